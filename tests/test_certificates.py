"""Certificates of whole networks: what they hold, what they refuse, and that they say why."""

import copy
import math

import pytest
import torch
from torch import nn
from truth import block_of, digits, random_weight, spectral_radius, trained

from pcdeq import ACTIVATIONS, PcDEQConv2d, PcDEQLinear, build_network, certify

NETS = [(f"linear_pcdeq_{a.variant}", a.name) for a in ACTIVATIONS.values()]
CONVS = [("multi_conv_pcdeq_1", "relu6"), ("multi_conv_pcdeq_2", "sigmoid")]


@pytest.mark.parametrize("name, activation", NETS)
def test_trained_networks_are_certified(name, activation):
    model = trained(name, activation)
    (c,) = certify(model, digits()[2][:100])
    assert c.name == "block" and c.condition and c.holds
    assert c.reason.startswith("W ≥ 0, x")
    assert c.smallest_weight >= 0 and c.smallest_injected >= 0
    assert c.lower.shape == c.upper.shape == (100, 80) and c.lower.dtype == torch.float64
    assert torch.equal(c.width, (c.upper - c.lower).amax(1)) and c.width.max() < 2e-4
    assert (c.rate_lower <= c.rate_upper).all() and (c.rate_upper < 1).all()
    assert c.observed == model.blocks[0].deq.iter_forward <= c.predicted.max()
    assert c.iterations > 0


@pytest.mark.parametrize("name, activation", CONVS)
def test_a_certificate_for_every_block(name, activation):
    model = trained(name, activation, 12)
    certificates = certify(model, digits()[2][:8])
    assert [c.name for c in certificates] == ["block1", "block2", "block3"]
    assert all(c.holds and c.width.max() < 1e-3 for c in certificates)
    assert all(c.observed <= c.predicted.max() for c in certificates)
    assert all(repr(c).startswith(f"Certificate({c.name}: holds=True, ") for c in certificates)


@pytest.mark.parametrize("tol", [1e-1, 1e-4])
def test_the_error_bounds_the_distance_of_the_output(tol):
    """A float64 solve to 1e-13 stands for z*; the network's output stopped at its tolerance."""
    model = copy.deepcopy(trained("linear_pcdeq_1", "tanh"))
    images = digits()[2][:50]
    seen = []
    model.block.register_forward_hook(lambda _, args, z: seen.append((args[0], z)))
    model.block.deq.tol = tol
    (c,) = certify(model, images)
    h, z = seen[0]
    exact = copy.deepcopy(model.block).double()
    exact.deq.tol, exact.deq.max_iter = 1e-13, 1000
    exact.inject = lambda _: model.block.inject(h).double()  # the x of the float32 layer
    with torch.no_grad():
        distance = (exact(h.double()) - z.double()).abs().amax(1)
    assert (distance <= c.error + 1e-12).all()
    assert (c.error <= distance + c.width + 1e-12).all()


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_any_solver_is_certified(solver, precision):
    model = copy.deepcopy(trained("linear_pcdeq_2", "sigmoid"))
    model.block.deq.solver, model.block.deq.precision = solver, precision
    (c,) = certify(model, digits()[2][:20])
    assert c.holds
    assert c.error.max() < (0.05 if precision == "bf16" else 1e-3)


def test_what_is_predicted_is_for_the_tolerance_that_the_precision_has():
    model = copy.deepcopy(trained("linear_pcdeq_2", "sigmoid"))
    x = digits()[2][:20]
    full = certify(model, x)[0].predicted
    model.block.deq.precision = "bf16"
    assert (certify(model, x)[0].predicted < full).all()


def test_modes_and_training_are_left_as_they_were():
    model = build_network("linear_pcdeq_1", "tanh")
    model.train()
    model.bn2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    certify(model, digits()[2][:10])
    assert model.training and model.bn1.training and not model.bn2.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(block.deq._forward_hooks for block in model.blocks)
    with pytest.raises(RuntimeError):
        certify(model, torch.rand(3, 1, 2, 2))
    assert model.training and not any(block.deq._forward_hooks for block in model.blocks)


def test_blocks_are_found_in_any_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), PcDEQConv2d(3), nn.Sequential(nn.Flatten(), PcDEQLinear(12))
    )
    names = [c.name for c in certify(model.double(), torch.rand(2, 1, 4, 4).double())]
    assert names == ["1", "2.1"]


def certificate(block, x):
    """Of a block alone that sees exactly this x."""
    block.inject = lambda h: h
    (found,) = certify(nn.Sequential(block), x)
    return found


