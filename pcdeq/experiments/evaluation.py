"""One pass over a test set: accuracy, loss and the iterations that the solves took.

The test set is cut into batches of 500 in file order, whatever the batch size of the training: a
solve stops by a norm over its whole batch, so the cut belongs to the figure. Of several processes
each takes every so-many-th of these same batches, and the sums meet at the end: every image counts
once, and the figures do not depend on how many processes there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pcdeq.experiments.data import ImageSet
from pcdeq.experiments.parallel import ALONE, Processes
from pcdeq.modes import evaluating
from pcdeq.networks import Network

BATCH_SIZE = 500


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a test set says.

    Attributes:
        accuracy: of the class with the largest logit, in percent.
        loss: mean cross entropy per image, in nats.
        forward_iters: evaluations of f per solve, the mean over blocks and batches.
        forward_iters_max: evaluations of f in the longest solve.
        unconverged: solves that did not reach their tolerance.
        seconds: wall time of the pass.
        images_per_second: throughput of the pass, batching and normalisation included.
    """

    accuracy: float
    loss: float
    forward_iters: float
    forward_iters_max: int
    unconverged: int
    seconds: float
    images_per_second: float


@torch.inference_mode()
def evaluate(
    model: Network,
    images: ImageSet,
    batch_size: int = BATCH_SIZE,
    *,
    processes: Processes = ALONE,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluates ``model`` on all of ``images``, in evaluation mode and without a graph.

    Args:
        model: the network; the modes of its modules are restored afterwards.
        images: the test set, on the model's device.
        batch_size: images a batch.
        processes: the processes that share the work; all of them get the same figures, apart
            from the time.
        after_batch: called after each batch; what it raises ends the pass.

    Returns:
        The figures over the whole set.
    """
    start = time.perf_counter()
    losses, correct, solves = [], [], []
    with evaluating(model):
        for first in range(processes.rank * batch_size, len(images), processes.world * batch_size):
            x, y = images.batch(slice(first, first + batch_size))
            logits = model(x)  # (B, classes)
            losses.append(F.cross_entropy(logits, y, reduction="sum"))
            correct.append((logits.argmax(1) == y).sum())
            solves += [block.deq.forward_solve for block in model.blocks]
            after_batch()
    loss, right, iterations, count, unconverged = processes.sum(
        total(losses),
        total(correct),
        sum(solve.iterations for solve in solves),
        len(solves),
        sum(not solve.converged for solve in solves),
    )
    longest = processes.max(max((solve.iterations for solve in solves), default=0))
    seconds = time.perf_counter() - start
    return Evaluation(
        accuracy=100 * right / len(images),
        loss=loss / len(images),
        forward_iters=iterations / count,
        forward_iters_max=int(longest),
        unconverged=int(unconverged),
        seconds=seconds,
        images_per_second=len(images) / seconds,
    )


def total(values: list[torch.Tensor]) -> float:
    """The sum of scalars that stayed on the device until now, in double precision on the host."""
    return torch.stack(values).cpu().double().sum().item() if values else 0.0
