"""The equilibrium as a module: its value and its gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from blocks import (
    SHAPES,
    both,
    every_activation,
    every_precision,
    every_solver,
    make,
    run,
    signal,
)
from torch import Tensor

from pcdeq.activations import ACTIVATIONS
from pcdeq.block import PcDEQ, PcDEQLinear
from pcdeq.implicit import PRECISIONS
from pcdeq.solvers import SOLVERS

# The value


@both
@every_activation
def test_output_is_a_fixed_point(kind, activation):
    block = make(kind, activation, tol=1e-12, max_iter=2000).double()
    h = signal(kind, torch.float64)
    z = block(h)
    torch.testing.assert_close(block.deq.f(z, block.inject(h)), z, rtol=1e-10, atol=1e-12)
    assert (z > 0).all() and (z <= block.activation.supremum).all()


@both
@every_activation
@every_solver
def test_the_fixed_point_is_unique(kind, activation, solver):
    """Several random nonnegative starts, one limit: the theorem, through the public solvers."""
    block = make(kind, activation).double()
    x = block.inject(signal(kind, torch.float64))
    weight = block.deq.f.W.weight().detach()
    reference = block.deq.f(iterate(block, x), x)
    for scale in (0, 0.01, 1, 30, 1000):
        start = scale * torch.rand_like(x)
        solve = SOLVERS[solver](block.deq.f.at(x, weight), start, tol=1e-12, max_iter=2000)
        torch.testing.assert_close(solve.z, reference, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def iterate(block: PcDEQ, x: Tensor) -> Tensor:
    """Plain iteration from zero, far beyond convergence."""
    z = torch.zeros_like(x)
    for _ in range(1500):
        z = block.deq.f(z, x)
    return z


def test_injection_of_each_variant():
    h = torch.linspace(-4, 4, 101)
    for name, activation in ACTIVATIONS.items():
        block = PcDEQLinear(3, activation=name)
        expected = F.relu(h) if activation.variant == 2 else torch.log1p(torch.exp(5 * h)) / 5
        torch.testing.assert_close(block.inject(h), expected, rtol=1e-4, atol=1e-7)
        assert block.activation is activation


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fill", [-1e30, -1e3, 1e30])
def test_extreme_inputs_give_finite_results(precision, fill):
    for name, activation in ACTIVATIONS.items():
        block = make("linear", name, precision=precision)
        h = torch.full((3, 5), fill, requires_grad=True)
        z = block(h)
        z.sum().backward()
        assert z.isfinite().all() and (z <= activation.supremum).all()
        assert h.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5)])
def test_linear_block_takes_any_number_of_leading_axes(shape):
    block = make("linear")
    h = torch.randn(shape, requires_grad=True)
    z = block(h)
    z.sum().backward()
    assert z.shape == h.grad.shape == shape
    with torch.no_grad():
        torch.testing.assert_close(z, block(h.reshape(-1, 5)).reshape(shape))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_block_takes_either_memory_layout(layout):
    block = make("conv")
    h = signal("conv")
    reference, gradients = run(block, h, torch.ones_like(h))
    z, again = run(block, h.contiguous(memory_format=layout), torch.ones_like(h))
    assert z.is_contiguous(memory_format=torch.channels_last)  # the fast one, out of either
    torch.testing.assert_close(z, reference)
    torch.testing.assert_close(again, gradients)


# The gradient


def whole_layer(block: PcDEQ):
    """The block as a function of its input and its parameters, and the parameters."""
    names, parameters = zip(*block.named_parameters(), strict=True)

    def layer(h, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (h,))

    return layer, parameters


@both
@every_activation
def test_gradcheck(kind, activation):
    block = make(kind, activation, root=0.5, n=3, tol=1e-14, max_iter=500).double()
    h = signal(kind, torch.float64)[:2, :3].requires_grad_()
    layer, parameters = whole_layer(block)
    assert torch.autograd.gradcheck(layer, (h, *parameters))


def test_gradcheck_with_anderson():
    block = make("linear", n=3, root=0.8, solver="anderson", tol=1e-14, max_iter=500).double()
    h = signal("linear", torch.float64)[:2, :3].requires_grad_()
    layer, parameters = whole_layer(block)
    assert torch.autograd.gradcheck(layer, (h, *parameters))


def test_gradcheck_where_relu6_saturates():
    """Some features at 6, some in between, none near the kink."""
    block = make("linear", "relu6", root=0.8, tol=1e-14, max_iter=500).double()
    h = torch.tensor([[9.0, 0.1, 0.2, 8.0, -1.0], [0.1, 0.2, 0.3, 0.1, 0.2]]).double()
    z = block(h)
    assert 0 < (z == 6).sum() < z.numel() and (z - 6).abs()[z != 6].min() > 0.01
    layer, parameters = whole_layer(block)
    assert torch.autograd.gradcheck(layer, (h.requires_grad_(), *parameters))


@both
@every_activation
def test_gradient_is_that_of_backpropagation_through_the_iteration(kind, activation):
    block = make(kind, activation, root=0.8, tol=1e-13, max_iter=1000).double()
    h = signal(kind, torch.float64)
    probe = torch.randn_like(h)
    z, gradients = run(block, h, probe)
    h.requires_grad_()
    x = block.inject(h)
    unrolled = torch.zeros_like(x)
    for _ in range(150):
        unrolled = block.deq.f(unrolled, x)
    torch.testing.assert_close(z, unrolled.detach(), rtol=1e-10, atol=1e-12)
    reference = torch.autograd.grad((unrolled * probe).sum(), [h, *block.parameters()])
    torch.testing.assert_close(gradients, list(reference), rtol=1e-9, atol=1e-11)


@both
@every_precision
def test_a_row_of_zeros_in_v_gives_finite_outputs_and_gradients(kind, precision):
    block = make(kind, precision=precision)
    with torch.no_grad():
        block.deq.f.W.weight_v[1] = 0
    z, gradients = run(block, signal(kind), torch.ones(SHAPES[kind]))
    assert z.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0].abs().sum() > 0


@both
def test_only_what_needs_a_gradient_gets_one(kind):
    block = make(kind)
    h = signal(kind)
    block(h).sum().backward()  # a first layer: h needs none
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())
    frozen = copy.deepcopy(block).requires_grad_(False)
    h.requires_grad_()
    frozen(h).sum().backward()
    assert h.grad.abs().sum() > 0 and all(p.grad is not None for p in block.parameters())


@both
def test_what_a_pass_keeps_is_in_autograd_s_hands(kind):
    """So that it goes with backward, and checkpointing and offloading see it."""
    block, kept = make(kind), []
    h = signal(kind).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z = block(h)
    assert z.data_ptr() in [t.data_ptr() for t in kept]
    assert not z._backward_hooks and z.grad_fn._raw_saved_tensors[0] is not None
    loss = z.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        _ = z.grad_fn.saved_tensors  # freed
    block.deq.backward_solve = None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert block.deq.backward_solve is None  # nothing was solved for it