def test_a_negative_weight_is_named():
    block = block_of(torch.full((3, 3), 0.1), "tanh")
    with torch.no_grad():
        block.deq.f.W.weight_v[1, 2] = -0.1
    c = certificate(block, torch.ones(2, 3))
    assert not c.holds and not c.condition and c.smallest_weight == pytest.approx(-0.1)
    assert "1 of 9 weights negative, the first at (1, 2) (-0.1)" in c.reason
    assert (c.lower == -1).all() and (c.upper == 1).all()  # nothing else is known
    assert (c.rate_upper == math.inf).all() and (c.predicted == math.inf).all()
    assert "predicted=inf" in repr(c) and repr(c).endswith(
        "reason='1 of 9 weights negative, the first at (1, 2) (-0.1)')"
    )


@pytest.mark.parametrize("activation", ["tanh", "softsign", "relu6"])
def test_an_injected_zero_is_named_where_it_may_not_be(activation):
    """One sample of three: the others are certified all the same."""
    x = torch.ones(3, 4)
    x[1, 2] = 0
    c = certificate(block_of(torch.full((4, 4), 0.1), activation), x)
    assert not c.holds and not c.condition and c.smallest_injected == 0
    assert "1 of 12 injected values not positive, the first at (1, 2) (0)" in c.reason
    assert c.width[1] == 2 * ACTIVATIONS[activation].supremum and c.rate_upper[1] == math.inf
    assert (c.width[[0, 2]] < 1e-4).all() and (c.rate_upper[[0, 2]] < 1).all()


def test_two_fixed_points_are_not_certified_as_one():
    """W = [[.5, 1], [0, 2]], x = (1, 0): z₂ = 0 and z₂ = tanh(2 z₂) > 0 both solve it."""
    c = certificate(
        block_of(torch.tensor([[0.5, 1.0], [0, 2.0]]), "tanh"), torch.tensor([[1.0, 0]])
    )
    assert not c.holds
    assert c.lower[0, 1] <= 0 and c.upper[0, 1] >= 0.957


def test_sigmoid_takes_zeros_but_nothing_negative():
    block = block_of(torch.full((4, 4), 0.1), "sigmoid")
    assert certificate(block, torch.zeros(2, 4)).holds
    c = certificate(block, torch.tensor([[0.0, 1.0, -0.5, -0.25]]))
    assert not c.holds
    assert "2 of 4 injected values negative, the first at (0, 2) (-0.5)" in c.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_named(bad):
    weight = torch.full((3, 3), 0.1)
    x = torch.ones(2, 3)
    x[1, 0] = bad
    c = certificate(block_of(weight, "softsign"), x)
    assert not c.holds and "1 of 6 injected values not finite, the first at (1, 0)" in c.reason
    assert c.width[0] < 1e-4
    block = block_of(weight, "relu6")
    with torch.no_grad():
        block.deq.f.W.weight_g[2] = bad
    c = certificate(block, torch.ones(2, 3))
    assert not c.holds and "3 of 9 weights not finite, the first at (2, 0)" in c.reason


def test_what_float64_cannot_resolve_is_named():
    x = torch.tensor([[1.0, 1e-300]], dtype=torch.float64)
    block = block_of(torch.eye(2) * 0.5, "tanh", torch.float64)
    c = certificate(block, x)
    assert not c.holds and "1 of 2 injected values too small for float64" in c.reason


def test_the_smallest_injected_values_are_fine():
    """Where softplus underflows in float32 the layer injects the smallest normal number."""
    weight = random_weight(5, 0.5, 1.0, 0)
    for dtype, x in ((torch.float32, torch.finfo(torch.float32).tiny), (torch.float64, 1.4e-218)):
        h = torch.full((2, 5), -100.0, dtype=dtype)
        (c,) = certify(nn.Sequential(block_of(weight, "tanh", dtype)), h)
        assert c.holds and c.smallest_injected == pytest.approx(x, rel=0.02, abs=0)
        assert (c.lower > 0).all() and c.width.max() < 1e-40
        assert c.predicted.isnan().sum() == 0 and f"predicted={c.predicted.max():.0f}" in repr(c)


