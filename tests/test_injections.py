"""The injections: positive, exact, monotone to rounding, and differentiable."""

import pytest
import torch
import torch.nn.functional as F

from pcdeq import injections
from pcdeq.injections import INJECTIONS, positive

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(autouse=True, params=[True, False], ids=["AMD", "others"])
def processor(request, monkeypatch):
    monkeypatch.setattr(injections, "AMD_AVX512", request.param)


@both_dtypes
def test_softplus_is_as_exact_as_its_dtype(dtype):
    h = torch.linspace(-12, 30, 100_001, dtype=dtype)
    s = 5 * h.double()
    exact = torch.logaddexp(s, torch.zeros_like(s)) / 5
    # exp turns the rounding of its argument, up to |5h| ulps, into a relative error
    bound = torch.finfo(dtype).eps * (4 + s.abs())
    assert ((positive(h) - exact).abs() <= bound * exact).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softplus_in_low_precision(dtype):
    h = torch.linspace(-1, 8, 1001).to(dtype)
    exact, eps = F.softplus(h.double(), beta=5), torch.finfo(dtype).eps
    assert positive(h).dtype == dtype
    assert ((positive(h).double() - exact).abs() <= 2 * eps * (1 + exact)).all()
    assert (positive(torch.tensor([-30.0, -1e4], dtype=dtype)) > 0).all()


@both_dtypes
def test_softplus_never_underflows_to_zero(dtype):
    h = torch.tensor([-float("inf"), -1e30, -1e4, -200.0, -21.0, -17.5], dtype=dtype)
    x = positive(h)
    assert (x > 0).all()
    assert x[0] == torch.finfo(dtype).tiny
    assert (x.diff() >= 0).all()


@both_dtypes
def test_softplus_of_large_inputs_is_the_input(dtype):
    h = torch.tensor([20.0, 1e4, 1e30, float("inf")], dtype=dtype)
    assert torch.equal(positive(h), h)
    assert positive(torch.tensor([float("nan")], dtype=dtype)).isnan().all()


def test_softplus_is_the_library_function_up_to_rounding():
    h = torch.randn(1000) * 3
    torch.testing.assert_close(positive(h), F.softplus(h, beta=5), rtol=2e-6, atol=0)


@pytest.mark.parametrize("variant", [1, 2])
def test_gradients(variant):
    h = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(INJECTIONS[variant], h)
    steep = torch.tensor([-1e4, 1e4], dtype=torch.float64, requires_grad=True)
    INJECTIONS[variant](steep).sum().backward()
    assert torch.equal(steep.grad, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_keeps_the_memory_format():
    h = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert positive(h).is_contiguous(memory_format=torch.channels_last)


def test_softplus_is_positive_where_subnormal_numbers_are_flushed_to_0():
    assert torch.set_flush_denormal(True)
    try:
        assert (positive(torch.tensor([-21.0, -40.0])) > 0).all()
    finally:
        torch.set_flush_denormal(False)
