"""Result files: what one run measured, as one small JSON file, from which every table is made.

A run's folder is large and stays where it was made; its result is a few kilobytes and is committed.
Whoever reads a table can open the result behind each figure and find the command that repeats it.
What is collected is a row of the paper or nothing: runs on the shipped sample are refused, runs
with other settings than the recipe's are refused, runs on someone's image folder and runs that
were cut short are taken in and carry a mark in every table.
"""

import csv
import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_origin, get_type_hints

import torch

from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.files import write_whole
from pcdeq.experiments.recipes import ROWS, Recipe, row_name
from pcdeq.experiments.runs import COLUMNS, CONFIG, METRICS, read_config
from pcdeq.implicit import OPTIONS
from pcdeq.networks import build_network

RECIPES = {recipe.name: recipe for recipe in ROWS}
DEFAULT_OPTIONS = {name: getattr(RunConfig, name) for name in OPTIONS}
SETTINGS = ("lr", "weight_decay", "batch_size", "milestone")  # what makes a run this row


@dataclass(frozen=True)
class Result:
    """What one run measured. The fields are the keys of its JSON file.

    Attributes:
        row: name of the paper's row, ``mnist_linear_pcdeq_1_tanh``.
        test_acc: test accuracy in percent after each epoch.
        forward_iters: mean iterations of the forward solves in each epoch.
        backward_iters: mean iterations of the backward solves in each epoch.
        epochs: what the recipe asks for; ``epochs_run`` may be fewer.
        seconds: training time, all epochs together.
        device: ``cpu``, ``cuda``, …; processor: the name of the processor or GPU.
        threads: threads of each process.
        options: solver, precision, tol, max_iter, processes, tf32.
        versions: python, torch, torchvision, pcdeq.
        data: ``torchvision`` for the genuine set, ``image-folder`` for anything else.
        command: what repeats the run.
    """

    row: str
    dataset: str
    network: str
    activation: str
    augment: bool
    seed: int
    parameters: int
    epochs: int
    epochs_run: int
    test_acc: list[float]
    forward_iters: list[float]
    backward_iters: list[float]
    seconds: float
    device: str
    processor: str
    threads: int
    options: dict[str, object]
    versions: dict[str, str]
    data: str
    command: str

    @property
    def genuine(self) -> bool:
        """Whether it is of the data set itself: not of the sample, nor of someone's folders."""
        return self.data == "torchvision"

    @property
    def whole(self) -> bool:
        """Whether all epochs of the recipe were run."""
        return self.epochs_run >= self.epochs

    @property
    def name(self) -> str:
        """The stem of its file."""
        return f"{self.row}{'' if self.genuine else '_folder'}_seed{self.seed}"


def read_results(directory: str | Path) -> list[Result]:
    """All results in a directory, in the paper's order and then by seed.

    Raises:
        RunError: a file there is no result.
        OSError: the directory is there, but cannot be read.
    """
    inside = Path(directory).iterdir() if Path(directory).exists() else ()
    paths = [path for path in inside if path.suffix == ".json"]
    order = list(RECIPES)
    return sorted(map(_read, paths), key=lambda r: (order.index(r.row), not r.genuine, r.seed))


def _read(path: Path) -> Result:
    try:
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        result = None
    if result is None or not _is_whole(result):
        raise RunError(f"{path} is not a result file as reproduce.py writes it: move it away")
    if result.row not in RECIPES:
        raise RunError(f"{path} names the row {result.row!r}, which the paper does not have")
    if result.name != path.stem:
        raise RunError(f"{path} holds the result of {result.name}: rename it")
    return result


