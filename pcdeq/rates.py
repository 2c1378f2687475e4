"""How fast: bounds on the rate of convergence, and on the number of iterations.

The spectral radius ρ of J = diag(σ'(Wz + x))·W is the rate at which the iterations of the forward
and of the adjoint equation converge at last. J ≥ 0, so any positive vector bounds ρ (Collatz,
Math. Z. 1942; Wielandt, Math. Z. 1950); the theory of positive concave mappings bounds the
iterations from the first one on.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pcdeq.enclosures import UNIT, Operator

RATE_STEPS = 20  # power steps towards the two vectors that bound the rate
SHIFT = 0.1  # s: damps eigenvalues of J on the circle of the largest, as a periodic J has them
LIFT = 1e-3  # δ: keeps every component of the upper vector positive
# Components of the lower vector below these fractions of its largest are set to 0, best one kept:
# its support need not reach everything that u reaches (reducible J, saturated units).
THRESHOLDS = (0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.3)


def rate_bounds(
    operator: Operator,
    x: Tensor,
    low: Tensor,
    high: Tensor,
    steps: int = RATE_STEPS,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Bounds on ρ(J(z)) for every z with low ≤ z ≤ high, rounding included.

    σ is concave, so J(z) = diag(σ'(Wz + x))·W falls as z rises, and with it ρ (Perron, Frobenius):
    ρ(J(high)) ≤ ρ(J(z)) ≤ ρ(J(low)). By Collatz and Wielandt ρ(J) ≤ maxᵢ (Jv)ᵢ/vᵢ for every v > 0,
    and ρ(J) ≥ min (Jw)ᵢ/wᵢ over the support of any w ≥ 0. Any vectors will do, so they come from
    float32 power steps, and one float64 product each gives the bounds. v and w start at ``high``,
    where v = z* has J(z*)z* ≤ z* − σ(x) by concavity.

    At relu6's kink at 6 the derivative is taken as 1 in J(low) and as 0 in J(high).

    The implicit gradient's J has the slope σ' that an output ẑ = σ(Wz + x) gives in its own value,
    where the iterate z before it may lie outside of [low, high]: with ``output`` its ρ lies between
    the bounds as well.

    Args:
        operator: the layer.
        x: injected values, shape (B, …).
        low, high: float64, shape of x.
        steps: power steps.
        output: ẑ, float64, shape of x.

    Returns:
        Lower and upper bounds, shape (B,) each.
    """
    x = x.double()
    steep = operator.slope(operator.argument(low, x), 1)  # σ' at low, from above
    flat = operator.slope(operator.argument(high, x), -1)  # σ' at high, from below
    if output is not None:
        own = operator.sigma.derivative(output)
        steep = torch.maximum(steep, own + 4 * UNIT)
        flat = torch.minimum(flat, (own - 4 * UNIT).clamp_(min=0))
    weight = operator.weight.float()
    apply = operator.layer.W.apply

    def power(slope: Tensor, v: Tensor, lift: Tensor | None) -> Tensor:
        for _ in range(steps):
            new = apply(v, weight).mul_(slope)
            new /= per_sample(largest(new).clamp_(min=1e-30), new)
            new.add_(v, alpha=SHIFT)
            v = new if lift is None else new.add_(lift, alpha=LIFT)
        return v

    start = (high / per_sample(largest(high), high)).float()
    flat32 = flat.float()
    v = power(steep.float(), start, start).clamp_(min=1e-30)
    w = _best_support(lambda w: apply(w, weight).mul_(flat32), power(flat32, start, None))
    rounding = (operator.terms + 16) * UNIT
    v, w = v.double(), w.double()
    upper = largest(operator.product(v).mul_(steep).div_(v)) * (1 + rounding)
    lower = _smallest_ratio(operator.product(w).mul_(flat), w) * (1 - rounding)
    return lower, upper


def _best_support(jacobian: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """w with its small components set to 0, below that threshold which gives the best bound."""
    best, kept = None, w
    for threshold in THRESHOLDS:
        cut = w * (w > threshold * per_sample(largest(w), w))
        ratio = _smallest_ratio(jacobian(cut), cut)
        if best is None:
            best, kept = ratio, cut
        else:
            kept = torch.where(per_sample(ratio > best, w), cut, kept)
            best = torch.maximum(best, ratio)
    return kept


def predicted_iterations(
    operator: Operator, ladder: dict[int, Tensor], upper: Tensor, tol: float
) -> Tensor:
    """Evaluations after which the plain iteration from 0 has met the stopping rule, at most.

    Let l_m = fᵐ(0) and θ = minᵢ (l_m)ᵢ/uᵢ ≤ minᵢ (l_m)ᵢ/z*ᵢ. fᵐ is concave with fixed point z*:
    z ≥ (1 − q)z* gives fᵐ(z) ≥ (1 − q)fᵐ(z*) + q fᵐ(0) ≥ (1 − q(1 − θ))z*. Hence by induction
    l_{km} ≥ (1 − q)z*, q = (1 − θ)ᵏ, and the step from z = l_{km} is f(z) − z ≤ f(z) − (1 − q)z*
    ≤ q f(z): the rule ‖f(z) − z‖/(‖f(z)‖ + 1e-5) < tol holds at evaluation km + 1 once q ≤ tol.
    ln tol/ln ρ is no such bound: ρ is the rate at z*, not on the way there.

    The iterates at hand are float32 ones of (1 − δ)f, which lie below; the rounding errors of
    plain float32 sums, at most (n + 8)·2⁻²⁴ relatively for each step, are taken off θ.

    Args:
        operator: the layer.
        ladder: {m: iterate m}, from ``enclose``.
        upper: u ≥ z*, shape (B, …).
        tol: of the stopping rule.

    Returns:
        Bounds, shape (B,), float64; infinite where none was found.
    """
    fewest = torch.full((len(upper),), math.inf, dtype=torch.float64, device=upper.device)
    for m, iterate in ladder.items():
        theta = (iterate / upper).flatten(1).amin(1)
        theta = (theta * (1 - (m * (operator.terms + 8) + 4) * 2.0**-24)).clamp_(0, 1 - 2.0**-24)
        powers = torch.ceil(math.log(tol) / torch.log1p(-theta))  # k; 0 ↦ ∞
        fewest = torch.minimum(fewest, m * powers.abs())
    return fewest + 1


def largest(t: Tensor) -> Tensor:
    """The largest component of each sample, shape (B,)."""
    return t.flatten(1).amax(1)


def _smallest_ratio(image: Tensor, w: Tensor) -> Tensor:
    """min imageᵢ/wᵢ over the support of w ≥ 0, shape (B,); 0 where w = 0."""
    ratio = torch.where(w > 0, image / w, math.inf).flatten(1).amin(1)
    return torch.where(ratio.isinf(), 0.0, ratio)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) values as (B, 1, …), to go with (B, …)."""
    return values.view(-1, *[1] * (like.dim() - 1))
