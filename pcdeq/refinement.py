"""z = f(z) in mixed precision: solve roughly in bfloat16, correct until the full f meets the rule.

It is the iterative refinement of numerical linear algebra (Wilkinson, 1963; Carson and Higham,
2018) with a Newton correction in place of a linear solve.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pcdeq.solvers import Map, Solve, norm, relative

LOW = torch.bfloat16  # the low precision
ROUGH_TOL = 2.0**-8  # of the first solve in bfloat16: its unit roundoff
CORRECTION_TOL = 0.02  # of a correction: small already, a few percent of it are enough


class Linearised(NamedTuple):
    """A map together with its tangent: ``tangent(f(z), r)`` is the map v ↦ J(z)v + r."""

    f: Map
    tangent: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


def refine(
    at: Callable[[torch.dtype], Linearised],
    z: Tensor | None,
    *,
    solver: Callable[..., Solve],
    dtype: torch.dtype,
    tol: float,
    max_iter: int,
    nonnegative: bool = True,
) -> Solve:
    """Mixed precision: solve roughly in bfloat16, then correct until the full f meets the rule.

    Each round evaluates f once in full precision, which checks the rule and gives the residual
    r = f(z) − z; the Newton correction δ = Jδ + r is solved in bfloat16 to a few percent,
    and z + δ = f(z) + (δ − r) is the next z. Where J is no contraction yet, a correction cannot be
    solved, or does not lower the residual: it is dropped, and the full precision goes on alone from
    the plain step f(z). The fixed point is unique, so any nonnegative z is a safe place for that.

    Args:
        at: the map and its tangent in a precision; made anew each time, so that what one precision
            needs takes no memory while the other is at work.
        z: start in the full precision, or ``None`` for the origin.
        solver: one of ``SOLVERS``, for both kinds of solves in bfloat16.
        dtype: the full precision.
        tol: as for ``picard``, of the residual in full precision.
        max_iter: largest number of evaluations, of either precision together.
        nonnegative: project corrected iterates onto the nonnegative orthant.
    """
    rule = {"tol": tol, "nonnegative": nonnegative}
    if max_iter == 1:
        return solver(at(dtype).f, z, max_iter=1, **rule)
    z, iterations = _roughly(at(LOW), z, solver, dtype, max_iter - 1, nonnegative)
    most = 2 * iterations  # products of a correction: what needs more may be no contraction
    full, before, plain = 0, math.inf, None  # residual and f(z) of the best z so far
    while True:
        r = None  # f may have its memory
        fz = at(dtype).f(z)
        iterations, full = iterations + 1, full + 1
        r = torch.sub(fz, z, out=None if fz is z else z)
        del z  # r has its memory
        residual = relative(*_read([norm(r), norm(fz)]))
        helps = residual < before  # NaN does not
        if helps:
            before, plain = residual, fz
        if residual < tol or plain is None:
            return Solve(fz, iterations, full, residual, residual < tol)
        if not helps or iterations + 1 >= max_iter:
            break
        r = r.to(LOW)  # in full it would take memory meanwhile
        left = max_iter - 1 - iterations
        z, spent, solved = _corrected(at(LOW), fz, r, solver, min(left, most))
        iterations += spent
        if not solved:
            break
        if nonnegative:
            z.clamp_(min=0)
    if iterations >= max_iter:
        return Solve(plain, iterations, full, before, False)
    rest = solver(at(dtype).f, plain, max_iter=max_iter - iterations, **rule)
    return rest._replace(iterations=iterations + rest.iterations, full=full + rest.full)


def _roughly(
    low: Linearised,
    z: Tensor | None,
    solver: Callable[..., Solve],
    dtype: torch.dtype,
    max_iter: int,
    nonnegative: bool,
) -> tuple[Tensor, int]:
    """The fixed point as bfloat16 has it, and the evaluations that it took."""
    start = None if z is None else z.to(LOW)
    rough = solver(low.f, start, tol=ROUGH_TOL, max_iter=max_iter, nonnegative=nonnegative)
    return rough.z.to(dtype), rough.iterations


def _corrected(
    low: Linearised, fz: Tensor, r: Tensor, solver: Callable[..., Solve], max_iter: int
) -> tuple[Tensor, int, bool]:
    """z + δ with δ = Jδ + r solved in bfloat16, the products that it took, and whether it is."""
    rule = {"tol": CORRECTION_TOL, "max_iter": max_iter, "nonnegative": False}
    correction = solver(low.tangent(fz.to(LOW), r), r, **rule)
    z = (correction.z - r).to(fz.dtype).add_(fz)  # its z is f(z) − r
    return z, correction.iterations, correction.converged


def _read(scalars: list[Tensor]) -> list[float]:
    """Python floats of 0-dimensional tensors, with one synchronisation for all of them."""
    if scalars[0].device.type == "cpu":
        return [s.item() for s in scalars]
    return torch.stack(scalars).tolist()