def _is_whole(result: Result) -> bool:
    """Whether every field is of its type, and there is a figure for each epoch."""
    kinds = {name: get_origin(kind) or kind for name, kind in get_type_hints(Result).items()}
    kinds["seconds"] = int | float
    columns = (result.test_acc, result.forward_iters, result.backward_iters)
    return (
        all(isinstance(getattr(result, name), kind) for name, kind in kinds.items())
        and {*OPTIONS, "processes", "tf32"} <= result.options.keys()
        and isinstance(result.options["processes"], int)
        and "torch" in result.versions
        and all(len(column) == result.epochs_run > 0 for column in columns)
        and all(isinstance(value, int | float) for column in columns for value in column)
    )


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The epochs of a run so far, from its metrics.csv; none where there is no such file.

    Raises:
        RunError: the file is damaged.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if missing := sorted({*COLUMNS} - {*(reader.fieldnames or COLUMNS)}):
                raise ValueError(f"it has no column {missing[0]}")
            return [{key: float(value) for key, value in row.items()} for row in reader]
    except (ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{path} is damaged: {error}") from None


def from_run(folder: str | Path) -> Result:
    """The result of a run's folder.

    Raises:
        RunError: no run there, no complete epoch, a run on the sample, or not a row of the paper.
    """
    folder = Path(folder)
    try:
        return _result(read_config(folder), read_metrics(folder))
    except RunError as error:
        raise RunError(f"{folder}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} does not say all that a result needs: {error}") from None


def _result(config: dict, metrics: list[dict[str, float]]) -> Result:
    if config["data"] == "sample":
        raise RunError("a run on the shipped sample never enters a table")
    recipe = _recipe(config)
    if not 0 < len(metrics) <= recipe.epochs:
        raise RunError(f"{len(metrics)} epochs, where the recipe has {recipe.epochs}")
    if config["parameters"] != parameter_count(recipe):
        raise RunError("its images have another number of classes than the data set")
    parts = [*config["earlier"], config]  # a resumed run may have begun on another machine
    return Result(
        row=recipe.name,
        dataset=recipe.dataset,
        network=recipe.net,
        activation=recipe.activation,
        augment=recipe.augment,
        seed=config["seed"],
        parameters=config["parameters"],
        epochs=recipe.epochs,
        epochs_run=len(metrics),
        test_acc=[round(row["test_acc"], 4) for row in metrics],
        forward_iters=[round(row["forward_iters"], 4) for row in metrics],
        backward_iters=[round(row["backward_iters"], 4) for row in metrics],
        seconds=round(sum(row["seconds"] for row in metrics), 1),
        device=config["device"],
        processor=" and ".join(dict.fromkeys(part["device_name"] for part in parts)),
        threads=config["threads"],
        options={name: config[name] for name in (*OPTIONS, "processes")}
        | {"tf32": any(config["tf32"].values())},
        versions=config["versions"],
        data=config["data"],
        command=_printed_command(recipe, config, len(metrics)),
    )


def _recipe(config: dict) -> Recipe:
    """The paper's row that a run is of."""
    name = row_name(*(config[key] for key in ("dataset", "net", "activation", "augment")))
    if name not in RECIPES:
        raise RunError(f"{name} is none of the paper's rows")
    recipe = RECIPES[name]
    for key in SETTINGS:
        mine, papers = config[key], getattr(recipe, key)
        if mine != papers:
            raise RunError(f"{key} {mine} is not the recipe's {papers}")
    return recipe


def parameter_count(recipe: Recipe) -> int:
    """Parameters of a row's network, counted without allocating them."""
    with torch.device("meta"):
        model = build_network(recipe.net, recipe.activation, recipe.dataset, recipe.augment)
    return sum(parameter.numel() for parameter in model.parameters())


def train_command(recipe: Recipe, seed: int, options: dict[str, object]) -> list[str]:
    """Arguments of the training script for one row: what the recipe's defaults leave open."""
    words = [f"train_{recipe.dataset}.py", "-net", recipe.net, "-activ", recipe.activation]
    words += ["--aug"] * recipe.augment + ["--seed", str(seed)]
    for name, value in options.items():
        if value is not None and value != DEFAULT_OPTIONS.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _printed_command(recipe: Recipe, config: dict, epochs: int) -> str:
    """What repeats a run: threads, and processes, decide the last digits on a CPU."""
    processes = config["processes"]
    start = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
    if config["device"] == "cpu":
        start = f"OMP_NUM_THREADS={config['threads']} {start}"
    options = {name: config[name] for name in DEFAULT_OPTIONS}
    words = train_command(recipe, config["seed"], options)
    words += ["-epochs", str(epochs)] * (epochs != recipe.epochs)
    if config["image_folder"]:
        words += ["--image-folder", Path(config["image_folder"]).name]
    return f"{start} {shlex.join(words)}"


def collect(folder: str | Path, directory: str | Path) -> Result:
    """Writes a run folder's result file; a longer run replaces one that was cut short.

    Args:
        folder: a run's folder.
        directory: where the result files are; made when absent.

    Returns:
        The result, also where the same one stood there already.

    Raises:
        RunError: not collectable (see :func:`from_run`), or another run of this row and seed
            stands there.
    """
    result = from_run(folder)
    path = Path(directory) / f"{result.name}.json"
    if path.exists():
        old = _read(path)
        if old == result:
            return result
        if old.whole or old.epochs_run >= result.epochs_run:
            raise RunError(f"{folder}: {path} already holds another run of this row and seed")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _format(result).encode())
    return result


def _format(result: Result) -> str:
    """JSON with a key per line, lists unbroken: small, and it reads and diffs well."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(result).items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def find_runs(places: Iterable[str | Path]) -> list[Path]:
    """Run folders among the places and one level below each.

    Raises:
        RunError: a place that holds no run.
    """
    found: list[Path] = []
    for place in map(Path, places):
        here = (
            [place]
            if (place / CONFIG).exists()
            else sorted(path.parent for path in place.glob(f"*/{CONFIG}"))
        )
        if not here:
            raise RunError(f"{place} holds no run: no {CONFIG} in it or in a folder below it")
        found += here
    return found
