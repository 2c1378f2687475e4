"""Enclosures against 40-digit arithmetic: sound for every σ, from W = 0 to spectral radius 50."""

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import (
    SLOPE,
    apply_exactly,
    block_of,
    dense,
    digits,
    exact,
    fixed_point_exactly,
    injected,
    is_below,
    random_weight,
    trained,
    weights_and_inputs,
)

from pcdeq import ACTIVATIONS
from pcdeq.enclosures import Operator, enclose, product


@st.composite
def problems(draw):
    """A block and one x: nonnegative W, x from 1e-8 to 1e3 (0 too where σ(0) > 0)."""
    activation, W, x = draw(weights_and_inputs(most=5))
    n = len(W)
    if activation == "sigmoid":
        x = x * torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return block_of(W, activation, dtype), x.to(dtype)[None]


def check_enclosure(block, x: torch.Tensor, **options) -> None:
    """f(l) ≥ l and f(u) ≤ u in 40 digits, which puts z* between them."""
    found = enclose(Operator(block.deq.f), x, **options)
    lower, upper = exact(found.lower[0]), exact(found.upper[0])
    top = mpmath.matrix([mpmath.mpf(block.activation.supremum)] * len(lower))
    assert is_below(lower, apply_exactly(block, lower, exact(x[0])))
    assert is_below(apply_exactly(block, upper, exact(x[0])), upper)
    assert is_below(lower, upper) and is_below(upper, top) and min(lower) >= 0


@given(problems(), st.sampled_from([1e-13, 1e-4, 10.0]), st.sampled_from([1, 2, 30, 400]))
@settings(deadline=None, max_examples=400)
def test_a_bound_is_one_in_40_digits(problem, tol, steps):
    check_enclosure(*problem, tol=tol, steps=steps)


@given(problems())
@settings(deadline=None, max_examples=150)
def test_the_fixed_point_lies_between(problem):
    block, x = problem
    z = fixed_point_exactly(block, exact(x[0]))
    found = enclose(Operator(block.deq.f), x)
    assert is_below(exact(found.lower[0]), z) and is_below(z, exact(found.upper[0]))


def rounding(factor):
    start = Operator.__init__

    def initialise(self, layer):
        start(self, layer)
        self.rounding *= factor

    return "__init__", initialise


def always_up():
    image = Operator.image
    return "image", lambda self, z, x, side: image(self, z, x, 1)


def in_float32():
    def image(self, z, x, side):
        s = self.weight.float() @ z[0].float() + x[0].float()
        return self.sigma.function(s).double()[None] * (1 + side * self.rounding)

    return "image", image


@pytest.mark.parametrize(
    "fault",
    [lambda: rounding(0.0), lambda: rounding(-1.0), always_up, in_float32],
    ids=["no 1 − ε", "its sign", "both ends upward", "in float32"],
)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    block = block_of(random_weight(5, 0.7, 1.0, 3), "tanh", torch.float64)

    def check():
        for k in range(1, 21):
            x = torch.full((1, 5), 0.1 * k, dtype=torch.float64)
            check_enclosure(block, x, tol=1e-15)

    check()
    monkeypatch.setattr(Operator, *fault())
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_tight_on_trained_networks(activation):
    variant = ACTIVATIONS[activation].variant
    model = trained(f"linear_pcdeq_{variant}", activation)
    ((block, x),) = injected(model, digits()[2][:200])
    operator = Operator(block.deq.f)
    found = enclose(operator, x)
    assert (found.upper - found.lower).max() < 2e-4
    assert found.steps < 150
    tight = enclose(operator, x, tol=1e-14)
    assert (tight.upper - tight.lower).max() < 1e-11
    assert (found.lower <= tight.lower).all() and (tight.upper <= found.upper).all()


def test_where_float32_fails_the_directed_iteration_takes_over():
    """A subnormal x, and a pair of samples of which one needs millions of steps."""
    block = block_of(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), "tanh")
    x = torch.tensor([[1.0, 1.0], [1e-45, 1e-45], [1e-6, 1e-20]])
    found = enclose(Operator(block.deq.f), x, steps=50)
    for i in range(3):
        check_enclosure(block, x[i : i + 1], steps=50)
    assert (found.upper - found.lower)[0].max() < 1e-4
    assert found.upper[2, 1] > 0.01  # wide, but sound


