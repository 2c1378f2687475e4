"""How the blocks of a network converge, evaluation by evaluation: the data of a picture."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pcdeq.certificates import Visit, certificate_of, visits
from pcdeq.enclosures import Operator
from pcdeq.solvers import relative


@dataclass
class History:
    """How one block converges on a batch.

    Attributes:
        name: of the block in the model.
        forward: residuals of the stopping rule, evaluation by evaluation, of the plain iteration
            from 0.
        backward: the same for the adjoint equation g = Jᵀg + 1, from g = 1, J at the limit above.
        width: max over the batch of u − l after 0, 1, 2, … directed steps from l = 0 and u = M;
            empty where the block's condition does not hold, and nothing is enclosed.
        rate: the largest ``rate_upper`` of the batch: a line of this slope lies above the tails.
            Infinite where the condition does not hold.
        tol: of the block's stopping rule.
    """

    name: str
    forward: list[float]
    backward: list[float]
    width: list[float]
    rate: float
    tol: float


def history(
    model: nn.Module, x: Tensor, steps: int = 60, after_step: Callable[[], object] = lambda: None
) -> list[History]:
    """Residuals and widths against the iteration, for each block, on one batch.

    Everything is iterated in float64, so that lines go on below float32's rounding.

    Args:
        model: as for ``certify``.
        x: a batch of its inputs.
        steps: evaluations to record.
        after_step: called after each evaluation, 2 · ``steps`` times for each block.

    Returns:
        One ``History`` for each use of a block, each list ``steps`` long (``width``: one more, or
        empty).
    """
    return [_history(visit, steps, after_step) for visit in visits(model, x)]


@torch.no_grad()
def _history(visit: Visit, steps: int, after_step: Callable[[], object]) -> History:
    certificate = certificate_of(visit)
    name, block, x, *_ = visit
    operator = Operator(block.deq.f)
    x = x.to(operator.device, torch.float64)
    low, high = torch.zeros_like(x), torch.full_like(x, operator.sigma.supremum)
    forward, backward, width = [], [], [operator.sigma.supremum] * certificate.condition
    z = low
    for _ in range(steps):
        new = operator.sigma.function(operator.argument(z, x))
        forward.append(_residual(new, z))
        if certificate.condition:
            low = torch.maximum(low, operator.image(low, x, -1))
            high = torch.minimum(high, operator.image(high, x, 1))
            width.append((high - low).max().item())
        z = new
        after_step()
    transposed = block.deq.f.W.transpose(operator.weight)
    slope = operator.sigma.derivative(z)
    g = torch.ones_like(x)
    adjoint = block.deq.f.adjoint(slope, g, transposed)
    for _ in range(steps):
        new = adjoint(g)
        backward.append(_residual(new, g))
        g = new
        after_step()
    rate = certificate.rate_upper.max().item()
    return History(name, forward, backward, width, rate, block.deq.tolerance)


def _residual(new: Tensor, old: Tensor) -> float:
    return relative((new - old).norm().item(), new.norm().item())
