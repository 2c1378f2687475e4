"""f(z, x) = σ(Wz + x): weight normalisation, projection, and the products that a solve uses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pcdeq import layers
from pcdeq.activations import ACTIVATIONS
from pcdeq.layers import ConcaveLayer, NonnegativeConv2d, NonnegativeLinear

N = 5
KINDS = {"linear": NonnegativeLinear, "conv": NonnegativeConv2d}
both = pytest.mark.parametrize("kind", KINDS)
every = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def make(kind: str, dtype: torch.dtype = torch.float64) -> NonnegativeLinear | NonnegativeConv2d:
    """W with rows of very different sizes, so that no test passes on the tiny initial ones."""
    W = KINDS[kind](N).to(dtype)
    with torch.no_grad():
        W.weight_v.uniform_(0, 1)
        W.weight_g.uniform_(0.1, 2)
    return W


def signal(kind: str, batch: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    shape = (batch, N) if kind == "linear" else (batch, N, 6, 4)
    return torch.randn(shape, dtype=dtype)


@both
def test_weight_is_that_of_weight_normalisation(kind):
    W = make(kind)
    reference = torch._weight_norm(W.weight_v, W.weight_g, 0)
    torch.testing.assert_close(W.weight(), reference)
    probe = torch.randn_like(reference)
    ours = torch.autograd.grad((W.weight() * probe).sum(), list(W.parameters()))
    theirs = torch.autograd.grad((reference * probe).sum(), list(W.parameters()))
    torch.testing.assert_close(ours, theirs)


@both
def test_initial_weight_is_drawn_after_the_default_one(kind):
    torch.manual_seed(7)
    W = KINDS[kind](N)
    torch.manual_seed(7)
    plain = nn.Linear(N, N, bias=False) if kind == "linear" else nn.Conv2d(N, N, 3, bias=False)
    v = torch.rand(plain.weight.shape) * math.sqrt(1e-4) / math.sqrt(2 * N)
    torch.testing.assert_close(W.weight_v.data, v.contiguous())
    torch.testing.assert_close(W.weight().data, v)  # g starts at ‖v‖
    assert (W.weight_v >= 0).all() and (W.weight_g > 0).all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_zeros_is_a_row_of_zeros(kind, dtype):
    W = make(kind, dtype)
    with torch.no_grad():
        W.weight_v[2] = 0
    weight = W.weight()
    assert torch.equal(weight[2], torch.zeros_like(weight[2]))
    weight.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in W.parameters())
    assert W.weight_g.grad[[0, 1, 3, 4]].abs().min() > 0


@both
def test_clamp_projects_both_parameters(kind):
    W = make(kind)
    with torch.no_grad():
        W.weight_v[0, 1] = -0.5
        W.weight_g[1] = -0.5
    v, g = W.weight_v, W.weight_g
    expected = [v.detach().clamp(min=0), g.detach().clamp(min=0)]
    W.clamp()
    assert W.weight_v is v and W.weight_g is g
    assert torch.equal(v.data, expected[0]) and torch.equal(g.data, expected[1])
    assert (W.weight() >= 0).all()


@both
def test_apply_is_the_map(kind):
    W, z = make(kind), signal(kind)
    weight = W.weight().detach()
    plain = nn.functional.linear if kind == "linear" else nn.functional.conv2d
    reference = plain(z, weight, **({} if kind == "linear" else {"padding": 1}))
    torch.testing.assert_close(W.apply(z, weight), reference)


@both
@torch.no_grad()
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layouts", ["zb", "z", "b", ""])  # which of both are in channels_last
def test_affine_is_the_map_and_b(kind, onednn, dtype, layouts, monkeypatch):
    if not onednn:
        monkeypatch.setattr(layers, "CONVOLUTION_PLUS", None)
    W, z, b = make(kind, dtype), signal(kind, dtype=dtype), signal(kind, dtype=dtype)
    if kind == "conv":
        z, b = (
            t.contiguous(memory_format=torch.channels_last) if name in layouts else t
            for name, t in (("z", z), ("b", b))
        )
    weight, kept = W.weight().detach(), b.clone()
    value = W.affine(b, z, W.factor(weight, b))
    truth = W.apply(z.double(), weight.double()) + b.double()
    rounding = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 2.0**-7}[dtype]
    assert (value - truth).abs().max() <= rounding * truth.abs().max()
    assert value.dtype == dtype and torch.equal(b, kept)  # b is x, or a gradient: not ours to write
    assert value.data_ptr() not in (z.data_ptr(), b.data_ptr())
    assert W.affine(b[:0], z[:0], W.factor(weight, b[:0])).shape == z[:0].shape


@pytest.mark.skipif(layers.CONVOLUTION_PLUS is None, reason="needs bfloat16 in the processor")
def test_a_convolution_in_bfloat16_and_its_sum_are_rounded_once(monkeypatch):
    W = make("conv", torch.bfloat16)
    z, b = signal("conv", 64).bfloat16(), signal("conv", 64).bfloat16()
    weight = W.weight().detach()
    truth = W.apply(z.double(), weight.double()) + b.double()
    with torch.no_grad():
        once = (W.affine(b, z, W.factor(weight, b)) - truth).norm()
        assert once <= 2.0**-8 * truth.norm()
        monkeypatch.setattr(layers, "CONVOLUTION_PLUS", None)
        assert once < 0.95 * (W.affine(b, z, W.factor(weight, b)) - truth).norm()
    recorded = W.affine(b, z.requires_grad_(), W.factor(weight, b))
    (gradient,) = torch.autograd.grad(recorded.sum(), z)  # the plain operators, which have one
    assert gradient.shape == z.shape and gradient.isfinite().all()


@both
@every
def test_tangent_and_adjoint_are_those_of_f(kind, activation):
    layer = ConcaveLayer(make(kind), activation)
    z, x = signal(kind).abs(), signal(kind).abs()
    weight = layer.W.weight().detach()
    v, g, r, b = (signal(kind) for _ in range(4))
    f = lambda z: activation.function(layer.W.apply(z, weight) + x)  # noqa: E731
    fz, Jv = torch.autograd.functional.jvp(f, z, v)
    slope, kept = activation.derivative(fz), [t.clone() for t in (v, g, r, b)]
    torch.testing.assert_close(layer.tangent(slope, r, weight)(v), Jv + r)
    _, Jg = torch.autograd.functional.vjp(f, z, g)
    adjoint = layer.adjoint(slope, b, layer.W.transpose(weight))
    torch.testing.assert_close(adjoint(g), Jg + b)
    assert all(map(torch.equal, (v, g, r, b), kept))


@both
def test_transpose_is_the_adjoint(kind):
    W, z, y = make(kind), signal(kind), signal(kind)
    weight = W.weight().detach()
    forward = (y * W.apply(z, weight)).sum()
    backward = (W.apply(y, W.transpose(weight)) * z).sum()
    torch.testing.assert_close(forward, backward)


@both
def test_weight_gradient_is_autograd_s(kind):
    W, z, y = make(kind), signal(kind), signal(kind)
    weight = W.weight().detach().requires_grad_()
    (reference,) = torch.autograd.grad((y * W.apply(z, weight)).sum(), weight)
    torch.testing.assert_close(W.weight_gradient(z, y), reference)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_are_in_channels_last_however_v_lies(layout):
    W = make("conv", torch.float32).to(memory_format=layout)
    assert W.weight_v.is_contiguous(memory_format=layout)
    weight = W.weight()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert W.transpose(weight).is_contiguous(memory_format=torch.channels_last)
    z = signal("conv", dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    assert W.apply(z, weight).is_contiguous(memory_format=torch.channels_last)


@both
@every
def test_concave_layer_is_sigma_of_w_z_plus_x(kind, activation):
    layer = ConcaveLayer(make(kind), activation)
    z, x = signal(kind).abs(), signal(kind).abs()
    weight = layer.W.weight().detach()
    reference = activation.function(layer.W.apply(z, weight) + x)
    kept = z.clone(), x.clone()
    torch.testing.assert_close(layer(z, x), reference)
    f = layer.at(x, weight)
    torch.testing.assert_close(f(z), reference)
    torch.testing.assert_close(f(None), layer(torch.zeros_like(x), x))
    assert torch.equal(z, kept[0]) and torch.equal(x, kept[1])


@both
@every
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), factor=st.floats(1.001, 50))
def test_layer_is_monotone_and_scalable(kind, activation, seed, factor):
    """The two properties of a standard interference mapping."""
    torch.manual_seed(seed)
    layer = ConcaveLayer(make(kind), activation)
    z, x = signal(kind).abs(), signal(kind).abs() + 1e-3
    with torch.no_grad():
        f = layer(z, x)
        assert (f > 0).all()
        assert (layer(z + signal(kind).abs(), x) >= f - 1e-12).all()
        assert (layer(factor * z, x) <= factor * f + 1e-12).all()
