"""The rounding of proofs on boxes against exact fractions and 40 digits: each allowance counts."""

from fractions import Fraction

import mpmath
import torch
from torch import nn
from truth import block_of, digits, network

from pcdeq import PcDEQLinear, robust
from pcdeq.enclosures import UNIT
from pcdeq.injections import positive
from pcdeq.robustness import INJECTION_ERROR, Box, image, logit_bounds


def fractions(values) -> list[Fraction]:
    return [Fraction(value) for value in values.flatten().tolist()]


def holds(box: Box, values: list) -> bool:
    """Whether exact values lie in a box, which is a point but for its rounding."""
    lower, upper = fractions(box.lower), fractions(box.upper)
    return all(low <= v <= high for low, v, high in zip(lower, values, upper, strict=True))


def test_the_centre_and_the_radius_hold_the_box():
    lower = torch.randn(2000).double()
    for width in (1.0, 1e-9):
        upper = lower + width * torch.rand(2000).double()
        centre, radius = map(fractions, Box(lower, upper).centred())
        ends = zip(centre, radius, fractions(lower), fractions(upper), strict=True)
        assert all(c - r <= low and high <= c + r for c, r, low, high in ends)


def test_the_mean_of_a_pool_is_inside():
    pool = nn.AvgPool2d(3)
    for _ in range(200):
        x = torch.randn(1, 1, 3, 3).double()
        assert holds(image(pool, Box(x, x)), [sum(fractions(x)) / 9])


def test_a_normalised_value_is_inside():
    norm = nn.BatchNorm1d(200).double().eval()
    with torch.no_grad():
        norm.running_mean.normal_(), norm.running_var.uniform_(0.1, 2)
        norm.weight.normal_(), norm.bias.normal_()
    x = torch.randn(1, 200).double()
    box = image(norm, Box(x, x))
    rows = (norm.running_mean, norm.running_var, norm.weight, norm.bias, x[0], *(b[0] for b in box))
    for row in zip(*(t.tolist() for t in rows), strict=True):
        mean, variance, weight, bias, value, low, high = map(mpmath.mpf, row)
        true = (value - mean) * weight / mpmath.sqrt(variance + mpmath.mpf(norm.eps)) + bias
        assert low <= true <= high


def test_a_margin_below_zero_is_not_proved_by_rounding():
    """Sums of a thousand terms of size 1e8 that cancel to a hair below zero."""
    for _ in range(40):
        classifier = nn.Linear(1000, 2).double()
        x = torch.rand(1, 1000).double()
        with torch.no_grad():
            classifier.weight[0] = 1e8 * torch.randn(1000).double()
            classifier.weight[1] = 0
            terms = zip(fractions(classifier.weight[0]), fractions(x), strict=True)
            total = sum(w * value for w, value in terms)
            classifier.bias[0], classifier.bias[1] = -float(total), float(abs(total)) * 2e-16
        margin = total + Fraction(classifier.bias[0].item()) - Fraction(classifier.bias[1].item())
        assert margin <= 0
        assert not robust(nn.Sequential(classifier), x, x, torch.tensor([0])).item()


def test_softplus_is_as_exact_as_is_taken_off():
    worst = 0
    for h in torch.linspace(-130, 8, 2000).double():
        true = mpmath.log1p(mpmath.exp(5 * mpmath.mpf(h.item()))) / 5
        found = mpmath.mpf(positive(h).item())
        worst = max(worst, abs(found / true - 1))
    assert 2 * UNIT < worst < INJECTION_ERROR


def test_an_injection_that_underflows_leaves_what_is_positive():
    h = torch.full((1, 1), -400.0)
    block = block_of(torch.tensor([[2.0]]), "tanh")  # of any x > 0 the fixed point is above 0.9
    box = image(block, Box(h.double(), h.double()))
    with torch.no_grad():
        x = block.inject(h)
    assert 0 < x.item() < 1e-37 and box.upper.item() > 0.9
    wide = image(block.double(), Box(h.double(), h.double()))
    assert wide.lower.item() == 0 and wide.upper.item() > 0.9


def test_autocast_makes_no_proof_coarser():
    model, images, labels = network("linear_pcdeq_1", "tanh"), digits()[2][:40], digits()[3][:40]
    expected, proved = logit_bounds(model, images, images), robust(model, images, images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = logit_bounds(model, images, images)
        assert torch.equal(robust(model, images, images, labels), proved)
    assert torch.equal(found.lower, expected.lower) and torch.equal(found.upper, expected.upper)


def test_where_nothing_is_known_the_logits_have_no_bounds():
    model = nn.Sequential(PcDEQLinear(8), nn.Linear(8, 2))
    x = torch.rand(3, 8)
    assert all(bound.isfinite().all() for bound in logit_bounds(model, x, x))
    broken = x.clone()
    broken[1] = torch.nan
    found = logit_bounds(model, broken, broken)
    assert (found.lower[1] == -torch.inf).all() and (found.upper[1] == torch.inf).all()
    assert found.lower[::2].isfinite().all() and found.upper[::2].isfinite().all()
    with torch.no_grad():
        model[0].deq.f.W.weight_v[0, 0] = -1
    found = logit_bounds(model, x, x)
    assert (found.lower == -torch.inf).all() and (found.upper == torch.inf).all()


def test_vectors_may_have_axes_before_the_last_one():
    block = PcDEQLinear(8)
    model = nn.Sequential(nn.Linear(8, 8), block, nn.Flatten(), nn.Linear(24, 3)).eval()
    block.deq.tol = 1e-6
    x = torch.randn(5, 3, 8)
    found = logit_bounds(model, x, x)
    with torch.no_grad():
        logits = model(x)
    assert (found.lower - 1e-4 < logits).all() and (logits < found.upper + 1e-4).all()
    assert robust(model, x, x, logits.argmax(1)).all()
