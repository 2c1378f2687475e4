"""What a checkpoint is worth: test figures, certificates, and accuracy that is proved."""

import argparse
import math
import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from pcdeq.experiments import certifying, data, machine
from pcdeq.experiments.evaluation import BATCH_SIZE, evaluate
from pcdeq.experiments.flags import (
    add_data,
    add_help,
    add_network,
    add_solver,
    check_identity,
    count,
    data_source,
    device,
    identity,
    program,
    radius,
)
from pcdeq.implicit import OPTIONS
from pcdeq.networks import Network
from pcdeq.weights import load_network

EXAMPLES = """\
  python evaluate.py runs/first/best.pth --sample --certify
  python evaluate.py best.pth --certify --eps 0.002 0.005 0.01 --first 2000
  python evaluate.py authors.pth -net linear_pcdeq_1 -activ tanh --dataset mnist
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says.

    Args:
        argv: arguments, those of the process when left out.

    Raises:
        SystemExit: usage, as argparse says it.
        CheckpointError: also DataError, RunError; each with one sentence for the user.
    """
    flags = _parse(argv)
    machine.keep_freed_memory()
    options = {name: getattr(flags, name) for name in OPTIONS}
    model = load_network(flags.checkpoint, *identity(flags), **options).to(flags.device)
    images = data.test_set(model, **data_source(flags), device=flags.device).some(flags.first)
    with machine.threads_for(model.name):
        _report(model, images, flags)


def _report(model: Network, images: data.ImageSet, flags: argparse.Namespace) -> None:
    tolerance = model.blocks[0].deq.tolerance
    where = machine.environment(torch.device(flags.device))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{model.name} ({model.activation}) for {model.dataset}, {size:,} parameters, "
        f"on {where['device_name']}, {machine.workers(1, where['threads'])}; "
        f"{flags.solver}, {flags.precision}, tolerance {tolerance:g}"
    )
    if warning := machine.precision_warning(flags.precision, torch.device(flags.device)):
        print(warning)
    if flags.image_folder and not model.class_names:
        print("the checkpoint names no classes: the folder's are taken in the order of their names")
    certifying.warn_of_negative_weights(model)
    origin = " (the sample: from MNIST's training set)" * flags.sample
    with _counter() as counter:
        test = evaluate(model, images, flags.batch_size, after_batch=counter.update)
    print(
        f"{len(images):,} test images{origin}: "
        f"accuracy {test.accuracy:.2f} %, loss {test.loss:.4f}; "
        f"iterations {test.forward_iters:.1f} (mean), {test.forward_iters_max} (max); "
        f"{test.images_per_second:,.0f} images/s",
        flush=True,  # what follows may take hours
    )
    if test.unconverged:
        missed = f"{test.unconverged} of the solves"
        print(f"warning: the tolerance {tolerance:g} was not reached in {missed}")
    if not math.isfinite(test.loss):
        print(f"warning: the loss is {test.loss}: the weights have exploded, or are damaged")
    if flags.certify:
        _timed(
            lambda tick: certifying.format_certificates(
                certifying.certify_set(model, images, after_batch=tick)
            )
        )
    if flags.eps:
        _timed(
            lambda tick: certifying.format_robustness(
                certifying.robust_accuracy(model, images, flags.eps, after_batch=tick)
            )
        )


def _timed(table: Callable[[Callable[[], object]], str]) -> None:
    """Prints a table and what it took."""
    start = time.perf_counter()
    with _counter() as counter:
        text = table(counter.update)
    print(f"\n{text}\n  ({time.perf_counter() - start:.1f} s)", flush=True)


def _counter() -> tqdm:
    """Counts batches, on a terminal only."""
    return tqdm(unit="batch", leave=False, dynamic_ncols=True, disable=None)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    flags = parser.parse_args(argv)
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_identity(parser, flags)
    return flags


# fmt: off
def _parser() -> argparse.ArgumentParser:
    parser = program(
        "evaluate.py", "CHECKPOINT [options]",
        "Test figures of a trained network, and what can be proved of it.",
        EXAMPLES,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pth, last.pth, or a plain "
                        "state dict as the authors' code saves it")
    proofs = parser.add_argument_group("proofs").add_argument
    proofs("--certify", action="store_true",
           help="a table per block: enclosure, rate, iterations, rounding included")
    proofs("--eps", metavar="R", nargs="+", type=radius, default=[],
           help="radii (pixels in [0, 1]): accuracy that is proved, and under attack")
    proofs("--first", metavar="N", type=count,
           help="only the first N test images; of folders, N from all over")

    add_network(parser)
    add_data(parser)
    run = parser.add_argument_group("run")
    run.add_argument("-b", "--batch-size", metavar="N", type=count, default=BATCH_SIZE,
                     help="images in a batch of the test (default: %(default)s)")
    run.add_argument("--device", metavar="NAME", type=device,
                     help="cpu, cuda, cuda:N, mps (default: cuda, else cpu)")
    add_help(run)
    add_solver(parser)
    return parser
# fmt: on
