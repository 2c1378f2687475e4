"""Which figures a run or a checkpoint gets, and the measurements that they need."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from pcdeq.block import PcDEQConv2d
from pcdeq.experiments import machine
from pcdeq.experiments.certifying import robust_accuracy, warn_of_negative_weights
from pcdeq.experiments.convergence import history
from pcdeq.experiments.curves import distinct, run_figures
from pcdeq.experiments.data import ImageSet, test_set
from pcdeq.experiments.figures import convergence_figure, robustness_figure
from pcdeq.experiments.files import check_writable
from pcdeq.experiments.flags import (
    add_data,
    add_help,
    add_network,
    check_identity,
    count,
    data_source,
    folder,
    identity,
    program,
    radius,
)
from pcdeq.networks import Network
from pcdeq.weights import load_network

BATCH = 100  # images whose convergence is shown; of convolutions, which take long, a tenth
STEPS = 60  # evaluations of each solve that are shown
EXAMPLES = """\
  python plot.py runs/* -o figures
  python plot.py runs/first/best.pth --sample -o figures
  python plot.py best.pth --eps 0.002 0.005 0.01 --first 2000 -o figures
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says.

    Args:
        argv: arguments, those of the process when left out.

    Raises:
        SystemExit: usage, as argparse says it.
        RunError: also CheckpointError, DataError; each with one sentence for the user.
    """
    parser = _parser()
    flags = parser.parse_args(argv)
    check_identity(parser, flags)
    flags.out = Path(flags.out)
    try:
        check_writable(flags.out)
    except ValueError as error:
        parser.error(str(error))
    folders = [run for run in flags.runs if run.is_dir()]
    if flags.eps and len(folders) == len(flags.runs):
        parser.error("--eps is for checkpoints: name best.pth or last.pth in the folder")
    checkpoints = distinct((run for run in flags.runs if run not in folders), _name)
    # All are read before anything is drawn, and proofs, which may take hours, come last.
    models = {name: load_network(path, *identity(flags)) for name, path in checkpoints.items()}
    sets = {name: test_set(model, **data_source(flags)) for name, model in models.items()}
    if folders:
        print(*run_figures(folders, flags.out), sep="\n", flush=True)
    for name, model in models.items():
        with machine.threads_for(model.name):
            print(*_of_checkpoint(model, sets[name], name, flags), sep="\n", flush=True)


def _name(path: Path) -> str:
    """What the figures of a checkpoint are named after: the run, where the file does not say it."""
    named = path.stem not in ("best", "last")
    return path.stem if named else f"{path.resolve().parent.name}_{path.stem}"


def _of_checkpoint(
    model: Network, images: ImageSet, name: str, flags: argparse.Namespace
) -> list[Path]:
    warn_of_negative_weights(model)
    count = BATCH // 10 if isinstance(model.blocks[0], PcDEQConv2d) else BATCH
    batch, _ = images.some(count).batch(slice(count))
    steps = 2 * STEPS * len(model.blocks)
    with tqdm(total=steps, unit="evaluation", leave=False, disable=None) as progress:
        histories = history(model, batch, STEPS, progress.update)
    made = [convergence_figure(histories, flags.out / f"{name}_convergence")]
    if flags.eps:
        images = images.some(flags.first)
        with tqdm(unit="batch", leave=False, disable=None) as progress:
            rows = robust_accuracy(model, images, [0, *flags.eps], after_batch=progress.update)
        made.append(robustness_figure(rows, flags.out / f"{name}_robustness"))
    return made


# fmt: off
def _parser() -> argparse.ArgumentParser:
    parser = program(
        "plot.py", "RUN [RUN ...] -o DIR [options]",
        "Draws runs and checkpoints, as PNG and PDF, a column of a paper wide.",
        EXAMPLES,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path,
                        help="folder: accuracy, loss, iterations; checkpoint: convergence")
    parser.add_argument("-o", "--out", metavar="DIR", type=folder, required=True,
                        help="for the figures")
    add_help(parser)
    proofs = parser.add_argument_group("proofs (of checkpoints)").add_argument
    proofs("--eps", metavar="R", nargs="+", type=radius, default=[],
           help="radii (pixels in [0, 1]): accuracy that is proved, and under attack")
    proofs("--first", metavar="N", type=count, help="on N test images only, as evaluate.py does")
    add_network(parser)
    add_data(parser)
    return parser
# fmt: on
