"""Proofs on boxes: bounds that no point leaves, corners that reach them."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from truth import around, block_of, digits, network, random_weight

from pcdeq import ACTIVATIONS, PcDEQLinear, robust
from pcdeq.attack import attack
from pcdeq.enclosures import Operator, enclose
from pcdeq.robustness import SLACK, Box, image, logit_bounds

NETS = [(f"linear_pcdeq_{a.variant}", a.name) for a in ACTIVATIONS.values()]
CONV = ("multi_conv_pcdeq_2", "sigmoid")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_corners_of_a_box_reach_the_bounds(kind, activation):
    torch.manual_seed(0)
    W = random_weight(8, 0.8, 1.0, 7) if kind == "linear" else torch.rand(3, 3, 3, 3) / 27
    block = block_of(W, activation, torch.float64)
    block.deq.tol, block.deq.max_iter = 1e-13, 5000
    shape = (5, 8) if kind == "linear" else (5, 3, 4, 6)
    lower = torch.randn(shape).double() * 2 - 1
    upper = lower + torch.rand(shape)
    with torch.no_grad():
        ends = block(lower), block(upper)
    found = enclose(Operator(block.deq.f), block.inject(lower), block.inject(upper), tol=1e-14)
    torch.testing.assert_close(found.lower, ends[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found.upper, ends[1], rtol=0, atol=1e-9)
    box = image(block, Box(lower, upper))
    assert (box.lower <= ends[0] + 1e-12).all() and (ends[1] - 1e-12 <= box.upper).all()
    torch.testing.assert_close(box.lower, ends[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(box.upper, ends[1], rtol=0, atol=1e-4)


def points_of(lower, upper, count=20):
    """Random points of the boxes, some coordinates at their ends, and both corners."""
    yield from (lower, upper, (lower + upper) / 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        t = torch.rand(lower.shape, generator=generator, dtype=lower.dtype)
        yield lower + (upper - lower) * t
        yield torch.where(t < 0.5, lower, upper)


def check_bounds(model, lower, upper, labels, count=20) -> None:
    """No point of the boxes leaves the bounds of the logits, the attack's results least of all."""
    bounds = logit_bounds(model, lower, upper)
    start = (lower + upper) / 2
    found = attack(model, start, lower, upper, labels, steps=8).points
    with torch.no_grad():
        for x in (*points_of(lower, upper, count), found):
            logits = model(x)
            assert (bounds.lower - 1e-10 <= logits).all() and (logits <= bounds.upper + 1e-10).all()


@pytest.mark.parametrize("name, activation", NETS)
@pytest.mark.parametrize("radius", [0.0, 0.002, 0.05])
def test_no_point_leaves_the_bounds(name, activation, radius):
    images, labels = digits()[2][::25], digits()[3][::25]
    check_bounds(network(name, activation, double=True), *around(images, radius), labels)


def test_no_point_leaves_the_bounds_of_a_conv_network():
    images, labels = digits()[2][::250], digits()[3][::250]
    model = network(*CONV, double=True)
    check_bounds(model, *around(images, 1e-4), labels, count=2)


def test_batch_norm_may_turn_a_box_over():
    model = network("linear_pcdeq_1", "tanh", double=True)
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.weight[::2] *= -1
            norm.bias += 0.1
    images, labels = digits()[2][::50], digits()[3][::50]
    check_bounds(model, *around(images, 0.01), labels)