@pytest.mark.parametrize("off", [0.5, 0.999, 1.0001, 2.0])
def test_candidates_from_anywhere_do(off, monkeypatch):
    """Float32 iterates far too low or too high: found out, and replaced by 0 or M."""
    rough = Operator.rough

    def wrong(self, x):
        f = rough(self, x)
        return lambda z: f(z) * off

    monkeypatch.setattr(Operator, "rough", wrong)
    for activation in ACTIVATIONS:
        block = block_of(random_weight(4, 0.6, 1.0, 2), activation)
        x = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
        check_enclosure(block, x)
        check_enclosure(block, x, tol=1e-13)
        found = enclose(Operator(block.deq.f), x, tol=1e-13)
        assert (found.upper - found.lower).max() < 1e-10


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_slope_is_between_its_roundings(activation):
    """From where nothing is left of σ' but its rounding to where it underflows."""
    operator = Operator(block_of(torch.tensor([[1.0]]), activation, torch.float64).deq.f)
    for s in 10.0 ** torch.arange(-12, 2.6, 0.02).double():
        true = SLOPE[activation](mpmath.mpf(s.item()), False)
        high, low = (mpmath.mpf(operator.slope(s, side).item()) for side in (1, -1))
        assert low <= true <= high and high - low < 1e-12


@pytest.mark.parametrize("stride, padding, size", [(1, 1, 3), (2, 0, 3), (2, 1, 3), (1, 0, 1)])
def test_the_product_is_the_convolution(stride, padding, size):
    torch.manual_seed(0)
    z, w = torch.rand(3, 4, 9, 8).double(), torch.rand(5, 4, size, size).double()
    expected = F.conv2d(z, w, stride=stride, padding=padding)
    torch.testing.assert_close(product(w, z, stride, padding), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_convolution_is_its_dense_matrix(activation):
    torch.manual_seed(1)
    block = block_of(torch.rand(3, 3, 3, 3) / 18, activation)
    matrix = dense(block, 5, 4)
    x = torch.rand(4, 3, 5, 4) + 0.01
    z = torch.rand(4, 3, 5, 4).double()
    flat = (z.flatten(1) @ matrix.t()).view_as(z)
    operator = Operator(block.deq.f)
    torch.testing.assert_close(operator.product(z), flat, rtol=1e-14, atol=0)
    found = enclose(operator, x, tol=1e-14)
    other = enclose(Operator(block_of(matrix, activation, torch.float64).deq.f), x.flatten(1))
    assert (found.lower.flatten(1) <= other.upper).all()
    assert (other.lower <= found.upper.flatten(1)).all()
    assert (found.upper - found.lower).max() < 1e-12


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("radius", [0.5, 3.0])
def test_every_start_ends_inside(activation, radius):
    """Uniqueness: hundreds of random starts in [0, M], one limit."""
    torch.manual_seed(2)
    block = block_of(random_weight(12, radius, 0.7, 5), activation)
    x = torch.rand(1, 12) * 0.3 + 1e-3
    operator = Operator(block.deq.f)
    found = enclose(operator, x)
    z = torch.rand(300, 12).double() * block.activation.supremum
    z[0], z[1] = 0, block.activation.supremum
    for _ in range(max(found.steps, 200)):
        z = block.activation.function(operator.argument(z, x.double()))
    assert (found.lower <= z).all() and (z <= found.upper).all()
    assert (found.upper - found.lower).max() < 1e-4


def test_a_box_of_x_holds_the_fixed_points_of_all_its_x():
    torch.manual_seed(3)
    block = block_of(random_weight(6, 0.9, 1.0, 1), "softsign")
    low = torch.rand(1, 6) * 0.2 + 1e-3
    high = low + torch.rand(1, 6)
    found = enclose(Operator(block.deq.f), low, high, tol=1e-14)
    x = low + torch.rand(500, 6) * (high - low)
    inside = enclose(Operator(block.deq.f), torch.cat([x, low, high]))
    assert (inside.upper >= found.lower).all() and (inside.lower <= found.upper).all()
    ends = enclose(Operator(block.deq.f), torch.cat([low, high]), tol=1e-14)
    torch.testing.assert_close(ends.lower[0], found.lower[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(ends.upper[1], found.upper[0], rtol=0, atol=1e-12)


@pytest.mark.slow
@given(problems(), st.sampled_from([1e-13, 1e-4]), st.sampled_from([3, 100, 400]))
@settings(deadline=None, max_examples=5000)
def test_thousands_of_bounds_in_40_digits(problem, tol, steps):
    check_enclosure(*problem, tol=tol, steps=steps)
