"""One run: epochs, with a test pass and a checkpoint behind each, and what it says meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pcdeq.experiments import data, machine
from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.data import ImageSet
from pcdeq.experiments.errors import RunError, reason
from pcdeq.experiments.evaluation import BATCH_SIZE, evaluate
from pcdeq.experiments.parallel import Processes, join
from pcdeq.experiments.runs import BEST, CERTIFICATES, LAST, Run, best_of
from pcdeq.experiments.signals import Signals
from pcdeq.experiments.trainer import Trainer, progress
from pcdeq.networks import build_network
from pcdeq.weights import CheckpointError, describe, load_state


@dataclass(frozen=True)
class RunResult:
    """A run: its folder, and the rows of its ``metrics.csv``."""

    folder: Path
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        best, last = best_of(self.rows), self.rows[-1]
        return (
            f"best {best['test_acc']:.2f} % (epoch {best['epoch']}), "
            f"last {last['test_acc']:.2f} %: {self.folder}"
        )


def train(config: RunConfig) -> RunResult:
    """One run: trains, tests after each epoch, keeps its folder, and says what it does.

    Args:
        config: the run, its folder checked (``runs.check_folder``).

    Raises:
        RunError: also DataError, CheckpointError; each with one sentence for the user.
        Interrupted: a signal came; the folder holds the complete epochs.
    """
    machine.keep_freed_memory()
    run = Run(config)
    with (
        machine.threads_for(config.net),
        join(config.device) as processes,
        run.held() if processes.first else nullcontext(),
    ):
        checkpoint = processes.tell(run.load() if processes.first else None)
        result = RunResult(run.folder, checkpoint["training"]["rows"] if checkpoint else [])

        def say(text: str) -> None:
            try:
                if processes.first:
                    print(text, flush=True)
            except OSError as error:
                why = f"the output cannot be written ({error.strerror})"
                if isinstance(error, BrokenPipeError):
                    why = "whoever read the output has gone"
                raise RunError(f"{why}; {_advice(run, result)}") from None

        if len(result.rows) >= config.epochs and not config.certify:
            done = len(result.rows)
            say(f"finished already, after {done} epoch{'s' * (done > 1)}: {result}")
            return result

        trainer, test_set = _prepare(config, processes, say)
        if checkpoint:
            _restore(trainer, test_set, checkpoint, run.folder / LAST)
        where = machine.environment(processes.device, processes.world)
        size = sum(parameter.numel() for parameter in trainer.network.parameters())
        if processes.first:
            run.begin({"parameters": size, **where})
        say(
            f"{config.net} ({config.activation}), {size:,} parameters, on {where['device_name']}, "
            f"{machine.workers(processes.world, where['threads'])}\n"
            f"{len(trainer.images):,} training and {len(test_set):,} test images ({config.data})"
        )
        if warning := machine.precision_warning(config.precision, processes.device):
            say(warning)
        ends = trainer.network.blocks[0].deq.tolerance
        if ends > config.tol:
            say(f"note: solves end at {ends:g}, as --tol {config.tol:g} is beyond their precision")
        if checkpoint and not (run.folder / BEST).exists():
            say(f"{BEST} is gone: the first epoch that is better than all before writes it again")
        if len(result.rows) < config.epochs:
            if config.milestone >= config.epochs:
                never = f"-m {config.milestone} is not below -epochs"
                say(f"note: the learning rate never falls: {never}")
            if (run.folder / CERTIFICATES).exists():
                again = "; --certify proves the new ones" * (not config.certify)
                say(f"note: {CERTIFICATES}, of older weights, goes with the next epoch{again}")
            say(HEADER)
        with Signals() as signals:
            for epoch in range(len(result.rows) + 1, config.epochs + 1):
                if processes.first:
                    signals.advice = _advice(run, result)
                try:
                    row = _train_and_test(trainer, test_set, epoch, signals.check)
                except FloatingPointError as error:
                    raise RunError(f"{error}; {run.kept(epoch - 1)}") from None
                result.rows.append(row)
                if processes.first:
                    run.save(_checkpoint(trainer, test_set, result.rows))
                say(_line(row, config))
            if processes.first:
                signals.advice = _advice(run, result)
                if config.certify:
                    _certify(run, trainer, test_set, say, signals.check)
        say(str(result))
        return result


def _advice(run: Run, result: RunResult) -> str:
    """What is kept of a run that ends now, and how to go on."""
    how = "--resume goes on" if result.rows else "the same command starts it"
    return f"{run.kept(len(result.rows))}, {how}"


def _prepare(
    config: RunConfig, processes: Processes, say: Callable[[str], None]
) -> tuple[Trainer, ImageSet]:
    """Loads the data and builds the network."""
    with processes.in_turn():
        train_set, test_set, classes = data.load(
            config.dataset,
            root=config.data_root,
            sample=config.sample,
            image_folder=config.image_folder,
            augment=config.augment,
            device=processes.device,
        )
    least, size = processes.smallest_batch, len(train_set)
    batch, rest = min(config.batch_size, size), size % config.batch_size
    why = "batch normalisation needs two images in each process"
    if batch < least:
        raise RunError(f"batches of {batch} are too small: {why}, at least {least} in all (-b)")
    if 0 < rest < least:
        say(f"the last batch of each epoch, of {rest}, is left out: {why}")
    torch.manual_seed(config.seed)
    network = build_network(
        config.net,
        config.activation,
        config.dataset,
        config.augment,
        classes,
        solver=config.solver,
        precision=config.precision,
        tol=config.tol,
        max_iter=config.max_iter,
    )
    network.class_names = train_set.class_names
    return Trainer(network.to(processes.device), train_set, config, processes), test_set


def _train_and_test(
    trainer: Trainer, test_set: ImageSet, epoch: int, check: Callable[[], None]
) -> dict[str, Any]:
    """One row of ``metrics.csv``."""
    processes, start = trainer.processes, time.perf_counter()
    row = trainer.epoch(epoch, check)
    processes.agree(trainer.network)
    batches = math.ceil(len(test_set) / BATCH_SIZE / processes.world)
    with progress(processes, total=batches, desc="test", unit="batch") as bar:
        test = evaluate(
            trainer.network,
            test_set,
            processes=processes,
            after_batch=lambda: (bar.update(), check()),
        )
    if not math.isfinite(test.loss):
        raise FloatingPointError(f"epoch {epoch}: the loss on the test set is {test.loss}")
    row |= {"test_loss": test.loss, "test_acc": test.accuracy}
    return row | {"seconds": round(time.perf_counter() - start, 3)}


def _checkpoint(trainer: Trainer, test_set: ImageSet, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``last.pth`` holds (``runs.STATE``)."""
    return {
        **describe(trainer.network),
        "model": trainer.network.state_dict(),
        "training": {
            "rows": rows,
            "optimizer": trainer.optimizer.state_dict(),
            "flags": trainer.config.identity(),
            "images": trainer.images.checksum,
            "test_images": test_set.checksum,
        },
    }


