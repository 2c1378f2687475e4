"""The command line: every flag means what its name says, and no input shows a traceback."""

import errno
import io
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcdeq.activations import allowed
from pcdeq.experiments import cli, data, training
from pcdeq.experiments.cli import guarded, main, parse
from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.errors import DataError, RunError
from pcdeq.experiments.recipes import ROWS
from pcdeq.experiments.signals import Interrupted
from pcdeq.networks import DATASETS, NETWORKS, variant_of
from pcdeq.weights import CheckpointError

ROOT = Path(__file__).parent.parent
SCRIPTS = {dataset: ROOT / f"train_{dataset}.py" for dataset in DATASETS}
NET = {"mnist": "linear_pcdeq_1", "svhn": "multi_conv_pcdeq_1", "cifar": "multi_conv_pcdeq_1"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(dataset: str, *flags: str) -> RunConfig:
    return parse(dataset, ["-net", NET[dataset], *flags], augmentation=dataset == "cifar")


def status_of(dataset: str, argv: list[str]) -> int:
    """The exit status of a training script, in this process."""
    with pytest.raises(SystemExit) as stop:
        main(dataset, argv, augmentation=dataset == "cifar")
    return stop.value.code


# From flags to a run


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_network_alone_gives_its_row(row):
    aug = ["--aug"] if row.augment else []
    flags = ["-net", row.net, "-activ", row.activation, *aug]
    config = parse(row.dataset, flags, augmentation=row.dataset == "cifar")
    assert asdict(row).items() <= asdict(config).items()
    assert config.folder == Path(f"runs/{row.name}_seed0")


def test_the_other_defaults():
    config = command("mnist")
    assert (config.activation, config.seed, config.data_root) == ("tanh", 0, "data")
    assert parse("mnist", ["-net", "linear_pcdeq_2"]).activation == "sigmoid"
    assert (config.solver, config.precision, config.tol, config.max_iter) == (
        "picard", "fp32", 1e-4, 200,
    )  # fmt: skip
    assert not (config.sample or config.resume or config.overwrite or config.certify)
    assert config.device == ("cuda" if torch.cuda.is_available() else "cpu")


SHORT = "-net multi_conv_pcdeq_1 -activ relu6 -lr 1e-3 -epochs 7 -wd 0 -b 32 -m 5"
LONG = (
    "--network multi_conv_pcdeq_1 --activation relu6 --learning-rate 1e-3 --epochs 7 "
    "--weight-decay 0 --batch-size 32 --milestone 5"
)


def test_a_training_whose_reader_has_gone_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def gone(*args, **kwargs):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    from pcdeq.experiments.training import train

    config = command("mnist", "--sample", "-epochs", "1", "--out", str(tmp_path / "run"))
    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(RunError, match="has gone; no epoch is done, the same command starts it"):
        train(config)


@pytest.mark.parametrize("flags", [SHORT, LONG])
def test_every_flag_arrives(flags):
    flags += (
        " --aug --seed 3 --device cpu --data-root d --out o --overwrite --image-folder i"
        " --solver anderson --precision mixed --tol 1e-3 --max-iter 50 --certify"
    )
    assert parse("cifar", flags.split(), augmentation=True) == RunConfig(
        dataset="cifar", net="multi_conv_pcdeq_1", activation="relu6", lr=1e-3, epochs=7,
        weight_decay=0.0, batch_size=32, milestone=5, augment=True, seed=3, device="cpu",
        data_root="d", out="o", overwrite=True, resume=False, sample=False, image_folder="i",
        solver="anderson", precision="mixed", tol=1e-3, max_iter=50, certify=True,
    )  # fmt: skip
    assert command("svhn", "--sample", "--resume").resume
    assert command("svhn", "--sample", "--out=~/x").out == str(Path.home() / "x")


# What is wrong is said before any data is read


REFUSED = [
    ("mnist", "-net transformer", "transformer.*linear_pcdeq_1.*multi_conv_pcdeq_2"),
    ("mnist", "-net linear_pcdeq_1 -activ sigmoid", "sigmoid.*tanh, softsign, relu6"),
    ("mnist", "-net linear_pcdeq_2 -activ tanh", "tanh.*choose from sigmoid"),
    ("mnist", "-net linear_pcdeq_1 -activ gelu", "gelu"),
    ("svhn", "-net linear_pcdeq_1", "linear_pcdeq_1 is for mnist"),
    ("cifar", "-net multi_conv_pcdeq_3", "choose from single_conv_pcdeq_1, .*multi_conv_pcdeq_2$"),
    ("cifar", "-net linear_pcdeq_2", "linear_pcdeq_2 is for mnist"),
    ("cifar", "-net single_conv_pcdeq_1 --aug", "augmentation.*single_conv_pcdeq_1"),
    ("svhn", "-net multi_conv_pcdeq_1 --aug", "unrecognized arguments: --aug"),
    ("mnist", "", "name a network with -net: linear_pcdeq_1, linear_pcdeq_2, single_conv_pcdeq_1"),
    ("mnist", "-n linear_pcdeq_1", "name a network|unrecognized arguments: -n"),
    (
        "mnist",
        "-net linear_pcdeq_1 -epoch 1",
        r"arguments: -epoch 1 \(is -epochs meant\?\); --help lists all",
    ),
    ("mnist", "-net", "expected one argument"),
    ("mnist", "-net linear_pcdeq_1 --res", "unrecognized arguments: --res"),
    ("mnist", "-net linear_pcdeq_1 --zeal 1", "unrecognized arguments: --zeal 1; --help lists all"),
    ("mnist", "--net linear_pcdeq_1", "name a network with -net|is -net meant"),
    ("mnist", "-net linear_pcdeq_1 surplus", "unrecognized arguments: surplus"),
    *(
        ("mnist", f"-net linear_pcdeq_1 {flag} {value}", f"{flag}.*'{re.escape(value)}' is not")
        for flag, values in {
            "-epochs": "0 -1 1.5 x 9999999999",
            "-b": "0 1 -64 nan",
            "-m": "-1 x",
            "-lr": "-0.001 nan inf x",
            "-wd": "-1 nan 1e999",
            "--tol": "0 -1 nan inf x",
            "--max-iter": "0 -1 x",
            "--seed": "-1 x 4294967296",
            "--device": "tpu cpu:x cuda:-1",
        }.items()
        for value in values.split()
    ),
    ("mnist", "-net linear_pcdeq_1 --solver newton", "newton.*picard.*anderson"),
    ("mnist", "-net linear_pcdeq_1 --precision fp8", "fp8.*fp32.*mixed.*bf16"),
    ("mnist", "-net linear_pcdeq_1 --device cuda:99", "cuda:99 is not available"),
    ("mnist", "-net linear_pcdeq_1 --sample --image-folder x", "not allowed with.*--sample"),
    ("mnist", "-net linear_pcdeq_1 --resume --overwrite", "not allowed with"),
    ("mnist", "-net linear_pcdeq_1 --out file/below", "file/below.*cannot be written"),
    ("mnist", "-net linear_pcdeq_1 --out=", "--out: the name is empty"),
    ("mnist", "-net linear_pcdeq_1 --data-root file", "--data-root: file is a file"),
]


@pytest.mark.parametrize("dataset, flags, words", REFUSED, ids=lambda value: str(value)[:60])
def test_refused(dataset, flags, words, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: pytest.fail("data was read"))
    Path("file").touch()
    assert status_of(dataset, flags.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"usage: train_{dataset}.py")
    assert re.search(words, err), err
    assert len(err.splitlines()) == 2
    assert not Path("runs").exists()


def test_a_folder_that_holds_a_run_is_refused(capsys):
    folder = command("mnist").folder
    folder.mkdir(parents=True)
    (folder / "last.pth").touch()
    assert status_of("mnist", ["-net", "linear_pcdeq_1"]) == 2
    assert re.search(f"{folder}.*holds a run.*--resume.*--overwrite", capsys.readouterr().err)
    assert command("mnist", "--overwrite").overwrite


# What a person sees


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("columns", ["80", "100"])
def test_help_fits_one_screen_and_its_examples_parse(dataset, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert status_of(dataset, ["--help"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 80 + 20 * (columns == "100")
    flat = " ".join(text.split())
    defaults = next(row for row in ROWS if row.dataset == dataset)
    for value in (defaults.lr, defaults.epochs, defaults.weight_decay, defaults.milestone):
        assert f"(default: {value})" in flat
    for group in ("recipe", "data", "run", "solver", "examples"):
        assert re.search(rf"^{group}.*:$", text, re.MULTILINE)
    for net in {row.net for row in ROWS if row.dataset == dataset}:
        assert net in text
    assert ("--aug" in text) == (dataset == "cifar")
    examples = [line.split()[2:] for line in lines if line.startswith("  python ")]
    assert len(examples) == 2
    for example in examples:
        parse(dataset, example, augmentation=dataset == "cifar")


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_scripts_only_name_their_data_set(dataset, monkeypatch, capsys):
    assert len(SCRIPTS[dataset].read_text().splitlines()) < 40
    asked = []
    monkeypatch.setattr(training, "train", asked.append)
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[dataset]), "-net", NET[dataset], "--sample"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS[dataset]), run_name="__main__")
    assert stop.value.code == 0
    assert asked == [command(dataset, "--sample")]
    capsys.readouterr()


# Exit statuses


@pytest.mark.parametrize(
    "error, status, words",
    [
        (RunError("the loss is nan"), 1, "error: the loss is nan"),
        (DataError("no\ndata"), 1, "error: no data"),
        (CheckpointError("last.pth is damaged"), 1, "error: last.pth is damaged"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "error: x: Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "memory, a smaller batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), 1, "memory, a smaller batch"),
        (MemoryError(), 1, "memory, a smaller batch"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "error: whoever read the output"),
        (KeyboardInterrupt(), 130, "SIGINT"),
        (Interrupted(2, "stopped by SIGINT; --resume"), 130, "stopped by SIGINT; --resume"),
        (Interrupted(15, "stopped by SIGTERM; --resume"), 143, "stopped by SIGTERM; --resume"),
        (SystemExit(2), 2, None),
        (SystemExit(), 0, None),
        (None, 0, None),
    ],
    ids=repr,
)
def test_exit_statuses(error, status, words, capsys):
    def program() -> None:
        if error is not None:
            raise error

    assert guarded(program) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "" if words is None else words in err and len(err.splitlines()) == 1


