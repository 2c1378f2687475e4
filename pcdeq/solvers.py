"""z = f(z): fixed-point solvers with one stopping rule.

A solve ends at the first evaluation whose residual, over the whole batch tensor, satisfies

    ‖f(z) − z‖₂ / (‖f(z)‖₂ + 1e-5) < tol

and returns f(z). Two iterations are offered: Picard, z ← f(z), which converges geometrically from
any nonnegative start when f is a positive concave mapping; and Anderson acceleration of depth one
(Anderson, 1965) with one mixing scalar per sample. Nothing here knows a layer.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from pcdeq import replay

EPSILON = 1e-5  # in the denominator of the residual, so that z* = 0 is no special case

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
            the solver's, to be written to, and not to be kept or returned again. On a GPU a
            ``functools.partial`` is replayed, if its function depends on nothing but its arguments
            and the first tensor among those bound is of the kind of z.
        z: the start, any shape with the batch in front, or ``None`` for the origin.
        tol: relative tolerance of the stopping rule.
        max_iter: largest number of evaluations; where it is reached, ``converged`` is false.
        nonnegative: for Anderson; a plain step stays where f maps to.
    """
    return _iterate(f, z, _plain, tol, max_iter)


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
    return _iterate(f, z, _secant_nonnegative if nonnegative else _secant, tol, max_iter)


class Before(NamedTuple):
    """What a secant step needs of the evaluation before: f(z), r, and ‖r‖² by sample."""

    fz: Tensor
    r: Tensor
    square: Tensor


# How an evaluation leads to the next z: f(z), r, before ↦ z, before, and a tensor whose memory the
# next residual may take, as fresh memory costs more than the subtraction.
Mix = Callable[[Tensor, Tensor, Before | None], tuple[Tensor, Before | None, Tensor | None]]


def _plain(fz: Tensor, r: Tensor, before: None) -> tuple[Tensor, None, Tensor]:
    return fz, before, fz  # by then fz is the old z


def _secant(fz: Tensor, r: Tensor, before: Before | None) -> tuple[Tensor, Before, Tensor | None]:
    square, z, spare = _sample_squares(r), fz, None
    if before is not None:
        spare = before.r
        change = _sample_squares(torch.sub(r, before.r, out=spare))
        # ⟨Δr, r⟩ by polarisation: norms take one pass where a product takes two
        gamma = (change + square - before.square) / (2 * change)
        gamma = gamma.where((square < before.square) & gamma.isfinite(), 0).to(fz.dtype)
        z = torch.lerp(fz, before.fz, gamma, out=spare)  # f(z) − γ·Δf
    # From the origin r is f(z) itself; each keeps memory of its own, which is written to.
    return z, Before(fz, r.clone() if r is fz else r, square), spare


def _secant_nonnegative(
    fz: Tensor, r: Tensor, before: Before | None
) -> tuple[Tensor, Before, Tensor | None]:
    z, before, spare = _secant(fz, r, before)
    return z if z is fz else z.clamp_(min=0), before, spare


SOLVERS: dict[str, Callable[..., Solve]] = {"picard": picard, "anderson": anderson}


