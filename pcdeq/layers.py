"""f(z, x) = σ(Wz + x) with W ≥ 0: the positive concave layer whose fixed point is sought.

W is a bias-free linear map or 3×3 convolution, kept in weight normalisation W = g·v/‖v‖ over its
output rows (Salimans and Kingma, 2016) with v ≥ 0 and g ≥ 0, so that projecting the two parameters
onto the nonnegative orthant after each optimizer step keeps W there (projected AdamW).

A solve uses one W many times: ``weight()`` forms it once, ``apply`` is the bare map, and ``affine``
the map plus a constant, with W as ``factor`` gives it. The transpose of such a map is a map of the
same kind, with the transposed matrix or the flipped kernel, so Jᵀy needs no autograd:
J = diag(σ')·W and Jᵀy = Wᵀ(σ'∘y). ``at``, ``tangent`` and ``adjoint`` are what solvers iterate.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pcdeq.activations import Activation
from pcdeq.processor import BFLOAT16


def _convolution_plus() -> Callable[..., Tensor] | None:
    """oneDNN's convolution that adds a tensor before it rounds; torch's compiler uses it.

    None where bfloat16 is emulated, and before torch 2.14: that of 2.11 takes a detour over another
    layout and is slower than two operators.
    """
    convolution = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    return convolution.binary if convolution and BFLOAT16 and torch.__version__ >= (2, 14) else None


CONVOLUTION_PLUS = _convolution_plus()  # for bfloat16
ONES = [1, 1]  # padding, stride, dilation


def _is_recorded() -> bool:
    """Whether someone looks on, autograd or a tracer: no σ in place, no operator of oneDNN's."""
    return torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling()


class Nonnegative(nn.Module):
    """W ≥ 0 in weight normalisation; what the linear map and the convolution share.

    Attributes:
        weight_g: ‖row‖ of W, shape (n, 1, …).
        weight_v: direction of each row, shape (n, n, …).
    """

    def __init__(self, v: Tensor):
        super().__init__()
        # The layer's default initialisation has drawn v; the draw below replaces it, so that one
        # seed gives the same parameters as a layer built first and made positive afterwards.
        v.uniform_(0, 1).mul_(math.sqrt(1e-4)).div_(math.sqrt(v.shape[0] + v.shape[1]))
        self.weight_g = nn.Parameter(_row_norms(v))
        self.weight_v = nn.Parameter(v)

    @property
    def width(self) -> int:
        """n: features, or channels."""
        return len(self.weight_v)

    def weight(self) -> Tensor:
        """W = g·v/‖v‖, shape of v, recorded by autograd. A row with v = 0 is a row W = 0."""
        return _WeightNorm.apply(self.weight_v, self.weight_g)

    def extra_repr(self) -> str:
        return f"{self.width}"

    @torch.no_grad()
    def clamp(self) -> None:
        """Projects v and g onto the nonnegative orthant, in place; where they are parametrised
        (``torch.nn.utils.parametrize``), the parameters behind them."""
        for parameter in self.parameters():
            parameter.clamp_(min=0)


class NonnegativeLinear(Nonnegative):
    """z ↦ Wz for z of shape (B, features), W of shape (features, features)."""

    def __init__(self, features: int):
        super().__init__(nn.Linear(features, features, bias=False).weight.detach())

    @staticmethod
    def apply(z: Tensor, weight: Tensor) -> Tensor:
        """Wz, shape (B, features)."""
        return F.linear(z, weight)

    @staticmethod
    def factor(weight: Tensor, b: Tensor) -> Tensor:
        """Wᵀ: what ``affine`` multiplies the rows of z by."""
        return weight.t()

    affine = staticmethod(torch.addmm)  # (b, z, factor) ↦ Wz + b, shape (B, features)

    @staticmethod
    def transpose(weight: Tensor) -> Tensor:
        """Wᵀ, as a weight for ``apply``."""
        return weight.t()

    @staticmethod
    def weight_gradient(z: Tensor, y: Tensor) -> Tensor:
        """∂⟨y, Wz⟩/∂W, summed over the batch."""
        return y.t() @ z