LAYERS = {
    "linear": nn.Linear(6, 4),
    "linear without bias": nn.Linear(6, 4, bias=False),
    "conv": nn.Conv2d(2, 3, 3, padding=1),
    "conv with stride": nn.Conv2d(2, 3, 3, stride=2),
    "batch norm": nn.BatchNorm2d(2),
    "max pool": nn.MaxPool2d(3, stride=1, padding=1),
    "average pool": nn.AvgPool2d(2),
    "flatten": nn.Flatten(),
    "relu": nn.ReLU(),
    "dropout": nn.Dropout(),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_map_boxes_onto_the_smallest(layer):
    """Corners chosen by the sign of each output's gradient reach both bounds."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double().eval()
    if isinstance(layer, nn.BatchNorm2d):
        layer.weight.data = torch.tensor([-1.5, 0.5]).double()
        layer.running_mean, layer.running_var = torch.tensor([[0.3, -2.0], [4.0, 0.1]]).double()
    shape = (1, 6) if isinstance(layer, nn.Linear) else (1, 2, 6, 6)
    lower = torch.randn(shape).double()
    upper = lower + torch.rand(shape) * 0.1
    box = image(layer, Box(lower, upper))
    for i in range(box.lower.numel()):
        x = ((lower + upper) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(layer(x).flatten()[i], x)
        high, low = torch.where(slope > 0, upper, lower), torch.where(slope > 0, lower, upper)
        most, least = (layer(end).detach().flatten()[i] for end in (high, low))
        assert box.lower.flatten()[i] <= least + 1e-15 and most <= box.upper.flatten()[i] + 1e-15
        if not isinstance(layer, nn.MaxPool2d):  # whose maximum may move to another pixel
            assert most - least == pytest.approx(
                (box.upper - box.lower).flatten()[i].item(), abs=1e-12
            )
    with torch.no_grad():
        for x in points_of(lower, upper):
            assert (box.lower <= layer(x) + 1e-15).all() and (layer(x) <= box.upper + 1e-15).all()


def test_rounding_stays_inside_where_sums_cancel():
    """A thousand terms of alternating sign and size 1e8, whose exact sum is known."""
    layer = nn.Linear(1000, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1e8 + 0.1, -1e8]).repeat(500))
        layer.bias.fill_(-50.0)
    x = torch.full((1, 1000), 0.7, dtype=torch.float64)
    w, b = layer.weight.detach()[0].tolist(), layer.bias.item()
    exact = sum(Fraction(wi) * Fraction(0.7) for wi in w) + Fraction(b)
    box = image(layer, Box(x, x))
    assert Fraction(box.lower.item()) <= exact <= Fraction(box.upper.item())
    assert 0 < (box.upper - box.lower).item() < 1e-1


@pytest.mark.parametrize("name, activation", NETS)
def test_a_radius_of_0_proves_what_is_right_and_nothing_else(name, activation):
    model, images, labels = network(name, activation, double=True), digits()[2], digits()[3]
    x = images.double()
    proved = robust(model, x, x, labels)
    with torch.no_grad():
        logits = model(x)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    margin = logits.gather(1, labels[:, None])[:, 0] - others
    assert proved.dtype == torch.bool and proved.shape == labels.shape
    assert not proved[margin <= 0].any()
    assert proved[margin > 2 * SLACK].all()
    assert 0.8 < proved.double().mean() <= (margin > 0).double().mean()


def test_larger_boxes_prove_less():
    model, images, labels = network("linear_pcdeq_2", "sigmoid"), digits()[2], digits()[3]
    before = torch.ones(len(images), dtype=torch.bool)
    for radius in (0.0, 0.001, 0.004, 0.01, 0.05, 1.0):
        proved = robust(model, *around(images, radius), labels)
        assert not (proved & ~before).any()
        before = proved
        if radius == 0.001:
            assert proved.double().mean() > 0.8
    assert not before.any()


def test_without_the_theorem_nothing_is_proved():
    model = network("linear_pcdeq_1", "tanh")
    images, labels = digits()[2][:50], digits()[3][:50]
    assert robust(model, images, images, labels).any()
    with torch.no_grad():
        model.block.deq.f.W.weight_v[3, 5] = -1e-3
    assert not robust(model, images, images, labels).any()
    model = network("linear_pcdeq_1", "tanh")
    images = images.clone()
    images[0] = torch.nan
    proved = robust(model, images, images, labels)
    assert not proved[0] and proved[1:].any()


def test_an_empty_box_proves_nothing():
    model = network("linear_pcdeq_1", "tanh")
    images, labels = digits()[2][:5], digits()[3][:5]
    with pytest.raises(ValueError, match="lower corner above"):
        robust(model, images + 0.2, images - 0.2, labels)
    for wrong in (labels - 10, labels + 10, labels.float()):
        with pytest.raises(ValueError, match="classes from 0 to 9"):
            robust(model, images, images, wrong)


def test_a_relu_in_place_leaves_the_box_as_it_was():
    box = Box(torch.randn(3, 4).double() - 1, torch.randn(3, 4).double() + 5)
    before = box.lower.clone(), box.upper.clone()
    found = image(nn.ReLU(inplace=True), box)
    assert torch.equal(found.lower, before[0].relu()) and torch.equal(found.upper, before[1].relu())
    assert torch.equal(box.lower, before[0]) and torch.equal(box.upper, before[1])


def test_a_parametrized_weight_is_the_one_that_is_used():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.manual_seed(2)
    plain = nn.Sequential(nn.Linear(5, 6), PcDEQLinear(6), nn.Linear(6, 3)).eval()
    doubled = copy.deepcopy(plain)
    for model in (plain, doubled):
        with torch.no_grad():
            model[0].weight.mul_(1 if model is doubled else 2)
    parametrize.register_parametrization(doubled[0], "weight", Doubled())
    x = torch.rand(7, 5)
    for ours, theirs in zip(logit_bounds(doubled, x, x), logit_bounds(plain, x, x), strict=True):
        assert torch.equal(ours, theirs)


def test_a_weight_that_changes_in_training_stays_as_it_is():
    torch.manual_seed(3)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6))
    model = nn.Sequential(first, PcDEQLinear(6), nn.Linear(6, 3))
    before, x = copy.deepcopy(model.state_dict()), torch.rand(7, 5)
    bounds = [logit_bounds(model, x, x) for _ in range(2)]
    robust(model, x, x, torch.zeros(7, dtype=torch.int64))
    assert model.training and first.training
    assert torch.equal(bounds[0].lower, bounds[1].lower)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sequences_may_be_nested():
    torch.manual_seed(1)
    flat = nn.Sequential(nn.Linear(5, 6), PcDEQLinear(6), nn.Linear(6, 3)).eval()
    nested = nn.Sequential(nn.Sequential(flat[0], flat[1]), flat[2])
    x = torch.rand(7, 5)
    for box in ((x, x), (x - 0.01, x + 0.01)):
        assert torch.equal(logit_bounds(flat, *box).lower, logit_bounds(nested, *box).lower)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, activation",
    [("single_conv_pcdeq_1", "tanh"), ("multi_conv_pcdeq_1", "relu6"), CONV],
)
def test_conv_networks_at_length(name, activation):
    """Certified, attacked, bounded: trained conv networks at radii where something is proved."""
    every = 200 if name.startswith("single") else 50
    images, labels = digits()[2][::every], digits()[3][::every]
    for radius in (0.0, 2e-4):
        model = network(name, activation)
        proved = robust(model, *around(images, radius), labels)
        corners = (corner.float() for corner in around(images, radius))
        found = attack(model, images, *corners, labels)
        assert not (proved & (found.margin < -1e-2)).any()
        if radius == 0:
            assert proved.sum() == (found.margin > 0).sum()
        model = network(name, activation, double=True)
        check_bounds(model, *around(images[:4], radius), labels[:4], count=2)
