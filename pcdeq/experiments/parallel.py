"""Several processes as one: ``torchrun`` starts N, and each trains on its part of every batch.

The batch is the global one, so a recipe means the same on any number of processes. All of them cut
the same shuffled batch, and each takes every N-th image of it. DistributedDataParallel averages the
gradients over the processes; each weights its mean loss by N times its share of the batch, so that
this average is the gradient of the loss over the whole batch even where the parts differ by an
image. The weights start from the first process's and then move alike everywhere, the projection
included. Only the first process writes files and shows progress.
"""

from __future__ import annotations

import os
import re
import signal
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pcdeq.experiments.errors import RunError, reason
from pcdeq.experiments.signals import handled_by

# How gloo and nccl put it when the other end is gone.
_LOST = re.compile(r"gloo|nccl|connection|peer|socket|broken pipe", re.IGNORECASE)


# What was reduced last, held here until the process ends: gloo's thread holds a tensor a moment
# longer than the call, and as the last one it enters the interpreter to free it, which aborts the
# process ("terminate called without an active exception") if the interpreter is ending by then.
# Seen once in some twenty runs of the tests, with torch 2.14.1. A test pass ends with two of them.
_REDUCED: deque[Tensor] = deque(maxlen=2)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        device: where this process computes.
        rank: its number among all, from 0.
        world: how many there are.
        local_rank: its number among those of its machine.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    @property
    def smallest_batch(self) -> int:
        """The fewest images in a batch: two a process, or batch normalisation has no variance."""
        return 2 * self.world

    def part(self, batch: Tensor) -> Tensor:
        """This process's images of a batch, (B,) to (B/N,) indices; sizes differ by one at most."""
        return batch[self.rank :: self.world]

    def share(self, batch: Tensor) -> float:
        """The weight of this process's mean loss, so that the average over processes is right."""
        return len(self.part(batch)) * self.world / len(batch)

    def sum(self, *values: float) -> list[float]:
        """The sums over the processes, in double precision."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """The largest over the processes."""
        return self._reduce((value,), dist.ReduceOp.MAX)[0]

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers, operation)
        _REDUCED.append(numbers)
        return numbers.tolist()

    def tell(self, value: Any) -> Any:
        """What the first process passes here, on all of them; the others' values are not used."""
        if self.world == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told)
        return told[0]

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as the training calls it: itself, or with its gradients averaged.

        On CUDA its batch norms are replaced by torch's synchronised ones, in place and under their
        names: with precision "bf16" these, unlike ``normalisation.BatchNorm2d``, end in bfloat16.
        On the CPU, where torch has none, each process normalises its part by itself.
        """
        if self.world == 1:
            return network
        if self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        with warnings.catch_warnings():
            # torch 2.14 has another name for broadcast_buffers, which 2.11 does not know.
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)

    def agree(self, network: nn.Module) -> None:
        """Gives all processes the first one's running statistics, before they are used or saved."""
        if self.world > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Lets the first process of each machine go first: it downloads, the others find files."""
        if self.local_rank > 0:
            self.max(0)  # waits
        yield
        if self.world > 1 and self.local_rank == 0:
            self.max(0)


ALONE = Processes(torch.device("cpu"))


def position() -> tuple[int, int, int]:
    """RANK, LOCAL_RANK and WORLD_SIZE, as ``torchrun`` sets them; a process alone is the first.

    Raises:
        RunError: they do not say which process this is.
    """
    given = {name: os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    way_out = "start with torchrun, or unset WORLD_SIZE, RANK and LOCAL_RANK"
    for name, value in given.items():
        if value and not value.isdecimal():
            raise RunError(f"{name} is {value!r} in the environment, no number: {way_out}")
    world = int(given["WORLD_SIZE"] or 1)
    if world == 1:  # RANK alone is some job script's
        return 0, 0, 1
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise RunError(f"WORLD_SIZE is {world}, but {name} is not set: {way_out}")
    rank = int(given["RANK"])
    if rank >= world:
        raise RunError(f"RANK is {rank}, but WORLD_SIZE is {world}: {way_out}")
    return rank, int(given["LOCAL_RANK"] or 0), world


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """Joins the other processes of this run, where ``torchrun`` started any.

    Args:
        device: as the user named it; with several processes on CUDA each takes a GPU of its own.

    Raises:
        RunError: the device cannot be used, the environment does not say which process this is, or
            another process was lost on the way.
    """
    rank, local_rank, world = position()
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", local_rank if world > 1 else place.index or 0)
    try:
        torch.zeros(1, device=place)
        if place.type == "cuda":
            torch.cuda.set_device(place)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"the device {place} cannot be used: {reason(error)}") from None
    if world > 1 and place.type not in ("cuda", "cpu"):
        raise RunError(f"several processes need --device cuda or cpu, not {place.type}")
    try:
        if world > 1:
            with handled_by(signal.SIG_DFL):  # waits for the others, who may have met a usage error
                dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        yield Processes(place, rank, world, local_rank)
        if world > 1:
            dist.destroy_process_group()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise RunError(f"{place} has too little memory: a smaller -b needs less") from None
        if world > 1 and not isinstance(error, RunError) and _LOST.search(str(error)):
            raise RunError(
                f"process {rank} of {world} lost another one, whose output may say why; --resume "
                f"goes on from the last complete epoch ({reason(error)})"
            ) from None
        raise
