"""Curves against the epoch: accuracy, loss and iterations, of results and of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pcdeq.activations import ACTIVATIONS
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.figures import (
    COLOURS,
    COLUMN,
    DASHES,
    DOT,
    HOLLOW,
    as_label,
    drawing,
    legend,
)
from pcdeq.experiments.recipes import ROWS
from pcdeq.experiments.results import Result, read_metrics
from pcdeq.experiments.runs import METRICS
from pcdeq.experiments.tables import TITLES, Line, changed_options, lines_of, network_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def result_figures(results: Iterable[Result], directory: str | Path) -> list[Path]:
    """Accuracy and iterations against epoch, one figure each per data set that has whole runs.

    A panel for each kind of network, a line for each row: the mean over seeds, and their standard
    deviation as a band.

    Returns:
        The PNG files written.
    """
    paths = []
    whole = [result for result in results if result.whole]  # a few epochs make no curve
    lines = [line for line in lines_of(ROWS, whole) if line.results]
    for dataset, mine in groupby(lines, key=lambda line: line.recipe.dataset):
        panels = [
            (title, list(panel))
            for title, panel in groupby(mine, key=lambda line: _kind(line, dataset))
        ]
        for name, draw in (("accuracy", _accuracy), ("iterations", _iterations)):
            path = Path(directory) / f"{dataset}_{name}"
            with drawing(path, 0.5 + 2.6 * len(panels), 3, ("png",)) as figure:
                axes = figure.subplots(1, len(panels), squeeze=False)[0]
                for axis, (title, panel) in zip(axes, panels, strict=True):
                    draw(axis, panel)
                    axis.set_title(", ".join([title, *_shared(panel)]))
                    labels = axis.get_legend_handles_labels()[1]
                    columns = 2 if max(map(len, labels)) < 20 else 1
                    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)
                    _against_epochs(axis)
            paths.append(Path(f"{path}.png"))
    return paths


def _against_epochs(axis: Axes) -> None:
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _kind(line: Line, dataset: str) -> str:
    kind = network_title(line.recipe.net).rsplit(" ", 1)[0]
    return f"{TITLES[dataset]}{' --aug' * line.recipe.augment}, {kind}"


def _accuracy(axis: Axes, lines: list[Line]) -> None:
    everything = []
    for line in lines:
        each = np.array([result.test_acc for result in line.results])  # (seeds, epochs)
        _band(axis, each, label=_label(line, lines), **_look(line, lines))
        everything.append(each.ravel())
    values = np.concatenate(everything)
    low, high = np.quantile(values, 0.03), values.max()  # the first epochs may start far below
    bottom = low - 0.05 * (high - low)
    axis.set(ylabel="test accuracy, %", ylim=(bottom, None))
    if values.min() < bottom:
        words = f"below the axis: down to {values.min():.1f} %"
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        place = {"transform": axis.transAxes, "ha": "right", "bbox": behind}
        axis.text(0.98, 0.02, words, size=6, color="grey", **place)


def _iterations(axis: Axes, lines: list[Line]) -> None:
    for line in lines:
        forward, backward = (
            np.array([getattr(result, name) for result in line.results])
            for name in ("forward_iters", "backward_iters")
        )
        look = _look(line, lines)
        _band(axis, forward, label=_label(line, lines), **look | {"linestyle": "-"})
        _band(axis, backward, **look | {"linestyle": DASHES[2]})
    axis.plot([], [], color="grey", label="forward")
    axis.plot([], [], color="grey", linestyle=DASHES[2], label="backward")
    axis.set(ylabel="iterations of a solve", ylim=(0, None))


def _band(axis: Axes, each: np.ndarray, **look: object) -> None:
    """The mean over the seeds (rows of ``each``) against the epoch, ± their deviation."""
    epochs, mean = np.arange(1, each.shape[1] + 1), each.mean(0)
    axis.plot(epochs, mean, marker="o" if len(epochs) == 1 else None, **look)
    if len(each) > 1:
        spread = each.std(0, ddof=1)
        colour = look["color"]
        axis.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)


def _look(line: Line, lines: list[Line]) -> dict[str, object]:
    """Colour and dashes of the activation; fainter where another line of the row came before."""
    number = list(ACTIVATIONS).index(line.recipe.activation)
    before = [other for other in lines[: lines.index(line)] if other.recipe == line.recipe]
    return {
        "color": COLOURS[number],
        "linestyle": DASHES[number % len(DASHES)],
        "alpha": 1 / (1 + len(before)),
    }


def _label(line: Line, lines: list[Line]) -> str:
    first, shared = line.results[0], _shared(lines)
    own = [option for option in changed_options(first) if option not in shared]
    words = [line.recipe.activation, *own] + ["†"] * (not first.genuine)
    return f"{' '.join(words)} (n = {len(line.results)})"


def _shared(lines: list[Line]) -> list[str]:
    """The options that all lines of a panel have: said once, above it."""
    first, *rest = (changed_options(line.results[0]) for line in lines)
    return [option for option in first if all(option in options for options in rest)]


def run_figures(folders: Sequence[str | Path], directory: str | Path) -> list[Path]:
    """Curves of runs against the epoch: accuracy and loss in one figure, iterations in another.

    Args:
        folders: runs' folders, a colour each; from the eighth on fainter ones.
        directory: where the figures go, as PNG and PDF.

    Returns:
        The PNG files written. A folder without a complete epoch is left out, with a printed line.

    Raises:
        RunError: no complete epoch in any of them; two of one name; no matplotlib.
    """
    runs, empty = {}, []
    for name, folder in distinct(map(Path, folders), lambda path: path.resolve().name).items():
        if rows := read_metrics(folder):
            runs[name] = {key: [row[key] for row in rows] for key in rows[0]}
        else:
            inside = f" (runs are in it: {folder}/*)" if any(folder.glob(f"*/{METRICS}")) else ""
            empty.append(f"{folder} is no run with a complete epoch{inside}")
    if not runs:
        raise RunError("; ".join(empty))
    for sentence in empty:
        print(f"left out: {sentence}")
    dots = any(len(columns["epoch"]) == 1 for columns in runs.values())
    curves, iterations = Path(directory) / "curves", Path(directory) / "iterations"
    with drawing(curves, COLUMN, 4.2) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        _pair(upper, runs, "test_acc", "train_acc", "accuracy, %")
        _pair(lower, runs, "test_loss", "train_loss", "cross entropy, nats")
        lower.set_yscale("log")
        _against_epochs(lower)
        legend(upper, "test", "training", dots=dots)
    with drawing(iterations, COLUMN, 2.5) as figure:
        axis = figure.subplots()
        _pair(axis, runs, "forward_iters", "backward_iters", "iterations of a solve")
        axis.set_ylim(0, None)
        _against_epochs(axis)
        legend(axis, "forward", "backward", dots=dots)
    return [Path(f"{path}.png") for path in (curves, iterations)]


def distinct(paths: Iterable[Path], name: Callable[[Path], str]) -> dict[str, Path]:
    """The paths by their names.

    Raises:
        RunError: two have one name, under which one would be drawn over the other.
    """
    named: dict[str, Path] = {}
    for path in paths:
        if (other := named.setdefault(name(path), path)).resolve() != path.resolve():
            raise RunError(f"{other} and {path} would be drawn under one name: rename one of them")
    return named


def _pair(axis: Axes, runs: dict, solid: str, dashed: str, label: str) -> None:
    """Two columns of each run's metrics: one solid, one dashed."""
    for number, (name, columns) in enumerate(runs.items()):
        turn, colour = divmod(number, len(COLOURS))
        look = {"color": COLOURS[colour], "alpha": 1 / (1 + turn)}  # fainter, the second time
        look |= DOT if len(columns["epoch"]) == 1 else {}
        axis.plot(columns["epoch"], columns[solid], label=as_label(name), **look)
        axis.plot(columns["epoch"], columns[dashed], linestyle=DASHES[2], **look, **HOLLOW)
    axis.set_ylabel(label)
