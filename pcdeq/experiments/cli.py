"""The flags of the training scripts, their checks and their help; from flags to a run.

Flags are spelled as the authors' scripts spell them, each with a long form. What is wrong with them
is said before any data is read, as argparse says it (exit status 2); whatever goes wrong later ends
with one sentence and status 1 (``guarded``). A parsed command line is a ``RunConfig``, no more.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

import torch

from pcdeq.activations import allowed
from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.errors import RunError, reason
from pcdeq.experiments.flags import (
    add_data,
    add_help,
    add_solver,
    count,
    device,
    folder,
    from_zero,
    program,
    rate,
    seed,
    several,
)
from pcdeq.experiments.recipes import DEFAULTS, ROWS, default_activation
from pcdeq.experiments.runs import check_folder
from pcdeq.experiments.signals import Interrupted, Leaving
from pcdeq.networks import NETWORKS, check_network
from pcdeq.weights import CheckpointError

EXAMPLES = """\
  python {prog} -net {first} --sample -epochs 10 -m 8
  python {prog} -net {last} --solver anderson --resume
"""


def main(dataset: str, argv: Sequence[str] | None = None, *, augmentation: bool = False) -> None:
    """A training script: parses the command line, trains, and exits with the right status.

    Args:
        dataset: ``"mnist"``, ``"svhn"`` or ``"cifar"``.
        argv: the command line without the program's name; ``sys.argv``'s if ``None``.
        augmentation: whether the script has ``--aug``.
    """

    def run() -> None:
        config = parse(dataset, argv, augmentation=augmentation)
        from pcdeq.experiments.training import train  # late: help and usage errors need no data

        train(config)

    sys.exit(guarded(run))


def parse(
    dataset: str, argv: Sequence[str] | None = None, *, augmentation: bool = False
) -> RunConfig:
    """The run that a command line asks for, checked as far as can be without reading data.

    Raises:
        SystemExit: as argparse does: status 0 after ``--help``, 2 after a usage error.
        RunError: the folder of the run to be resumed is damaged.
    """
    parser = _parser(dataset, augmentation)
    flags = parser.parse_args(argv)
    if flags.net is None:
        parser.error(f"name a network with -net: {', '.join(_networks(dataset))}")
    if flags.net not in NETWORKS:  # of all networks, name those of this script
        parser.error(f"unknown network {flags.net!r}: choose from {', '.join(_networks(dataset))}")
    flags.activation = flags.activation or default_activation(flags.net)
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_network(flags.net, flags.activation, dataset, flags.augment)
        config = RunConfig(dataset=dataset, **vars(flags))
        check_folder(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def guarded(function: Callable[[], object]) -> int:
    """Runs a program and returns its exit status; no expected failure shows a traceback.

    Returns:
        0: done, or nothing to do. 2: usage. 130, 143: stopped by SIGINT, SIGTERM. 1: anything
        else that can be expected to happen (data, checkpoint, non-finite loss, disk, memory), with
        one sentence on stderr. An exception that nobody expected is a bug and passes through.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
        with contextlib.suppress(AttributeError):  # a path may hold what the terminal cannot show
            getattr(sys, name).reconfigure(errors="backslashreplace")
    with Leaving():
        status, sentence = _outcome(function)
    if sentence:
        with contextlib.suppress(OSError):
            print(sentence, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # Python must not flush again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not (status or isinstance(error, BrokenPipeError)):  # `| head` has read enough
            status = 1
            with contextlib.suppress(OSError):
                print(f"error: the output cannot be written ({error.strerror})", file=sys.stderr)
    return status


def _outcome(function: Callable[[], object]) -> tuple[int, str]:
    try:
        function()
    except SystemExit as stop:  # argparse has said all
        status = int(stop.code or 0)
        return status, "stopped by SIGTERM" * (status == 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return 130, "stopped by SIGINT"
    except Interrupted as stop:
        return stop.status, str(stop)
    except Exception as error:
        sentence = _sentence(error)
        if not sentence:
            raise
        return 1, "error: " + " ".join(sentence.split())
    return 0, ""


def _sentence(error: Exception) -> str:
    """What to tell the user, or "" for an error that only a traceback explains."""
    if isinstance(error, RunError | CheckpointError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        return "whoever read the output has gone"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return place + reason(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "CPUAllocator" in str(error):
        return f"out of memory, a smaller batch (-b) may fit: {error}"
    return ""


def _allowed(variant: int) -> str:
    default, *others = allowed(variant)
    return ", ".join([f"{default} (default)", *others])


def _networks(dataset: str) -> list[str]:
    return list(dict.fromkeys(row.net for row in ROWS if row.dataset == dataset))


# fmt: off
def _parser(dataset: str, augmentation: bool) -> argparse.ArgumentParser:
    nets = _networks(dataset)
    cheap = next(net for net in nets if not net.startswith("single_conv"))
    prog = f"train_{dataset}.py"
    parser = program(
        prog, "-net NET [options]",
        "Trains a positive concave deep equilibrium network (pcDEQ, ICML 2024).",
        EXAMPLES.format(prog=prog, first=cheap, last=nets[-1]),
    )
    parser.set_defaults(augment=False, **DEFAULTS[dataset])

    recipe = parser.add_argument_group("recipe (defaults: the paper's)").add_argument
    recipe("-net", "--network", dest="net", metavar="NET",
           help=f"required: {', '.join(nets)}")
    recipe("-activ", "--activation", dest="activation", metavar="NAME",
           help="; ".join(f"pcDEQ-{variant}: {_allowed(variant)}" for variant in (1, 2)))
    recipe("-lr", "--learning-rate", dest="lr", metavar="X", type=rate,
           help="AdamW's learning rate (default: %(default)s)")
    recipe("-epochs", "--epochs", metavar="N", type=count,
           help="passes over the training set (default: %(default)s)")
    recipe("-wd", "--weight-decay", metavar="X", type=rate,
           help="AdamW's weight decay (default: %(default)s)")
    recipe("-b", "--batch-size", metavar="N", type=several,
           help="images in a step (default: %(default)s)")
    recipe("-m", "--milestone", metavar="N", type=from_zero,
           help="last epoch at the learning rate; a tenth of it after that "
                "(default: %(default)s)")
    if augmentation:
        recipe("--aug", dest="augment", action="store_true",
               help="random crops and flips, and the wider network (multi_conv only)")
    recipe("--seed", metavar="N", type=seed, default=0,
           help="of weights, order and crops (default: %(default)s)")

    add_data(parser)

    run = parser.add_argument_group("run")
    run.add_argument("--device", metavar="NAME", type=device,
                     help="cpu, cuda, cuda:N, mps (default: cuda, else cpu)")
    run.add_argument("--out", metavar="DIR", type=folder,
                     help="the run's folder (default: runs/NAME_OF_RUN)")
    again = run.add_mutually_exclusive_group().add_argument
    again("--overwrite", action="store_true", help="start anew where the folder holds a run")
    again("--resume", action="store_true",
          help="go on with the folder's run, under the same flags")
    run.add_argument("--certify", action="store_true",
                     help="at the end, certificates of the test set's equilibria")
    add_help(run)

    add_solver(parser)
    return parser
# fmt: on
