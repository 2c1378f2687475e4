"""Real processes that are stopped, killed, and run out of disk: what is left goes on.

The reference is a run that nothing happened to. It and most of the resumed runs go on in the tests'
own process, which has paid for importing torch; the stopped ones are the scripts as users start
them. The long part (``-m slow``) kills twenty runs at random moments, and ranks of torchrun.
"""

import contextlib
import csv
import itertools
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from processes import FLAGS, SCRIPT, children, free_port, run, same, start, torchrun, until, weights

from pcdeq.experiments.cli import parse
from pcdeq.experiments.runs import BEST, CONFIG, LAST, METRICS
from pcdeq.experiments.training import train

EPOCHS = 12


def flags(folder, *more, epochs=EPOCHS):
    return [*FLAGS, "-epochs", str(epochs), "--out", str(folder), "--resume", *more]


def go_on(folder, epochs=EPOCHS):
    """Begins a run, or resumes it, in this process."""
    train(parse("mnist", flags(folder, epochs=epochs)))


def metrics(folder):
    """The rows of ``metrics.csv`` without the time; each whole, each once, in order."""
    with open(folder / METRICS, newline="") as file:
        rows = [list(row.values())[:-1] for row in csv.DictReader(file, strict=True)]
    assert [row[0] for row in rows] == [str(epoch) for epoch in range(1, len(rows) + 1)]
    assert all(None not in row and "" not in row for row in rows)
    return rows


def epochs_done(folder):
    return len(metrics(folder)) if (folder / METRICS).exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    go_on(folder)
    return folder


def check_end(folder, whole):
    """The run is finished, and its numbers are those of the one that nothing happened to."""
    assert metrics(folder) == metrics(whole)
    for name in (LAST, BEST):
        assert same(weights(folder / name), weights(whole / name))
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))


def one_sentence(err, *parts):
    assert err.count("\n") == 1 and "Traceback" not in err
    assert all(str(part) in err for part in parts), err


