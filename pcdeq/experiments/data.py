"""A data set as one uint8 tensor on the device; whole batches normalised and augmented there.

The sets are small (CIFAR-10: 180 MB), so each is decoded once, through torchvision, and kept where
the network runs. A batch is then an index and a few elementwise passes: no worker processes, no
copies, no Python per image. The idea is that of cifar10-airbench (Keller Jordan, 2024), down to the
crop that is one gather for the whole batch.

Where the images come from: the genuine sets (downloaded when absent, every file checked against its
md5 sum before it is read), anyone's folders of images, or 5,000 digits that the package ships.
"""

import functools
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pcdeq.experiments.errors import DataError, shortened
from pcdeq.networks import DATASETS, Network, check_dataset

NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # mean, std per channel
    "mnist": ((0.0,), (1.0,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
DIGITS = tuple("0123456789")
CLASSES = {  # of the genuine sets, in the order of their labels
    "mnist": DIGITS,
    "svhn": DIGITS,
    "cifar": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
}
SAMPLE = Path(__file__).with_name("mnist_sample.npz")  # made by tools/make_sample.py
PADDING = 4  # of the random crop, in pixels


@dataclass
class ImageSet:
    """Images and labels, whole, on the device.

    Attributes:
        images: uint8, (N, C, H, W), channels_last where C > 1.
        labels: int64, (N,), on the same device.
        mean: subtracted from pixels in [0, 1], per channel.
        std: what they are divided by then, per channel.
        augment: each image of each batch gets its own random crop (padding 4) and flip.
        class_names: of anyone's folders, in the order of the labels; of other sets none.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # As whole images (1, C, H, W): broadcasting over the batch alone is five times as fast.
        like = self.images[:1].float()
        channels = torch.tensor([self.mean, self.std], device=like.device)[:, None, :, None, None]
        self._mean, self._std = (torch.ones_like(like).mul_(c) for c in channels)
        self._plain = not any(self.mean) and set(self.std) == {1.0}  # pixels in [0, 1] stay so

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def checksum(self) -> int:
        """CRC-32 of pixels and labels: another one for other images, or another order."""
        pixels = self.images.permute(0, 2, 3, 1)  # in the order of their memory, as a rule
        pixels, labels = (t.cpu().contiguous().numpy() for t in (pixels, self.labels))
        return zlib.crc32(labels, zlib.crc32(pixels))

    def some(self, count: int | None) -> "ImageSet":
        """The first so many images, all if ``None``; of folders, which stand there class by class,
        so many at equal distances."""
        if count is None or count >= len(self):
            return self
        chosen = torch.arange(count, device=self.labels.device)
        if self.class_names:
            chosen = chosen * len(self) // count
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

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
        pixels = self.images.permute(0, 2, 3, 1)  # in the order of their memory
        if isinstance(indices, slice):
            pixels, labels = pixels[indices], self.labels[indices]
        else:
            indices = indices.to(pixels.device, non_blocking=True)
            # Whole images are copied here, single pixels by self.images[indices].
            pixels, labels = pixels.index_select(0, indices), self.labels.index_select(0, indices)
        images = pixels.permute(0, 3, 1, 2)
        if self.augment:
            images = crop_and_flip(images, generator)
        images = images.float().div_(255)
        return images if self._plain else images.sub_(self._mean).div_(self._std), labels


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
        ValueError: there is no such data set.
        DataError: files are absent, damaged, or not what the data set needs.
    """
    # Readers are imported late: torchvision takes longer than reading the sample.
    check_dataset(dataset)
    shape = DATASETS[dataset]
    names: tuple[str, ...] = ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy and PIL about how torchvision calls them
        if sample:
            train, test = _sample(shape)
        elif image_folder is not None:
            from pcdeq.experiments.folders import image_folders

            train, test, names = image_folders(Path(image_folder), shape)
        else:
            from pcdeq.experiments.genuine import SOURCES, genuine

            instead = "or give --sample (MNIST digits, no download)"
            train, test = genuine(SOURCES[dataset](Path(root)), instead)
    return (
        _image_set(train, dataset, device, augment, names),
        _image_set(test, dataset, device, False, names),
        len(names) or 10,
    )


def test_set(
    network: Network,
    *,
    root: str | Path = "data",
    sample: bool = False,
    image_folder: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> ImageSet:
    """The test set for a trained network; arguments as for ``load``. Of folders only ``test/``.

    Raises:
        DataError: also where the images have other classes than the network, by their number or, as
            far as both are known, by their names.
    """
    if network.classes != 10 and image_folder is None:
        raise DataError(
            f"the network is for {network.classes} classes, not for {network.dataset}'s ten: "
            "name the folder of its images with --image-folder"
        )
    if image_folder is not None:
        from pcdeq.experiments.folders import test_folder

        labelled, names = test_folder(Path(image_folder), DATASETS[network.dataset])
        images = _image_set(labelled, network.dataset, device, False, names)
    else:
        _, images, _ = load(network.dataset, root=root, sample=sample, device=device)
        names = DIGITS if sample else CLASSES[network.dataset]
    known = network.class_names or names
    missing, foreign = sorted(set(known) - set(names)), sorted(set(names) - set(known))
    if missing or foreign:
        only = [f"only the network knows {shortened(missing)}"] * bool(missing)
        only += [f"only the images have {shortened(foreign)}"] * bool(foreign)
        raise DataError(
            f"the network was trained on other classes than the images have: {'; '.join(only)}"
        )
    if len(names) != network.classes:
        raise DataError(
            f"the network is for {network.classes} classes, the images have {len(names)}"
        )
    return images


def _image_set(
    labelled: tuple[Tensor, Tensor],
    dataset: str,
    device: str | torch.device,
    augment: bool,
    class_names: tuple[str, ...],
) -> ImageSet:
    """Images uint8 (N, C, H, W) and labels int64 (N,) as they are kept."""
    images, labels = labelled
    memory = torch.channels_last if images.shape[1] > 1 else torch.contiguous_format
    images = images.to(device).contiguous(memory_format=memory)
    return ImageSet(images, labels.to(device), *NORMALISATION[dataset], augment, class_names)


def _sample(shape: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
    """Images uint8 (N, C, H, W) and labels int64 (N,) of the two parts."""
    channels, height, width = shape
    with np.load(SAMPLE) as arrays:
        digits = {name: torch.from_numpy(arrays[name]) for name in arrays if name != "notice"}

    def part(name: str) -> tuple[Tensor, Tensor]:
        images = digits[f"{name}_images"][:, None]  # (N, 1, 28, 28)
        top, left = (height - images.shape[2]) // 2, (width - images.shape[3]) // 2
        images = F.pad(images, (left, left, top, top))  # every pixel as it was written
        return images.expand(-1, channels, -1, -1), digits[f"{name}_labels"].long()

    return [part("train"), part("test")]