class NonnegativeConv2d(Nonnegative):
    """z ↦ W∗z for z of shape (B, channels, H, W), W of shape (channels, channels, 3, 3).

    Padding 1. W and activations are in channels_last, which is two to three times faster on CPUs
    than the default layout and what tensor cores want; v lies as the model keeps it.
    """

    def __init__(self, channels: int):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        super().__init__(conv.weight.detach())

    def weight(self) -> Tensor:
        """W, as of ``Nonnegative``, in channels_last."""
        return super().weight().contiguous(memory_format=torch.channels_last)

    @staticmethod
    def apply(z: Tensor, weight: Tensor) -> Tensor:
        """W∗z, shape (B, channels, H, W)."""
        return F.conv2d(z, weight, padding=1)

    @staticmethod
    def factor(weight: Tensor, b: Tensor) -> Tensor:
        """W; for ``CONVOLUTION_PLUS`` packed for images of the shape of b, once for a solve."""
        low = weight.dtype == torch.bfloat16 and weight.is_cpu and CONVOLUTION_PLUS is not None
        if low and b.numel() > 0 and not _is_recorded():
            pack = torch.ops.mkldnn._reorder_convolution_weight.default
            return pack(weight, ONES, ONES, ONES, 1, b.shape)
        return weight

    @staticmethod
    def affine(b: Tensor, z: Tensor, factor: Tensor) -> Tensor:
        """W∗z + b, shape (B, channels, H, W).

        With a packed W, b is added before the sums are rounded: one pass and one rounding less. In
        float32 that would gain nothing.
        """
        if factor.is_mkldnn:
            return CONVOLUTION_PLUS(
                z, b, factor, None, ONES, ONES, ONES, 1, "add", 1, None, [], None
            )
        return F.conv2d(z, factor, padding=1).add_(b)

    @staticmethod
    def transpose(weight: Tensor) -> Tensor:
        """The kernel of the transposed convolution: flipped, input and output channels swapped."""
        return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def weight_gradient(z: Tensor, y: Tensor) -> Tensor:
        """∂⟨y, W∗z⟩/∂W, summed over the batch."""
        shape = (z.shape[1], z.shape[1], 3, 3)
        return nn.grad.conv2d_weight(z, shape, y, padding=1)


class ConcaveLayer(nn.Module):
    """f(z, x) = σ(Wz + x), the map whose fixed point in z is the output of a pcDEQ layer.

    Args:
        W: ``NonnegativeLinear`` or ``NonnegativeConv2d``.
        activation: σ.
    """

    def __init__(self, W: NonnegativeLinear | NonnegativeConv2d, activation: Activation):
        super().__init__()
        self.W = W
        self.activation = activation

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """σ(Wz + x) as the paper defines it, recorded by autograd, for z and x of one shape.

        Solves take ``at``, with W formed once.
        """
        return self.activation.function(self.W.apply(z, self.W.weight()) + x)

    def at(self, x: Tensor, weight: Tensor) -> Callable[[Tensor | None], Tensor]:
        """f as a map z ↦ σ(Wz + x) of one x and one W, as solvers take it; f(None) is f(0).

        For use without a graph; each value is memory of its own. The same holds of ``tangent`` and
        ``adjoint``.
        """
        sigma = self.activation.function if _is_recorded() else self.activation.function_
        return partial(_f, self.W.affine, sigma, x, self.W.factor(weight, x))

    def tangent(self, slope: Tensor, r: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """v ↦ Jv + r = σ'∘(Wv) + r, from the slope σ' and W."""
        return partial(_tangent, self.W.apply, r, slope, weight)

    def adjoint(self, slope: Tensor, b: Tensor, transposed: Tensor) -> Callable[[Tensor], Tensor]:
        """g ↦ Jᵀg + b = Wᵀ(σ'∘g) + b, from the slope σ' and Wᵀ."""
        return partial(_adjoint, self.W.affine, b, slope, self.W.factor(transposed, b))


# Plain functions with nothing but arguments: a solver can see all that a map depends on.


def _f(affine: Callable, sigma: Callable, x: Tensor, factor: Tensor, z: Tensor | None) -> Tensor:
    return sigma(x.clone() if z is None else affine(x, z, factor))


def _tangent(apply: Callable, r: Tensor, slope: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    return torch.addcmul(r, slope, apply(v, weight))


def _adjoint(affine: Callable, b: Tensor, slope: Tensor, factor: Tensor, g: Tensor) -> Tensor:
    return affine(b, slope * g, factor)


class _WeightNorm(torch.autograd.Function):
    """W = g·v/‖v‖ by rows, with its gradient (Salimans and Kingma, 2016).

    Plain weight normalisation gives NaN for a row v = 0, which a projection can produce: here such
    a row gives W = 0 and no gradient. So does one whose norm the dtype cannot hold (in float32
    below 1e-23 or above 1e19, which training does not come near).
    """

    @staticmethod
    def forward(ctx, v: Tensor, g: Tensor) -> Tensor:
        inverse = _row_norms(v).reciprocal_().nan_to_num_(nan=math.nan, posinf=0)
        scale = g * inverse
        ctx.save_for_backward(v, inverse, scale)
        return v * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dW: Tensor) -> tuple[Tensor, Tensor]:
        v, inverse, scale = ctx.saved_tensors
        u = v * inverse  # rows of length 1
        dg = (dW * u).sum(tuple(range(1, v.ndim)), keepdim=True)  # ⟨dW, u⟩
        dv = torch.addcmul(dW, u, dg, value=-1).mul_(scale)  # g/‖v‖·(dW − ⟨dW, u⟩u)
        return dv, dg


def _row_norms(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)
