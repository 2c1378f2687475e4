"""Peak memory of a step, and an epoch with its data: each in a process of its own.

``alone`` runs this file and reads the figures that it prints.
"""

import gc
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from contestants import BATCH, OPTIONS, ROWS, TEXTBOOK, Row, contestant, train_step, trained
from PIL import Image
from textbook import textbook
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pcdeq import build_network
from pcdeq.experiments import data, machine
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.optimizer import AdamW

LINUX = sys.platform == "linux"


def alone(**arguments) -> dict:
    """Runs ``peak_memory`` or ``epoch`` in a process of its own and returns its figures."""
    command = [sys.executable, __file__, json.dumps(arguments)]
    # Every tensor then goes back to the system as it is freed: the peak is of what lives.
    glibc = {"MALLOC_MMAP_THRESHOLD_": str(2**16)} if "row" in arguments else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | glibc)
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise RunError(f"{arguments} ended with {done.returncode}: {last}")
    return json.loads(done.stdout)


def peak_memory(name: str, row: Row, seed: int, device: str = "cpu") -> dict[str, float]:
    """MiB by which three steps raise the peak of this process's memory, or of its GPU memory."""
    images, _, _ = data.load(row.dataset, sample=True, device=device)
    network = trained(replace(row, training_steps=0), images, seed)
    x, y = images.batch(slice(0, BATCH))
    if name not in OPTIONS:
        x = x.contiguous(memory_format=torch.contiguous_format)
    model, optimizer = contestant(name, row, network)
    train_step(model, optimizer, x, y)  # behind it stands what libraries keep for good
    before = reset_peak(device)
    for _ in range(3):
        train_step(model, optimizer, x, y)
    return {"MiB": peak(device) - before}


def reset_peak(device: str) -> float:
    """Lets the peak of memory start anew; the MiB in use."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    if LINUX:
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: str) -> float:
    """The most MiB in use since."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident("VmHWM")


def resident(field: str) -> float:
    """``VmRSS``, resident memory, or ``VmHWM``, its peak, in MiB; NaN where not on Linux."""
    if not LINUX:
        return math.nan
    line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if field in ln)
    return int(line.split()[1]) / 2**10


def epoch(name: str, seed: int, device: str = "cpu") -> dict[str, float]:
    """Seconds of one epoch of MNIST linear over 60,000 digits, and its peak memory in MiB.

    The digits are the shipped ones, fifteen times over: what is timed does not depend on them.
    The textbook reads them as torchvision's MNIST does, image by image through PIL and ToTensor,
    with a DataLoader of four workers; this project from its one tensor.
    """
    ours = name != TEXTBOOK
    images, _, _ = data.load("mnist", sample=True, device=device if ours else "cpu")
    images = replace(
        images, images=images.images.repeat(15, 1, 1, 1), labels=images.labels.repeat(15)
    )
    torch.manual_seed(seed)
    network = build_network("linear_pcdeq_1", "tanh").to(device)
    reset_peak(device)
    model = network if ours else textbook(network)
    # The first optimizer of a process imports half of torch: no part of an epoch.
    kind = AdamW if ours else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=5e-4, weight_decay=1.5e-2)
    if device != "cpu":  # the first products of a process load libraries
        x, y = images.batch(slice(BATCH))
        train_step(model, optimizer, x.to(device), y.to(device))
    start = time.perf_counter()
    if ours:
        with machine.threads_for(network.name):  # as the training scripts do
            for batch in torch.randperm(len(images)).split(BATCH):
                train_step(model, optimizer, *images.batch(batch))
    else:
        digits = AsTorchvision(images)
        pinned = {"pin_memory": device != "cpu"}
        for x, y in DataLoader(digits, BATCH, shuffle=True, num_workers=4, **pinned):
            train_step(model, optimizer, *(t.to(device, non_blocking=True) for t in (x, y)))
    if device != "cpu":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "MiB": peak(device)}


class AsTorchvision(Dataset):
    """Digits as ``torchvision.datasets.MNIST`` with ToTensor gives them, one at a time."""

    def __init__(self, images: data.ImageSet):
        self.images, self.to_tensor = images, transforms.ToTensor()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images.images[index, 0].numpy(), mode="L")
        return self.to_tensor(image), int(self.images.labels[index])


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    if "row" in task:
        print(json.dumps(peak_memory(**task | {"row": ROWS[task["row"]]})))
    else:
        print(json.dumps(epoch(**task)))
