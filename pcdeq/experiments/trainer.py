"""One step, one epoch.

A step is projected AdamW: the gradient through the equilibria, the optimizer's step, and every
block's weight back onto the nonnegative orthant. An epoch is a loop over the indices of one
shuffle, since the data set is a tensor on the device. The shape of this file is that of minGPT's
trainer.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pcdeq.block import PcDEQ
from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.data import ImageSet
from pcdeq.experiments.optimizer import AdamW
from pcdeq.experiments.parallel import ALONE, Processes
from pcdeq.networks import Network


class Trainer:
    """A network, its optimizer and its training set: what a step needs and changes.

    Args:
        network: on the device.
        images: the training set, on the same device.
        config: the run; its learning rate, milestone, weight decay, batch size and seed count here.
        processes: those that share the work.
    """

    def __init__(
        self, network: Network, images: ImageSet, config: RunConfig, processes: Processes = ALONE
    ) -> None:
        self.network, self.images, self.config = network, images, config
        self.processes = processes
        self.model = processes.wrap(network)
        self.optimizer = AdamW(network.parameters(), config.lr, config.weight_decay)

    def step(self, x: Tensor, y: Tensor, share: float = 1.0) -> tuple[float, int]:
        """One step of projected AdamW.

        Args:
            x: images (B, C, H, W), normalised.
            y: labels (B,).
            share: weight of this batch's mean loss (``Processes.share``).

        Returns:
            The mean loss, in nats, and how many images were classified rightly.

        Raises:
            FloatingPointError: a solve or the loss is not finite; the weights are as before.
        """
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = None  # zero_grad takes 2 % of a step of the linear network
        logits = self.model(x)  # (B, classes)
        self._check("forward")
        loss = F.cross_entropy(logits, y)
        (loss * share).backward()
        # The backward solves have waited for the device already: reading two numbers is cheap now.
        value, right = torch.stack((loss.detach(), (logits.argmax(1) == y).sum())).tolist()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value}, though every forward solve is finite: a smaller -lr or -wd "
                "may help"
            )
        self._check("backward")
        self.optimizer.step()
        self.network.clamp()
        return value, int(right)

    def _check(self, direction: str) -> None:
        for name, block in self.network.named_children():
            if isinstance(block, PcDEQ):
                solve = getattr(block.deq, f"{direction}_solve")
                if not math.isfinite(solve.residual):
                    raise FloatingPointError(
                        f"the {direction} solve of {name} is not finite: a smaller -lr or -wd may "
                        "help"
                    )

    def epoch(self, epoch: int, after_step: Callable[[], None] = lambda: None) -> dict[str, float]:
        """One pass over the shuffled training set.

        Args:
            epoch: its number, from 1; decides learning rate, shuffle and augmentation.
            after_step: called after each step; what it raises ends the epoch.

        Returns:
            The first columns of ``metrics.csv``: means over images, and over blocks and steps.

        Raises:
            FloatingPointError: a loss or a solve is not finite; that step is not taken.
        """
        config, processes = self.config, self.processes
        lr = config.lr if epoch <= config.milestone else 0.1 * config.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        shuffle = torch.randperm(
            len(self.images), generator=generator("cpu", config.seed, epoch)
        ).to(processes.device)
        batches = [
            batch
            for batch in shuffle.split(config.batch_size)
            if len(batch) >= processes.smallest_batch
        ]
        augmentation = generator(processes.device, config.seed, epoch, processes.rank)
        deqs = [block.deq for block in self.network.blocks]
        loss = right = seen = forward = backward = unconverged = 0
        self.model.train()
        with progress(processes, batches, desc=f"epoch {epoch}/{config.epochs}") as bar:
            for number, batch in enumerate(bar, 1):
                x, y = self.images.batch(processes.part(batch), augmentation)
                try:
                    mean, hits = self.step(x, y, processes.share(batch))
                except FloatingPointError as error:
                    raise FloatingPointError(f"epoch {epoch}, step {number}: {error}") from None
                loss, right, seen = loss + mean * len(y), right + hits, seen + len(y)
                for deq in deqs:
                    forward += deq.iter_forward
                    backward += deq.iter_backward
                    unconverged += not deq.forward_solve.converged
                    unconverged += not deq.backward_solve.converged
                bar.set_postfix_str(f"loss {loss / seen:.4f}", refresh=False)
                after_step()
        solves = len(batches) * len(deqs) * processes.world
        loss, right, seen, forward, backward, unconverged = processes.sum(
            loss, right, seen, forward, backward, unconverged
        )
        return {
            "epoch": epoch,
            "lr": lr,
            "train_loss": loss / seen,
            "train_acc": 100 * right / seen,
            "forward_iters": forward / solves,
            "backward_iters": backward / solves,
            "unconverged": int(unconverged),
        }


def generator(device: str | torch.device, *numbers: int) -> torch.Generator:
    """A generator seeded from all of ``numbers``, so that there is no state to carry along."""
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0]))


def progress(processes: Processes, *iterable: Any, **text: Any) -> tqdm:
    """A bar of the first process, on a terminal only: a log file keeps no trail of bars."""
    silent = None if processes.first else True
    return tqdm(*iterable, leave=False, dynamic_ncols=True, disable=silent, **text)
