"""The paper's tables with one command: run what is missing, take in, render what was measured."""

import argparse
import contextlib
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from pcdeq.experiments import machine
from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.flags import add_help, add_solver, count, device, folder, program
from pcdeq.experiments.publish import publish
from pcdeq.experiments.recipes import ROWS, Recipe
from pcdeq.experiments.results import Result, collect, find_runs, read_results, train_command
from pcdeq.experiments.runs import LAST, check_folder
from pcdeq.experiments.schedule import Job, run_all, share
from pcdeq.experiments.tables import (
    TITLES,
    Reference,
    as_reference,
    changed_options,
    read_reference,
    render,
    write_between,
)
from pcdeq.implicit import OPTIONS

PASSED_ON = ("data_root", "device", *OPTIONS)
EXAMPLES = """\
  python reproduce.py mnist --rows 'linear*' --jobs 2
  python reproduce.py all --seeds 1 --list | head -1 | sh
  python reproduce.py --table --results mine   # beside the repository's own
"""


def main(root: Path, argv: Sequence[str] | None = None) -> None:
    """Does what the command line says.

    Args:
        root: the repository: training scripts, ``results/``, ``weights/`` and ``README.md``.
        argv: arguments, those of the process when left out.

    Raises:
        SystemExit: usage, as argparse says it.
        RunError: runs failed or could not be taken in; with one sentence for the user.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    parser.set_defaults(**dict.fromkeys(OPTIONS))
    given = parser.parse_args(argv)
    args.default_solver = all(getattr(given, name) is None for name in OPTIONS)
    rows = [recipe for recipe in ROWS if args.dataset in (recipe.dataset, "all", None)]
    recipes = [recipe for recipe in rows if _matches(recipe, args.rows)]
    if not recipes:
        wider, names = f"*{args.rows}*", ", ".join(recipe.name for recipe in rows)
        meant = f" (is {wider!r} meant?)" if any(_matches(recipe, wider) for recipe in rows) else ""
        parser.error(f"no row matches {args.rows!r}{meant}; rows are {names}")
    results = Path(args.results or os.path.relpath(root / "results"))
    own = results.resolve() == root.resolve() / "results"
    if args.collect:
        _collect(find_runs(args.collect), results, root if own else results)
    elif args.table:
        _table(recipes, results, root, own)
    elif args.figures:
        _figures(recipes, results)
    elif args.dataset:
        _run(args, recipes, results, root, own)
    else:
        parser.error("say which rows to run: mnist, svhn, cifar or all")


# fmt: off
def _parser() -> argparse.ArgumentParser:
    parser = program(
        "reproduce.py", "[mnist | svhn | cifar | all] [options]",
        "Runs what is missing of the paper's tables, and renders what was measured.",
        EXAMPLES,
    )
    add_help(parser)
    parser.add_argument("dataset", nargs="?", choices=(*TITLES, "all"), metavar="DATASET",
                        help="which rows: mnist, svhn, cifar, all")
    rows = parser.add_argument_group("what").add_argument
    rows("--rows", metavar="PATTERN", default="*", help="of these, those like 'linear*', '*relu6'")
    rows("--seeds", metavar="N", type=count, default=5, help="0 to N − 1 (default: %(default)s)")
    rows("--jobs", metavar="N", type=count, default=1,
         help="runs at a time, with 1/N of the cores each (default: %(default)s)")
    rows("--results", metavar="DIR", type=folder,
         help="holds what is done, and DIR/runs (default: results)")

    instead = parser.add_argument_group("instead of running").add_mutually_exclusive_group()
    instead = instead.add_argument
    instead("--list", action="store_true", help="print one training command per missing run")
    instead("--collect", metavar="RUN", nargs="+", type=Path,
            help="take in run folders, or folders of them")
    instead("--table", action="store_true",
            help="print the tables; those of all rows of results/ go into README.md too")
    instead("--figures", action="store_true", help="draw them to DIR/figures (matplotlib)")

    run = parser.add_argument_group("passed on to the runs").add_argument
    run("--data-root", metavar="DIR", type=folder, help="where the sets are, or are downloaded to")
    run("--device", metavar="NAME", type=device, help="cpu, cuda, cuda:N, mps")
    add_solver(parser)
    return parser
# fmt: on


def _matches(recipe: Recipe, pattern: str) -> bool:
    """Whether a row is like the pattern, its data set named or not."""
    return any(fnmatch(name, pattern) for name in (recipe.name, recipe.name.split("_", 1)[1]))


def _run(
    args: argparse.Namespace, recipes: list[Recipe], results: Path, root: Path, own: bool
) -> None:
    """Runs, or lists, what has no whole result on the genuine data yet."""
    whole = [r for r in read_results(results) if r.genuine and r.whole]
    have = {(r.row, r.seed) for r in whole}
    asked = [(recipe, seed) for recipe in recipes for seed in range(args.seeds)]
    _note_others(whole, asked, args)
    missing = [
        (
            recipe,
            seed,
            results / "runs" / f"{recipe.name}_seed{seed}",
            _options(args, recipe.name, whole),
        )
        for recipe, seed in asked
        if (recipe.name, seed) not in have
    ]
    jobs = [_job(*run, root) for run in missing]
    if not jobs:
        print(
            f"nothing to do: {results} holds all {len(asked)} results of {len(recipes)} row(s); "
            "with another --results DIR they are measured anew",
            file=sys.stderr if args.list else sys.stdout,
        )
        return
    for run in missing:
        _check(*run)
    if args.list:
        with contextlib.suppress(BrokenPipeError):  # `| head -1` leaves early
            for job in jobs:
                print(shlex.join(job.command))
        return
    _fetch({recipe.dataset for recipe, *_ in missing}, args)
    threads = share(args.jobs)
    linear = ", the linear ones with 1" * any(job.serial for job in jobs) * (threads > 1)
    print(f"{len(jobs)} run(s), {args.jobs} at a time, {threads} thread(s) each{linear}")
    home = root if own else results
    failures = run_all(
        jobs, args.jobs, lambda job: _take_in(job.folder, results, home), len(asked) - len(jobs)
    )
    if len(jobs) > 1:  # what failed was said when it did, hours ago perhaps
        for failure in failures:
            print(f"failed: {failure.job.name}: {failure.reason}", file=sys.stderr)
    if failures:
        usage = any(failure.reason.startswith("exit status 2:") for failure in failures)
        again = "" if usage else "; the same command tries again"  # other flags are needed
        raise RunError(f"{len(failures)} of {len(jobs)} runs failed{again}")


def _options(args: argparse.Namespace, row: str, whole: list[Result]) -> dict[str, object]:
    """What a run is passed: where no flag says it, with the solver of most of the row's results.

    A table averages seeds of the same options only.
    """
    options = {name: getattr(args, name) for name in PASSED_ON}
    held = Counter(
        tuple(result.options[name] for name in OPTIONS) for result in whole if result.row == row
    )
    if held and args.default_solver:
        ((most, _),) = held.most_common(1)
        options |= dict(zip(OPTIONS, most, strict=True))
    return options


def _fetch(datasets: set[str], args: argparse.Namespace) -> None:
    """Downloads what is absent, once and before any run; raises DataError where that fails."""
    from pcdeq.experiments.genuine import SOURCES, genuine  # late: torchvision takes a second

    for dataset in sorted(datasets):
        genuine(SOURCES[dataset](Path(args.data_root or "data")))


def _note_others(
    whole: list[Result], asked: list[tuple[Recipe, int]], args: argparse.Namespace
) -> None:
    """Says which results count as done though their solves had other options than now asked for."""
    wanted = {(recipe.name, seed) for recipe, seed in asked}
    for result in whole:
        options = _options(args, result.row, whole)
        if (result.row, result.seed) in wanted and any(
            result.options[name] != options[name] for name in OPTIONS
        ):
            how = " ".join(changed_options(result)) or "the default options"
            print(
                f"note: {result.row}, seed {result.seed}, is held with {how}: a table averages "
                "seeds of the same options only",
                file=sys.stderr,
            )


def _check(recipe: Recipe, seed: int, folder: Path, options: dict[str, object]) -> None:
    """Refuses now what the training script would when the run's turn comes, hours later perhaps."""
    given = {name: value for name, value in options.items() if value is not None}
    run = {"seed": seed, "out": str(folder), "resume": True}
    try:
        check_folder(RunConfig(**asdict(recipe), **run, **given))
    except ValueError as error:
        begun = (folder / LAST).exists()
        way_out = "; name what it was begun with, move its folder away, or take other --results"
        raise RunError(f"{error}{way_out * begun}") from None


