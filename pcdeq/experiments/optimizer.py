"""AdamW as torch's fused kernel computes it, with less around the kernel.

For a network as small as the linear ones ``torch.optim.AdamW.step`` spends twice as long around its
kernel as in it, a tenth of a training step: it sorts the parameters into groups anew, raises a
count of steps for each, and looks for hooks and profilers.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW:
    """``torch.optim.AdamW(…, fused=True)`` for one group of parameters with one count of steps.

    Values and, after a step, state dicts are torch's, and each loads the other's. There are no
    hooks.

    Args:
        parameters: of one dtype, on their final device; in each step all have a gradient.
        lr: learning rate.
        weight_decay: decoupled from the gradient (Loshchilov and Hutter, ICLR 2019).
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float):
        self._torch = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=True)
        (group,) = self.param_groups
        first, *_ = group["params"]
        self._count = torch.zeros((), dtype=torch.float32, device=first.device)
        self._means, self._squares = (
            [torch.zeros_like(p) for p in group["params"]] for _ in range(2)
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's, a list of one; ``lr`` in it may be changed."""
        return self._torch.param_groups

    def step(self) -> None:
        """One step, in place."""
        (group,) = self.param_groups
        parameters, (beta1, beta2) = group["params"], group["betas"]
        with torch.no_grad():
            self._count += 1
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                self._means,
                self._squares,
                [],  # amsgrad's
                [self._count] * len(parameters),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch's: a count for each parameter."""
        (group,) = self.param_groups
        for p, mean, square in zip(group["params"], self._means, self._squares, strict=True):
            step = self._count.clone()
            self._torch.state[p] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        return self._torch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from ``state_dict``, of this class or of torch's.

        Raises:
            ValueError: it is of other parameters, of no step, of steps that not all parameters took
                part in, or of ``amsgrad`` or ``maximize``.
        """
        self._torch.load_state_dict(state_dict)
        (group,) = self.param_groups
        if group["amsgrad"] or group["maximize"]:
            raise ValueError("amsgrad and maximize are not supported")
        group["fused"] = True  # torch's own may not have been
        states = [self._torch.state[p] for p in group["params"]]
        counts = {int(state.get("step", 0)) for state in states}
        if len(counts) > 1 or counts == {0}:
            raise ValueError(f"one count of steps is needed, above 0: {counts}")
        self._count.fill_(*counts)
        self._means = [state["exp_avg"] for state in states]
        self._squares = [state["exp_avg_sq"] for state in states]
