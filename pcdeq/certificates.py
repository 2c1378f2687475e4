"""What the theory promises, for these weights and these inputs: one certificate for each block.

For a block z* = σ(Wz* + x) a certificate holds

- an enclosure l ≤ z* ≤ u, rounding included (``pcdeq.enclosures``);
- bounds on the spectral radius ρ of J = diag(σ'(Wz + x))·W, the rate at which the iterations of
  the forward and of the adjoint equation converge;
- an upper bound on the number of plain iterations.

Sources: Gabor, Piotrowski, Cavalcante (ICML 2024) for existence, uniqueness and convergence;
Collatz (1942) and Wielandt (1950) for the bounds on ρ; the bound on the iterations is derived in
``predicted_iterations``.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pcdeq.enclosures import SMALLEST, UNIT, Operator, enclose, full_float32
from pcdeq.implicit import PcDEQ
from pcdeq.solvers import EPSILON

RATE_STEPS = 20  # power steps towards the two vectors that bound the rate
SHIFT = 0.1  # s: damps eigenvalues of J on the circle of the largest, as a periodic J has them
LIFT = 1e-3  # δ: keeps every component of the upper vector positive
# Components of the lower vector below these fractions of its largest are set to 0, best one kept:
# its support need not reach everything that u reaches (reducible J, saturated units).
THRESHOLDS = (0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.3)


@dataclass
class Certificate:
    """What is proved of one block for one batch of B inputs.

    Tensors are float64. z* is in units of σ's values; rates and ratios have none.

    Attributes:
        name: of the block in the model.
        smallest_weight: min W, as the layer computes it.
        smallest_injected: min x, as the layer sees it, in the layer's own dtype.
        condition: the variant's condition: W ≥ 0, and x > 0 (σ(0) = 0) or x ≥ 0 (σ(0) > 0), all
            of it finite. Without it nothing below is proved for the samples concerned: their
            enclosure is the trivial one, [−M, M], which holds every fixed point.
        lower: l ≤ z*, shape of x; also f(l) ≥ l.
        upper: u ≥ z*, shape of x; also f(u) ≤ u.
        width: max over components of u − l, shape (B,).
        error: bound on ‖ẑ − z*‖∞ for the network's own output ẑ, shape (B,): the largest of
            |ẑ − l| and |u − ẑ|. The stopping rule, over the whole batch, bounds no sample's error.
        rate_lower: ρ(J) ≥ this at z* and at ẑ, shape (B,).
        rate_upper: ρ(J) ≤ this at z* and at ẑ, shape (B,). Below 1, the implicit gradient's linear
            system, whose J is taken at ẑ, is solvable and its iteration converges.
        iterations: evaluations of f that the enclosure took, float32 and float64 together.
        predicted: at most so many evaluations does the plain iteration from 0 need to meet the
            block's tolerance on this sample alone, shape (B,); for the batch, the largest one.
        observed: evaluations of the block's own solve of this batch (which counts bfloat16 ones
            too, and may be another method than the plain iteration).
        holds: the condition holds and every rate_upper is below 1.
        reason: a sentence: why it holds, or what is wrong, where, and how often.
    """

    name: str
    smallest_weight: float
    smallest_injected: float
    condition: bool
    lower: Tensor
    upper: Tensor
    width: Tensor
    error: Tensor
    rate_lower: Tensor
    rate_upper: Tensor
    iterations: int
    predicted: Tensor
    observed: int
    holds: bool
    reason: str


def certify(model: nn.Module, x: Tensor, rate_steps: int = RATE_STEPS) -> list[Certificate]:
    """Certificates of all pcDEQ blocks of a model for one batch, in the order of the pass.

    Args:
        model: any module with pcDEQ blocks; it runs once, in evaluation mode, which is restored.
        x: a batch of the model's inputs.
        rate_steps: power steps for the bounds on the rate; more bring them closer together.

    Returns:
        One certificate for each block.
    """
    with torch.no_grad(), full_float32():
        return [
            _certify_block(name, block, x, z, rate_steps) for name, block, x, z in _visits(model, x)
        ]


def _visits(model: nn.Module, inputs: Tensor) -> list[tuple[str, PcDEQ, Tensor, Tensor]]:
    """Name, block, injected x and output ẑ of every block, from one pass in evaluation mode."""
    visits: list[tuple[str, PcDEQ, Tensor, Tensor]] = []
    hooks = [
        block.deq.register_forward_hook(
            lambda _, args, z, name=name, block=block: visits.append((name, block, args[0], z))
        )
        for name, block in model.named_modules()
        if isinstance(block, PcDEQ)
    ]
    try:
        with evaluating(model):
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return visits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _certify_block(name: str, block: PcDEQ, x: Tensor, z: Tensor, rate_steps: int) -> Certificate:
    operator = Operator(block.deq.f)
    x, z = x.to(operator.device), z.to(operator.device)
    sound, violations = _violations(operator, x, z)
    bound = operator.sigma.supremum
    lower = torch.full_like(x, -bound, dtype=torch.float64)
    upper = torch.full_like(x, bound, dtype=torch.float64)
    rate_lower = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    rate_upper = torch.full_like(rate_lower, math.inf)
    predicted = torch.full_like(rate_lower, math.inf)
    iterations = 0
    if sound.any():
        x_sound, z_sound = (x, z.double()) if sound.all() else (x[sound], z[sound].double())
        enclosure = enclose(operator, x_sound)
        lower[sound], upper[sound], iterations = enclosure[:3]
        low = torch.minimum(enclosure.lower, z_sound)
        high = torch.maximum(enclosure.upper, z_sound)
        rate_lower[sound], rate_upper[sound] = rate_bounds(operator, x_sound, low, high, rate_steps)
        predicted[sound] = predicted_iterations(
            operator, enclosure.ladder, enclosure.upper, block.deq.tol
        )
    slow = int((sound & ~(rate_upper < 1)).sum())
    if slow:
        violations.append(
            f"the rate is not bounded below 1 for {slow} of {len(x)} samples "
            f"(largest bound {rate_upper[sound].max():.3g})"
        )
    positive = "x > 0" if operator.sigma.variant == 1 else "x ≥ 0"
    return Certificate(
        name=name,
        smallest_weight=operator.weight.min().item(),
        smallest_injected=x.min().item(),
        condition=bool(sound.all()),
        lower=lower,
        upper=upper,
        width=_largest(upper - lower),
        error=_largest(torch.maximum((z - lower).abs(), (upper - z).abs())),
        rate_lower=rate_lower,
        rate_upper=rate_upper,
        iterations=iterations,
        predicted=predicted,
        observed=block.deq.iter_forward,
        holds=not violations,
        reason="; ".join(violations) or f"W ≥ 0, {positive}, and every rate is below 1",
    )


def _violations(operator: Operator, x: Tensor, z: Tensor) -> tuple[Tensor, list[str]]:
    """Samples for which the theory applies, shape (B,), and what keeps it from the others."""
    sound = torch.ones(len(x), dtype=torch.bool, device=x.device)
    found = []
    strict = operator.sigma.variant == 1
    for what, values, kind, bad in (
        ("weight", operator.weight, "negative", operator.weight < 0),
        ("weight", operator.weight, "not finite", ~operator.weight.isfinite()),
        (
            "injected value",
            x,
            "not positive" if strict else "negative",
            x <= 0 if strict else x < 0,
        ),
        ("injected value", x, "too small for float64", (x > 0) & (x < SMALLEST) & strict),
        ("injected value", x, "not finite", ~x.isfinite()),
        ("output", z, "not finite", ~z.isfinite()),
    ):
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            found.append(
                f"{int(bad.sum())} of {bad.numel()} {what}s {kind}, "
                f"the first at {first} ({values[first].item():.3g})"
            )
            sound &= ~bad.flatten(1).any(1) if values is not operator.weight else False
    return sound, found


def rate_bounds(
    operator: Operator, x: Tensor, low: Tensor, high: Tensor, steps: int = RATE_STEPS
) -> tuple[Tensor, Tensor]:
    """Bounds on ρ(J(z)) for every z with low ≤ z ≤ high, rounding included.

    σ is concave, so J(z) = diag(σ'(Wz + x))·W falls as z rises, and with it ρ (Perron, Frobenius):
    ρ(J(high)) ≤ ρ(J(z)) ≤ ρ(J(low)). By Collatz and Wielandt ρ(J) ≤ maxᵢ (Jv)ᵢ/vᵢ for every v > 0,
    and ρ(J) ≥ min (Jw)ᵢ/wᵢ over the support of any w ≥ 0. Any vectors will do, so they come from
    float32 power steps, and one float64 product each gives the bounds. v and w start at ``high``;
    concavity bounds the ratio there by 1 − minᵢ σ(x)ᵢ/highᵢ, and no step on v makes it worse.

    At relu6's kink at 6 the derivative is taken as 1 in J(low) and as 0 in J(high).

    Args:
        operator: the layer.
        x: injected values, shape (B, …).
        low, high: float64, shape of x.
        steps: power steps.

    Returns:
        Lower and upper bounds, shape (B,) each.
    """
    x = x.double()
    steep = operator.slope(operator.argument(low, x), 1)  # σ' at low, from above
    flat = operator.slope(operator.argument(high, x), -1)  # σ' at high, from below
    weight = operator.weight.float()
    apply = operator.layer.W.apply

    def power(slope: Tensor, v: Tensor, lift: Tensor | None) -> Tensor:
        for _ in range(steps):
            new = apply(v, weight).mul_(slope)
            new /= _per_sample(_largest(new).clamp_(min=1e-30), new)
            new.add_(v, alpha=SHIFT)
            v = new if lift is None else new.add_(lift, alpha=LIFT)
        return v

    start = (high / _per_sample(_largest(high), high)).float()
    flat32 = flat.float()
    v = power(steep.float(), start, start).clamp_(min=1e-30)
    w = _best_support(lambda w: apply(w, weight).mul_(flat32), power(flat32, start, None))
    rounding = (operator.terms + 16) * UNIT
    v, w = v.double(), w.double()
    upper = _largest(operator.product(v).mul_(steep).div_(v)) * (1 + rounding)
    lower = _smallest_ratio(operator.product(w).mul_(flat), w) * (1 - rounding)
    return lower, upper


def _best_support(jacobian, w: Tensor) -> Tensor:
    """w with its small components set to 0, below that threshold which gives the best bound."""
    best, kept = None, w
    for threshold in THRESHOLDS:
        cut = w * (w > threshold * _per_sample(_largest(w), w))
        ratio = _smallest_ratio(jacobian(cut), cut)
        if best is None:
            best, kept = ratio, cut
        else:
            kept = torch.where(_per_sample(ratio > best, w), cut, kept)
            best = torch.maximum(best, ratio)
    return kept


def predicted_iterations(
    operator: Operator, ladder: dict[int, Tensor], upper: Tensor, tol: float
) -> Tensor:
    """Evaluations after which the plain iteration from 0 has met the stopping rule, at most.

    Let l_m = fᵐ(0) and θ = minᵢ (l_m)ᵢ/uᵢ ≤ minᵢ (l_m)ᵢ/z*ᵢ. fᵐ is concave with fixed point z*:
    z ≥ (1 − q)z* gives fᵐ(z) ≥ (1 − q)fᵐ(z*) + q fᵐ(0) ≥ (1 − q(1 − θ))z*. Hence by induction
    0 ≤ z* − l_{km} ≤ (1 − θ)ᵏz* =: q z*. The next step then is at most q‖z*‖ long, and ends at a
    norm of at least (1 − q)‖z*‖: the rule ‖step‖/(‖z‖ + 1e-5) < tol holds at evaluation km + 1 if
    q ≤ tol/(1 + tol). ln tol/ln ρ is no such bound: ρ is the rate at z*, not on the way there.

    The iterates at hand are float32 ones of (1 − δ)f, which lie below; their rounding errors, at
    most (n + 8)·2⁻²⁴ relatively for each step, are taken off θ.

    Args:
        operator: the layer.
        ladder: {m: iterate m}, from ``enclose``.
        upper: u ≥ z*, shape (B, …).
        tol: of the stopping rule.

    Returns:
        Bounds, shape (B,), float64; infinite where none was found.
    """
    fewest = torch.full((len(upper),), math.inf, dtype=torch.float64, device=upper.device)
    inverse = upper.float().reciprocal_()
    for m, iterate in ladder.items():
        theta = (iterate * inverse).flatten(1).amin(1).double()
        theta = (theta * (1 - (m * (operator.terms + 8) + 4) * 2.0**-24)).clamp_(0, 1 - 2.0**-24)
        powers = torch.ceil(math.log(tol / (1 + tol)) / torch.log1p(-theta))  # k; 0 ↦ ∞
        fewest = torch.minimum(fewest, m * powers.abs())
    return fewest + 1


@dataclass
class History:
    """How one block converges on a batch: the data of a picture.

    Attributes:
        name: of the block in the model.
        forward: residuals of the stopping rule, evaluation by evaluation, of the plain iteration
            from 0.
        backward: the same for the adjoint equation g = Jᵀg + 1, from g = 1, J at the limit above.
        width: max over the batch of u − l after 0, 1, 2, … directed steps from l = 0 and u = M.
        rate: the largest ``rate_upper`` of the batch: a line of this slope lies above the tails.
        tol: of the block's stopping rule.
    """

    name: str
    forward: list[float]
    backward: list[float]
    width: list[float]
    rate: float
    tol: float


@torch.no_grad()
def history(model: nn.Module, x: Tensor, steps: int = 60) -> list[History]:
    """Residuals and widths against the iteration, for each block, on one batch; for pictures.

    Everything is iterated in float64, so that lines go on below float32's rounding.

    Args:
        model: as for ``certify``.
        x: a batch of its inputs.
        steps: evaluations to record.

    Returns:
        One ``History`` for each block, each list ``steps`` long (``width``: one more).
    """
    return [
        _history(name, block, x, z, certificate.rate_upper.max().item(), steps)
        for (name, block, x, z), certificate in zip(
            _visits(model, x), certify(model, x), strict=True
        )
    ]


def _history(name: str, block: PcDEQ, x: Tensor, z: Tensor, rate: float, steps: int) -> History:
    operator = Operator(block.deq.f)
    x = x.to(operator.device, torch.float64)
    low, high = torch.zeros_like(x), torch.full_like(x, operator.sigma.supremum)
    forward, backward, width = [], [], [operator.sigma.supremum]
    z = low
    for _ in range(steps):
        new = operator.sigma.function(operator.argument(z, x))
        forward.append(_residual(new, z))
        low = torch.maximum(low, operator.image(low, x, -1))
        high = torch.minimum(high, operator.image(high, x, 1))
        width.append((high - low).max().item())
        z = new
    transposed = block.deq.f.W.transpose(operator.weight)
    slope = operator.slope(operator.argument(z, x), -1)
    g = torch.ones_like(x)
    for _ in range(steps):
        new = block.deq.f.W.apply(slope * g, transposed) + 1
        backward.append(_residual(new, g))
        g = new
    return History(name, forward, backward, width, rate, block.deq.tol)


def _residual(new: Tensor, old: Tensor) -> float:
    return ((new - old).norm() / (new.norm() + EPSILON)).item()


def _largest(t: Tensor) -> Tensor:
    return t.flatten(1).amax(1)


def _smallest_ratio(image: Tensor, w: Tensor) -> Tensor:
    """min imageᵢ/wᵢ over the support of w ≥ 0, shape (B,); 0 where w = 0."""
    ratio = torch.where(w > 0, image / w, math.inf).flatten(1).amin(1)
    return torch.where(ratio.isinf(), 0.0, ratio)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
