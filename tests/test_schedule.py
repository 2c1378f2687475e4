"""The scheduler: made-up runs for its rules, real ones on the shipped digits for what happens."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import made_up_run

from pcdeq.experiments.errors import RunError
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
