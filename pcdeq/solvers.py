"""z = f(z): fixed-point solvers with one stopping rule.

A solve ends at the first evaluation whose residual, over the whole batch tensor, satisfies

    ‖f(z) − z‖₂ / (‖f(z)‖₂ + 1e-5) < tol

and returns f(z). Two iterations are offered: Picard, z ← f(z), which converges geometrically from
any nonnegative start when f is a positive concave mapping; and Anderson acceleration of depth one
(Anderson, 1965) with one mixing scalar per sample. ``refine`` runs either of them in bfloat16 and
ends at the rule in full precision, by the iterative refinement of numerical linear algebra
(Wilkinson, 1963; Carson and Higham, 2018) with a Newton correction. Nothing here knows a layer.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

EPSILON = 1e-5  # in the denominator of the residual, so that z* = 0 is no special case
LOW = torch.bfloat16  # the low precision
BF16_TOL = 2.0**-8  # the unit roundoff of bfloat16: the least residual that it can be asked for

# Reading a residual stops a GPU until it is idle, so there several evaluations are queued first.
# Iterates behind the first that meets the rule are dropped: the result does not depend on this.
CHECK_EVERY = {"cpu": 1, "cuda": 4, "mps": 4}

Map = Callable[[Tensor | None], Tensor]


class Solve(NamedTuple):
    """What a solve returns.

    Attributes:
        z: the last evaluation f(z), shape of the start; ``None`` where only the figures are kept.
        iterations: evaluations of the map in any precision, products with its Jacobian included.
        full: those of them in the full precision.
        residual: of the last evaluation, by the stopping rule; NaN if the iterates were not finite.
        converged: whether the residual is below the tolerance.
    """

    z: Tensor | None
    iterations: int
    full: int
    residual: float
    converged: bool


def picard(
    f: Map, z: Tensor | None, *, tol: float, max_iter: int, nonnegative: bool = True
) -> Solve:
    """Plain fixed-point iteration z ← f(z).

    Args:
        f: the map; ``f(None)`` means f(0). It must not write to its argument; what it returns is
            the solver's, to be written to, and not to be kept or returned again.
        z: the start, any shape with the batch in front, or ``None`` for the origin.
        tol: relative tolerance of the stopping rule.
        max_iter: largest number of evaluations; where it is reached, ``converged`` is false.
        nonnegative: for Anderson; a plain step stays where f maps to.
    """
    return _iterate(f, z, _plain, tol, max_iter)


def _plain(fz: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return fz, fz  # by then fz is the old z


def anderson(
    f: Map, z: Tensor | None, *, tol: float, max_iter: int, nonnegative: bool = True
) -> Solve:
    """Anderson acceleration of depth one: a secant step along the last two evaluations.

    With r = f(z) − z and the changes Δr and Δf since the evaluation before, each sample takes
    z ← f(z) − γ·Δf, γ = ⟨Δr, r⟩/‖Δr‖², which minimises ‖r − γΔr‖. A sample whose ‖r‖ did not fall
    takes the plain step.

    Args:
        f: as for ``picard``.
        z: as for ``picard``.
        tol: as for ``picard``.
        max_iter: as for ``picard``.
        nonnegative: project each mixed iterate onto the nonnegative orthant, where f is defined.
    """
    f_before = r_before = square_before = None

    def mix(fz: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        nonlocal f_before, r_before, square_before
        square, mixed, spare = _sample_squares(r), fz, r_before
        if r_before is not None:
            change = _sample_squares(torch.sub(r, r_before, out=spare))
            # ⟨Δr, r⟩ by polarisation: norms take one pass where a product takes two
            gamma = (change + square - square_before) / (2 * change)
            gamma = gamma.where((square < square_before) & gamma.isfinite(), 0).to(fz.dtype)
            mixed = torch.lerp(fz, f_before, gamma, out=spare)  # f(z) − γ·Δf
            if nonnegative:
                mixed.clamp_(min=0)
        # From the origin r is f(z) itself; each keeps memory of its own, which is written to.
        f_before, r_before, square_before = fz, r.clone() if r is fz else r, square
        return mixed, spare

    return _iterate(f, z, mix, tol, max_iter)


SOLVERS: dict[str, Callable[..., Solve]] = {"picard": picard, "anderson": anderson}


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
    and z + δ = f(z) + (δ − r) is the next z. The fixed point is unique, so any nonnegative z is a
    safe place to go on from: a correction that did not lower the residual is dropped, and the plain
    step f(z) taken in its place.

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
    if max_iter == 1:
        return solver(at(dtype).f, z, tol=tol, max_iter=1, nonnegative=nonnegative)
    z, iterations = _roughly(at(LOW), z, solver, dtype, max_iter - 1, nonnegative)
    full, before = 0, math.inf
    plain = None  # the plain step, while a correction taken in its place is on trial
    while True:
        r = None  # f may have its memory
        fz = at(dtype).f(z)
        iterations, full = iterations + 1, full + 1
        r = torch.sub(fz, z, out=None if fz is z else z)
        del z  # r has its memory
        residual = _relative(*_read([_norm(r), _norm(fz)]))
        if residual < tol or iterations >= max_iter:
            return Solve(fz, iterations, full, residual, residual < tol)
        if plain is not None and not residual < before:  # NaN fails too
            z, plain = plain, None
            continue
        if math.isnan(residual):
            return Solve(fz, iterations, full, residual, False)
        before = residual
        if iterations + 1 < max_iter:
            r = r.to(LOW)  # in full it would take memory meanwhile
            z, spent = _corrected(at(LOW), fz, r, solver, max_iter - 1 - iterations)
            iterations, plain = iterations + spent, fz
            if nonnegative:
                z.clamp_(min=0)
        else:
            z, plain = fz, None


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
) -> tuple[Tensor, int]:
    """z + δ with δ = Jδ + r solved in bfloat16, and the products that it took."""
    rule = {"tol": CORRECTION_TOL, "max_iter": max_iter, "nonnegative": False}
    correction = solver(low.tangent(fz.to(LOW), r), r, **rule)
    return fz + (correction.z - r), correction.iterations  # z = f(z) − r


ROUGH_TOL = BF16_TOL  # of the first solve in bfloat16
CORRECTION_TOL = 0.02  # of a correction: small already, a few percent of it are enough


def _iterate(
    f: Map,
    z: Tensor | None,
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    tol: float,
    max_iter: int,
) -> Solve:
    """Iterates until f(z) meets the rule, reading residuals a few at a time.

    ``mix(f(z), r)`` gives the next z, and a tensor whose memory the next residual r = f(z) − z may
    take: fresh memory costs more than the subtraction. ‖f(z)‖ is left out where the rule cannot
    hold as ‖f(z)‖ ≤ ‖z‖ + ‖r‖; of the plain step, whose z is the last f(z), ‖z‖ is bounded so.
    """
    iterations, spare, plain = 0, None, mix is _plain
    z_norm = 0.0 if z is None and plain else math.inf  # an upper bound
    while True:
        pending, norms = [], []
        for _ in range(max_iter - iterations):
            r = None  # f may have its memory
            fz = f(z)
            out = None if pending or fz is z else spare  # what is pending may be the solution
            r = fz if z is None else torch.sub(fz, z, out=out)
            pending.append(fz)
            norms.append(_norm(r))
            check_every = CHECK_EVERY.get(fz.device.type, 1)
            if len(pending) == check_every:
                break
            z, spare = mix(fz, r)
        if not plain:  # all of them are wanted, with one synchronisation
            norms += map(_norm, pending)
        norms = _read(norms)
        sizes = norms[len(pending) :]
        for k, fz in enumerate(pending):
            change = norms[k]
            iterations += 1
            z_norm += change
            # A tenth more than the tolerance, as norms are rounded; NaN is not above it.
            if change > 1.1 * tol * (z_norm + EPSILON) and iterations < max_iter:
                continue
            size = sizes[k] if sizes else _norm(fz).item()
            residual = _relative(change, size)
            if not residual >= tol or iterations == max_iter:  # NaN ends a solve too
                return Solve(fz, iterations, iterations, residual, residual < tol)
            if plain:
                z_norm = size
        z, spare = mix(fz, r)


def _relative(change: float, size: float) -> float:
    return change / (size + EPSILON)


def _norm(t: Tensor) -> Tensor:
    """‖t‖₂, 0-dimensional."""
    if t.ndim != 4 or t.device.type != "cpu" or t.dtype not in (torch.float32, torch.float64):
        return vector_norm(t)
    t = t.permute(0, 2, 3, 1).reshape(-1)  # a view, if t is in channels_last
    return t.dot(t).sqrt_()  # in half the time of vector_norm


def _sample_squares(t: Tensor) -> Tensor:
    """‖·‖² of each sample, shape (B, 1, …), in float32 at least."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    return vector_norm(t, dim=tuple(range(1, t.ndim)), keepdim=True, dtype=dtype).square_()


def _read(scalars: list[Tensor]) -> list[float]:
    """Python floats of 0-dimensional tensors, with one synchronisation for all of them."""
    if scalars[0].device.type == "cpu":
        return [s.item() for s in scalars]
    return torch.stack(scalars).tolist()
