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

# In the denominator of the residual, so that z* = 0 is no special case. But where ‖f(0)‖ is below
# tol·1e-5, f(0) is taken for the fixed point, however far that is.
EPSILON = 1e-5

Map = Callable[[Tensor | None], Tensor]


class Solve(NamedTuple):
    """What a solve returns.

    Attributes:
        z: the last evaluation f(z), shape of the start; ``None`` where only the figures are kept.
        iterations: evaluations of the map in any precision, products with its Jacobian included.
        full: those of them in the full precision.
        residual: of the last evaluation, by the stopping rule; NaN if the iterates, or their norms,
            were not finite.
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
            ``functools.partial`` of positional arguments is replayed. Its function must depend on
            its arguments alone; those that are no tensors are hashable, and the first tensor is of
            the kind of z. Nothing is recorded for a gradient: where f's tensors require one, solve
            under ``torch.no_grad``.
        z: the start, any shape with the batch in front, or ``None`` for the origin.
        tol: relative tolerance of the stopping rule.
        max_iter: largest number of evaluations; where it is reached, ``converged`` is false.
        nonnegative: makes no difference here (see ``anderson``): a plain step stays where f maps
            to.
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
# next residual may take, as fresh memory costs more than the subtraction. The first time `before`
# is None, or, where iterations are recorded, a `Before` of zeros: the step is then the plain one.
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
    """Iterates until f(z) meets the rule.

    ‖f(z)‖ is left out where the rule cannot hold as ‖f(z)‖ ≤ ‖z‖ + ‖r‖; of the plain step, whose z
    is the last f(z), ‖z‖ is bounded so.
    """
    n = _at_once(f)
    if n > 1:
        return _iterate_at_once(n, f, z, mix, tol, max_iter)
    iterations, before, spare, plain = 0, None, None, mix is _plain
    z_norm = 0.0 if z is None and plain else math.inf  # an upper bound
    while True:
        r = None  # f may have its memory
        fz = f(z)
        r = fz if z is None else torch.sub(fz, z, out=None if fz is z else spare)
        change = norm(r).item()
        iterations += 1
        z_norm += change
        # A tenth more than the tolerance, as norms are rounded; NaN is not above it.
        if not change > 1.1 * tol * (z_norm + EPSILON) or iterations >= max_iter:
            size = norm(fz).item()
            residual = relative(change, size)
            if not residual >= tol or iterations >= max_iter:  # NaN ends a solve too
                return Solve(fz, iterations, iterations, residual, residual < tol)
            if plain:
                z_norm = size
        z, before, spare = mix(fz, r, before)


def _at_once(f: Map) -> int:
    """How many evaluations are made before their residuals are read.

    Reading one makes a GPU wait for the processor. Few of large tensors: they are kept meanwhile,
    and those behind the first that meets the rule are made in vain.
    """
    for a in f.args if isinstance(f, partial) else ():
        if isinstance(a, Tensor):
            return 1 if a.is_cpu else 4 if a.numel() <= replay.LARGEST else 2
    return 1


def _iterate_at_once(
    n: int, f: Map, z: Tensor | None, mix: Mix, tol: float, max_iter: int
) -> Solve:
    """The same, n evaluations at a time: replayed where that pays, or else launched.

    Iterates behind the first that meets the rule are dropped: the result does not depend on n.
    """
    if isinstance(f, partial) and replay.pays(f):
        with replay.lend(_from(n, f, z, mix)) as recorded:
            if recorded:
                solve = _first_below(recorded, tol, max_iter)
                return solve._replace(z=solve.z.clone())  # the recording writes there again
    before = None

    def launched() -> tuple[list[Tensor], Tensor]:
        nonlocal z, before
        evaluations, norms, z, before = _iterations(n, f, z, mix, before)
        return evaluations, norms

    return _first_below(launched, tol, max_iter)


def _first_below(
    next_few: Callable[[], tuple[list[Tensor], Tensor]], tol: float, max_iter: int
) -> Solve:
    """The first evaluation that meets the rule, of few after few, each with its norms."""
    iterations = 0
    while True:
        evaluations, norms = next_few()
        for fz, change, size in zip(evaluations, *norms.tolist(), strict=True):
            iterations += 1
            residual = relative(change, size)
            if not residual >= tol or iterations >= max_iter:
                return Solve(fz, iterations, iterations, residual, residual < tol)
        del evaluations, fz  # the next few may have their memory


def _iterations(
    n: int, f: Map, z: Tensor | None, mix: Mix, before: Before | None
) -> tuple[list[Tensor], Tensor, Tensor, Before | None]:
    """n evaluations, ‖r‖ and ‖f(z)‖ of each (2, n), and the z and the before to go on from."""
    evaluations, residuals = [], []
    for _ in range(n):
        fz = f(z)
        r = fz if z is None else fz - z
        evaluations.append(fz)
        residuals.append(r)
        z, before, _ = mix(fz, r if mix is _plain else r.clone(), before)  # it may take r's memory
    norms = torch._foreach_norm(residuals + evaluations)  # one launch for all
    return evaluations, torch.stack(norms).view(2, n), z, before


def _from(n: int, f: partial, z: Tensor | None, mix: Mix) -> partial:
    """The first n iterations from z, as a call to record."""
    if z is None:
        z = torch.zeros_like(next(a for a in f.args if isinstance(a, Tensor)))
    before = [None] * 3
    if mix is not _plain:
        zero = torch.zeros_like(z)  # from where a secant step is the plain one
        before = zero, zero, _sample_squares(zero)
    return partial(_recorded, n, mix, z, *before, f.func, *f.args)


def _recorded(
    n: int,
    mix: Mix,
    z: Tensor,
    before_fz: Tensor | None,
    before_r: Tensor | None,
    before_square: Tensor | None,
    f: Callable[..., Tensor],
    *args: object,
) -> tuple[list[Tensor], Tensor]:
    """As ``_iterations``, of tensors that stay: z and before become those of the next call."""
    start = z, before_fz, before_r, before_square
    evaluations, norms, z, before = _iterations(n, partial(f, *args), z, mix, Before(*start[1:]))
    for old, new in zip(start, (z, *(before or ())), strict=False):  # a mix may need no before
        if old is not None:
            old.copy_(new)
    return evaluations, norms


def relative(change: float, size: float) -> float:
    """The residual from ‖f(z) − z‖ and ‖f(z)‖; NaN where the latter has overflowed."""
    return change / (size + EPSILON) if size < math.inf else math.nan


def norm(t: Tensor) -> Tensor:
    """‖t‖₂, 0-dimensional."""
    if t.ndim != 4 or not t.is_cpu or t.dtype not in (torch.float32, torch.float64):
        return vector_norm(t)
    t = t.permute(0, 2, 3, 1).reshape(-1)  # a view, if t is in channels_last
    return t.dot(t).sqrt_()  # in half the time of vector_norm


def _sample_squares(t: Tensor) -> Tensor:
    """‖·‖² of each sample, shape (B, 1, …), in float32 at least."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    return vector_norm(t, dim=tuple(range(1, t.ndim)), keepdim=True, dtype=dtype).square_()