def _iterate(f: Map, z: Tensor | None, mix: Mix, tol: float, max_iter: int) -> Solve:
    """Iterates until f(z) meets the rule, reading residuals a few at a time.

    ‖f(z)‖ is left out where the rule cannot hold as ‖f(z)‖ ≤ ‖z‖ + ‖r‖; of the plain step, whose z
    is the last f(z), ‖z‖ is bounded so.
    """
    if isinstance(f, partial) and replay.pays(f):
        with replay.lend(_few_from(f, z, mix)) as few:
            if few:
                return _replayed(few, tol, max_iter)
    iterations, before, spare, plain = 0, None, None, mix is _plain
    z_norm = 0.0 if z is None and plain else math.inf  # an upper bound
    while True:
        pending, norms = [], []
        for _ in range(max_iter - iterations):
            r = None  # f may have its memory
            fz = f(z)
            out = None if pending or fz is z else spare  # what is pending may be the solution
            r = fz if z is None else torch.sub(fz, z, out=out)
            pending.append(fz)
            norms.append(norm(r))
            check_every = CHECK_EVERY.get(fz.device.type, 1)
            if len(pending) == check_every:
                break
            z, before, spare = mix(fz, r, before)
        if not plain:  # all of them are wanted, with one synchronisation
            norms += map(norm, pending)
        norms = read(norms)
        sizes = norms[len(pending) :]
        for k, fz in enumerate(pending):
            change = norms[k]
            iterations += 1
            z_norm += change
            # A tenth more than the tolerance, as norms are rounded; NaN is not above it.
            if change > 1.1 * tol * (z_norm + EPSILON) and iterations < max_iter:
                continue
            size = sizes[k] if sizes else norm(fz).item()
            residual = relative(change, size)
            if not residual >= tol or iterations == max_iter:  # NaN ends a solve too
                return Solve(fz, iterations, iterations, residual, residual < tol)
            if plain:
                z_norm = size
        z, before, spare = mix(fz, r, before)


def _replayed(few: replay.Replay, tol: float, max_iter: int) -> Solve:
    """The same with a few evaluations at each replay."""
    iterations = 0
    while True:
        evaluations, norms = few()
        for fz, change, size in zip(evaluations, *norms.tolist(), strict=True):
            iterations += 1
            residual = relative(change, size)
            if not residual >= tol or iterations == max_iter:
                return Solve(fz.clone(), iterations, iterations, residual, residual < tol)


def _few_from(f: partial, z: Tensor | None, mix: Mix) -> partial:
    """The first few iterations from z, as a call to record."""
    if z is None:
        z = torch.zeros_like(next(a for a in f.args if isinstance(a, Tensor)))
    before = [None] * 3
    if mix is not _plain:
        zero = torch.zeros_like(z)  # from where a secant step is the plain one
        before = zero, zero, _sample_squares(zero)
    return partial(_few, CHECK_EVERY["cuda"], mix, z, *before, f.func, *f.args)


def _few(n, mix, z, before_fz, before_r, before_square, f, *args) -> tuple[list[Tensor], Tensor]:
    """n evaluations, and ‖r‖ and ‖f(z)‖ of each (2, n); z and before become those of the next."""
    start = z, before_fz, before_r, before_square
    before, evaluations, residuals = Before(*start[1:]), [], []
    for _ in range(n):
        fz = f(*args, z)
        evaluations.append(fz)
        residuals.append(fz - z)
        r = residuals[-1] if mix is _plain else residuals[-1].clone()  # whose memory a mix may take
        z, before, _ = mix(fz, r, before)
    for old, new in zip(start, (z, *before), strict=True):
        if old is not None:
            old.copy_(new)
    norms = torch._foreach_norm(residuals + evaluations)  # one launch for all
    return evaluations, torch.stack(norms).view(2, n)


def relative(change: float, size: float) -> float:
    """The residual from ‖f(z) − z‖ and ‖f(z)‖."""
    return change / (size + EPSILON)


def norm(t: Tensor) -> Tensor:
    """‖t‖₂, 0-dimensional."""
    if t.ndim != 4 or t.device.type != "cpu" or t.dtype not in (torch.float32, torch.float64):
        return vector_norm(t)
    t = t.permute(0, 2, 3, 1).reshape(-1)  # a view, if t is in channels_last
    return t.dot(t).sqrt_()  # in half the time of vector_norm


def _sample_squares(t: Tensor) -> Tensor:
    """‖·‖² of each sample, shape (B, 1, …), in float32 at least."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    return vector_norm(t, dim=tuple(range(1, t.ndim)), keepdim=True, dtype=dtype).square_()


def read(scalars: list[Tensor]) -> list[float]:
    """Python floats of 0-dimensional tensors, with one synchronisation for all of them."""
    if scalars[0].device.type == "cpu":
        return [s.item() for s in scalars]
    return torch.stack(scalars).tolist()
