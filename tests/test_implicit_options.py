"""The equilibrium's options: every solver and precision against a float64 solve."""

import functools

import pytest
import torch
import torch.nn.functional as F
from blocks import (
    KINDS,
    SHAPES,
    both,
    distance,
    every_activation,
    every_device,
    every_precision,
    every_solver,
    exact,
    make,
    run,
    signal,
)
from torch import Tensor

from pcdeq import replay
from pcdeq.block import PcDEQLinear
from pcdeq.implicit import PRECISIONS
from pcdeq.layers import CONVOLUTION_PLUS
from pcdeq.solvers import SOLVERS

TOLERANCE = {"fp32": 1e-4, "mixed": 1e-4, "bf16": 2.0**-8}


@both
@every_activation
@every_solver
@every_precision
@every_device
@pytest.mark.parametrize("root", [0.6, 0.95])
def test_every_option_gives_the_same_numbers(kind, activation, solver, precision, root, device):
    block = make(kind, activation, root=root, solver=solver, precision=precision)
    h, probe = signal(kind), torch.rand(SHAPES[kind])
    z, gradients = run(block.to(device), h.to(device), probe.to(device))
    reference, exact_gradients = exact(block, h, probe)
    solves = block.deq.forward_solve, block.deq.backward_solve
    # A residual below tol leaves an error of ρ/(1 − ρ)·tol; a gradient has that of both solves.
    bound = 1.5 * TOLERANCE[precision] / (1 - root)
    assert distance(z, reference) < bound
    assert z.dtype == torch.float32
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert distance(ours, theirs) < 2 * bound
    assert all(s.converged for s in solves)
    assert all(s.residual < TOLERANCE[precision] for s in solves)


@both
@every_precision
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_equilibrium_of_x_in_another_dtype(kind, precision, dtype):
    """z* is in the parameters' dtype, with a graph and without, and ∂x in that of x."""
    block = make(kind, precision=precision)
    x = block.inject(signal(kind)).to(dtype).requires_grad_()
    z = block.deq(x)
    with torch.no_grad():
        assert block.deq(x).dtype == z.dtype == torch.float32
    (gradient,) = torch.autograd.grad(z.sum(), x)
    assert gradient.dtype == dtype
    reference = x.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(block.deq(reference).sum(), reference)
    assert distance(gradient, expected) < 2.0**-6


@every_solver
def test_float32_evaluations_of_each_precision(solver):
    counts = {}
    for precision in PRECISIONS:
        torch.manual_seed(3)
        block = make("linear", "relu6", root=0.95, solver=solver, precision=precision)
        run(block, signal("linear"), torch.ones(SHAPES["linear"]))
        counts[precision] = block.deq.forward_solve, block.deq.backward_solve
    for fp32, mixed, bf16 in zip(*counts.values(), strict=True):
        assert fp32.full == fp32.iterations > 8
        assert 1 <= mixed.full <= 4 < mixed.iterations
        assert bf16.full == 0 < bf16.iterations


