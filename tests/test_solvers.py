"""Fixed-point solvers on maps written here: the rule to the letter, and the right limit.

The map of most tests is z ↦ min(Az + b, 6) with A ≥ 0 of a chosen spectral radius and b so small
that the fixed point stays below 6: it is (I − A)⁻¹b, known without iterating, and as slow to reach
as one likes.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from maps import Map, slow
from torch import Tensor

from pcdeq import solvers
from pcdeq.solvers import SOLVERS, anderson, picard

every = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def textbook(f: Map, z: Tensor, tol: float, max_iter: int) -> tuple[Tensor, int, float, bool]:
    """The rule as the paper's code has it."""
    for iteration in range(1, max_iter + 1):
        fz = f(z)
        residual = (fz - z).norm().item() / (fz.norm().item() + 1e-5)  # which no tie rounds to tol
        if residual < tol:
            return fz, iteration, residual, True
        z = fz
    return fz, max_iter, residual, False


@pytest.mark.parametrize("tol", [1e-1, 1e-4, 1e-9])
@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_picard_is_the_textbook_loop(rho, tol):
    f = slow(rho)
    solve = picard(f, None, tol=tol, max_iter=500)
    z, iterations, residual, converged = textbook(f, torch.zeros_like(f.b), tol, 500)
    assert torch.equal(solve.z, z)
    assert (solve.iterations, solve.full, solve.converged) == (iterations, iterations, converged)
    assert solve.residual == pytest.approx(residual, rel=1e-6)


@every
def test_counts_are_calls(solver):
    f = slow(0.8)
    solve = solver(f, None, tol=1e-6, max_iter=500)
    assert solve.iterations == solve.full == f.calls > 5


@every
def test_reaches_the_fixed_point(solver):
    f = slow(0.95)
    solve = solver(f, None, tol=1e-13, max_iter=2000)
    assert solve.converged and solve.residual < 1e-13
    torch.testing.assert_close(solve.z, f.solution(), rtol=1e-10, atol=0)


@every
@pytest.mark.parametrize("start", [0.0, 0.5, 100.0])
def test_every_nonnegative_start_leads_to_it(solver, start):
    f = slow(0.9)
    z = start * torch.rand_like(f.b)
    solve = solver(f, z, tol=1e-12, max_iter=2000)
    torch.testing.assert_close(solve.z, f.solution(), rtol=1e-9, atol=0)


@every
def test_no_start_means_the_origin(solver):
    f = slow(0.8)
    g = Map(f.A, f.b)
    a = solver(f, None, tol=1e-8, max_iter=100)
    b = solver(g, torch.zeros_like(f.b), tol=1e-8, max_iter=100)
    assert torch.equal(a.z, b.z) and a[1:] == b[1:]
    assert f.starts_at_none and not g.starts_at_none


@every
def test_the_start_is_not_written_to(solver):
    f = slow(0.8)
    z = torch.rand_like(f.b)
    kept = z.clone()
    solver(f, z, tol=1e-8, max_iter=100)
    assert torch.equal(z, kept)


@every
def test_ends_at_max_iter_and_says_so(solver):
    f = slow(0.9)
    needed = solver(f, None, tol=1e-6, max_iter=1000).iterations
    exact = solver(f, None, tol=1e-6, max_iter=needed)
    assert exact.converged and exact.iterations == needed
    cut = solver(f, None, tol=1e-6, max_iter=needed - 1)
    assert not cut.converged and cut.iterations == needed - 1 and cut.residual >= 1e-6
    once = solver(f, None, tol=1e-6, max_iter=1)
    assert once.iterations == 1 and torch.equal(once.z, f(None))


@every
def test_a_residual_equal_to_the_tolerance_is_not_below_it(solver):
    f = slow(0.8)
    residual = solver(f, None, tol=1e-30, max_iter=3).residual
    assert not solver(f, None, tol=residual, max_iter=3).converged
    assert solver(f, None, tol=residual * (1 + 1e-9), max_iter=3).converged


@every
def test_not_finite_ends_the_solve(solver):
    f = slow(0.8)

    def broken(z):
        fz = f(z)
        return fz * math.nan if f.calls == 4 else fz

    solve = solver(broken, None, tol=1e-12, max_iter=100)
    assert solve.iterations == f.calls == 4
    assert math.isnan(solve.residual) and not solve.converged


@every
@pytest.mark.parametrize("every_so_many", [1, 3])
def test_a_norm_that_overflows_is_no_convergence(solver, every_so_many, monkeypatch):
    """‖f(z)‖ is infinite in float32 before ‖f(z) − z‖ is: their ratio would be 0."""
    monkeypatch.setattr(solvers, "_at_once", lambda f: every_so_many)
    start = torch.full((1, 2), 1.5e19)
    solve = solver(lambda z: 1.5 * z, start, tol=1e-4, max_iter=50)
    assert math.isnan(solve.residual) and not solve.converged


