"""Bounds on the rate against dense eigenvalues, and on the iterations against counted ones."""

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import (
    block_of,
    dense,
    digits,
    exact,
    fixed_point_exactly,
    injected,
    jacobian_exactly,
    radius_exactly,
    spectral_radius,
    trained,
    weights_and_inputs,
)

from pcdeq import ACTIVATIONS, rates
from pcdeq.enclosures import Operator, enclose
from pcdeq.rates import predicted_iterations, rate_bounds
from pcdeq.solvers import picard


@st.composite
def problems(draw):
    activation, W, x = draw(weights_and_inputs(most=4))
    return block_of(W, activation), x.float()[None]


def bounds_of(block, x, **options):
    operator = Operator(block.deq.f)
    found = enclose(operator, x, **options)
    return rate_bounds(operator, x, found.lower, found.upper)


def check_rates(block, x) -> None:
    """lower ≤ ρ(J(z*)) ≤ upper, with z*, J and ρ in 40 digits."""
    lower, upper = bounds_of(block, x)
    z = fixed_point_exactly(block, exact(x[0]))
    right, left = (jacobian_exactly(block, z, exact(x[0]), side) for side in (False, True))
    error = mpmath.mpf(10) ** -9  # of a defective eigenvalue: the fourth root of 1e-40, at most
    assert lower.item() <= radius_exactly(right) + error
    assert radius_exactly(left) - error <= upper.item()


@given(problems())
@settings(deadline=None, max_examples=200)
def test_the_spectral_radius_lies_between(problem):
    check_rates(*problem)