class Dtypes(torch.overrides.TorchFunctionMode):
    """The dtypes in which the products of W are computed inside it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.linear, torch.addmm, F.conv2d, torch.conv2d, CONVOLUTION_PLUS):
            self.seen.append(next(a for a in args if isinstance(a, Tensor)).dtype)
        return function(*args, **(kwargs or {}))


@both
@every_precision
def test_products_are_computed_in_the_precision_asked_for(kind, precision):
    block = make(kind, precision=precision)
    with Dtypes() as dtypes, torch.no_grad():
        block(signal(kind))
    expected = {
        "fp32": {torch.float32},
        "mixed": {torch.float32, torch.bfloat16},
        "bf16": {torch.bfloat16},
    }
    assert set(dtypes.seen) == expected[precision]
    solve = block.deq.forward_solve
    skipped = 1  # the evaluation at z = 0 takes no product
    assert dtypes.seen.count(torch.float32) == solve.full - (skipped if precision == "fp32" else 0)
    assert len(dtypes.seen) == solve.iterations - skipped


@both
@every_solver
@every_precision
@every_device
def test_a_float64_model_computes_in_float64_whatever_the_option(kind, solver, precision, device):
    block = make(kind, solver=solver, precision=precision, tol=1e-12, max_iter=1000).double()
    h, probe = signal(kind, torch.float64), torch.rand(SHAPES[kind], dtype=torch.float64)
    replay.clear()  # what is replayed is not seen
    with Dtypes() as dtypes:
        z, gradients = run(block.to(device), h.to(device), probe.to(device))
    assert set(dtypes.seen) == {torch.float64}
    reference, exact_gradients = exact(block, h, probe)
    close = functools.partial(torch.testing.assert_close, check_device=False)
    close(z, reference, rtol=1e-9, atol=1e-10)
    close(gradients, exact_gradients, rtol=1e-8, atol=1e-9)
    assert block.deq.forward_solve.full == block.deq.iter_forward
    assert block.deq.backward_solve.full == block.deq.iter_backward


@both
def test_anderson_needs_fewer_iterations_on_a_slow_block(kind):
    iterations = {}
    for solver in SOLVERS:
        torch.manual_seed(1)
        block = make(kind, "relu6", root=0.95, solver=solver)
        run(block, signal(kind), torch.ones(SHAPES[kind]))
        iterations[solver] = block.deq.iter_forward, block.deq.iter_backward
    for fast, plain in zip(iterations["anderson"], iterations["picard"], strict=True):
        assert fast < 0.7 * plain


def test_iterations_are_those_of_the_rule():
    block = make("linear", "relu6", root=0.9)
    h = signal("linear").requires_grad_()
    probe = torch.rand(SHAPES["linear"])
    assert block.deq.iter_forward == block.deq.iter_backward == 0
    assert block.deq.forward_solve is None and block.deq.backward_solve is None
    z_star = block(h)
    (z_star * probe).sum().backward()

    x, W = block.inject(h).detach(), block.deq.f.W.weight().detach()
    f = lambda z: (z @ W.T + x).clamp(0, 6)  # noqa: E731
    assert block.deq.iter_forward == count(f, torch.zeros_like(x))
    slope = ((z_star > 0) & (z_star < 6)).float()
    assert block.deq.iter_backward == count(lambda g: (slope * g) @ W + probe, probe)
    assert block.deq.forward_solve.z is None and block.deq.backward_solve.z is None


def count(f, z: Tensor) -> int:
    for k in range(1, 201):
        fz = f(z)
        if (fz - z).norm() / (fz.norm() + 1e-5) < 1e-4:
            return k
        z = fz
    return 200


@every_solver
@every_precision
def test_max_iter_bounds_both_solves_and_is_reported(solver, precision):
    for max_iter in (1, 2, 5):
        block = make("linear", "relu6", root=0.95, solver=solver, precision=precision, tol=1e-9)
        block.deq.max_iter = max_iter
        z, gradients = run(block, signal("linear"), torch.ones(SHAPES["linear"]))
        assert z.isfinite().all() and all(g.isfinite().all() for g in gradients)
        for solve in (block.deq.forward_solve, block.deq.backward_solve):
            assert solve.iterations <= max_iter
            assert solve.converged == (solve.residual < block.deq.tolerance)
        assert not block.deq.forward_solve.converged


@every_solver
@pytest.mark.parametrize("root", [1.5, 5.0])
@pytest.mark.parametrize("behind", [1, 8])
def test_mixed_precision_solves_what_float32_solves(solver, root, behind):
    """Samples of small x, which the norm over the batch leaves where J is no contraction yet."""
    n = 32
    h = torch.randn(64, n)
    h[:behind] = -2
    solves, outputs = [], []
    for precision in ("fp32", "mixed"):
        block = PcDEQLinear(n, solver=solver, precision=precision)
        with torch.no_grad():
            block.deq.f.W.weight_v.fill_(1)
            block.deq.f.W.weight_g.fill_(root / n**0.5)
            outputs.append(block(h))
        solves.append(block.deq.forward_solve)
    full, mixed = solves
    assert full.converged and mixed.converged
    assert mixed.iterations < 60
    torch.testing.assert_close(outputs[1][behind:], outputs[0][behind:], rtol=1e-3, atol=1e-3)


def test_inputs_that_are_not_finite_end_the_solve_at_once():
    for precision in PRECISIONS:
        block = make("linear", precision=precision)
        h = signal("linear")
        h[0, 0] = float("nan")
        assert block(h).isnan().any()
        solve = block.deq.forward_solve
        assert not solve.converged and solve.residual != solve.residual and solve.iterations <= 2


@pytest.mark.parametrize(
    "option, message",
    [
        ({"solver": "newton"}, r"'newton'.*picard, anderson"),
        ({"solver": []}, r"unknown solver \[\]"),
        ({"precision": "fp16"}, r"'fp16'.*fp32, mixed, bf16"),
        ({"tol": 0.0}, "tol must be a number between 0 and 1, not 0.0"),
        ({"tol": float("nan")}, "tol must be a number between 0 and 1, not nan"),
        ({"tol": "1e-3"}, "tol must be a number between 0 and 1, not '1e-3'"),
        ({"max_iter": 0}, "max_iter must be a whole number from 1 on, not 0"),
        ({"max_iter": True}, "max_iter must be a whole number from 1 on, not True"),
        ({"max_iter": 2.5}, "max_iter must be a whole number from 1 on, not 2.5"),
        ({"max_iter": None}, "max_iter must be a whole number from 1 on, not None"),
        ({"activation": "relu"}, r"'relu'.*tanh, softsign, relu6, sigmoid"),
    ],
)
@both
def test_wrong_options_are_refused_in_one_sentence(kind, option, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind](5, **option)


@pytest.mark.parametrize("option", ["solver", "precision", "tol", "max_iter"])
def test_options_are_checked_where_they_are_set_later_too(option):
    deq = PcDEQLinear(3).deq
    before = getattr(deq, option)
    with pytest.raises(ValueError, match=option):
        setattr(deq, option, "bf-16")
    assert getattr(deq, option) == before


@pytest.mark.parametrize(
    "dtype, precision, least",
    [
        (torch.float64, "fp32", 2**-53),
        (torch.float32, "mixed", 2**-24),
        (torch.float32, "bf16", 2**-8),
        (torch.float16, "fp32", 2**-11),
        (torch.bfloat16, "fp32", 2**-8),
    ],
)
def test_no_more_is_asked_of_a_precision_than_it_has(dtype, precision, least):
    deq = PcDEQLinear(3, precision=precision, tol=1e-30).to(dtype).deq
    assert deq.tolerance == least
    deq.tol = 0.1
    assert deq.tolerance == 0.1


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", "float32"), ("mixed", "float32"), ("bf16", "bfloat16")]
)
@both
def test_the_gradient_of_the_weight_is_taken_in_its_precision(kind, precision, dtype, monkeypatch):
    block, seen = make(kind, precision=precision), []
    W = block.deq.f.W
    own = W.weight_gradient
    monkeypatch.setattr(
        type(W), "weight_gradient", staticmethod(lambda z, y: seen.append((z, y)) or own(z, y))
    )
    block(signal(kind)).sum().backward()
    ((z, y),) = seen
    assert z.dtype == y.dtype == getattr(torch, dtype)
    assert W.weight_v.grad.dtype == torch.float32


@both
@pytest.mark.parametrize("change", [*PRECISIONS, "double", "solver"])
@every_precision
def test_the_way_back_may_have_other_options_than_the_way_there(kind, precision, change):
    block, h, probe = make(kind, precision=precision), signal(kind), torch.rand(SHAPES[kind])
    _, truths = exact(block, h, probe)
    leaves = [h.requires_grad_(), *block.parameters()]
    z = block(h)
    if change == "double":
        block.double()
        leaves = leaves[:1]  # torch has replaced the parameters
    elif change == "solver":
        block.deq.solver = "anderson"
    else:
        block.deq.precision = change
    gradients = torch.autograd.grad((z * probe).sum(), leaves)
    for gradient, truth in zip(gradients, truths[: len(leaves)], strict=True):
        assert distance(gradient, truth) < (0.05 if "bf16" in (precision, change) else 1e-3)


def test_a_network_in_bfloat16_meets_its_rule():
    torch.manual_seed(0)
    block = make("linear", "softsign", root=0.6, n=16).bfloat16()
    block(torch.randn(8, 16).bfloat16())
    assert block.deq.forward_solve.converged


@both
def test_an_unknown_option_is_named_with_those_that_there_are(kind):
    with pytest.raises(TypeError, match=rf"{KINDS[kind].__name__} has no option 'toll'.*max_iter"):
        KINDS[kind](5, toll=1)


def test_options_are_shown():
    assert "solver=anderson, precision=mixed, tol=0.001, max_iter=50" in repr(
        PcDEQLinear(3, solver="anderson", precision="mixed", tol=1e-3, max_iter=50)
    )
