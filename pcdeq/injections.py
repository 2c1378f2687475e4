"""x = inject(h): what makes a block's input positive, as its variant needs it.

pcDEQ-1 needs x > 0 and takes softplus with β = 5; pcDEQ-2 needs x ≥ 0 and takes ReLU.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcdeq.processor import AMD_AVX512

BETA = 5.0
LINEAR = 40.0  # βh from where on log(1 + e^{βh}) is βh to all digits, of float64 too


def positive(h: Tensor) -> Tensor:
    """log(1 + e^{βh})/β > 0 with β = 5, shape and dtype of h.

    Where it underflows (float32: h < −17.1), it is the smallest normal number, without which the
    fixed point need not be unique; smaller ones some arithmetic flushes to 0.
    """
    return _Softplus.apply(h)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        # Older versions of torch for Apple's GPUs take log(1 + e^{βh}) as it stands.
        passes = (AMD_AVX512 and h.device.type == "cpu") or h.device.type == "mps"
        x = _by_passes(h) if passes else F.softplus(h, BETA, LINEAR)
        return x.clamp_(min=torch.finfo(h.dtype).tiny)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return torch.ops.aten.softplus_backward.default(grad, h, BETA, LINEAR)


def _by_passes(h: Tensor) -> Tensor:
    """softplus without log1p, which is slow on some processors and inexact on Apple's GPUs.

    softplus(h) = max(h, 0) + log1p(u)/β with u = e^{−β|h|}, and log1p(u) = log(w) + (u − (w − 1))/w
    for w = 1 + u as rounded, whose second term gives back what the rounding took: as accurate.
    """
    u = h.abs().mul_(-BETA).exp_()
    w = u + 1
    log1p = torch.addcdiv(w.log(), u.sub_(w - 1), w, out=u)
    return h.clamp(min=0).add_(log1p, alpha=1 / BETA)


INJECTIONS: dict[int, Callable[[Tensor], Tensor]] = {1: positive, 2: F.relu}  # by variant
