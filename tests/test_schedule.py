"""The scheduler: made-up runs for its rules, real ones on the shipped digits for what happens."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import made_up_run

from pcdeq.experiments import genuine, reproduce
from pcdeq.experiments.errors import DataError, RunError
from pcdeq.experiments.recipes import ROWS
from pcdeq.experiments.reproduce import main
from pcdeq.experiments.results import RECIPES, collect, read_metrics, read_results
from pcdeq.experiments.schedule import Job, cores, picture, remaining, run_all
from pcdeq.experiments.signals import Interrupted

ROOT = Path(__file__).resolve().parents[1]
LINEAR = RECIPES["mnist_linear_pcdeq_1_tanh"]


def job(folder: Path, name: str, script: str) -> Job:
    """A run that is a few lines of Python; ``here`` is the folder of all runs."""
    code = f"import os, sys, time\nfrom pathlib import Path\nhere = Path({str(folder)!r})\n{script}"
    return Job(name, (sys.executable, "-c", code), folder / name, 1)


def training(folder: Path, name: str, *flags: str, epochs: int = 1) -> Job:
    """A real run of the smallest network on the shipped digits."""
    words = ("-net", "linear_pcdeq_1", "--sample", "-epochs", str(epochs), *flags)
    out = ("--out", str(folder / name), "--resume")
    return Job(
        name, (sys.executable, str(ROOT / "train_mnist.py"), *words, *out), folder / name, epochs
    )


def test_every_job_runs_and_a_failure_stops_none(tmp_path, capfd):
    finished = []
    jobs = [
        job(tmp_path, "good", "print('fine')"),
        job(tmp_path, "bad", "print('Traceback'); sys.exit('disk full')"),
        job(tmp_path, "killed", "os.kill(os.getpid(), 9)"),
        job(tmp_path, "refused", ""),
        job(tmp_path, "last", ""),
    ]

    def take_in(job: Job) -> None:
        if job.name == "refused":
            raise RunError("not a row of the paper")
        finished.append(job.name)

    failures = run_all(jobs, 2, take_in, done=3)
    assert sorted(finished) == ["good", "last"]
    assert {failure.job.name: failure.reason for failure in failures} == {
        "bad": f"exit status 1: disk full (log: {tmp_path / 'bad.log'})",
        "killed": f"exit status -9: it said nothing (log: {tmp_path / 'killed.log'})",
        "refused": "not a row of the paper",
    }
    assert (tmp_path / "good.log").read_text() == "fine\n"
    shown = capfd.readouterr().err
    assert "bad: exit status 1: disk full" in shown
    assert shown.splitlines()[-1] == "5 done, 0 running, 0 left, 3 failed"


@pytest.mark.parametrize("asked", [None, "3"])
def test_threads_are_the_share_of_the_cores_or_what_the_user_asks_for(tmp_path, monkeypatch, asked):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    script = "(here / 'NAME').write_text(os.environ.get('OMP_NUM_THREADS', 'none'))"
    jobs = [
        replace(job(tmp_path, name, script.replace("NAME", name)), serial=name == "linear")
        for name in ("linear", "conv")
    ]
    assert run_all(jobs, 1, lambda job: None) == []
    assert (tmp_path / "conv").read_text() == (asked or str(cores()))
    assert (tmp_path / "linear").read_text() == (asked or "none")


def test_no_more_than_n_run_at_a_time_and_each_has_its_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = """
name = here / f"{os.getpid()}.running"
name.touch()
(here / f"{os.getpid()}.threads").write_text(os.environ["OMP_NUM_THREADS"])
(here / f"{os.getpid()}.beside").write_text(str(len(list(here.glob("*.running")))))
time.sleep(0.3)
name.unlink()
"""
    jobs = [job(tmp_path, str(number), script) for number in range(5)]
    assert run_all(jobs, 2, lambda job: None) == []
    assert {path.read_text() for path in tmp_path.glob("*.beside")} <= {"1", "2"}
    assert len(list(tmp_path.glob("*.threads"))) == 5
    for path in tmp_path.glob("*.threads"):
        assert path.read_text() == str(max(1, cores() // 2))


def test_a_run_in_another_schedulers_hands_is_waited_for(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    mine = job(tmp_path, "run", "(here / 'started').touch()")
    other = job(tmp_path, "other", "(here / 'other started').touch()")
    with mine.log.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        thread = threading.Thread(target=run_all, args=([mine, other], 1, lambda job: None))
        thread.start()
        wait_for(lambda: (tmp_path / "other started").exists())
        assert not (tmp_path / "started").exists()
    thread.join(20)
    assert not thread.is_alive()
    assert (tmp_path / "started").exists()


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


SCHEDULER = """
import sys
from pathlib import Path
from pcdeq.experiments.cli import guarded
from pcdeq.experiments.schedule import Job, run_all
folder = Path(sys.argv[1])
command = tuple(sys.argv[2:])
jobs = [Job(name, command, folder / name, 1) for name in ("a", "b", "c")]
sys.exit(guarded(lambda: run_all(jobs, 2, lambda job: None)))
"""
# Says that it was asked to stop, once, and takes its time; the log lock keeps it apart.
PATIENT = """
import os, signal, sys, time
def stop(*_):
    time.sleep(0.5)
    print("kept", flush=True)
    os._exit(143)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


