"""The layer in one's own network: everything that people do to modules, done to it."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blocks import (
    SHAPES,
    both,
    distance,
    every_activation,
    every_precision,
    make,
    run,
    signal,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from pcdeq import Equilibrium, PcDEQConv2d, PcDEQLinear, project, register_projection
from pcdeq.implicit import PRECISIONS


@both
@every_activation
def test_deepcopy_pickle_and_save_give_an_equal_block(kind, activation):
    block = make(kind, activation, solver="anderson", precision="mixed", tol=1e-5, max_iter=99)
    h, probe = signal(kind), torch.rand(SHAPES[kind])
    reference, gradients = run(block, h, probe)  # a block that has been used
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    copies = [
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert other.activation is block.activation
        assert repr(other) == repr(block)
        z, again = run(other, h, probe)
        assert torch.equal(z, reference)
        torch.testing.assert_close(again, gradients)
        with torch.no_grad():
            next(other.parameters()).fill_(0.1)  # its own parameters
    assert torch.equal(run(block, h, probe)[0], reference)


@both
def test_state_dict_has_two_entries_and_loads(kind):
    block, other = make(kind), make(kind)
    assert list(block.state_dict()) == ["deq.f.W.weight_g", "deq.f.W.weight_v"]
    other.load_state_dict(block.state_dict())
    h = signal(kind)
    assert torch.equal(block(h), other(h))


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype(kind, dtype):
    block = make(kind, root=0.5)
    h, probe = signal(kind), torch.rand(SHAPES[kind])
    reference, gradients = run(block, h, probe)
    z, again = run(block.to(dtype), h.to(dtype), probe.to(dtype))
    bound = {torch.float64: 3e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    assert z.dtype == dtype and all(g.dtype == dtype for g in again)
    assert distance(z, reference.double()) < bound
    assert all(distance(a, b.double()) < bound for a, b in zip(again, gradients, strict=True))


@both
def test_computes_in_its_own_precision_whatever_comes_in(kind):
    block = make(kind)
    h = signal(kind).bfloat16()
    z = block(h)
    assert z.dtype == torch.float32
    assert torch.equal(z, block(h.float()))
    assert block(signal(kind).double()).dtype == torch.float32


@both
@every_activation
@every_precision
def test_autocast_changes_nothing(kind, activation, precision):
    block = make(kind, activation, precision=precision)
    h, probe = signal(kind), torch.rand(SHAPES[kind])
    reference, gradients = run(block, h, probe)
    with torch.autocast("cpu", torch.bfloat16):
        z, inside = run(block, h, probe)  # backward inside, too
        half = h.clone().requires_grad_()
        outside = block(half)
    assert z.dtype == torch.float32 and torch.equal(z, reference)
    torch.testing.assert_close(inside, gradients)
    (outside * probe).sum().backward()
    torch.testing.assert_close(half.grad, gradients[0])


@both
def test_complex_inputs_are_refused(kind):
    with pytest.raises(TypeError, match="real inputs"):
        make(kind, "tanh")(signal(kind).to(torch.complex64))


def test_an_image_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), not \(3, 5, 5\)"):
        PcDEQConv2d(3)(torch.rand(3, 5, 5))


def test_what_is_no_tensor_is_refused():
    for given, kind in ((np.zeros((4, 3)), "ndarray"), ([[0.0] * 3], "list"), (None, "NoneType")):
        for layer in (PcDEQLinear(3), PcDEQConv2d(3)):
            with pytest.raises(TypeError, match=f"the input must be a tensor, not {kind}"):
                layer(given)


def test_a_projection_of_nothing_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="nothing to project"):
        register_projection(torch.optim.SGD(model.parameters()), model)
    block = make("linear")
    with pytest.raises(TypeError, match="comes first, then the model, not Linear and SGD"):
        register_projection(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match=r"the model must be an nn\.Module, not generator"):
        project(model.parameters())
    with pytest.raises(ValueError, match="no pcDEQ layer: there is nothing to project"):
        project(model)
    with pytest.raises(ValueError, match="steps no pcDEQ weight of this model"):
        register_projection(torch.optim.SGD(model.parameters()), block)


@both
def test_projects_the_parameter_behind_a_parametrised_weight(kind):
    class Half(nn.Module):
        def forward(self, v):
            return v * (torch.arange(v.shape[1]) % 2).view(1, -1, *[1] * (v.ndim - 2))

    block = make(kind)
    W = block.deq.f.W
    nn.utils.parametrize.register_parametrization(W, "weight_v", Half())
    with torch.no_grad():
        W.parametrizations.weight_v.original.sub_(W.weight_v.max() / 2)
    assert W.weight().min() < 0
    project(block)
    assert W.weight().min() == 0 < W.weight().max()


@both
def test_an_optimizer_that_flattens_parameters_trains_a_block(kind):
    block, h, probe = make(kind), signal(kind), torch.rand(SHAPES[kind])
    optimizer = torch.optim.LBFGS(block.parameters(), lr=0.1)

    def loss():
        optimizer.zero_grad()
        value = (block(h) - probe).square().mean()
        value.backward()
        return value

    before = loss().item()
    optimizer.step(loss)
    project(block)
    assert loss().item() < before


def test_stands_behind_layers_that_autocast_lowers():
    model = nn.Sequential(nn.Linear(4, 5), make("linear"), nn.Linear(5, 2))
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters()
    )
    assert distance(out, model(x).double()) < 3e-2


@both
def test_gradients_accumulate(kind):
    block = make(kind, tol=1e-7, max_iter=1000)
    h = signal(kind)
    for part in h.split(1):
        block(part).square().sum().backward()
    accumulated = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    block(h).square().sum().backward()
    for ours, whole in zip(accumulated, block.parameters(), strict=True):
        torch.testing.assert_close(ours, whole.grad, rtol=1e-4, atol=1e-4)


@both
def test_two_backward_passes_through_a_retained_graph(kind):
    block = make(kind)
    h = signal(kind).requires_grad_()
    z = block(h)
    z.sum().backward(retain_graph=True)
    once = h.grad.clone()
    z.sum().backward()
    torch.testing.assert_close(h.grad, 2 * once)


@both
def test_used_twice_in_one_graph(kind):
    """Weights shared over depth: each pass has a node of its own."""
    block = make(kind, root=0.5, n=3, tol=1e-14, max_iter=500).double()
    h = signal(kind, torch.float64)[:1, :3].requires_grad_()
    assert torch.autograd.gradcheck(lambda h: block(block(h) - 0.5), (h,))


@both
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(kind, reentrant):
    block, before = make(kind), nn.Identity()
    h, probe = signal(kind), torch.rand(SHAPES[kind])
    _, gradients = run(block, h, probe)
    h.requires_grad_()
    z = checkpoint(lambda h: block(before(h)), h, use_reentrant=reentrant)
    (z * probe).sum().backward()
    ours = [h.grad, *(p.grad for p in block.parameters())]
    torch.testing.assert_close(ours, gradients)


@both
@pytest.mark.parametrize("of", ["input", "weight"])
def test_second_derivatives_are_refused(kind, of):
    """The adjoint solve is not recorded: autograd would drop what runs through it, silently."""
    block = make(kind)
    h = signal(kind).requires_grad_()
    before = block.deq.f.W.weight_v if of == "weight" else h
    with pytest.raises(RuntimeError, match="differentiable once: create_graph=True is not"):
        torch.autograd.grad(block(h).square().sum(), before, create_graph=True)


@both
def test_the_gradient_of_the_output_is_that_of_what_follows(kind):
    """The adjoint solution is for the block's inside: a probe at its output sees ∂L/∂z*."""
    block = make(kind)
    h, probe = signal(kind).requires_grad_(), torch.rand(SHAPES[kind])
    z = block(h)
    z.retain_grad()
    (z * probe).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, probe)
    assert torch.equal(torch.autograd.grad((z * probe).sum(), z)[0], probe)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_traced_block_computes(kind, precision):
    block = make(kind, "tanh", precision=precision).eval()
    h = signal(kind)
    with torch.no_grad():
        traced = torch.jit.trace(block, h, check_trace=False)
        # Traced, bfloat16 is rounded once more in each evaluation.
        bound = {"rtol": 0, "atol": 2.0**-6} if precision == "bf16" else {}
        torch.testing.assert_close(traced(h), block(h), **bound)


