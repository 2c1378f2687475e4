"""A data set as one uint8 tensor on the device; whole batches normalised and augmented there.

The sets are small (CIFAR-10: 180 MB), so each is decoded once, through torchvision, and kept where
the network runs. A batch is then an index and a few elementwise passes: no worker processes, no
copies, no Python per image. The idea is that of cifar10-airbench (Keller Jordan, 2024), down to the
crop that is one gather for the whole batch.

Where the images come from: the genuine sets (downloaded when absent, every file checked against its
md5 sum before it is read), anyone's folders of images, or 5,000 digits that the package ships.
"""

import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from pcdeq.networks import DATASETS

NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # mean, std per channel
    "mnist": ((0.0,), (1.0,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
MNIST_MD5 = {  # of the uncompressed files; torchvision has those of the compressed ones
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SAMPLE = Path(__file__).with_name("mnist_sample.npz")  # made by tools/make_sample.py
PADDING = 4  # of the random crop, in pixels
CONNECT_SECONDS = 20  # a server that is silent for longer is not there

Labelled = tuple[Tensor, Tensor]  # images uint8 (N, C, H, W), labels int64 (N,)


class DataError(RuntimeError):
    """The images cannot be had; one sentence that names the file or folder and what to do."""


@dataclass
class ImageSet:
    """Images and labels, whole, on the device.

    Attributes:
        images: uint8, (N, C, H, W), channels_last where C > 1.
        labels: int64, (N,), on the same device.
        mean: subtracted from pixels in [0, 1], per channel.
        std: what they are divided by then, per channel.
        augment: each image of each batch gets its own random crop (padding 4) and flip.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False

    def __post_init__(self) -> None:
        # As whole images (1, C, H, W): broadcasting over the batch alone is five times as fast.
        like = self.images[:1].float()
        channels = torch.tensor([self.mean, self.std], device=like.device)[:, None, :, None, None]
        self._mean, self._std = (torch.ones_like(like).mul_(c) for c in channels)

    def __len__(self) -> int:
        return len(self.images)

    def batch(
        self, indices: slice | Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The images at these positions as the network takes them.

        Args:
            indices: a slice, or int64 positions (B,) on any device.
            generator: of the crops and flips; torch's own for the device if ``None``.

        Returns:
            Images, float32 (B, C, H, W), and labels, int64 (B,).
        """
        if isinstance(indices, Tensor):
            indices = indices.to(self.images.device, non_blocking=True)
        images = self.images[indices]
        if self.augment:
            images = crop_and_flip(images, generator)
        return images.float().div_(255).sub_(self._mean).div_(self._std), self.labels[indices]


def crop_and_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image padded with 4 black pixels, cropped to its size at random, flipped or not.

    Args:
        images: (B, C, H, W), any dtype.
        generator: where the random numbers come from, on any device.

    Returns:
        The same shape and dtype, channels_last.
    """
    B, C, H, W = images.shape
    draw = {"generator": generator, "device": generator.device if generator else images.device}
    shift = torch.randint(2 * PADDING + 1, (2, B, 1), **draw).to(images.device, non_blocking=True)
    flip = torch.randint(2, (B, 1), **draw).to(images.device, non_blocking=True).bool()
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, *[PADDING] * 4))  # (B, H + 8, W + 8, C)
    column = torch.arange(W, device=images.device)
    rows = shift[0] + torch.arange(H, device=images.device)  # (B, H)
    columns = shift[1] + torch.where(flip, W - 1 - column, column)  # (B, W)
    image = torch.arange(B, device=images.device)[:, None, None]
    # One gather of pixels for the batch: position of each in the padded batch, (B, H, W)
    pixel = (image * padded.shape[1] + rows[:, :, None]) * padded.shape[2] + columns[:, None, :]
    cropped = padded.reshape(-1, C).index_select(0, pixel.flatten())
    return cropped.view(B, H, W, C).permute(0, 3, 1, 2)


def load(
    dataset: str,
    *,
    root: str | Path = "data",
    sample: bool = False,
    image_folder: str | Path | None = None,
    augment: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[ImageSet, ImageSet, int]:
    """The training and the test set, in the shape and normalisation of a data set.

    Args:
        dataset: ``"mnist"``, ``"svhn"`` or ``"cifar"``.
        root: folder of the genuine set; what is absent is downloaded into it.
        sample: the 5,000 shipped digits instead; where images are larger than 28×28 they get a
            black margin, and where there are three channels, three equal ones.
        image_folder: a folder with ``train/<class>/*`` and ``test/<class>/*`` instead, resized.
        augment: training images are cropped and flipped at random.
        device: where both sets are kept.

    Returns:
        Training set, test set, number of classes.

    Raises:
        DataError: files are absent, damaged, or not what the data set needs.
    """
    shape = DATASETS[dataset]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy and PIL about how torchvision calls them
        if sample:
            train, test, classes = *_sample(shape), 10
        elif image_folder is not None:
            train, test, classes = _image_folders(Path(image_folder), shape)
        else:
            train, test, classes = *_genuine(GENUINE[dataset](Path(root))), 10
    mean, std = NORMALISATION[dataset]
    memory = torch.channels_last if shape[0] > 1 else torch.contiguous_format
    train_set, test_set = (
        ImageSet(
            images.to(device).contiguous(memory_format=memory), labels.to(device), mean, std, crop
        )
        for (images, labels), crop in ((train, augment), (test, False))
    )
    return train_set, test_set, classes


# The genuine sets


class Genuine(NamedTuple):
    """How torchvision keeps and reads a data set."""

    title: str
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
    return Genuine("MNIST", files, archives, datasets.MNIST.mirrors[0], read)


def _svhn(root: Path) -> Genuine:
    def read(train: bool) -> Labelled:
        part = datasets.SVHN(root, "train" if train else "test", download=True)
        return torch.from_numpy(part.data), torch.from_numpy(part.labels)

    parts = [datasets.SVHN.split_list[part] for part in ("train", "test")]
    files = {root / name: md5 for _, name, md5 in parts}
    return Genuine("SVHN", files, {}, parts[0][0].rpartition("/")[0], read)


def _cifar(root: Path) -> Genuine:
    def read(train: bool) -> Labelled:
        part = datasets.CIFAR10(root, train, download=True)
        return torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)

    own = datasets.CIFAR10
    meta = (own.meta["filename"], own.meta["md5"])
    files = {root / own.base_folder / n: m for n, m in (*own.train_list, *own.test_list, meta)}
    return Genuine("CIFAR-10", files, {root / own.filename: own.tgz_md5}, own.url, read)


GENUINE: dict[str, Callable[[Path], Genuine]] = {"mnist": _mnist, "svhn": _svhn, "cifar": _cifar}


def _genuine(source: Genuine) -> tuple[Labelled, Labelled]:
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
    except (RuntimeError, URLError, TimeoutError, ConnectionError, HTTPException) as error:
        wanted = [path for path in source.archives if not path.exists()] or missing
        names = ", ".join(path.name for path in wanted)
        reason = str(error).strip().splitlines()[-1].strip("<>")
        raise DataError(
            f"{source.title} is not in {wanted[0].parent} and cannot be downloaded ({reason}): "
            f"put {names} there (from {source.url}), or use --sample, which needs no download"
        ) from error


@contextmanager
def _download(files: dict[Path, str]) -> Iterator[None]:
    """Gives up on a silent server, and leaves no half of a file behind."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        yield
    except BaseException:
        for path, md5 in files.items():  # all that was there before had its md5 sum
            if path.is_file() and not check_integrity(path, md5):
                path.unlink()
        raise
    finally:
        socket.setdefaulttimeout(before)


# The shipped digits


def _sample(shape: tuple[int, int, int]) -> tuple[Labelled, Labelled]:
    channels, height, width = shape
    with np.load(SAMPLE) as arrays:
        digits = {name: torch.from_numpy(arrays[name]) for name in arrays if name != "notice"}

    def part(name: str) -> Labelled:
        images = digits[f"{name}_images"][:, None]  # (N, 1, 28, 28)
        top, left = (height - images.shape[2]) // 2, (width - images.shape[3]) // 2
        images = F.pad(images, (left, left, top, top))  # every pixel as it was written
        return images.expand(-1, channels, -1, -1), digits[f"{name}_labels"].long()

    return part("train"), part("test")


# Anyone's images


def _image_folders(folder: Path, shape: tuple[int, int, int]) -> tuple[Labelled, Labelled, int]:
    train, test = (_list_images(folder / part) for part in ("train", "test"))
    if len(train.classes) < 2:
        raise DataError(f"{folder}/train holds one class: there is nothing to tell apart")
    if differing := sorted(set(train.classes) ^ set(test.classes)):
        raise DataError(
            f"{folder}: train/ and test/ must hold the same classes; only one of them has "
            f"{_shortened(differing)}"
        )
    return _decode(train, shape), _decode(test, shape), len(train.classes)


def _list_images(folder: Path) -> datasets.ImageFolder:
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not there: --image-folder DIR reads DIR/train/<class>/* and "
            "DIR/test/<class>/*"
        )
    try:
        return datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class, or a class without images
        raise DataError(f"{folder}: {error}") from error


def _decode(listed: datasets.ImageFolder, shape: tuple[int, int, int]) -> Labelled:
    channels, height, width = shape
    images = np.empty((len(listed), height, width, channels), np.uint8)

    def decode(index: int) -> None:
        path, _ = listed.samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert("L" if channels == 1 else "RGB")
        except Exception as error:  # PIL's decoders raise whatever they meet
            raise DataError(f"{path} cannot be read as an image: {error}") from error
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        images[index] = np.asarray(image).reshape(height, width, channels)

    with ThreadPool() as pool:
        done = pool.imap_unordered(decode, range(len(listed)), chunksize=64)
        for _ in tqdm(done, f"reading {listed.root}", len(listed), leave=False, disable=None):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(listed.targets)


def _shortened(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
