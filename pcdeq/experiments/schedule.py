"""Runs as processes, N at a time, each with its share of the cores, until all are done.

A run is a plain training command with ``--resume``, so whatever happens here costs each run at most
the epoch in progress. Its output goes to a log beside its folder. The log is locked (flock) through
the very descriptor that the run writes to, so the lock lives and dies with the run: a scheduler
that was killed leaves runs that finish on their own, and the next one waits for those instead of
writing into their folders. No state is kept.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from pcdeq.experiments.errors import RunError
from pcdeq.experiments.files import lock
from pcdeq.experiments.results import read_metrics
from pcdeq.experiments.signals import Signals
from pcdeq.experiments.tables import duration

POLL = 0.2  # seconds between two looks at the running processes
REFRESH = 1.0  # seconds between two pictures of the progress on a terminal
REPEAT = 600.0  # and in a log


@dataclass(frozen=True)
class Job:
    """One run: its name, its command, the folder that it fills, and how many epochs it makes.

    ``serial``: its command knows itself that one thread is best.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    epochs: int
    serial: bool = False

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder.with_name(self.folder.name + ".log")


@dataclass(frozen=True)
class Failure:
    """A run that did not end well, and why, in words."""

    job: Job
    reason: str


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share(workers: int) -> int:
    """Threads for each of so many runs at a time: as ``OMP_NUM_THREADS`` says, or cores/workers."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else max(1, cores() // workers)


def run_all(
    jobs: Sequence[Job], workers: int, finished: Callable[[Job], None], done: int = 0
) -> list[Failure]:
    """Runs every job, ``workers`` at a time, each with its ``share`` of threads at most.

    Args:
        jobs: what to run, in this order.
        workers: processes at a time.
        finished: called for each run that ended well; a RunError of its own makes it a failure.
        done: runs that were done before, for the display.

    Returns:
        The failures; they stop no other run.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the running processes have been asked to stop too, and
            have ended.
    """
    waiting, running, failures = list(jobs), {}, []
    threads = share(workers)
    display = _Display(done)
    with Signals() as signals:
        signals.advice = "the same command goes on"
        try:
            while waiting or running:
                _fill(waiting, running, workers, threads)
                display.show(waiting, running, workers)
                time.sleep(POLL)
                signals.check()
                for job in [job for job in running if running[job].poll() is not None]:
                    reason = _outcome(job, running.pop(job).returncode, finished)
                    failures += [Failure(job, reason)] * bool(reason)
                    display.ended(job, reason)
        except BaseException:
            _stop(running.values())
            raise
    display.show(waiting, running, workers)
    return failures


def _fill(
    waiting: list[Job], running: dict[Job, subprocess.Popen], workers: int, threads: int
) -> None:
    """Starts waiting jobs until ``workers`` are running, in order; passes over locked ones."""
    for job in list(waiting):
        if len(running) < workers and (process := _start(job, threads)):
            waiting.remove(job)
            running[job] = process


def _start(job: Job, threads: int) -> subprocess.Popen | None:
    """The job's process, or None while another process is at it."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        if not lock(log):
            return None
        limit = {} if job.serial else {"OMP_NUM_THREADS": str(threads)}
        at_once = {"PYTHONUNBUFFERED": "1"}  # else the log may not end with the error
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | limit | at_once,
            start_new_session=True,  # a Ctrl-C reaches it once, through us, not twice
        )


def _outcome(job: Job, status: int, finished: Callable[[Job], None]) -> str:
    """Why the ended job failed, or nothing."""
    if status:
        lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"exit status {status}: {last} (log: {job.log})"
    try:
        finished(job)
    except (RunError, OSError) as error:
        return str(error)
    return ""


def _stop(processes: Iterable[subprocess.Popen]) -> None:
    """Asks the runs to stop, as a user would, and waits until each has kept its last epoch."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


class _Display:
    """One picture of all runs: redrawn in place on a terminal, else now and then."""

    def __init__(self, done: int):
        self.done, self.failed = done, 0
        self.live = sys.stderr.isatty()
        self.drawn = 0  # lines of the picture that stands on the terminal
        self.next = 0.0

    def ended(self, job: Job, reason: str) -> None:
        self.done, self.failed = self.done + (not reason), self.failed + bool(reason)
        self._erase()
        print(f"{job.name}: {reason or 'done'}", file=sys.stderr, flush=True)
        self.next = 0.0

    def show(self, waiting: list[Job], running: dict, workers: int) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + (REFRESH if self.live else REPEAT)
        lines = picture(self.done, self.failed, waiting, list(running), workers)
        self._erase()
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            lines = [line[:width] for line in lines]
            self.drawn = len(lines) if waiting or running else 0
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _erase(self) -> None:
        if self.drawn:
            print(f"\033[{self.drawn}F\033[J", end="", file=sys.stderr)
        self.drawn = 0


def picture(
    done: int, failed: int, waiting: list[Job], running: list[Job], workers: int
) -> list[str]:
    """The state of all runs in words: a line for the whole, a line for each running one."""
    metrics = {job: _epochs(job) for job in (*running, *waiting)}
    left = remaining(metrics, workers)
    head = f"{done} done, {len(running)} running, {len(waiting)} left"
    head += f", {failed} failed" * bool(failed)
    if len(running) < workers and waiting:
        head += " (in another process's hands)"
    head += f"; about {duration(left)} to go" if left is not None else ""
    lines = [head]
    for job in running:
        rows = metrics[job]
        now = (
            f"epoch {len(rows)} of {job.epochs}, {rows[-1]['test_acc']:.2f} %"
            if rows
            else ("first epoch")
        )
        lines.append(f"  {job.name}: {now}")
    return lines


def _epochs(job: Job) -> list[dict]:
    try:
        return read_metrics(job.folder)
    except RunError:  # damaged: the run itself will say so
        return []


def remaining(metrics: dict[Job, list[dict]], workers: int) -> float | None:
    """Seconds until all these jobs are done, from their own epochs so far; None while unknown.

    A job without an epoch yet is taken to run at the mean pace of the others.
    """
    paces = {job: mean(row["seconds"] for row in rows) for job, rows in metrics.items() if rows}
    if not paces:
        return None
    usual = mean(paces.values())
    each = [max(0, job.epochs - len(rows)) * paces.get(job, usual) for job, rows in metrics.items()]
    return max(sum(each) / workers, *each)