def stopped(folder, number, epochs=2):
    """A process of this run that gets a signal after some more epochs."""
    process = start(SCRIPT, *flags(folder))
    goal = epochs_done(folder) + epochs
    until(lambda: epochs_done(folder) >= goal, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert epochs_done(folder) < EPOCHS
    return process.returncode, err


def test_sigterm_ends_with_143_and_the_run_goes_on_to_the_same_end(whole, tmp_path):
    status, err = stopped(tmp_path / "run", signal.SIGTERM)
    assert status == 143
    one_sentence(err, "stopped by SIGTERM", f"{tmp_path / 'run'} holds the run up to epoch")
    go_on(tmp_path / "run")
    check_end(tmp_path / "run", whole)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(whole, tmp_path):
    folder = tmp_path / "run"
    process = start(SCRIPT, *flags(folder))
    until(lambda: epochs_done(folder) >= 2, process)
    for _ in range(10_000):  # between two writes: the next one goes to the device that is full
        with contextlib.suppress(FileExistsError):
            os.symlink("/dev/full", folder / f".{LAST}.tmp")
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    one_sentence(err, f"{folder / LAST} cannot be written (No space left on device)")
    assert 2 <= epochs_done(folder) < EPOCHS
    go_on(folder)
    check_end(folder, whole)


@pytest.mark.slow
def test_sigint_ends_with_130_time_and_again(whole, tmp_path):
    folder = tmp_path / "run"
    for _ in range(3):
        status, err = stopped(folder, signal.SIGINT)
        assert status == 130
        one_sentence(err, "stopped by SIGINT", f"{folder} holds the run up to epoch")
    status, _, err = run(SCRIPT, *flags(folder))
    assert (status, err) == (0, "")
    check_end(folder, whole)
    status, out, err = run(SCRIPT, *flags(folder))
    assert (status, err) == (0, "") and out.startswith(f"finished already, after {EPOCHS} epochs")
    check_end(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(tmp_path, number):
    folder = tmp_path / "run"
    long_step = ["-net", "multi_conv_pcdeq_1", "-b", "4000"]
    process = start(SCRIPT, *flags(folder), *long_step)
    until((folder / CONFIG).exists, process)
    time.sleep(1)
    process.send_signal(number)
    time.sleep(0.2)
    assert process.poll() is None  # the step in progress goes on
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == "" and "1/12" not in out


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kill_9_at_any_moment_leaves_a_folder_that_resumes(whole, tmp_path, seed):
    folder, dice = tmp_path / "run", random.Random(seed)
    process = start(SCRIPT, *flags(folder))
    if seed:  # 0: while it still starts
        until(folder.exists, process)
    time.sleep(dice.uniform(0, 3))
    process.kill()
    process.communicate()
    if seed % 2:  # and again, while it resumes
        process = start(SCRIPT, *flags(folder))
        goal = epochs_done(folder) + 1
        until(lambda: epochs_done(folder) >= goal, process)
        time.sleep(dice.uniform(0, 1))
        process.kill()
        process.communicate()
    go_on(folder)
    check_end(folder, whole)


def disks():
    """Small disks that a test can fill up: a tmpfs where this user may mount one."""
    probe = "mount -t tmpfs -o size=64k none /mnt && umount /mnt"
    try:
        mounts = subprocess.run(["sh", "-c", probe], capture_output=True).returncode == 0
    except OSError:
        mounts = False
    return ["tmpfs"] if mounts else []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moved", *disks()])
def test_a_disk_that_fills_up_or_goes_away_mid_run(whole, tmp_path, kind):
    disk, folder = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
    try:
        process = start(SCRIPT, *flags(folder))
        until(lambda: epochs_done(folder) >= 2, process)
        if kind == "tmpfs":
            with open(disk / "ballast", "wb", buffering=0) as ballast:
                while process.poll() is None:  # a renamed file frees what it replaces
                    with contextlib.suppress(OSError):
                        ballast.write(bytes(4096))
            reason = "No space left on device"
        else:
            os.rename(folder, disk / "elsewhere")
            reason = "No such file or directory"
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        one_sentence(err, folder, "cannot be written", reason)
        if kind == "tmpfs":
            os.remove(disk / "ballast")
        else:
            assert not folder.exists()
            os.rename(disk / "elsewhere", folder)
        assert 2 <= epochs_done(folder) < EPOCHS
        go_on(folder)
        check_end(folder, whole)
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_damaged_files_are_one_sentence(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name, damage in itertools.product(
        (LAST, CONFIG), (lambda whole: b"", lambda whole: whole[: len(whole) // 2])
    ):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(content))
        status, out, err = run(SCRIPT, *flags(folder))
        assert (status, out) == (1, "")
        one_sentence(err, folder / name)
        (folder / name).write_bytes(content)
    check_end(folder, whole)


# Several processes


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    folder = tmp_path / "run"
    for done, processes in ((2, 2), (3, 1), (5, 2)):
        script = torchrun(processes, SCRIPT) if processes > 1 else [SCRIPT]
        status, out, err = run(*script, *flags(folder, epochs=done))
        assert status == 0, err
        lines = out.splitlines()
        assert ("2 processes of " in lines[0]) == (processes == 2)
        assert sum(line.startswith("  epoch") for line in lines) == 1  # rank 0 alone speaks
        assert epochs_done(folder) == done
    losses = [float(row[2]) for row in metrics(folder)]
    assert losses == sorted(losses, reverse=True)  # each part began where the one before ended


@pytest.mark.slow
def test_a_killed_rank_takes_torchrun_down_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "run"
    process = start(*torchrun(2, SCRIPT), *flags(folder, epochs=30))
    until(lambda: epochs_done(folder) >= 2, process)
    os.kill(children(process)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "SIGKILL" in err or "Signal 9" in err
    go_on(folder, epochs=30)
    assert epochs_done(folder) == 30


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_is_one_sentence_of_the_others(tmp_path, victim):
    """Without torchrun's agent, which would end the others itself."""
    folder = tmp_path / "run"
    address = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        start(SCRIPT, *flags(folder, epochs=30), RANK=rank, LOCAL_RANK=rank, **address)
        for rank in range(2)
    ]
    until(lambda: epochs_done(folder) >= 2, ranks[0])
    ranks[victim].kill()
    _, err = ranks[1 - victim].communicate(timeout=120)
    ranks[victim].communicate()
    assert ranks[1 - victim].returncode == 1
    one_sentence(err, f"process {1 - victim} of 2 lost another one")
    go_on(folder, epochs=30)
    assert epochs_done(folder) == 30


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_stops_all_and_the_run_goes_on(tmp_path, number):
    folder = tmp_path / "run"
    process = start(*torchrun(2, SCRIPT), *flags(folder, epochs=30))
    until(lambda: epochs_done(folder) >= 2, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert f"{folder} holds the run up to epoch" in err
    assert not children(process)
    go_on(folder, epochs=30)
    assert epochs_done(folder) == 30