@pytest.mark.parametrize(
    "kind, shape", [("linear", ()), ("linear", (3, 7)), ("conv", (2, 7, 6, 6))]
)
def test_a_width_that_does_not_fit_is_a_sentence(kind, shape):
    with pytest.raises(ValueError, match=rf"must be of shape \(.*, not {re.escape(str(shape))}"):
        make(kind)(torch.rand(shape))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
@pytest.mark.parametrize("how", ["method", "module", "no_grad", "detached"])
def test_writing_to_the_output_is_an_error_not_a_wrong_gradient(shape, how):
    block = make("linear")
    z = block(torch.randn(shape, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"modified (inplace|by an inplace)"):
        if how == "method":
            z.mul_(2)
        elif how == "module":
            z = nn.ReLU(inplace=True)(z)
        elif how == "no_grad":
            with torch.no_grad():
                z.mul_(2)
        else:
            z.detach().mul_(2)
        z.sum().backward()


def test_writing_to_the_input_afterwards_is_no_problem():
    """h is saved by the injection, which autograd guards; z* aliases nothing of the caller's."""
    block = make("linear")
    h = signal("linear")
    z = block(h)
    kept = z.detach().clone()
    h.zero_()
    assert torch.equal(z, kept)


@both
def test_the_caller_s_gradient_is_not_written_to(kind):
    block = make(kind)
    for precision in PRECISIONS:
        block.deq.precision = precision
        probe = torch.rand(SHAPES[kind])
        kept = probe.clone()
        block(signal(kind)).backward(probe)
        assert torch.equal(probe, kept)


@every_precision
def test_expanded_gradients(precision):
    """The gradient of a sum is one number seen from everywhere: not to be written to."""
    block = make("conv", precision=precision)
    h = signal("conv")
    _, reference = run(block, h, torch.ones_like(h))
    h.requires_grad_()
    block(h).sum().backward()
    torch.testing.assert_close(h.grad, reference[0])


def test_stands_in_a_sequential_and_trains():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        PcDEQConv2d(6, activation="sigmoid"),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 64, 16),
        PcDEQLinear(16, activation="relu6", solver="anderson", precision="mixed", tol=1e-3),
        nn.Linear(16, 3),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    register_projection(optimizer, model)
    x, y = torch.randn(30, 1, 8, 8), torch.arange(30) % 3
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_equilibrium_takes_the_injected_input_itself():
    block = make("linear")
    equilibrium = Equilibrium(block.deq.f, solver="anderson", tol=1e-6)
    x = (torch.rand(3, 5) + 0.1).requires_grad_()
    with torch.no_grad():
        z = equilibrium(x)
    assert not z.requires_grad
    torch.testing.assert_close(block.deq.f(z, x), z, rtol=1e-4, atol=1e-5)
