"""What the theory promises, for these weights and these inputs: a certificate for each block.

For a block z* = σ(Wz* + x) a certificate holds

- an enclosure l ≤ z* ≤ u (``pcdeq.enclosures``);
- bounds on the spectral radius ρ of J = diag(σ'(Wz + x))·W, the rate at which the iterations of
  the forward and of the adjoint equation converge (``pcdeq.rates``);
- an upper bound on the number of plain iterations (there too).

Existence, uniqueness and convergence are the theorems of Gabor, Piotrowski, Cavalcante (ICML 2024).
The bounds hold with rounding; what each rests on stands where it is computed.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcdeq.block import PcDEQ
from pcdeq.checks import check_count, check_module, check_tensor
from pcdeq.enclosures import SMALLEST, Operator, enclose, full_float32
from pcdeq.modes import evaluating
from pcdeq.rates import RATE_STEPS, largest, predicted_iterations, rate_bounds


@dataclass(eq=False)  # tensors have no one truth value
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
        rate_lower: ρ(J) ≥ this, shape (B,), for J at z* and for the implicit gradient's, whose σ'
            is taken in the value of ẑ.
        rate_upper: ρ(J) ≤ this, shape (B,), for the same two. Below 1, the implicit gradient's
            linear system is solvable and its iteration converges, with W and σ' as they are:
            ``bf16`` rounds both.
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

    def __repr__(self) -> str:
        """The figures of the worst sample, and what is wrong; all of it is in the attributes."""
        wrong = "" if self.holds else f", reason={self.reason!r}"
        return (
            f"Certificate({self.name or 'the block'}: holds={self.holds}, "
            f"rate_upper={self.rate_upper.max():.3g}, width={self.width.max():.2g}, "
            f"error={self.error.max():.2g}, predicted={self.predicted.max():.0f}{wrong})"
        )


def certify(model: nn.Module, x: Tensor, rate_steps: int = RATE_STEPS) -> list[Certificate]:
    """Certificates of all pcDEQ blocks of a model for one batch, in the order of the pass.

    Args:
        model: any module with pcDEQ blocks; it runs once, in evaluation mode, which is restored.
        x: a batch of the model's inputs, of the shape and dtype that it takes.
        rate_steps: power steps for the bounds on the rate; more bring them closer together, until
            little is left to gain.

    Returns:
        One certificate for each use of a block.

    Raises:
        TypeError: the model is no module, or the batch no tensor.
        ValueError: the batch is empty, ``rate_steps`` is no whole number from 1 on, or the pass
            reaches no pcDEQ block.
    """
    check_count("rate_steps", rate_steps)
    return [certificate_of(visit, rate_steps) for visit in visits(model, x)]


class Visit(NamedTuple):
    """One use of a block in a pass: its injected x, its output ẑ, and the evaluations for it."""

    name: str
    block: PcDEQ
    x: Tensor
    z: Tensor
    observed: int


@torch.no_grad()
def visits(model: nn.Module, inputs: Tensor) -> list[Visit]:
    """All uses of blocks in one pass in evaluation mode, in its order; as for ``certify``."""
    check_module(model)
    check_tensor("the batch of inputs", inputs)
    if inputs.ndim == 0:
        raise ValueError("a batch of inputs has its samples along the first axis, not no axis")
    if not len(inputs):
        raise ValueError("there is no sample in the batch: nothing to certify")
    if not any(isinstance(module, PcDEQ) for module in model.modules()):
        raise ValueError("the model has no pcDEQ block: nothing to certify")
    found: list[Visit] = []
    hooks = [
        block.deq.register_forward_hook(
            lambda deq, args, z, name=name, block=block: found.append(
                Visit(name, block, args[0], z, deq.iter_forward)
            )
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
    if not found:
        raise ValueError("the pass reached none of the model's pcDEQ blocks: nothing to certify")
    return found


@torch.no_grad()
@full_float32()
def certificate_of(visit: Visit, rate_steps: int = RATE_STEPS) -> Certificate:
    """The certificate of one use of a block; arguments as for ``certify``."""
    name, block, x, z, observed = visit
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
        rate_lower[sound], rate_upper[sound] = rate_bounds(
            operator, x_sound, enclosure.lower, enclosure.upper, rate_steps, z_sound
        )
        predicted[sound] = predicted_iterations(
            operator, enclosure.ladder, enclosure.upper, block.deq.tolerance
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
        width=largest(upper - lower),
        error=largest(torch.maximum((z - lower).abs(), (upper - z).abs())),
        rate_lower=rate_lower,
        rate_upper=rate_upper,
        iterations=iterations,
        predicted=predicted,
        observed=observed,
        holds=not violations,
        reason="; ".join(violations) or f"W ≥ 0, {positive}, and every rate is below 1",
    )


def _violations(operator: Operator, x: Tensor, z: Tensor) -> tuple[Tensor, list[str]]:
    """Samples for which the theory applies, shape (B,), and what keeps it from the others."""
    weight, sound, found = operator.weight, torch.ones(len(x), dtype=torch.bool), []
    strict = operator.sigma.variant == 1
    outside = ("not positive", x <= 0) if strict else ("negative", x < 0)
    for what, values, how, bad in (
        ("weight", weight, "negative", weight < 0),
        ("weight", weight, "not finite", ~weight.isfinite()),
        ("injected value", x, *outside),
        ("injected value", x, "too small for float64", (x > 0) & (x < SMALLEST) & strict),
        ("injected value", x, "not finite", ~x.isfinite()),
        ("output", z, "not finite", ~z.isfinite()),
    ):
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            found.append(
                f"{int(bad.sum())} of {bad.numel()} {what}s {how}, "
                f"the first at {first} ({values[first].item():.3g})"
            )
            sound &= False if values is weight else ~bad.flatten(1).any(1).cpu()
    return sound.to(x.device), found
