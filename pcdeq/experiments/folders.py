"""Anyone's images: a folder for each class, read once, by several threads."""

import os
import sys
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from pcdeq.experiments.errors import DataError, reason, shortened

Labelled = tuple[Tensor, Tensor]  # images uint8 (N, C, H, W), labels int64 (N,)


def image_folders(
    folder: Path, shape: tuple[int, int, int]
) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """The training and the test set, and the names of the classes in the order of their labels.

    Args:
        folder: with ``train/<class>/*`` and ``test/<class>/*``.
        shape: C, H, W that images are converted and resized to.

    Raises:
        DataError: a folder is absent, the classes differ, or a file is no image.
    """
    train, test = (_list_images(folder / part) for part in ("train", "test"))
    if len(train.classes) < 2:
        raise DataError(f"{folder}/train holds one class: there is nothing to tell apart")
    if differing := sorted(set(train.classes) ^ set(test.classes)):
        raise DataError(
            f"{folder}: train/ and test/ must hold the same classes; only one of them has "
            f"{shortened(differing)}"
        )
    return _decode(train, shape), _decode(test, shape), tuple(train.classes)


def test_folder(folder: Path, shape: tuple[int, int, int]) -> tuple[Labelled, tuple[str, ...]]:
    """The test set alone, and the names of its classes; arguments and errors as above."""
    test = _list_images(folder / "test")
    return _decode(test, shape), tuple(test.classes)


class _Folder(datasets.ImageFolder):
    """torchvision's, but for folders that are hidden, which are no classes, or cannot be read."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        folders = (entry.name for entry in os.scandir(directory) if entry.is_dir())
        classes = sorted(name for name in folders if name[0] != ".")
        if not classes:
            raise FileNotFoundError("it holds no folder of a class")
        for name in classes:  # torchvision takes one that cannot be read for an empty one
            if not os.access(os.path.join(directory, name), os.R_OK | os.X_OK):
                raise FileNotFoundError(f"no permission to read {name}")
        return classes, {name: label for label, name in enumerate(classes)}


def _list_images(folder: Path) -> datasets.ImageFolder:
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not there: --image-folder DIR reads DIR/train/<class>/* and "
            "DIR/test/<class>/*"
        )
    others = []

    def is_image(path: str) -> bool:
        if any(part[0] == "." for part in Path(path).relative_to(folder).parts):
            return False  # hidden, as what macOS and notebooks leave
        known = path.lower().endswith(IMG_EXTENSIONS)
        if not known:
            others.append(path)
        return known

    endings = f"images end in {', '.join(IMG_EXTENSIONS)}"
    try:
        listed = _Folder(str(folder), is_valid_file=is_image)
    except FileNotFoundError as error:  # no class, or a class without images
        raise DataError(f"{folder}: {str(error).strip(' .')} ({endings})") from error
    if others:
        count = f"{len(others):,} other file" + "s" * (len(others) > 1)
        print(f"{folder}: {count} left out, as {others[0]}: {endings}", file=sys.stderr)
    return listed


def _decode(listed: datasets.ImageFolder, shape: tuple[int, int, int]) -> Labelled:
    channels, height, width = shape
    images = np.empty((len(listed), height, width, channels), np.uint8)

    def decode(index: int) -> None:
        path, _ = listed.samples[index]
        try:
            with Image.open(path) as file:
                if file.mode[0] in "IF":  # 16 and 32 bits: PIL would clip all above 255
                    raise ValueError(
                        f"it has more than 8 bits a channel (mode {file.mode}): convert it to 8"
                    )
                image = file.convert("L" if channels == 1 else "RGB")
        except Exception as error:  # PIL's decoders raise whatever they meet
            unknown = isinstance(error, UnidentifiedImageError)  # whose text names the path again
            why = "PIL knows no such format" if unknown else reason(error)
            raise DataError(f"{path} cannot be read as an image: {why}") from error
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        images[index] = np.asarray(image).reshape(height, width, channels)

    with ThreadPool() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, about palettes
        done = pool.imap_unordered(decode, range(len(listed)), chunksize=64)
        for _ in tqdm(done, f"reading {listed.root}", len(listed), leave=False, disable=None):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(listed.targets)
