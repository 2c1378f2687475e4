"""The genuine sets: read through torchvision, verified; where absent, the error helps."""

import errno
import hashlib
import os
import pickle
import re
import shutil
import socket
import tarfile
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from pcdeq.experiments import genuine as genuine_sets
from pcdeq.experiments.data import load
from pcdeq.experiments.errors import DataError
from pcdeq.networks import DATASETS

RNG = np.random.default_rng(0)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


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
    sums = {name: md5(root / "MNIST" / "raw" / name) for name in genuine_sets.MNIST_MD5}
    monkeypatch.setattr(genuine_sets, "MNIST_MD5", sums)
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
    source = genuine_sets.SOURCES[dataset](root)
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
    assert asked and not (tmp_path / "none").exists()  # no empty folder is left behind
    sentence = str(error.value)
    place = tmp_path / "none" / ("MNIST/raw" if dataset == "mnist" else "")
    for words in (*WANTED[dataset], str(place), "--sample", "no route to host"):
        assert words in sentence
    inside = ("MNIST/raw/" if dataset == "mnist" else "") + WANTED[dataset][0]
    assert f"name with --data-root the folder that has {inside}, or" in sentence
    assert "\n" not in sentence


def test_where_nothing_can_be_written_the_error_says_what_to_do_too(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(DataError, match=r"cannot be downloaded \(.*Permission denied.*--sample"):
        load("mnist", root=tmp_path / "none")


def test_only_what_is_missing_is_asked_for(genuine):
    root, _ = genuine
    (root / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"put test_32x32\.mat there"):
        load("svhn", root=root)


STOPS = [URLError("gone"), KeyboardInterrupt(), TimeoutError("slow"), ConnectionResetError()]


@pytest.mark.parametrize("stop", STOPS)
def test_half_a_download_is_not_left_behind(tmp_path, stop):
    half, whole = tmp_path / "half", tmp_path / "whole"

    def read(train: bool):
        assert socket.getdefaulttimeout() == genuine_sets.CONNECT_SECONDS
        half.write_bytes(b"ha")
        whole.write_bytes(b"whole")
        raise stop

    sums = {half: hashlib.md5(b"half").hexdigest(), whole: hashlib.md5(b"whole").hexdigest()}
    source = genuine_sets.Genuine("Some set", tmp_path, sums, {}, "http://example.org", read)
    with pytest.raises(KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else DataError):
        genuine_sets.genuine(source)
    assert socket.getdefaulttimeout() is None
    assert not half.exists() and whole.read_bytes() == b"whole"