def scheduler(folder: Path, *command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCHEDULER, str(folder), *command],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_ctrl_c_stops_the_runs_cleanly_and_starts_no_more(tmp_path):
    process = scheduler(tmp_path, sys.executable, "-c", PATIENT)
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    wait_for(lambda: all(log.exists() and "ready" in log.read_text() for log in logs))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert [log.read_text() for log in logs] == ["ready\nkept\n"] * 2
    assert not (tmp_path / "c.log").exists()


def test_runs_outlive_a_killed_scheduler_and_keep_their_lock(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    script = "import time; print('ready', flush=True); time.sleep(3)"
    process = scheduler(tmp_path, sys.executable, "-c", script)
    log = tmp_path / "a.log"
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    process.kill()
    process.communicate()
    with log.open("ab") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_picture_and_the_time_left(tmp_path):
    made_up_run(tmp_path / "a", LINEAR, ran=10)  # 2 s an epoch
    a, b = (Job(name, (), tmp_path / name, 40) for name in "ab")
    accuracy = read_metrics(tmp_path / "a")[-1]["test_acc"]
    assert picture(7, 1, [b], [a], 1) == [
        "7 done, 1 running, 1 left, 1 failed; about 2.3 min to go",  # 30 + 40 epochs
        f"  a: epoch 10 of 40, {accuracy:.2f} %",
    ]
    assert picture(0, 0, [a], [b], 2)[1] == "  b: first epoch"
    assert "in another process's hands" in picture(0, 0, [a], [], 1)[0]
    assert remaining({b: []}, 1) is None
    rows = [{"seconds": 2.0}] * 10
    assert remaining({a: rows, b: []}, 2) == 80.0  # no faster than the longest of them


# Real runs


def test_real_runs_a_failing_one_among_them_and_their_collection(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    from torchvision.utils import save_image

    from pcdeq.experiments.data import load

    digits, _, _ = load("mnist", root=tmp_path, sample=True)
    for number in range(40):
        for part in ("train", "test"):
            place = tmp_path / "digits" / part / str(int(digits.labels[number]))
            place.mkdir(parents=True, exist_ok=True)
            save_image(digits.images[number].float() / 255, place / f"{number}.png")
    runs, results = tmp_path / "runs", tmp_path / "results"
    folder = training(runs, "folder", "--image-folder", str(tmp_path / "digits"))
    folder = Job(
        folder.name, tuple(word for word in folder.command if word != "--sample"), folder.folder, 1
    )
    jobs = [
        training(runs, "sample"),
        training(runs, "broken", "-lr", "1e30"),
        folder,
    ]
    failures = run_all(jobs, 2, lambda job: collect(job.folder, results))
    reasons = {failure.job.name: failure.reason for failure in failures}
    assert reasons.keys() == {"sample", "broken"}
    assert "never enters a table" in reasons["sample"]
    assert "exit status 1: error: epoch 1" in reasons["broken"]
    (result,) = read_results(results)
    assert (result.name, result.epochs_run, result.genuine) == (
        "mnist_linear_pcdeq_1_tanh_folder_seed0", 1, False
    )  # fmt: skip
    assert result.threads == max(1, cores() // 2)


def test_a_scheduler_stopped_halfway_goes_on_where_it_was(tmp_path):
    run = training(tmp_path, "run", epochs=5)

    def stop_after_an_epoch() -> None:
        wait_for(lambda: read_metrics(run.folder))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_an_epoch).start()
    with pytest.raises(Interrupted, match="the same command goes on"):
        run_all([run], 2, lambda job: None)
    kept = read_metrics(run.folder)
    assert 1 <= len(kept) < 5
    finished = []
    assert run_all([run], 2, finished.append) == []
    assert finished == [run]
    rows = read_metrics(run.folder)
    assert rows[: len(kept)] == kept and len(rows) == 5


# The command line


def call(capsys, *words: str) -> str:
    main(ROOT, words)
    return capsys.readouterr().out


def test_the_list_is_one_training_command_per_missing_run(tmp_path, capsys):
    empty = tmp_path / "none"
    commands = call(capsys, "all", "--results", str(empty), "--seeds", "1", "--list").splitlines()
    assert len(commands) == len(set(commands)) == 32
    assert not empty.exists()
    for command, recipe in zip(commands, ROWS, strict=True):
        words = shlex.split(command)
        assert Path(words[1]).resolve() == ROOT / f"train_{recipe.dataset}.py"
        assert words[-2:] == [str(empty / "runs" / f"{recipe.name}_seed0"), "--resume"]
        assert ("--aug" in words) == recipe.augment
    made_up_run(tmp_path / "run", LINEAR, seed=1)
    collect(tmp_path / "run", tmp_path)
    made_up_run(tmp_path / "run", LINEAR, seed=0, ran=3)  # cut short: is run whole
    collect(tmp_path / "run", tmp_path)
    listed = call(
        capsys,
        "mnist",
        "--rows",
        "linear*tanh",
        "--seeds",
        "3",
        "--list",
        "--results",
        str(tmp_path),
        "--precision",
        "mixed",
        "--data-root",
        "a b",
    )
    seeds = [shlex.split(line)[7] for line in listed.splitlines()]
    assert seeds == ["0", "2"]
    assert "--data-root 'a b' --precision mixed" in listed


def test_the_first_line_of_the_list_is_enough_for_head(tmp_path):
    command = f"{shlex.quote(sys.executable)} reproduce.py all --results {tmp_path} --list"
    done = subprocess.run(
        f"{command} | head -1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_nothing_to_do_is_said(tmp_path, capsys):
    for seed in range(2):
        made_up_run(tmp_path / "run", LINEAR, seed)
        collect(tmp_path / "run", tmp_path)
    said = call(
        capsys,
        "mnist",
        "--rows",
        "*tanh",
        "--seeds",
        "2",
        "--results",
        str(tmp_path),
        "--list",
        "--rows",
        "mnist_linear_pcdeq_1_tanh",
    )
    assert said == ""
    said = call(
        capsys, "mnist", "--rows", "linear*tanh", "--seeds", "2", "--results", str(tmp_path)
    )
    assert said.startswith(f"nothing to do: {tmp_path} holds all 2 results of 1 row(s); ")


def test_what_is_held_with_other_options_is_named(tmp_path, capsys):
    made_up_run(tmp_path / "run", LINEAR)
    collect(tmp_path / "run", tmp_path)
    asked = ["mnist", "--rows", "linear*tanh", "--seeds", "2", "--list", "--results", str(tmp_path)]
    main(ROOT, asked)
    assert capsys.readouterr().err == ""
    main(ROOT, [*asked, "--solver", "anderson"])
    said = "note: mnist_linear_pcdeq_1_tanh, seed 0, is held with the default options: "
    assert capsys.readouterr().err == said + "a table averages seeds of the same options only\n"


def test_runs_from_elsewhere_are_taken_in_with_their_weights(tmp_path, capsys):
    made_up_run(tmp_path / "there/a", LINEAR)
    made_up_run(tmp_path / "there/b", LINEAR, device_name="Abacus")
    made_up_run(tmp_path / "there/c", LINEAR, seed=1)
    mine = tmp_path / "mine"
    with pytest.raises(RunError, match="1 of 3 runs were not taken in"):
        main(ROOT, ["--collect", str(tmp_path / "there"), "--results", str(mine)])
    assert "another run of this row and seed" in capsys.readouterr().err
    assert [result.seed for result in read_results(mine)] == [0, 1]
    assert [path.name for path in (mine / "weights").glob("*.pth")] == [f"{LINEAR.name}.pth"]


def test_someone_elses_results_stand_beside_the_repositorys(tmp_path, capsys):
    made_up_run(tmp_path / "run", LINEAR)
    collect(tmp_path / "run", tmp_path)
    before = (ROOT / "README.md").read_bytes()
    shown = call(capsys, "--table", "--rows", "linear*tanh", "--results", str(tmp_path))
    assert "Slide rule" in shown and "authors' code, %" in shown
    assert (ROOT / "README.md").read_bytes() == before


@pytest.mark.parametrize("what", ["--table", "--figures"])
def test_a_folder_without_results_is_an_error(tmp_path, what):
    with pytest.raises(RunError, match="holds no results"):
        main(ROOT, [what, "--results", str(tmp_path / "none")])


def test_figures_are_of_the_rows_that_were_asked_for(tmp_path, capsys):
    made_up_run(tmp_path / "run", LINEAR)
    collect(tmp_path / "run", tmp_path)
    words = ["--figures", "--results", str(tmp_path)]
    with pytest.raises(RunError, match="holds no result of these rows"):
        main(ROOT, ["svhn", *words])
    assert "mnist_accuracy.png" in call(capsys, "mnist", *words)
    made_up_run(tmp_path / "short", LINEAR, ran=1)
    collect(tmp_path / "short", tmp_path / "few")
    with pytest.raises(RunError, match="no whole run of these rows"):
        main(ROOT, ["--figures", "--results", str(tmp_path / "few")])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["cifar10"],
        ["mnist", "--rows", "linaer*"],
        ["mnist", "--jobs", "0"],
        ["mnist", "--seeds", "x"],
        ["mnist", "--list", "--table"],
        ["mnist", "--solver", "newton"],
        ["mnist", "--tol", "-1"],
        ["--collect"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(ROOT, words)
    assert stop.value.code == 2
    assert "usage: reproduce.py" in capsys.readouterr().err


def test_absent_data_is_said_once_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "run_all", lambda *_: pytest.fail("a run was begun"))
    monkeypatch.setattr(genuine, "SOURCES", {"mnist": lambda root: root})

    def absent(source):
        raise DataError(f"MNIST is not in {source}")

    monkeypatch.setattr(genuine, "genuine", absent)
    words = ["mnist", "--results", str(tmp_path), "--data-root", str(tmp_path / "data")]
    with pytest.raises(DataError, match=r"MNIST is not in .*data"):
        main(ROOT, words)