def test_each_use_of_a_block_has_its_own_certificate():
    block, observed = PcDEQLinear(6), []
    block.deq.register_forward_hook(lambda deq, *_: observed.append(deq.iter_forward))
    with torch.no_grad():
        block.deq.f.W.weight_g.fill_(0.7)
    x = torch.full((4, 6), -3.0)
    found = certify(nn.Sequential(block, nn.Linear(6, 6), block), x)
    assert [c.observed for c in found] == observed and len(set(observed)) == 2
    assert [c.name for c in found] == ["0", "0"]


def test_what_is_certified_does_not_depend_on_an_autocast():
    model = nn.Sequential(PcDEQLinear(32, activation="relu6", tol=1e-3))
    with torch.no_grad():
        model[0].deq.f.W.weight_v.uniform_()
        model[0].deq.f.W.weight_g.fill_(0.9 / 32**0.5)
    x = torch.randn(8, 32)
    (outside,) = certify(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = certify(model, x)
        assert torch.is_autocast_enabled("cpu")
    for name in ("lower", "upper", "rate_lower", "rate_upper", "predicted"):
        assert torch.equal(getattr(outside, name), getattr(inside, name)), name


def test_a_gradient_that_may_not_converge_is_not_certified():
    """A solve stopped early: z* is certified, the J that its output gives is not below 1."""
    block = block_of(torch.tensor([[3.0]]), "tanh")
    block.deq.max_iter = 1
    c = certificate(block, torch.tensor([[0.01]]))
    assert c.condition and not c.holds
    assert "the rate is not bounded below 1 for 1 of 1 samples (largest bound 3" in c.reason
    assert c.width.max() < 1e-4
    block.deq.max_iter = 200
    assert certificate(block, torch.tensor([[0.01]])).holds


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_rates_hold_at_the_fixed_point_and_for_the_implicit_gradient(factor):
    """Its σ' is that of the value ẑ = σ(Wz + x), wherever the solve has left it."""
    block = block_of(random_weight(6, 1.5, 1.0, 4), "tanh")
    x = torch.full((1, 6), 0.05)
    exact = certificate(block, x)
    output = (factor * exact.lower).clamp(max=0.99).float()
    block.deq._solve_forward = lambda x, weight: output
    c = certificate(block, x)
    weight = block.deq.f.W.weight().detach().double()
    for z in (exact.lower, output.double()):
        slopes = 1 - z**2  # tanh' in its own value
        radius = spectral_radius(slopes.t() * weight)
        assert c.rate_lower[0] <= radius + 1e-6 and radius - 1e-6 <= c.rate_upper[0]


def test_what_is_certified_converges_where_one_sample_of_a_batch_lags_behind():
    """The forward rule, over the batch, is met while a small sample is still on its way.

    There ρ(J) at ẑ is below 1, at the iterate before it is not: that J is the gradient's.
    """
    block = PcDEQLinear(1, activation="tanh", tol=0.1).double()
    with torch.no_grad():
        block.deq.f.W.weight_v.fill_(1)
        block.deq.f.W.weight_g.fill_(5)
    h = torch.tensor([[-0.25], *[[3.0]] * 50]).double().requires_grad_()
    (c,) = certify(nn.Sequential(block), h)
    z = block(h)
    z.sum().backward()
    assert not block.deq.backward_solve.converged and not c.holds
    assert c.rate_upper[0] > 5 * block.activation.derivative(z[0]).item() - 1e-6 > 1
    block.deq.tol = 1e-6
    (c,) = certify(nn.Sequential(block), h)
    block(h).sum().backward()
    assert block.deq.backward_solve.converged and c.holds


def test_what_has_nothing_to_certify_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        certify(nn.Sequential(PcDEQLinear(3)), torch.rand(0, 3))
    with pytest.raises(ValueError, match="samples along the first axis"):
        certify(nn.Sequential(PcDEQLinear(1)), torch.tensor(1.0))
    with pytest.raises(ValueError, match="no pcDEQ block"):
        certify(nn.Linear(3, 3), torch.rand(2, 3))
    with pytest.raises(TypeError, match=r"must be an nn\.Module, not Tensor"):
        certify(torch.rand(2, 3), PcDEQLinear(3))
    with pytest.raises(TypeError, match="the batch of inputs must be a tensor, not list"):
        certify(PcDEQLinear(3), [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="rate_steps must be a whole number from 1 on, not 0"):
        certify(PcDEQLinear(3), torch.rand(2, 3), rate_steps=0)


def test_blocks_that_the_pass_does_not_reach_are_no_certificate():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].unused = PcDEQLinear(3)
    with pytest.raises(ValueError, match="reached none of the model's pcDEQ blocks"):
        certify(model, torch.rand(2, 3))