# Each with a note on what is special about it, and the spectral radius of W itself.
SPECIAL = {
    "periodic": torch.tensor([[0, 0.9], [0.9, 0]]),
    "a cycle of three": torch.tensor([[0, 0.5, 0], [0, 0, 2.0], [0.7, 0, 0]]),
    "reducible": torch.tensor([[0.5, 1.0], [0, 0.8]]),
    "two classes, the weak one first": torch.tensor([[0.1, 3.0], [0, 0.6]]),
    "nilpotent": torch.tensor([[0, 1.0], [0, 0]]),
    "zero": torch.zeros(2, 2),
    "a row of zeros": torch.tensor([[0.4, 0.4], [0, 0]]),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("W", SPECIAL.values(), ids=SPECIAL)
def test_special_matrices(W, activation):
    block = block_of(W, activation)
    for scale in (1e-6, 0.05, 1.0, 30.0):
        x = torch.linspace(1, 2, len(W))[None] * scale
        check_rates(block, x)
        if scale >= 0.05:
            lower, upper = bounds_of(block, x)
            assert upper - lower < 0.02 + 0.1 * upper


def test_relu6_exactly_at_6():
    """Wz + x = 6 there: the derivative is anything from 0 to 1, and the bounds say so."""
    W = torch.diag(torch.tensor([0.5, 0.25]))
    x = torch.tensor([[3.0, 1.0]])
    check_rates(block_of(W, "relu6"), x)
    lower, upper = bounds_of(block_of(W, "relu6"), x)
    assert upper.item() >= 0.5
    assert lower.item() <= 0.25


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("brightness", [1, 12])
def test_they_meet_on_trained_linear_blocks(activation, brightness):
    """Within 0.01, around the dense eigenvalue; bright images saturate relu6 units."""
    model = trained(f"linear_pcdeq_{ACTIVATIONS[activation].variant}", activation)
    ((block, x),) = injected(model, digits()[2][:100] * brightness)
    operator = Operator(block.deq.f)
    found = enclose(operator, x, tol=1e-13)
    lower, upper = rate_bounds(operator, x, found.lower, found.upper)
    assert (upper - lower).max() < 0.01
    z = (found.lower + found.upper) / 2
    if activation == "relu6" and brightness > 1:
        assert ((found.lower > 5.9999).sum(1) > 5).double().mean() > 0.9
    slopes = operator.slope(operator.argument(z, x.double()), -1)
    for i in range(0, 100, 9):
        radius = spectral_radius(slopes[i, :, None] * operator.weight)
        assert lower[i] <= radius + 1e-9 and radius - 1e-9 <= upper[i]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_convolution_is_its_dense_matrix(activation):
    torch.manual_seed(4)
    block = block_of(torch.rand(2, 2, 3, 3) / 9, activation)
    x = torch.rand(3, 2, 5, 6) + 0.01
    operator = Operator(block.deq.f)
    found = enclose(operator, x, tol=1e-13)
    lower, upper = rate_bounds(operator, x, found.lower, found.upper, steps=60)
    slopes = operator.slope(operator.argument(found.lower, x.double()), 1).flatten(1)
    for i in range(3):
        radius = spectral_radius(slopes[i, :, None] * dense(block, 5, 6))
        assert lower[i] <= radius + 1e-9 and radius - 1e-9 <= upper[i]
    assert (upper - lower).max() < 0.02


@pytest.mark.parametrize(
    "fault",
    [
        lambda self, argument, side: SLOPE(self, argument + side, side),
        lambda self, argument, side: SLOPE(self, argument, side) * (1 - 1e-6 * side),
        lambda self, argument, side: SLOPE(self, argument, side).clamp(max=0.9),
    ],
    ids=["J at the wrong end", "the wrong sign of its rounding", "a kink cut off"],
)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    def check():
        for W in SPECIAL.values():
            for activation in ACTIVATIONS:
                check_rates(block_of(W, activation), torch.linspace(0.1, 1, len(W))[None])
        W = torch.diag(torch.tensor([0.5, 0.25]))
        check_rates(block_of(W, "relu6"), torch.tensor([[3.0, 1.0]]))

    check()
    monkeypatch.setattr(Operator, "slope", fault)
    with pytest.raises(AssertionError):
        check()


SLOPE = Operator.slope


def check_iterations(block, x, tol: float, most: int = 3000) -> None:
    """No plain solve of one sample from 0 takes more evaluations than predicted."""
    operator = Operator(block.deq.f)
    found = enclose(operator, x)
    predicted = predicted_iterations(operator, found.ladder, found.upper, tol)
    weight, f = block.deq.f.W.weight().detach(), block.deq.f
    for i in range(len(x)):
        for dtype in (torch.float64, torch.float32):
            xi, W = x[i : i + 1].to(dtype), weight.to(dtype)
            solve = picard(f.at(xi, W), None, tol=tol, max_iter=most)
            assert predicted[i] >= (solve.iterations if solve.converged else most)


@given(problems(), st.sampled_from([0.3, 1e-2, 1e-4, 1e-5]))
@settings(deadline=None, max_examples=200)
def test_no_plain_solve_takes_longer_than_predicted(problem, tol):
    check_iterations(*problem, tol)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_prediction_on_trained_networks(activation):
    model = trained(f"linear_pcdeq_{ACTIVATIONS[activation].variant}", activation)
    ((block, x),) = injected(model, digits()[2][:50])
    check_iterations(block, x, 1e-4)
    operator = Operator(block.deq.f)
    found = enclose(operator, x)
    predicted = predicted_iterations(operator, found.ladder, found.upper, 1e-4)
    assert predicted.max() <= 3 * block.deq.iter_forward  # and it is worth something
    assert predicted.max() >= block.deq.iter_forward  # of the whole batch


def test_a_prediction_from_the_rate_alone_would_be_caught(monkeypatch):
    """ln tol/ln ρ is no bound: far from z* the iteration is slower."""

    def naive(operator, ladder, upper, tol):
        return torch.log(torch.tensor(tol)) / torch.log(torch.tensor(0.05)) + 0 * upper[:, 0]

    monkeypatch.setitem(globals(), "predicted_iterations", naive)
    block = block_of(torch.tensor([[2.0]]), "tanh")
    with pytest.raises(AssertionError):
        check_iterations(block, torch.tensor([[1e-3]]), 1e-4)


def test_more_steps_bring_the_bounds_closer():
    torch.manual_seed(5)
    block = block_of(torch.rand(3, 3, 3, 3) / 20, "sigmoid")
    x = torch.rand(2, 3, 8, 8)
    operator = Operator(block.deq.f)
    found = enclose(operator, x)
    gaps = []
    for steps in (0, 5, rates.RATE_STEPS, 80):
        lower, upper = rate_bounds(operator, x, found.lower, found.upper, steps)
        gaps.append((upper - lower).max())
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.2 * gaps[0]