def _job(recipe: Recipe, seed: int, folder: Path, options: dict[str, object], root: Path) -> Job:
    script, *words = train_command(recipe, seed, options)
    script = os.path.relpath(root / script)
    command = (_python(), script, *words, "--out", str(folder), "--resume")
    return Job(folder.name, command, folder, recipe.epochs, machine.is_serial(recipe.net))


def _python() -> str:
    """``python`` where that is this interpreter, else the path of this one."""
    return "python" if shutil.which("python") == sys.executable else sys.executable


def _take_in(folder: Path, results: Path, home: Path) -> None:
    """Collects a run, and publishes its weights where it is one to publish."""
    result = collect(folder, results)
    publish(folder, result, home / "weights")
    short = "" if result.whole else f" after {result.epochs_run} of {result.epochs} epochs"
    print(f"{results / result.name}.json: {result.test_acc[-1]:.2f} %{short}")


def _collect(runs: list[Path], results: Path, home: Path) -> None:
    refused = 0
    for run in runs:
        try:
            _take_in(run, results, home)
        except RunError as error:
            print(f"not taken in: {error}", file=sys.stderr)
            refused += 1
    if refused:
        raise RunError(f"{refused} of {len(runs)} runs were not taken in")


def _held(results: Path) -> list[Result]:
    if not (held := read_results(results)):
        raise RunError(f"{results} holds no results: reproduce.py DATASET --results {results}")
    return held


def _figures(recipes: list[Recipe], results: Path) -> None:
    """Draws the rows that were run whole."""
    from pcdeq.experiments.curves import result_figures  # late: matplotlib is optional

    rows = {recipe.name for recipe in recipes}
    mine = [result for result in _held(results) if result.row in rows]
    if not (paths := result_figures(mine, results / "figures")):
        raise RunError(f"{results} holds no whole run of these rows: a few epochs make no curve")
    print(*paths, sep="\n")


def references(root: Path) -> list[Reference]:
    """Other implementations' accuracies that the repository carries."""
    return [read_reference(path) for path in sorted((root / "results/references").glob("*.json"))]


def _table(recipes: list[Recipe], results: Path, root: Path, own: bool) -> None:
    """Prints the tables, beside the repository's where they are someone else's."""
    beside = references(root)
    if not own:
        ours = read_results(root / "results")
        beside.insert(0, as_reference("this repository", "`results/` of this repository.", ours))
    text = render(recipes, _held(results), beside)
    print(text)
    if own and len(recipes) == len(ROWS):
        changed = write_between(root / "README.md", text)
        print(f"README.md {'has them now' if changed else 'has them already'}", file=sys.stderr)
