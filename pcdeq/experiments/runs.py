"""A run's folder: four files, each written whole or not at all, and what makes a run resumable.

    config.json   all flags and where they ran: versions, device, processor, threads, commit
    metrics.csv   a row per epoch
    best.pth      the weights with the highest test accuracy
    last.pth      the weights after the last complete epoch, and what goes on from there

``last.pth`` is the truth. It carries the optimizer and the metrics so far, and is written first;
``best.pth`` and ``metrics.csv`` follow from it (``Run.settle``). So a crash between two files loses
nothing and doubles nothing: the next start lets the others follow again. There is no generator
state to keep: shuffles and crops are drawn anew for each epoch from (seed, epoch).
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pcdeq.experiments.config import FLAGS, RunConfig, differences
from pcdeq.experiments.errors import RunError, reason
from pcdeq.experiments.files import check_writable, make_and_lock, temporary, write_whole
from pcdeq.experiments.parallel import position
from pcdeq.weights import CheckpointError, read_checkpoint

CONFIG, METRICS, BEST, LAST = "config.json", "metrics.csv", "best.pth", "last.pth"
CERTIFICATES = "certificates.json"
COLUMNS = (
    "epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc",
    "forward_iters", "backward_iters", "unconverged", "seconds",
)  # fmt: skip
STATE = {"rows": list, "optimizer": dict, "flags": dict}  # what last.pth adds to the weights


def check_folder(config: RunConfig) -> None:
    """Refuses, before any data is read, a folder in which this run must not or cannot write.

    Under torchrun the first process speaks for all: by the time that the others look, it may
    already have begun the run.

    Raises:
        ValueError: with one sentence for the user.
        RunError: ``config.json`` is damaged, or the environment does not say which process this is.
    """
    rank, *_ = position()
    if rank > 0:
        return
    folder = config.folder
    if config.resume and config.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    check_writable(folder)
    if not any((folder / name).exists() for name in (METRICS, BEST, LAST)):
        if others := sorted(folder.glob(f"*/{CONFIG}")):
            raise ValueError(f"{folder} holds runs ({others[0].parent}): name another folder")
        return  # no epoch was completed
    if not (config.overwrite or (folder / LAST).exists()):
        raise ValueError(
            f"{folder} holds a run but no {LAST} to go on from: --overwrite starts it anew"
        )
    if not (config.resume or config.overwrite):
        raise ValueError(
            f"{folder} already holds a run: --resume goes on with it, --overwrite starts it anew"
        )
    if config.resume and (folder / CONFIG).exists():
        try:
            old = read_config(folder)
        except RunError as error:
            way_out = f"; with that file removed, --resume goes on from {LAST} alone"
            readable = os.access(folder / CONFIG, os.R_OK)  # then it is damaged
            raise RunError(f"{error}{way_out * readable}") from None
        different = differences(old, config.identity())
        if config.epochs < old.get("epochs", 0):
            fewer = f"-epochs {config.epochs} (was {old['epochs']}, and may only be raised)"
            different += ", " * bool(different) + fewer
        if different:
            raise ValueError(f"--resume continues {folder} with the same flags, but: {different}")


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a run's folder.

    Raises:
        RunError: it is damaged.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read: {reason(error)}") from None
    kinds = {"epochs": int, "earlier": list}
    if (
        not isinstance(config, dict)
        or not FLAGS.keys() <= config.keys()
        or not all(isinstance(config.get(name), kind) for name, kind in kinds.items())
    ):
        raise RunError(f"{path} is not the config.json of a run")
    return config


class Run:
    """The folder of one run.

    Args:
        config: the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.folder = config, config.folder
        self._waiting: dict[str, Any] | None = None  # config.json, while an old run stands there

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder, and keeps every other process from this run in it meanwhile.

        Raises:
            RunError: another process is at it, or the folder cannot be made.
        """
        try:
            handle = make_and_lock(self.folder)
        except BlockingIOError:
            raise RunError(
                f"another process is training in {self.folder}: wait for it, stop it, or name "
                "another folder with --out"
            ) from None
        except OSError as error:
            raise RunError(f"{self.folder} cannot be written ({error.strerror})") from None
        try:
            yield
        finally:
            with suppress(OSError):  # it holds something, as a rule
                self.folder.rmdir()  # before another process may lock it
            if handle is not None:
                os.close(handle)

    def begin(self, environment: dict[str, Any]) -> None:
        """Opens the folder and writes ``config.json``.

        With ``--overwrite`` an old run stands until the first epoch of the new one is kept.

        Args:
            environment: where the run runs (``machine.environment``). Where a resumed run began
                elsewhere, that stays under "earlier".
        """
        earlier = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, METRICS, BEST, LAST, CERTIFICATES):  # left by a kill in a write
                temporary(self.folder / name).unlink(missing_ok=True)
            old_run = any((self.folder / name).exists() for name in (LAST, BEST, METRICS))
            if old_run and not self.config.overwrite and (self.folder / CONFIG).exists():
                old = read_config(self.folder)
                here = {name: value for name, value in environment.items() if name != "command"}
                then = {name: old.get(name) for name in here}
                earlier = old.get("earlier", []) + [then] * (then != here)
        except OSError as error:
            raise RunError(f"{self.folder} cannot be written ({error.strerror})") from None
        record = {**asdict(self.config), "data": self.config.data, **environment}
        record["earlier"] = earlier
        if self.config.overwrite and old_run:
            self._waiting = record
        else:
            self.write_json(CONFIG, record)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a value as a JSON file of this folder."""
        write_whole(self.folder / name, (json.dumps(value, indent=2) + "\n").encode())

    def load(self) -> dict[str, Any] | None:
        """What ``last.pth`` holds, verified, with the other files settled by it; None without one.

        Raises:
            CheckpointError: ``last.pth`` is damaged, foreign, or another run's; or ``best.pth`` is
                damaged.
        """
        path, best = self.folder / LAST, self.folder / BEST
        if not (self.config.resume and path.exists()):
            return None
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; --resume cannot go on from it, --overwrite starts the run anew"
            ) from None
        state = checkpoint.get("training")
        if not _is_state(state):
            raise CheckpointError(
                f"{path} holds weights but no run to go on with: --overwrite starts it anew"
            )
        different = differences(state["flags"], self.config.identity())
        if different:
            raise CheckpointError(f"{path} belongs to another run: {different}")
        if best.exists() and best_of(state["rows"]) != state["rows"][-1]:
            read_checkpoint(best)
        self.settle(checkpoint)
        return checkpoint

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Keeps a complete epoch.

        Args:
            checkpoint: the identity and weights of the network, and under "training" the ``STATE``.
        """
        # No config.json of an old run beside the new one's weights, whenever a crash may come.
        obsolete = None if self._waiting is None else self.folder / CONFIG
        write_whole(self.folder / LAST, _serialised(checkpoint), obsolete=obsolete)
        if self._waiting is not None:  # the old run's other files follow
            self.write_json(CONFIG, self._waiting)
            self._waiting = None
        (self.folder / CERTIFICATES).unlink(missing_ok=True)  # they were of other weights
        self.settle(checkpoint)

    def settle(self, checkpoint: dict[str, Any]) -> None:
        """Lets ``best.pth`` and ``metrics.csv`` follow from what ``last.pth`` holds."""
        state = checkpoint["training"]
        if best_of(state["rows"]) == state["rows"][-1]:
            weights = {name: value for name, value in checkpoint.items() if name != "training"}
            write_whole(self.folder / BEST, _serialised(weights))
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(state["rows"])
        write_whole(self.folder / METRICS, text.getvalue().encode())

    def kept(self, epochs: int) -> str:
        """What is safe after so many complete epochs, for a message."""
        if epochs:
            return f"{self.folder} holds the run up to epoch {epochs}"
        if self._waiting is not None:
            return f"no epoch is done, {self.folder} holds the run that was there"
        return "no epoch is done"


def _is_state(state: Any) -> bool:
    """Whether this is what ``STATE`` says, with a row for each epoch from 1 on."""
    return (
        isinstance(state, dict)
        and all(isinstance(state.get(name), kind) and state[name] for name, kind in STATE.items())
        and all(isinstance(row, dict) and row.keys() == set(COLUMNS) for row in state["rows"])
        and [row["epoch"] for row in state["rows"]] == list(range(1, len(state["rows"]) + 1))
    )


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the highest test accuracy, the first one of equals."""
    return max(rows, key=lambda row: row["test_acc"])


def _serialised(checkpoint: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()
