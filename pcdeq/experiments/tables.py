"""Result files to Markdown tables in the paper's order, each figure with what it rests on.

The form is that of the tables people use most (network, parameters, accuracy, reference), with what
their users then ask for: how many seeds, their spread, last and best epoch, machine and command.
Other implementations' accuracies stand in columns of their own, compared by Welch's unequal
variances (B. L. Welch, Biometrika 34, 1947): the standard error of a difference of means is
√(s₁²/n₁ + s₂²/n₂), and the difference is called one where its 95 % interval excludes 0.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import sqrt
from pathlib import Path
from statistics import mean, stdev, variance

from scipy.stats import t as student

from pcdeq.experiments.errors import RunError
from pcdeq.experiments.files import write_whole
from pcdeq.experiments.recipes import Recipe
from pcdeq.experiments.results import DEFAULT_OPTIONS, Result, parameter_count

TITLES = {"mnist": "MNIST", "svhn": "SVHN", "cifar": "CIFAR-10"}
BEGIN = "<!-- tables: begin (python reproduce.py --table writes what stands here) -->"
END = "<!-- tables: end -->"
FOREIGN = "† Not the genuine data set but a folder of images (`--image-folder`)."
SHORT = "‡ Cut short: fewer epochs than the recipe's."
LEGEND = (
    "Test accuracy: mean ± standard deviation over n seeds. Iterations forward / backward in the "
    "last epoch and training time: means over seeds. The best epoch is chosen on the test set: an "
    "optimistic figure. Letters: where and how it ran."
)
COLUMNS = (
    "data set", "network", "activation", "parameters",
    "last epoch, %", "best epoch, %", "iterations", "time",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """Someone else's accuracies: percent after the last epoch, one per seed, for some rows."""

    name: str
    source: str
    last: dict[str, list[float]]


def read_reference(path: str | Path) -> Reference:
    """The reference in a JSON file (``name``, ``source``, ``rows``: each with ``last``)."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    last = {row: figures["last"] for row, figures in content["rows"].items()}
    return Reference(content["name"], content["source"], last)


def as_reference(name: str, source: str, results: Iterable[Result]) -> Reference:
    """Whole runs on the genuine data as a reference for other runs."""
    last: dict[str, list[float]] = {}
    for result in results:
        if result.genuine and result.whole:
            last.setdefault(result.row, []).append(result.test_acc[-1])
    return Reference(name, source, last)


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation and how many: ``98.02 ± 0.08 (n = 5)``."""
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{deviation} (n = {len(values)})"


