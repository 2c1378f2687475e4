"""The attack: it stays in its box, breaks no proof, and leaves the network as it was."""

import copy

import pytest
import torch
from torch import nn
from truth import around, digits, network

from pcdeq import ACTIVATIONS, build_network, robust
from pcdeq.attack import attack

NETS = [(f"linear_pcdeq_{a.variant}", a.name) for a in ACTIVATIONS.values()]


@pytest.mark.parametrize("name, activation", NETS)
def test_the_attack_breaks_no_proof_and_breaks_something(name, activation):
    model, images, labels = network(name, activation), digits()[2][::4], digits()[3][::4]
    lower, upper = around(images, 0.02)
    proved = robust(model, *around(images, 0.002), labels)
    small = attack(model, images, *(c.float() for c in around(images, 0.002)), labels)
    assert not (proved & (small.margin < -1e-3)).any()
    found = attack(model, images, lower.float(), upper.float(), labels)
    with torch.no_grad():
        logits = model(images)
    clean = (logits.argmax(1) == labels).double().mean()
    attacked = (found.margin > 0).double().mean()
    assert attacked < clean
    inside = (lower.float() <= found.points) & (found.points <= upper.float())
    assert inside.all() and found.points.shape == images.shape
    with torch.no_grad():
        logits = model(found.points)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    margin = logits.gather(1, labels[:, None])[:, 0] - others
    torch.testing.assert_close(margin, found.margin, rtol=0, atol=1e-2)


def test_vectors_are_attacked_as_images_are():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.5], [1.0, 0.9]])
    found = attack(model, x, x - 0.1, x + 0.1, torch.tensor([0, 0]))
    torch.testing.assert_close(found.margin, torch.tensor([0.3, -0.1]))
    torch.testing.assert_close(found.points, x + torch.tensor([-0.1, 0.1]))


def test_an_attack_in_inference_mode_is_the_same():
    model, (x, labels) = network("linear_pcdeq_1", "tanh"), (part[:5] for part in digits()[2:])
    expected = attack(model, x, x - 0.1, x + 0.1, labels, steps=3)
    with torch.inference_mode():
        found = attack(model, x * 1, x - 0.1, x + 0.1, labels * 1, steps=3)
        assert (x * 1).is_inference() and torch.is_inference_mode_enabled()
    assert torch.equal(found.margin, expected.margin)
    assert torch.equal(found.points, expected.points)


def test_an_attack_that_fails_leaves_the_network_as_it_was_too():
    with torch.inference_mode():
        model, x = build_network("linear_pcdeq_1", "tanh"), torch.rand(2, 1, 28, 28)
        with pytest.raises(RuntimeError, match="Inference tensors"):  # no gradient of such a model
            attack(model, x, x - 0.1, x + 0.1, torch.arange(2), steps=1)
        assert model.training and all(p.requires_grad for p in model.parameters())


def test_the_attack_leaves_the_network_as_it_was():
    model = build_network("linear_pcdeq_1", "relu6").train()
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(4, 1, 28, 28)
    attack(model, x, x - 0.1, x + 0.1, torch.arange(4), steps=2)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_attack_takes_no_gradient_of_the_weights(monkeypatch):
    model = network("linear_pcdeq_1", "tanh")
    images, labels = digits()[2][:5], digits()[3][:5]
    frozen = model.classifier.bias.requires_grad_(False)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counted = []
    kind = type(model.block.deq.f.W)
    monkeypatch.setattr(kind, "weight_gradient", staticmethod(lambda z, y: counted.append(1)))
    attack(model, images, images - 0.01, images + 0.01, labels, steps=2)
    assert not counted and not frozen.requires_grad
    assert wanted and all(parameter.requires_grad for parameter in wanted)
    with pytest.raises(ValueError, match="steps must be a whole number from 1 on, not 0"):
        attack(model, images, images, images, labels, steps=0)


class Margins(nn.Module):
    """Two logits whose first is larger by the next of some margins, whatever comes in."""

    def __init__(self, margins):
        super().__init__()
        self.margins = iter(margins)

    def forward(self, x):
        return torch.cat([next(self.margins) + 0 * x, 0 * x], 1)


def test_what_was_broken_stays_broken_behind_nan():
    x = torch.zeros(1, 1)
    for margins, least in ((1, -1, torch.nan, 2), -torch.inf), ((1, -1, 3, 2), -1.0):
        found = attack(Margins(margins), x, x - 1, x + 1, torch.tensor([0]), steps=3)
        assert found.margin.item() == least


def test_an_attack_that_meets_nan_has_broken_the_network():
    model = network("linear_pcdeq_1", "tanh")
    images, labels = digits()[2][:5], digits()[3][:5]
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    margin = attack(model, images, images - 0.01, images + 0.01, labels, steps=2).margin
    assert not (margin > 0).any()
