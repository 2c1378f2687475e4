"""The genuine data sets, through torchvision, every file checked against its md5 sum first.

What is absent is downloaded; where that fails the error says which files to put where.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from pcdeq.experiments.errors import DataError

MNIST_MD5 = {  # of the uncompressed files; torchvision has those of the compressed ones
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
CONNECT_SECONDS = 20  # a server that is silent for longer is not there

Labelled = tuple[Tensor, Tensor]  # images uint8 (N, C, H, W), labels int64 (N,)


class Genuine(NamedTuple):
    """How torchvision keeps and reads a data set."""

    title: str
    root: Path  # --data-root
    files: dict[Path, str]  # what it reads → md5
    archives: dict[Path, str]  # what it unpacks them from, if anything → md5
    url: str
    read: Callable[[bool], Labelled]  # the training set if true, else the test set


class MNIST(datasets.MNIST):
    """torchvision's reader, but for the ``processed/*.pt`` of its old versions: unverifiable."""

    def _check_legacy_exist(self) -> bool:
        return False


def _mnist(root: Path) -> Genuine:
    def read(train: bool) -> Labelled:
        part = MNIST(root, train, download=True)
        return part.data[:, None], part.targets

    raw = root / "MNIST" / "raw"
    files, archives = (
        {raw / name: md5 for name, md5 in names}
        for names in (MNIST_MD5.items(), datasets.MNIST.resources)
    )
    return Genuine("MNIST", root, files, archives, datasets.MNIST.mirrors[0], read)


def _svhn(root: Path) -> Genuine:
    def read(train: bool) -> Labelled:
        part = datasets.SVHN(root, "train" if train else "test", download=True)
        return torch.from_numpy(part.data), torch.from_numpy(part.labels)

    parts = [datasets.SVHN.split_list[part] for part in ("train", "test")]
    files = {root / name: md5 for _, name, md5 in parts}
    return Genuine("SVHN", root, files, {}, parts[0][0].rpartition("/")[0], read)


def _cifar(root: Path) -> Genuine:
    def read(train: bool) -> Labelled:
        part = datasets.CIFAR10(root, train, download=True)
        return torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)

    own = datasets.CIFAR10
    meta = (own.meta["filename"], own.meta["md5"])
    files = {root / own.base_folder / n: m for n, m in (*own.train_list, *own.test_list, meta)}
    return Genuine("CIFAR-10", root, files, {root / own.filename: own.tgz_md5}, own.url, read)


SOURCES: dict[str, Callable[[Path], Genuine]] = {"mnist": _mnist, "svhn": _svhn, "cifar": _cifar}


def genuine(source: Genuine, instead: str = "") -> tuple[Labelled, Labelled]:
    """The training and the test set.

    Args:
        source: one of ``SOURCES``, of a folder.
        instead: "or …", what else can be done where they cannot be had.

    Raises:
        DataError: a file is damaged, or absent and not to be downloaded.
    """
    missing = [path for path in source.files if not path.exists()]
    needed = source.files | source.archives if missing else source.files
    for path, md5 in needed.items():
        if path.exists() and not check_integrity(path, md5):
            raise DataError(
                f"{path} is damaged or not the genuine file (its md5 sum is not {md5}): delete it, "
                "and the next start downloads it again"
            )
    if not missing:
        return source.read(True), source.read(False)
    try:
        with _download(needed):
            return source.read(True), source.read(False)
    except (RuntimeError, OSError, HTTPException) as error:
        wanted = [path for path in source.archives if not path.exists()] or missing
        names = ", ".join(path.name for path in wanted)
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip("<>")
        raise DataError(
            f"{source.title} is not in {wanted[0].parent} and cannot be downloaded ({reason}): "
            f"put {names} there (from {source.url}), or name with --data-root the folder that has "
            f"{wanted[0].relative_to(source.root)}{instead and ', '}{instead}"
        ) from error


@contextmanager
def _download(files: dict[Path, str]) -> Iterator[None]:
    """Gives up on a silent server, and leaves no half of a file and no empty folder behind."""
    before = socket.getdefaulttimeout()
    folders = {folder for path in files for folder in path.parents if not folder.exists()}
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        yield
    except BaseException:
        for path, md5 in files.items():  # all that was there before had its md5 sum
            if path.is_file() and not check_integrity(path, md5):
                path.unlink()
        for folder in sorted(folders, reverse=True):  # the inner ones first
            with suppress(OSError):  # it holds something, or was never made
                folder.rmdir()
        raise
    finally:
        socket.setdefaulttimeout(before)
