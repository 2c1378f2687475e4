"""One run, as the flags of the training scripts describe it, and what makes two the same run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcdeq.experiments.recipes import row_name


@dataclass
class RunConfig:
    """One run: a field for each flag, with the flag's default where that is the same for all sets.

    Attributes:
        dataset: ``"mnist"``, ``"svhn"`` or ``"cifar"``; of ``net`` and ``activation`` the names.
        lr, weight_decay: of AdamW.
        epochs, batch_size: whole numbers from 1 on; the batch is that of all processes together.
        milestone: the last epoch at ``lr``.
        augment: ``--aug``. The others are named as their flags.
    """

    dataset: str
    net: str
    activation: str
    lr: float
    epochs: int
    weight_decay: float
    batch_size: int
    milestone: int
    augment: bool = False
    seed: int = 0
    device: str = "cpu"
    data_root: str = "data"
    out: str | None = None
    overwrite: bool = False
    resume: bool = False
    sample: bool = False
    image_folder: str | None = None
    solver: str = "picard"
    precision: str = "fp32"
    tol: float = 1e-4
    max_iter: int = 200
    certify: bool = False

    @property
    def data(self) -> str:
        """Where the images come from: "torchvision", "sample" or "image-folder"."""
        return "sample" if self.sample else "image-folder" if self.image_folder else "torchvision"

    @property
    def folder(self) -> Path:
        """The run's folder, ``out`` or one named after the run."""
        if self.out is not None:
            return Path(self.out)
        row = row_name(self.dataset, self.net, self.activation, self.augment)
        mark = {"sample": "_sample", "image-folder": "_folder", "torchvision": ""}[self.data]
        return Path("runs") / f"{row}{mark}_seed{self.seed}"

    def __post_init__(self) -> None:
        if self.image_folder is not None:
            self.image_folder = os.path.abspath(self.image_folder)

    def identity(self) -> dict[str, Any]:
        """The fields that change the numbers: what a resumed run must have in common."""
        return {name: getattr(self, name) for name in FLAGS}


# The fields that change the numbers, and what the command line calls them.
FLAGS = {
    "dataset": "data set", "net": "-net", "activation": "-activ", "lr": "-lr",
    "weight_decay": "-wd", "batch_size": "-b", "milestone": "-m", "augment": "--aug",
    "seed": "--seed", "sample": "--sample", "image_folder": "--image-folder",
    "solver": "--solver", "precision": "--precision", "tol": "--tol", "max_iter": "--max-iter",
}  # fmt: skip


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The flags in which the run ``new`` differs from ``old``, each with both values, or ""."""
    return ", ".join(
        f"{FLAGS[name]} {_shown(new[name])} (was {_shown(old.get(name))})"
        for name in FLAGS
        if new[name] != old.get(name)
    )


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return value
