"""What ``robust`` has no proof for it refuses, in a sentence that names it."""

import re

import pytest
import torch
from torch import nn
from truth import digits, network

from pcdeq import PcDEQConv2d, PcDEQLinear, robust
from pcdeq.robustness import Box, image, logit_bounds


def test_what_it_does_not_know_it_refuses():
    x = torch.rand(2, 4)
    with pytest.raises(TypeError, match="no interval image is known for Tanh"):
        robust(nn.Sequential(nn.Tanh(), nn.Linear(4, 2)), x, x, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="last layer must be"):
        robust(nn.Sequential(nn.Linear(4, 2), nn.Flatten()), x, x, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"must be an nn\.Sequential, not Linear"):
        robust(nn.Linear(4, 2), x, x, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="last layer must be"):
        robust(nn.Sequential(), x, x, torch.tensor([0, 1]))
    plain = nn.Sequential(nn.Linear(4, 2))
    for targets in (torch.tensor([0]), torch.tensor([[1, 0], [0, 1]])):
        with pytest.raises(ValueError, match=r"targets of shape \(B,\)"):
            robust(plain, x, x, targets)

    with pytest.raises(ValueError, match=r"corners differ in shape: \(2, 4\) and \(1, 4\)"):
        logit_bounds(plain, x, x[:1])

    class Negated(nn.Linear):
        def forward(self, h):
            return -super().forward(h)

    class Skipping(nn.Sequential):
        def forward(self, h):
            return h + super().forward(h)

    for model in (nn.Sequential(Negated(4, 4), *plain), Skipping(nn.Linear(4, 4), *plain)):
        with pytest.raises(TypeError, match="has a forward of its own"):
            robust(model, x, x, torch.tensor([0, 1]))
    replaced = nn.Sequential(nn.Linear(4, 4), *plain)
    replaced[0].forward = lambda h: -h
    with pytest.raises(TypeError, match="has a forward of its own"):
        robust(replaced, x, x, torch.tensor([0, 1]))
    plain[0].register_forward_hook(lambda *io: -io[2])
    with pytest.raises(TypeError, match="Linear with a forward hook"):
        robust(plain, x, x, torch.tensor([0, 1]))

    class Squared(PcDEQLinear):
        def inject(self, h):
            return h * h + 0.01

    own = PcDEQLinear(4)
    own.inject = lambda h: h * h + 0.01
    for block in (Squared(4), own):
        with pytest.raises(TypeError, match="has a forward of its own"):
            robust(nn.Sequential(block, nn.Linear(4, 4)), x, x, torch.tensor([0, 1]))
    inner = nn.Sequential(PcDEQLinear(4), nn.Linear(4, 4))
    inner[0].deq.register_forward_hook(lambda *io: -io[2])
    with pytest.raises(TypeError, match="Equilibrium with a forward hook"):
        robust(inner, x, x, torch.tensor([0, 1]))
    model = nn.Sequential(nn.Linear(4, 4))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *io: -io[2])
    with everywhere, pytest.raises(TypeError, match="with a forward hook"):
        robust(model, x, x, torch.tensor([0, 1]))
    pixels = Box(torch.rand(1, 2, 8, 8).double(), torch.rand(1, 2, 8, 8).double())
    for pool in (nn.AvgPool2d(2, divisor_override=-1), nn.MaxPool2d(2, return_indices=True)):
        with pytest.raises(TypeError, match="no interval image is known for"):
            image(pool, pixels)
    with pytest.raises(TypeError, match="targets must be a tensor, not list"):
        robust(nn.Sequential(nn.Linear(4, 4)), x, x, [0, 1])
    for conv in (nn.Conv2d(2, 2, 3, dilation=2), nn.Conv2d(2, 2, 3, padding="same")):
        with pytest.raises(TypeError, match="no interval image is known for Conv2d"):
            image(conv, Box(torch.rand(1, 2, 8, 8).double(), torch.rand(1, 2, 8, 8).double()))


@pytest.mark.parametrize(
    "shape, words",
    [
        ((2, 1, 28, 27), r"Linear takes no inputs of shape \(2, 756\)"),
        ((2, 28), r"Linear takes no inputs of shape \(2, 28\)"),
        ((2,), r"Flatten takes no inputs of shape \(2,\)"),
    ],
)
def test_inputs_of_another_shape_are_named(shape, words):
    x = torch.rand(shape)
    with pytest.raises(ValueError, match=words):
        robust(network("linear_pcdeq_1", "tanh"), x, x, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "layer, shape, name",
    [
        (nn.Linear(4, 4), (2, 3, 4), "the last Linear"),
        (nn.Conv2d(3, 4, 3), (2, 4, 5, 5), "Conv2d"),
        (nn.Conv2d(3, 4, 3), (3, 5, 5), "Conv2d"),
        (nn.BatchNorm2d(1), (2, 3, 2, 2), "BatchNorm2d"),
        (nn.MaxPool2d(2), (2, 4, 4), "MaxPool2d"),
        (nn.AvgPool2d(2), (2, 4), "AvgPool2d"),
        (PcDEQLinear(4), (2, 3), "PcDEQLinear"),
        (PcDEQConv2d(4), (2, 3, 5, 5), "PcDEQConv2d"),
    ],
)
def test_the_layer_that_an_input_does_not_fit_is_named(layer, shape, name):
    x = torch.rand(shape)
    model = nn.Sequential(layer, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=re.escape(f"{name} takes no inputs of shape {shape}")):
        robust(model, x, x, torch.zeros(len(x), dtype=torch.int64))


def test_running_out_of_memory_is_no_wrong_shape(monkeypatch):
    def enclose(*_, **__):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr("pcdeq.robustness.enclose", enclose)
    images = digits()[2][:2]
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        robust(network("linear_pcdeq_1", "tanh"), images, images, torch.tensor([0, 1]))


def test_corners_are_tensors_of_floating_dtype():
    model, images = network("linear_pcdeq_1", "tanh"), torch.randint(256, (2, 1, 28, 28)).byte()
    with pytest.raises(TypeError, match=r"floating tensors, not torch\.uint8"):
        robust(model, images, images, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="floating tensors, not list"):
        logit_bounds(model, images.tolist(), images.float())
    with pytest.raises(TypeError, match="floating tensors, not list"):
        robust(model, images.float(), images.tolist(), torch.tensor([0, 1]))
