"""σ: each entry of the table against what the theory asks of it, and against autograd."""

import copy
import dataclasses
import pickle
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pcdeq import activations
from pcdeq.activations import ACTIVATIONS, allowed, get_activation

every = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
PRE = torch.cat(  # s ≥ 0, relu6's kinks 0 and 6 among them
    [torch.linspace(0, 8, 97), torch.tensor([1e-30, 1e-6, 20.0, 1e4])]
).double()

REFERENCES = {
    "tanh": lambda s: (torch.exp(2 * s) - 1) / (torch.exp(2 * s) + 1),
    "softsign": lambda s: s / (1 + s),
    "relu6": lambda s: torch.minimum(s, torch.full_like(s, 6)),
    "sigmoid": lambda s: 1 / (1 + torch.exp(-s)),
}


@every
def test_is_the_function_of_its_name(activation):
    s = PRE[PRE < 100]
    assert torch.allclose(activation.function(s), REFERENCES[activation.name](s), rtol=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_place_is_the_same_function(activation, dtype):
    s = torch.linspace(-3, 9, 50).to(dtype)
    kept = s.clone()
    out = activation.function(s)
    assert torch.equal(s, kept) and out.dtype == dtype
    written = activation.function_(s)
    assert written.data_ptr() == s.data_ptr()
    torch.testing.assert_close(written, out)


@every
@pytest.mark.parametrize("side", [5, 40])  # below and above LARGE
@pytest.mark.parametrize("numpy", [True, False])
def test_in_place_on_images_is_as_exact(activation, side, numpy, monkeypatch):
    """Where another kernel may take over: accuracy, layout, and the edges of float32."""
    if not numpy:
        monkeypatch.setattr(activations, "NUMPY", False)
    torch.manual_seed(0)
    s = torch.rand(4, 12, side, side) * 10
    edges = torch.tensor([0.0, 1.4e-45, 1e-39, 1.2e-38, 1e-30, 1e-7, 9.0, 1e4, torch.inf])
    if activation.name == "softsign":
        edges = edges[:-1]  # inf/inf, in torch's own as well
    s.view(-1)[: len(edges)] = edges
    s = s.contiguous(memory_format=torch.channels_last)
    truth = activation.function(s.double())
    v = activation.function_(s.clone(memory_format=torch.preserve_format))
    assert v.stride() == s.stride() and (v[s > 0] > 0).all()  # a pcDEQ-1 value never underflows
    torch.testing.assert_close(v.double(), truth, rtol=3 * 2.0**-24, atol=2e-45)
    plain = activation.function_(s.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(plain, v, rtol=3 * 2.0**-24, atol=0)
    assert activation.function_(torch.full_like(s, torch.nan)).isnan().all()


@every
def test_in_place_on_large_images_in_bfloat16_is_rounded_once(activation):
    s = (torch.rand(4, 12, 40, 40) * 4).bfloat16().contiguous(memory_format=torch.channels_last)
    assert s.numel() > activations.LARGE
    truth = activation.function(s.double())
    v = activation.function_(s.clone(memory_format=torch.preserve_format))
    assert v.dtype == torch.bfloat16 and v.stride() == s.stride()
    roundings = 3 if activation.name == "softsign" else 1  # |s|, 1 + |s| and the quotient
    torch.testing.assert_close(v.double(), truth, rtol=1.01 * roundings * 2.0**-8, atol=0)


def test_many_threads_share_a_large_tanh(monkeypatch):
    numpys = []
    monkeypatch.setattr(
        activations, "np", types.SimpleNamespace(tanh=lambda v, out: numpys.append(v))
    )
    monkeypatch.setattr(activations, "NUMPY", True)
    monkeypatch.setattr(activations, "FEW", 4)
    tanh_ = ACTIVATIONS["tanh"].function_
    for threads, elements, expected in ((1, 10**5, 1), (4, 10**5, 1), (16, 10**5, 0), (16, 99, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        numpys.clear()
        tanh_(torch.ones(elements))
        assert len(numpys) == expected


@every
def test_derivative_in_its_own_value_is_autograd_s(activation):
    s = PRE.clone().requires_grad_()
    v = activation.function(s)
    (reference,) = torch.autograd.grad(v.sum(), s)
    torch.testing.assert_close(activation.derivative(v.detach()), reference, rtol=0, atol=1e-14)


@every
def test_vjp_is_derivative_times_g(activation):
    v = activation.function(PRE)
    g = torch.linspace(-2, 3, len(PRE)).double()
    expected = activation.derivative(v) * g
    torch.testing.assert_close(activation.vjp(g, v), expected)
    low = activation.vjp(g.bfloat16(), v.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.double() - expected).norm() < 2.0**-6 * expected.norm()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_derivative_keeps_dtype_and_argument(activation, dtype):
    v = activation.function(torch.linspace(0, 9, 50).to(dtype))
    kept = v.clone()
    slope = activation.derivative(v)
    assert slope.dtype == dtype and torch.equal(v, kept)
    assert (slope >= 0).all() and (slope <= 1).all()


@every
def test_supremum_bounds_and_is_approached(activation):
    values = activation.function(PRE)
    assert (values <= activation.supremum).all()
    assert values[-1] == pytest.approx(activation.supremum, rel=1e-3)


@every
def test_variant_is_what_sigma_of_zero_says(activation):
    at_zero = activation.function(torch.zeros(1)).item()
    assert activation.variant == (2 if at_zero > 0 else 1)
    assert activation.name in allowed(activation.variant)
    assert activation.name not in allowed(3 - activation.variant)


@every
@given(
    a=st.floats(0, 30),
    b=st.floats(0, 30),
    t=st.floats(0, 1),
)
def test_is_nondecreasing_and_concave(activation, a, b, t):
    def sigma(s: float) -> float:
        return activation.function(torch.tensor(s, dtype=torch.float64)).item()

    assert sigma(min(a, b)) <= sigma(max(a, b))
    chord = t * sigma(a) + (1 - t) * sigma(b)
    assert sigma(t * a + (1 - t) * b) >= chord - 1e-12


@every
def test_is_copied_and_pickled_as_its_name(activation):
    assert copy.deepcopy(activation) is activation
    assert pickle.loads(pickle.dumps(activation)) is activation


@every
def test_one_of_its_own_is_copied_as_it_is(activation):
    own = dataclasses.replace(activation, supremum=2.0)
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert copied == own and copied.supremum == 2 and copied is not activation


def test_allowed_names_the_default_first():
    assert allowed(1) == ("tanh", "softsign", "relu6")
    assert allowed(2) == ("sigmoid",)


def test_an_unknown_name_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"'gelu'.*tanh, softsign, relu6, sigmoid"):
        get_activation("gelu")
    with pytest.raises(ValueError, match="unknown activation"):
        get_activation(["tanh"])