def test_sigterm_before_training_is_143(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert guarded(lambda: signal.raise_signal(signal.SIGTERM)) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("bug", [ValueError("?"), RuntimeError("?"), KeyError("?")], ids=repr)
def test_a_bug_is_not_hidden(bug):
    def program() -> None:
        raise bug

    with pytest.raises(type(bug)):
        guarded(program)


def test_a_reader_that_goes_away_sees_no_traceback(tmp_path):
    program = """if True:
        import sys
        from pcdeq.experiments.cli import guarded
        sys.exit(guarded(lambda: [print("x" * 1000) for _ in range(10_000)]))
    """
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"error: whoever read the output has gone\n"
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_output_that_cannot_be_written_is_one_sentence():
    program = "import sys; from pcdeq.experiments.cli import guarded; "
    program += "sys.exit(guarded(lambda: print('a')))"
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, env=environment,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == b"error: the output cannot be written (No space left on device)\n"


def test_closed_streams_are_no_error(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert guarded(lambda: print("a", file=sys.stderr)) == 0


def test_a_path_that_cannot_be_shown_is_no_error(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert guarded(lambda: print("a\udcff")) == 0
    assert screen.buffer.getvalue() == b"a\\udcff\n"


# Any command line at all

FLAGS = sorted(
    {flag for action in cli._parser("cifar", True)._actions for flag in action.option_strings}
)
VALUES = st.sampled_from(
    [*NETWORKS, "tanh", "sigmoid", "0", "1", "-1", "2.5", "1e-3", "nan", "-inf", "1_0", "٣", "cpu",
     "cuda", "mps", "picard", "anderson", "fp32", "bf16", "file/below", "folder", "/", "", " ",
     "--", "-", "=", "%s", "%(default)s", "{}", "@file", "-b64", "--tol=1", "-lr=1", "-h1",
     "\0", "\udcff", "x" * 300, "9" * 5000, "../../.."]
)  # fmt: skip
TOKENS = st.sampled_from(FLAGS) | VALUES | st.text(max_size=8)
PAIRS = st.tuples(st.sampled_from(FLAGS), VALUES | st.text(max_size=8)).map(list)
COMMANDS = st.tuples(
    st.sampled_from([[], *(["-net", net] for net in NETWORKS)]),
    st.lists(PAIRS | TOKENS.map(lambda token: [token]), max_size=6),
).map(lambda parts: [*parts[0], *(token for group in parts[1] for token in group)])
ALLOWED = {0, 1, 2, 130, 143}


@given(dataset=st.sampled_from(list(DATASETS)), argv=COMMANDS)
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_command_line_ends_in_an_exit_status(dataset, argv, monkeypatch, capsys):
    Path("file").touch()
    Path("folder").mkdir(exist_ok=True)
    runs = []
    monkeypatch.setattr(training, "train", runs.append)
    status = status_of(dataset, argv)
    assert status in (0, 2)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert (status == 2) == bool(err)
    assert all(isinstance(run, RunConfig) for run in runs)


@st.composite
def trainings(draw) -> tuple[str, list[str]]:
    """Command lines that pass the checks, few of them sensible."""
    dataset = draw(st.sampled_from(list(DATASETS)))
    nets = sorted({row.net for row in ROWS if row.dataset == dataset})
    net = draw(st.sampled_from(nets))
    flags = ["-net", net, "--sample", "--overwrite", "--out", "run"]

    def maybe(flag: str, *values: str) -> None:
        if draw(st.booleans()):
            flags.extend([flag, draw(st.sampled_from(values))])

    flags += ["-epochs", draw(st.sampled_from("12"))]
    flags += ["--max-iter", draw(st.sampled_from(["1", "2", "10"]))]
    maybe("-activ", *allowed(variant_of(net)))
    maybe("-lr", "0", "1e-3", "1e3", "1e30", "1e308")
    maybe("-wd", "0", "0.5", "1e30")
    maybe("-b", "1", "2", "3", "11", "1000000")
    maybe("-m", "0", "1", "99")
    maybe("--seed", "0", "4294967295")
    maybe("--solver", "picard", "anderson")
    maybe("--precision", "fp32", "mixed", "bf16")
    maybe("--tol", "1e-30", "1e-4", "1e30")
    if dataset == "cifar" and net.startswith("multi") and draw(st.booleans()):
        flags.append("--aug")
    return dataset, flags


@given(trainings())
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_training_ends_in_an_exit_status(monkeypatch, capsys, command_line):
    whole = data.load

    def few(*args, **kwargs):
        *parts, classes = whole(*args, **kwargs)
        for part in parts:
            part.images, part.labels = part.images[:12], part.labels[:12]
        return *parts, classes

    with monkeypatch.context() as patch:
        patch.setattr(data, "load", few)
        status = status_of(*command_line)
    err = capsys.readouterr().err
    assert status in ALLOWED and "Traceback" not in err
    assert (status == 1) == err.startswith("error: "), err
