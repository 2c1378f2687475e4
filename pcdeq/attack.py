"""A whole network on a box of inputs: an attack, which looks for a point that changes the class."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcdeq.checks import check_count
from pcdeq.modes import evaluating, frozen
from pcdeq.rates import per_sample


class Attack(NamedTuple):
    """The worst that an attack found: ``points`` (B, …) of the boxes and their ``margin``
    (B,), the logit of the target less the largest other one; negative where the class changed, −∞
    where a logit was NaN."""

    points: Tensor
    margin: Tensor


def attack(
    model: nn.Module, x: Tensor, lower: Tensor, upper: Tensor, target: Tensor, *, steps: int = 40
) -> Attack:
    """Projected gradient descent on the margin, over each box (Madry et al., ICLR 2018).

    From x, ``steps`` steps of 2.5/steps of the radius against the sign of the gradient. It finds
    inputs that change the class, or does not: accuracy under it is at least the true accuracy on
    the boxes, as the certified one is at most that.

    Args:
        model: any network; it runs as it is (its own precision and tolerance), in evaluation mode,
            which is restored.
        x: where to start, (B, …); moved into the box.
        lower, upper: corners of the boxes, as the network sees its inputs, shape of x.
        target: classes, shape (B,).
        steps: gradients to take.

    Raises:
        ValueError: ``steps`` is no whole number from 1 on.
    """
    check_count("steps", steps)
    with evaluating(model), frozen(model), torch.inference_mode(False), torch.enable_grad():
        target = target.clone()  # one of an inference mode outside takes part in no gradient
        stride = (upper - lower) * (1.25 / steps)
        points = x.clamp(lower, upper)
        worst = Attack(points, points.new_full((len(points),), torch.inf))
        for step in range(steps + 1):
            points = points.detach().requires_grad_(step < steps)
            margin = _margin(model(points), target)
            reached = torch.where(margin.isnan(), -torch.inf, margin).detach()  # no class is told
            worse = reached < worst.margin
            worst = Attack(
                torch.where(per_sample(worse, points), points.detach(), worst.points),
                torch.where(worse, reached, worst.margin),
            )
            if step < steps:
                (gradient,) = torch.autograd.grad(margin.sum(), points)
                points = (points.detach() - stride * gradient.sign()).clamp(lower, upper)
    return worst


def _margin(logits: Tensor, target: Tensor) -> Tensor:
    """The target's logit less the largest other one, shape (B,)."""
    target = target.view(-1, 1)
    others = logits.scatter(1, target, -torch.inf)
    return logits.gather(1, target).squeeze(1) - others.amax(1)
