"""Trained networks for others: one small checkpoint per row, and a table of what each is worth.

Of each row the first seed's last epoch is kept (not the best one, which the test set would have
chosen), without the optimizer, under the row's name. The table beside the files holds their
sha256 and the test accuracy of the run that made them.
"""

import hashlib
import io
import re
from pathlib import Path

import torch

from pcdeq.experiments.errors import RunError
from pcdeq.experiments.files import alone_in, write_whole
from pcdeq.experiments.recipes import ROWS
from pcdeq.experiments.results import Result
from pcdeq.experiments.runs import LAST
from pcdeq.experiments.tables import machine_title
from pcdeq.weights import IDENTITY, read_checkpoint

FIRST_SEED = 0
TABLE = "README.md"
HEAD = """\
# Trained networks

Of each row that was run whole on the genuine data: the first seed after its last epoch, in float32.
`python evaluate.py weights/NAME.pth --data-root data` measures the accuracy again: to the last
digit on the machine and with the options named here, within 0.02 points elsewhere.
`python reproduce.py` writes files and table.

| file | test accuracy, % | made on | sha256 |
| --- | --: | --- | --- |
"""
LINE = re.compile(
    r"^\| `(?P<file>\S+\.pth)` \| (?P<accuracy>[\d.]+) \| .* \| `(?P<sha>\w{64})` \|$"
)


def publish(folder: str | Path, result: Result, directory: str | Path) -> Path | None:
    """Writes the last weights of a run's folder as ``<row>.pth``, and their line in the table.

    Args:
        folder: the run's folder.
        result: what was collected from it.
        directory: where the weights stand; made when absent.

    Returns:
        The file, or None where the run is not one to publish: another seed than the first, cut
        short, or not on the genuine data.

    Raises:
        CheckpointError: the folder's last weights cannot be read.
        RunError: they are not those of the last epoch in the result.
    """
    if not (result.genuine and result.whole and result.seed == FIRST_SEED):
        return None
    checkpoint = read_checkpoint(Path(folder) / LAST)
    if len(checkpoint.get("training", {}).get("rows", ())) != result.epochs_run:
        raise RunError(f"{LAST} in {folder} is not of epoch {result.epochs_run}")
    kept = {key: checkpoint[key] for key in IDENTITY}
    kept["model"] = {
        key: value.float() if value.is_floating_point() else value
        for key, value in checkpoint["model"].items()
    }
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{result.row}.pth"
    with alone_in(directory):  # the table is read and written again
        write_whole(path, buffer.getvalue())
        _note(path, result, hashlib.sha256(buffer.getvalue()).hexdigest())
    return path


def read_table(directory: str | Path) -> dict[str, re.Match]:
    """The lines of the table of weights by file name, each with ``accuracy`` and ``sha``."""
    path = Path(directory) / TABLE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {match["file"]: match for match in map(LINE.match, lines) if match}


def _note(path: Path, result: Result, sha: str) -> None:
    """Writes one file's line into the table; the others keep theirs, in the paper's order."""
    lines = {name: match[0] for name, match in read_table(path.parent).items()}
    machine = machine_title(result)
    lines[path.name] = f"| `{path.name}` | {result.test_acc[-1]:.2f} | {machine} | `{sha}` |"
    text = HEAD + "".join(
        lines[name] + "\n" for recipe in ROWS if (name := f"{recipe.name}.pth") in lines
    )
    write_whole(path.parent / TABLE, text.encode())