@every
def test_zero_is_a_fixed_point_like_any_other(solver):
    solve = solver(lambda z: 0.5 * z, torch.ones(2, 3), tol=1e-4, max_iter=200)
    assert solve.converged and solve.z.norm() < 1e-8  # by the 1e-5 in the denominator


@every
@pytest.mark.parametrize("tol, max_iter", [(1e-6, 500), (1e-6, 20), (1e-1, 500), (0.9, 1)])
def test_reading_residuals_late_changes_nothing(solver, tol, max_iter, monkeypatch):
    f = slow(0.9)
    f.b[2] = 0.9  # a row that meets the kink
    results = []
    for every_so_many in (1, 2, 3, 4, 7):
        monkeypatch.setattr(solvers, "_at_once", lambda f, n=every_so_many: n)
        results.append(solver(f, None, tol=tol, max_iter=max_iter))
    for solve in results[1:]:
        assert torch.equal(solve.z, results[0].z) and solve[1:] == results[0][1:]


@every
def test_an_empty_batch_is_solved_at_once(solver, monkeypatch):
    monkeypatch.setattr(solvers, "_at_once", lambda f: 4)  # late reading mixes before it knows
    solve = solver(lambda z: 0.5 * z, torch.ones(0, 3, 4, 4), tol=1e-4, max_iter=200)
    assert solve.converged and solve.iterations == 1 and solve.z.shape == (0, 3, 4, 4)


def test_reading_late_stops_at_the_first_that_meets_the_rule(monkeypatch):
    """Residuals that fall below the tolerance, rise again and fall again."""
    values = [8.0, 8.0001, 4.0, 4.0001, 2.0, 2.0001]
    for every_so_many in (1, 2, 3, 4, 7):
        monkeypatch.setattr(solvers, "_at_once", lambda f, n=every_so_many: n)
        remaining = iter(values + [1.0] * 7)
        solve = picard(
            lambda z, remaining=remaining: torch.full((1, 1), next(remaining)),
            None,
            tol=1e-3,
            max_iter=6,
        )
        assert solve.iterations == 2 and solve.z.item() == pytest.approx(8.0001)


@pytest.mark.parametrize("start", [None, 1.0, 1e3])
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12),
    shrink=st.floats(0.01, 1),
    tol=st.sampled_from([1e-3, 0.1, 0.5, 0.9]),
)
def test_leaving_out_norms_never_changes_where_picard_stops(start, values, shrink, tol):
    """Whatever the iterates do: grow, shrink, jump to zero and back."""
    iterates = [torch.full((1, 2), (start or 0) + v * shrink**k) for k, v in enumerate(values)]
    z = None if start is None else torch.full((1, 2), start)
    z_textbook = torch.zeros(1, 2) if z is None else z
    replay = iter(iterates)
    solve = picard(lambda _: next(replay).clone(), z, tol=tol, max_iter=len(values))
    replay = iter(iterates)
    expected = textbook(lambda _: next(replay), z_textbook, tol, len(values))
    assert torch.equal(solve.z, expected[0])
    assert (solve.iterations, solve.converged) == (expected[1], expected[3])
    assert solve.residual == pytest.approx(expected[2], rel=1e-5)


def test_norms_are_left_out_only_where_their_rounding_cannot_matter():
    """f(z) along z: ‖f(z)‖ = ‖z‖ + ‖r‖, but for rounding, and the rule is met by a hair."""
    for _ in range(100):
        z = torch.rand(1, 50)
        fz = z * 1.01
        tol = ((fz - z).norm() / (fz.norm() + 1e-5)).item() * (1 + 1e-7)
        expected = textbook(lambda _, fz=fz: fz, z, tol, 9)
        replay = iter([z, fz, *[torch.zeros_like(z)] * 7])
        solve = picard(lambda _, replay=replay: next(replay).clone(), None, tol=tol, max_iter=9)
        if expected[1] == 1:  # else its own norms say otherwise
            assert solve.iterations == 2


def _half_way(fz, r, before):
    return fz - 0.5 * r, None, None


