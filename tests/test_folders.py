"""Folders of images: read as torchvision reads them; what is wrong with them is named."""

import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets, transforms

from pcdeq.experiments import data
from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.data import load
from pcdeq.experiments.errors import DataError
from pcdeq.experiments.training import train
from pcdeq.networks import DATASETS, build_network
from pcdeq.weights import CheckpointError, load_network, load_weights

RNG = np.random.default_rng(0)


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


def test_a_network_is_tested_on_a_folder_without_training_images(tmp_path):
    write_images(tmp_path, {"ant": 2, "cat": 3})
    _, expected, _ = load("svhn", image_folder=tmp_path)
    shutil.rmtree(tmp_path / "train")
    network = build_network("single_conv_pcdeq_1", "relu6", "svhn", classes=2)
    images = data.test_set(network, image_folder=tmp_path)
    assert torch.equal(images.images, expected.images)
    assert torch.equal(images.labels, expected.labels)
    assert (images.mean, images.std, images.augment) == (expected.mean, expected.std, False)
    network = build_network("single_conv_pcdeq_1", "relu6", "svhn")
    with pytest.raises(DataError, match="is for 10 classes, the images have 2"):
        data.test_set(network, image_folder=tmp_path)


def test_more_than_8_bits_are_refused(tmp_path):
    """PIL would clip them to white."""
    write_images(tmp_path, {"a": 1, "b": 1})
    deep = Image.fromarray(np.full((20, 20), 31_000, np.uint16))
    deep.save(tmp_path / "train" / "b" / "0.png")
    with pytest.raises(DataError, match=r"train/b/0\.png .*more than 8 bits"):
        load("svhn", image_folder=tmp_path)


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
        data.test_set(
            build_network("multi_conv_pcdeq_1", "tanh", "cifar", classes=2), image_folder=tmp_path
        )
        assert not caught


def test_classes_must_be_the_same(tmp_path):
    write_images(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    with pytest.raises(DataError, match="same classes; only one of them has b, c"):
        load("cifar", image_folder=tmp_path)


def test_a_network_knows_the_names_of_its_classes(tmp_path):
    write_images(tmp_path / "pets", {"cat": 4, "dog": 4})
    config = RunConfig("svhn", "multi_conv_pcdeq_1", "tanh", 1e-3, 1, 0.0, 4, 1)
    config = replace(config, image_folder=str(tmp_path / "pets"), out=str(tmp_path / "run"))
    train(config)
    network = load_network(tmp_path / "run" / "best.pth")
    assert network.class_names == ("cat", "dog")
    images = data.test_set(network, image_folder=tmp_path / "pets")
    assert images.class_names == ("cat", "dog")
    write_images(tmp_path / "others", {"cat": 2, "emu": 2})
    with pytest.raises(DataError, match="only the network knows dog; only the images have emu"):
        data.test_set(network, image_folder=tmp_path / "others")
    for part in ("train", "test"):  # the same images under other names
        (tmp_path / "pets" / part / "cat").rename(tmp_path / "pets" / part / "ape")
    with pytest.raises(CheckpointError, match=r"class_names is .*cat.* not .*ape"):
        train(replace(config, resume=True, epochs=2))
    load_weights(network, authors_file(network, tmp_path))
    assert network.class_names == ()


def authors_file(network, folder):
    torch.save(network.state_dict(), folder / "plain.pth")
    return folder / "plain.pth"


def test_ten_classes_of_ones_own_are_not_digits():
    network = build_network("linear_pcdeq_1", "tanh")
    assert len(data.test_set(network, sample=True)) == 1000
    network.class_names = tuple("abcdefghij")
    with pytest.raises(
        DataError,
        match=r"network knows a, b, c, d, e, \.\.\.; only the images have 0, 1, 2, 3, 4, \.\.\.$",
    ):
        data.test_set(network, sample=True)
    network.class_names = data.DIGITS
    assert len(data.test_set(network, sample=True)) == 1000


def test_a_hidden_folder_is_no_class(tmp_path):
    write_images(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "train" / ".git").mkdir()
    train_set, _, classes = load("svhn", image_folder=tmp_path)
    assert classes == 2 and train_set.class_names == ("cat", "dog")
    assert train_set.labels.tolist() == [0, 0, 1, 1]
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).rename(tmp_path / "train" / f".{name}")
    with pytest.raises(DataError, match="train: it holds no folder of a class"):
        load("svhn", image_folder=tmp_path)


def test_hidden_files_are_no_images_and_what_else_is_left_out_is_said(tmp_path, capsys):
    write_images(tmp_path, {"cat": 2, "dog": 2})
    cats = tmp_path / "train" / "cat"
    (cats / ".thumbnails").mkdir()
    shutil.copy(cats / "0.png", cats / ".thumbnails" / "0.png")
    (cats / "._0.png").write_bytes(b"as macOS leaves them")
    train_set, _, _ = load("svhn", image_folder=tmp_path)
    assert len(train_set) == 4 and capsys.readouterr().err == ""
    (cats / "1.png").rename(cats / "1.heic")
    train_set, _, _ = load("svhn", image_folder=tmp_path)
    assert len(train_set) == 3
    err = capsys.readouterr().err
    assert f"train: 1 other file left out, as {cats / '1.heic'}: images end in .jpg" in err
    (cats / "0.png").unlink()
    with pytest.raises(DataError, match=r"for the classes cat \(images end in \.jpg.*\.webp\)$"):
        load("svhn", image_folder=tmp_path)


def test_a_run_does_not_go_on_with_other_test_images(tmp_path):
    write_images(tmp_path / "pets", {"cat": 4, "dog": 4})
    config = RunConfig("svhn", "multi_conv_pcdeq_1", "tanh", 1e-3, 1, 0.0, 4, 1)
    config = replace(config, image_folder=str(tmp_path / "pets"), out=str(tmp_path / "run"))
    train(config)
    cats, dogs = (tmp_path / "pets" / "test" / name / "0.png" for name in ("cat", "dog"))
    shutil.copy(cats, dogs)
    with pytest.raises(CheckpointError, match="other test images"):
        train(replace(config, resume=True, epochs=2))


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


def test_a_class_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    write_images(tmp_path, {"a": 1, "closed": 1})
    monkeypatch.setattr(os, "access", lambda place, mode: not str(place).endswith("closed"))
    with pytest.raises(DataError, match="train: no permission to read closed"):
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
