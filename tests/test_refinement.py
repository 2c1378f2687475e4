"""pcdeq.refinement: the full rule, from work in bfloat16."""

import math

import pytest
import torch
from maps import Map, slow
from torch import Tensor

from pcdeq.refinement import Linearised, refine
from pcdeq.solvers import SOLVERS, picard

every = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def mixed(f: Map, z: Tensor | None = None, solver=picard, **rule):
    low = f.to(torch.bfloat16)
    return refine(at(f, low), z, solver=solver, dtype=f.b.dtype, **rule), low


def at(f: Map, low: Map, tangent=None):
    """Both precisions, as ``refine`` takes them."""
    return {
        f.b.dtype: Linearised(f, f.tangent),
        low.b.dtype: Linearised(low, tangent or low.tangent),
    }.get


@every
@pytest.mark.parametrize("rho", [0.5, 0.95])
@pytest.mark.parametrize("start", [None, 3.0])
def test_refinement_meets_the_full_rule_with_few_full_evaluations(solver, rho, start):
    f = slow(rho, dtype=torch.float32)
    z = None if start is None else torch.full_like(f.b, start)
    solve, _ = mixed(f, z, solver, tol=1e-4, max_iter=300)
    assert solve.converged and solve.residual < 1e-4
    assert solve.z.dtype == torch.float32
    again = ((f(solve.z) - solve.z).norm() / f(solve.z).norm()).item()
    assert again < 1e-4  # the map contracts, so the result meets the rule as well
    error = (solve.z.double() - f.solution()).norm() / f.solution().norm()
    assert error < 1e-4 / (1 - rho)
    assert solve.full <= 4


def test_a_correction_that_cannot_be_solved_is_dropped():
    f = slow(0.9, dtype=torch.float32)
    low = f.to(torch.bfloat16)
    rule = {"tol": 1e-5, "max_iter": 300}
    both = at(f, low, lambda fz, r: lambda v: 2 * v + r)  # no contraction
    solve = refine(both, None, solver=picard, dtype=torch.float32, **rule)
    rough = picard(low, None, tol=2**-8, max_iter=299).z.float()
    assert solve.converged and solve.full == f.calls
    assert solve.full == 1 + picard(f, f(rough), **rule).iterations


def test_refinement_counts_evaluations_of_both_precisions():
    f = slow(0.9, dtype=torch.float32)
    low, tangents = f.to(torch.bfloat16), []

    def tangent(fz, r):
        assert fz.dtype == torch.bfloat16
        product = low.tangent(fz, r)
        return lambda v: tangents.append(v) or product(v)

    both = at(f, low, tangent)
    solve = refine(both, None, solver=picard, dtype=torch.float32, tol=1e-4, max_iter=99)
    assert solve.full == f.calls
    assert solve.iterations == f.calls + low.calls + len(tangents)
    assert low.starts_at_none and tangents and all(v.dtype == torch.bfloat16 for v in tangents)


@every
@pytest.mark.parametrize("max_iter", [1, 2, 3, 4, 5, 8, 13])
def test_refinement_never_exceeds_max_iter(solver, max_iter):
    f = slow(0.95, dtype=torch.float32)
    solve, _ = mixed(f, None, solver, tol=1e-7, max_iter=max_iter)
    assert solve.iterations == max_iter and not solve.converged
    assert f.calls == solve.full >= 1
    assert solve.z.dtype == torch.float32 and solve.z.isfinite().all()


HARMFUL = {
    "wrong direction": lambda r: lambda v: -50 * r,
    "too long": lambda r: lambda v: 1000 * r,
    "not finite": lambda r: lambda v: r * math.nan,
    "growing": lambda r: lambda v: 3 * v + r,
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_refinement_drops_a_correction_that_does_not_lower_the_residual(harm):
    f = slow(0.8, dtype=torch.float32)
    both = at(f, f.to(torch.bfloat16), lambda fz, r: HARMFUL[harm](r))
    solve = refine(both, None, solver=picard, dtype=torch.float32, tol=1e-5, max_iter=10_000)
    assert solve.converged
    torch.testing.assert_close(solve.z.double(), f.solution(), rtol=1e-3, atol=0)
    assert f.least >= 0


@pytest.mark.parametrize("max_iter", range(4, 20))
def test_refinement_that_runs_out_of_evaluations_returns_the_best_z(max_iter):
    """Not the harmful correction that it had just tried."""
    f = slow(0.8, dtype=torch.float32)
    both = at(f, f.to(torch.bfloat16), lambda fz, r: HARMFUL["too long"](r))
    rule = {"solver": picard, "dtype": torch.float32, "tol": 1e-7}
    solve = refine(both, None, max_iter=max_iter, **rule)
    first = refine(both, None, max_iter=3, **rule)
    assert solve.iterations <= max_iter and not solve.converged
    assert solve.residual <= first.residual < 0.3
    again = ((f(solve.z) - solve.z).norm() / f(solve.z).norm()).item()
    assert again <= solve.residual  # the map contracts


def test_refinement_stops_where_the_map_is_not_finite():
    f = slow(0.8, dtype=torch.float32)
    low = f.to(torch.bfloat16)
    f.b[0, 0] = math.nan
    solve = refine(at(f, low), None, solver=picard, dtype=f.b.dtype, tol=1e-4, max_iter=99)
    assert math.isnan(solve.residual) and not solve.converged and solve.full == 1
