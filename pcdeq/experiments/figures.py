"""The look of the figures, and those of one checkpoint. Only this file knows matplotlib.

Readable at column width and without colours: the palette is Okabe and Ito's for all kinds of colour
vision (2008), and each activation has a dash pattern of its own where lines would otherwise differ
in colour alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pcdeq.experiments.convergence import History
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 2)), (0, (2, 1)), (0, (6, 2, 1, 2)))
DOT = {"marker": "o", "markersize": 4}  # where a line is one point; hollow if it were dashed
HOLLOW = {"markerfacecolor": "none"}
FLOOR = 1e-14  # below it a relative residual in float64 is rounding
COLUMN = 3.4  # inches: a column of a two-column paper
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text
}


@contextmanager
def drawing(
    path: Path, width: float, height: float, formats: Sequence[str] = ("png", "pdf")
) -> Iterator[Figure]:
    """A figure to draw on, written as ``path`` with each ending when the block ends.

    Args:
        path: where, without the ending; its folder is made when absent.
        width: inches.
        height: inches.
        formats: the endings.

    Raises:
        RunError: there is no matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("figures need matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        for ending in formats:
            image = io.BytesIO()  # written whole: a full disk tears no figure
            figure.savefig(image, format=ending)
            write_whole(Path(f"{path}.{ending}"), image.getvalue())


def legend(axis: Axes, solid: str, dashed: str, *, dots: bool = False) -> None:
    """What solid and dashed mean, and the lines' names, above a figure that grows with them.

    Solid or dashed lines without a meaning of their own are not there.
    """
    look = {"color": "grey"} | (DOT if dots else {})
    if solid:
        axis.plot([], [], label=solid, **look)
    if dashed:
        axis.plot([], [], linestyle=DASHES[2], label=dashed, **look, **HOLLOW)
    first = -bool(solid) - bool(dashed)
    handles, labels = (each[first:] + each[:first] for each in axis.get_legend_handles_labels())
    columns = 2 if max(map(len, labels)) < 40 else 1
    figure, more = axis.figure, math.ceil(len(labels) / columns) - 2
    figure.set_figheight(figure.get_figheight() + max(0, more) * 0.16)  # inches a row
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def as_label(name: str) -> str:
    """A name that someone else gave, as matplotlib shows it: no formula, and not hidden."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def convergence_figure(histories: Sequence[History], path: Path) -> Path:
    """How the blocks of one network converge on a batch, iteration by iteration, on a log axis.

    Residuals of the forward and the backward solve, a colour for each block, with the certified
    rate as a dashed line of that slope above them, and the width of the enclosure closing.

    Args:
        histories: of ``convergence.history``, one a block.
        path: the figure, without its ending.

    Returns:
        The PNG file written, beside it a PDF.
    """
    several = len(histories) > 1
    with drawing(path, COLUMN, 5.4) as figure:
        axes = figure.subplots(3, 1, sharex=True)
        for colour, each in zip(COLOURS, histories, strict=False):
            for axis, residuals in zip(axes, (each.forward, each.backward), strict=False):
                _falling(axis, 1, residuals, colour, each.name if several else "measured")
                _slope(axis, residuals, each.rate, colour)
            closing = each.width.index(min(each.width)) + 1 if each.width else 0
            _falling(axes[2], 0, each.width[:closing], colour, each.name)
        if unproved := [each.name for each in histories if not each.width]:
            words = f"no certificate of {', '.join(unproved)}"
            axes[2].text(0.98, 0.95, words, transform=axes[2].transAxes, ha="right", va="top")
        for axis, label in zip(axes, ("forward residual", "backward residual"), strict=False):
            axis.axhline(histories[0].tol, color="grey", linestyle=":", label="tolerance")
            axis.set_ylabel(label)
        axes[2].set(ylabel="width of the enclosure", xlabel="iteration")
        proved = any(0 < each.rate < 1 for each in histories)
        legend(axes[0], "measured" * several, "certified rate (slope)" * proved)
    return Path(f"{path}.png")


def _falling(axis: Axes, first: int, values: Sequence[float], colour: str, label: str) -> None:
    """Values against the iteration, from ``first`` on, until they drown in rounding."""
    count = next((k for k, value in enumerate(values) if value < FLOOR), len(values))
    axis.semilogy(range(first, first + count), values[:count], color=colour, label=label)


def _slope(axis: Axes, residuals: Sequence[float], rate: float, colour: str) -> None:
    """The line c·rateᵏ that touches the residuals from above."""
    shown = [(k, value) for k, value in enumerate(residuals, 1) if value >= FLOOR]
    if not (0 < rate < 1 and shown):
        return
    height = max(math.log(value) - k * math.log(rate) for k, value in shown)
    line = [math.exp(height + k * math.log(rate)) for k, _ in shown]
    axis.semilogy(
        [k for k, _ in shown], line, color=colour, linestyle=DASHES[2], linewidth=0.8, zorder=3
    )


def robustness_figure(rows: Sequence[dict], path: Path) -> Path:
    """Certified and attacked accuracy against the radius: the truth lies between the lines.

    Between two radii they are steps: what is proved of the larger box holds of every smaller one,
    and what an attack broke of the smaller box is broken of every larger one.

    Args:
        rows: of ``pcdeq.experiments.certifying.robust_accuracy``, one a radius.
        path: the figure, without its ending.

    Returns:
        The PNG file written, beside it a PDF.
    """
    rows = sorted(rows, key=lambda row: row["radius"])
    radii, certified, attacked = (
        [row[key] for row in rows] for key in ("radius", "certified", "attacked")
    )
    with drawing(path, COLUMN, 2.5) as figure:
        axis = figure.subplots()
        for k in range(len(rows) - 1):
            axis.fill_between(
                radii[k : k + 2], certified[k + 1], attacked[k], color=COLOURS[0], alpha=0.1, lw=0
            )
        look = {"marker": "o", "markersize": 3}
        attack = {"drawstyle": "steps-post", "color": COLOURS[1], "linestyle": DASHES[1]}
        axis.plot(radii, attacked, label="under attack", **attack, **look)
        proof = {"drawstyle": "steps-pre", "color": COLOURS[0]}
        axis.plot(radii, certified, label="certified", **proof, **look)
        axis.set(
            xlabel="radius of the box (sup norm, pixels in [0, 1])",
            ylabel=f"accuracy, % of {rows[0]['images']:,} images",
            xlim=(0, None),
            ylim=(0, 101),  # a line at 100 shows
        )
        figure.legend(loc="outside upper center", ncols=2)
    return Path(f"{path}.png")