def _restore(trainer: Trainer, test_set: ImageSet, checkpoint: dict[str, Any], path: Path) -> None:
    """Puts weights and optimizer back as they were."""
    for name, mine in describe(trainer.network).items():
        theirs = checkpoint.get(name, mine)  # older checkpoints have no class_names
        if theirs != mine:
            raise CheckpointError(f"{path}: its {name} is {theirs}, not {mine}")
    sets = {"images": ("training", trainer.images), "test_images": ("test", test_set)}
    for key, (kind, images) in sets.items():
        if checkpoint["training"].get(key, images.checksum) != images.checksum:
            raise CheckpointError(
                f"{path} comes from other {kind} images, or from another order of them: go on with "
                "the same, or begin a new run with another --out"
            )
    load_state(trainer.network, checkpoint, path)
    try:
        trainer.optimizer.load_state_dict(checkpoint["training"]["optimizer"])
    except Exception as error:  # of whatever kind: the file is whole, but not one of ours
        raise CheckpointError(f"{path} does not fit this run: {reason(error)}") from None


def _certify(
    run: Run,
    trainer: Trainer,
    test_set: ImageSet,
    say: Callable[[str], None],
    check: Callable[[], None],
) -> None:
    from pcdeq.experiments.certifying import certify_set, format_certificates  # not every run's

    with progress(trainer.processes, desc="certificates", unit="batch") as bar:
        certificates = certify_set(
            trainer.network, test_set, after_batch=lambda: (bar.update(), check())
        )
    run.write_json(CERTIFICATES, certificates)
    say(format_certificates(certificates))


HEADER = "  epoch      lr  train loss  accuracy  test loss  accuracy   iterations  seconds"


def _line(row: dict[str, Any], config: RunConfig) -> str:
    """A row as a line under ``HEADER``; a second line warns of unconverged solves."""
    epoch = f"{row['epoch']}/{config.epochs}"
    iterations = f"{row['forward_iters']:.1f} + {row['backward_iters']:.1f}"
    text = (
        f"{epoch:>7}  {row['lr']:>6g}  {row['train_loss']:>10.4f}  {row['train_acc']:>6.2f} %  "
        f"{row['test_loss']:>9.4f}  {row['test_acc']:>6.2f} %  {iterations:>11}  "
        f"{row['seconds']:>7.1f}"
    )
    if row["unconverged"]:
        text += (
            f"\nwarning: the tolerance was not reached in {row['unconverged']} of the solves of "
            f"epoch {row['epoch']} (--max-iter {config.max_iter})"
        )
    return text