def compare(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Difference of two means, its 95 % interval, and what it tells, in words."""
    difference = mean(ours) - mean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return f"{difference:+.2f}, too few seeds to tell"
    a, b = variance(ours) / len(ours), variance(theirs) / len(theirs)
    reach = 0.0
    if a + b:
        freedom = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1))
        reach = student.ppf(0.975, freedom) * sqrt(a + b)
    word = (
        "no difference seen"
        if abs(difference) <= reach
        else ("higher" if difference > 0 else "lower")
    )
    low, high = difference - reach, difference + reach
    return f"{difference:+.2f} ({low:+.2f} to {high:+.2f}), {word}"


def render(
    recipes: Iterable[Recipe], results: Iterable[Result], references: Sequence[Reference] = ()
) -> str:
    """One Markdown table for each data set, with its legend and commands below.

    Args:
        recipes: the rows to show, in the paper's order; a row without a result is 'not run'.
        results: what was measured; seeds of one row are averaged where data, epochs and options
            agree, and stand in lines of their own where they do not.
        references: each gets two columns where it has something for the data set.

    Returns:
        Markdown, without a heading.
    """
    lines = lines_of(recipes, list(results))
    return "\n".join(
        _table(list(mine), references)
        for _, mine in groupby(lines, key=lambda line: line.recipe.dataset)
    )


@dataclass(frozen=True)
class Line:
    """A line of a table: a row of the paper and the results that it averages, none if not run."""

    recipe: Recipe
    results: list[Result]

    @property
    def marked(self) -> bool:
        """Whether a result in it is not of a whole run on the genuine data."""
        return any(not (result.genuine and result.whole) for result in self.results)

    def last(self) -> list[float]:
        """Test accuracies after the last epoch, in percent, one a result."""
        return [result.test_acc[-1] for result in self.results]


def lines_of(recipes: Iterable[Recipe], results: list[Result]) -> list[Line]:
    """All lines: of one row, first what is whole and genuine."""

    def alike(result: Result) -> tuple:
        options = json.dumps(result.options, sort_keys=True)
        return not result.genuine, -result.epochs_run, result.parameters, options

    lines = []
    for recipe in recipes:
        mine = sorted((result for result in results if result.row == recipe.name), key=alike)
        groups = [list(group) for _, group in groupby(mine, key=alike)]
        lines += [Line(recipe, group) for group in groups or [[]]]
    return lines


def _table(lines: list[Line], references: Sequence[Reference]) -> str:
    """The lines of one data set as a table, its legend and its commands; folded where none is
    whole."""
    names = {line.recipe.name for line in lines}
    references = [reference for reference in references if names & reference.last.keys()]
    measured = [result for line in lines for result in line.results]
    machines = list(dict.fromkeys(map(machine_title, measured)))
    head = list(COLUMNS)
    for reference in references:
        head += [f"{reference.name}, %", "difference"]
    rows = [head, ["---"] * 3 + ["--:"] * (len(head) - 3)]
    rows += [_cells(line, machines) + _compared(line, references) for line in lines]
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    legend = [LEGEND] * bool(measured)
    legend += [f"{_letter(number)}: {machine}." for number, machine in enumerate(machines)]
    legend += [FOREIGN] * any(not result.genuine for result in measured)
    legend += [SHORT] * any(not result.whole for result in measured)
    legend += [f"{reference.name}: {reference.source}" for reference in references]
    text += "".join(f"\n{entry}  " for entry in legend) + "\n" + _commands(lines)
    if any(line.results and not line.marked for line in lines):
        return text
    title = TITLES[lines[0].recipe.dataset]
    return f"<details><summary>{title}: no row was run whole yet</summary>\n\n{text}\n</details>\n"


def _cells(line: Line, machines: list[str]) -> list[str]:
    """What stands under COLUMNS."""
    recipe, results = line.recipe, line.results
    title = TITLES[recipe.dataset] + " --aug" * recipe.augment
    parameters = results[0].parameters if results else parameter_count(recipe)
    cells = [title, network_title(recipe.net), recipe.activation, f"{parameters:,}"]
    if not results:
        return [*cells, "not run", "", "", ""]
    first = results[0]
    cells[0] += "" if first.genuine else " †"
    short = "" if first.whole else f", {first.epochs_run} of {first.epochs} epochs ‡"
    seconds: dict[str, list[float]] = {}
    for result in results:
        letter = _letter(machines.index(machine_title(result)))
        seconds.setdefault(letter, []).append(result.seconds)
    forward = mean(result.forward_iters[-1] for result in results)
    backward = mean(result.backward_iters[-1] for result in results)
    return [
        *cells,
        spread(line.last()) + short,
        spread([max(result.test_acc) for result in results]),
        f"{forward:.1f} / {backward:.1f}",
        ", ".join(f"{duration(mean(times))} {letter}" for letter, times in seconds.items()),
    ]


def _letter(number: int) -> str:
    """A, B, … Z, AA, BB, …"""
    return chr(ord("A") + number % 26) * (number // 26 + 1)


def _compared(line: Line, references: Sequence[Reference]) -> list[str]:
    """Each reference's accuracy, and how ours differs where it is the same experiment."""
    cells = []
    for reference in references:
        theirs = reference.last.get(line.recipe.name, [])
        fair = theirs and line.results and not line.marked
        cells += [spread(theirs) if theirs else "", compare(line.last(), theirs) if fair else ""]
    return cells


def _commands(lines: list[Line]) -> str:
    """The commands behind a table, folded away; seeds of one line share one command."""
    seeds: dict[str, list[int]] = {}
    for result in (result for line in lines for result in line.results):
        command = re.sub(r"--seed \d+", "--seed S", result.command)
        seeds.setdefault(command, []).append(result.seed)
    if not seeds:
        return ""
    commands = "".join(
        f"{command}  # S = {', '.join(map(str, each))}\n" for command, each in seeds.items()
    )
    summary = "The commands that made these figures"
    return f"\n<details><summary>{summary}</summary>\n\n```text\n{commands}```\n\n</details>\n"


def network_title(net: str) -> str:
    """``multi_conv_pcdeq_1`` as the paper writes it: ``multi conv pcDEQ-1``."""
    return net.replace("_pcdeq_", " pcDEQ-").replace("_", " ")


def machine_title(result: Result) -> str:
    """Where and how a result was made: processor, threads, versions, options off the default."""
    threads = f", {result.threads} thread{'s' if result.threads > 1 else ''}"
    words = result.processor + (threads if result.device == "cpu" else "")
    if result.options["processes"] > 1:
        words += f", {result.options['processes']} processes"
    words += ", TF32" * result.options["tf32"] + f", torch {result.versions['torch']}"
    changed = " ".join(changed_options(result))
    return words + (f", `{changed}`" if changed else "")


def changed_options(result: Result) -> list[str]:
    """The options of a run that are not the defaults, as flags."""
    return [
        f"--{name.replace('_', '-')} {result.options[name]}"
        for name, value in DEFAULT_OPTIONS.items()
        if result.options[name] != value
    ]


def duration(seconds: float) -> str:
    """Two figures' worth of a time: ``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{minutes:.{1 if minutes < 9.95 else 0}f} min"
    return f"{minutes / 60:.1f} h"


def write_between(path: str | Path, text: str) -> bool:
    """Puts text between the two markers of a Markdown file, and leaves the rest as it is.

    Returns:
        Whether the file is another one now.

    Raises:
        RunError: the file does not have the two markers, each once and in order.
    """
    path = Path(path)
    old = path.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or old.count(BEGIN) + old.count(END) > 2:
        raise RunError(f"{path} lacks the one pair of markers for the tables: {BEGIN} … {END}")
    new = f"{before}{begin}\n{text}{end}{after}"
    if new != old:
        write_whole(path, new.encode())
    return new != old