@pytest.mark.parametrize(
    "mix", [solvers._plain, solvers._secant, solvers._secant_nonnegative, _half_way]
)
def test_what_a_gpu_records_is_the_iteration(mix):
    f = slow(0.8)
    call = partial(lambda b, A, z: b.clone() if z is None else z @ A.T + b, f.b, f.A)
    first = solvers._from(4, call, None, mix)
    recorded = partial(first.func, *(a.clone() if torch.is_tensor(a) else a for a in first.args))
    for _ in range(9):  # each goes on where the one before has ended
        evaluations, norms = recorded()
    assert norms.shape == (2, 4)
    solve = solvers._iterate(call, None, mix, 1e-300, 36)
    torch.testing.assert_close(evaluations[-1], solve.z, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rho", [0.9, 0.97])
def test_anderson_needs_fewer_iterations_on_slow_maps(rho):
    f = slow(rho)
    plain = picard(f, None, tol=1e-6, max_iter=1000)
    accelerated = anderson(f, None, tol=1e-6, max_iter=1000)
    assert accelerated.converged and accelerated.iterations < 0.6 * plain.iterations


def test_anderson_is_the_least_squares_step():
    """Against the minimiser of ‖r − γΔr‖ found by torch.linalg.lstsq, sample by sample."""
    f = slow(0.9)
    z = [torch.zeros_like(f.b)]
    for _ in range(6):
        r = [f(point) - point for point in z[-2:]]
        step = f(z[-1]).clone()
        if len(z) > 1:
            for i in range(len(step)):
                if r[1][i].norm() < r[0][i].norm():
                    change = (r[1] - r[0])[i, :, None]
                    gamma = torch.linalg.lstsq(change, r[1][i, :, None]).solution
                    step[i] -= gamma.item() * (f(z[-1]) - f(z[-2]))[i]
        z.append(step.clamp(min=0))
    for k in range(1, 6):
        solve = anderson(f, None, tol=1e-300, max_iter=k)
        torch.testing.assert_close(solve.z, f(z[k - 1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_map_that_returns_its_argument_or_a_constant_is_solved(solver):
    """What comes back is the iterate itself: its memory must not take the residual."""
    constant = torch.ones(3, 2)
    solve = solver(lambda z: constant, None, tol=1e-6, max_iter=9)
    assert solve.converged and torch.equal(solve.z, torch.ones(3, 2))
    start = torch.full((3, 2), 2.0)
    solve = solver(lambda z: z, start, tol=1e-6, max_iter=9)
    assert solve.converged and solve.iterations == 1 and torch.equal(solve.z, start)
    assert torch.equal(constant, torch.ones(3, 2)) and torch.equal(start, torch.full((3, 2), 2.0))


def test_anderson_takes_the_plain_step_where_a_residual_did_not_fall():
    """Without the rule, r = 1, then 2 would give γ = 2 and throw the iterate far off."""
    values = iter([1.0, 3.0, 3.5])
    arguments = []

    def f(z):
        arguments.append(None if z is None else z.item())
        return torch.full((1, 1), next(values))

    anderson(f, None, tol=1e-9, max_iter=3)
    assert arguments == [None, 1.0, 3.0]


def test_anderson_takes_the_plain_step_where_squares_underflow():
    """‖r‖² falls from 3e-45 to 1e-45, the least float32; ‖Δr‖² is 0, and γ would be 0/0."""
    values = iter([5e-23, 9e-23, 1e-22])
    arguments = []

    def f(z):
        arguments.append(None if z is None else z.clone())  # its memory is the solver's
        return torch.full((1, 1), next(values))

    anderson(f, None, tol=1e-30, max_iter=3)
    assert torch.equal(arguments[2], torch.full((1, 1), 9e-23))


def test_anderson_mixes_each_sample_on_its_own():
    f = slow(0.9, batch=5)
    f.b *= torch.tensor([[0.01], [0.3], [1.0], [3.0], [9.0]])
    for k in (3, 4, 8):
        together = anderson(f, None, tol=1e-300, max_iter=k).z
        for i in range(5):
            alone = anderson(Map(f.A, f.b[i : i + 1]), None, tol=1e-300, max_iter=k).z
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-12)


def test_anderson_mixes_images_sample_by_sample():
    f = slow(0.9, n=12)
    flat = anderson(f, None, tol=1e-300, max_iter=5).z

    def folded(z):
        return f(None if z is None else z.reshape(4, 12)).reshape(4, 2, 3, 2)

    images = anderson(folded, None, tol=1e-300, max_iter=5).z
    torch.testing.assert_close(images.reshape(4, 12), flat)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_anderson_keeps_to_the_orthant_where_asked(nonnegative):
    A = torch.tensor([[0.1, 0.6], [0.0, 0.6]], dtype=torch.float64)
    f = Map(A, torch.tensor([[0.101, 0.001]], dtype=torch.float64))
    start = torch.tensor([[2.0, 5.0]], dtype=torch.float64)  # from here a secant step overshoots
    solve = anderson(f, start, tol=1e-10, max_iter=200, nonnegative=nonnegative)
    assert solve.converged
    torch.testing.assert_close(solve.z, f.solution(), rtol=1e-7, atol=0)
    assert (f.least >= 0) == nonnegative


def test_norms_of_bfloat16_are_accumulated_in_float32():
    """Summed in bfloat16, a hundred thousand small changes would vanish beside a large one."""
    n = 100_000
    z = torch.ones(1, n, dtype=torch.bfloat16)
    solve = picard(lambda z: z * 1.0078125, z, tol=1e-30, max_iter=1)
    assert solve.residual == pytest.approx(1 - 1 / 1.0078125, rel=1e-2)
