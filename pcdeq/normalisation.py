"""Batch normalisation of images in the parameters' precision; of few channels, on a CPU, faster.

In channels_last torch vectorises over the channels of a pixel. Where they do not fill its vectors
(12, 20, 24, 50 and 82 channels of the conv networks) its kernels take scalar steps, which with
AVX-512 cost a tenth of a training step. The same arithmetic, written as passes over rows of many
pixels at once, is several times as fast there (24 channels were not measured alone). With the
shorter vectors of AVX2 it is faster for 12 channels of 28×28 pixels only: in half the time with two
threads, with one in two thirds at best.

y = w·(h − m)/√(v + ε) + b with mean m and variance v of each channel over batch and pixels
(Ioffe and Szegedy, 2015).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pcdeq.processor import AVX512

# Channels that torch's kernels take at once, and from which on scalar steps no longer matter.
VECTOR, MANY = (16, 100) if AVX512 else (8, 16)
PIXELS = 64  # in a row, at most: long rows, and still many of them
BLOCK = 2**18  # values in a few rows


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, the same to rounding; what it cannot do faster it leaves to torch.

    Images that come in a lower precision than the parameters', as under autocast, leave in that of
    the parameters: the block behind computes in it, and nothing is rounded in between.
    """

    def forward(self, h: Tensor) -> Tensor:
        """Normalised h, of its shape (B, channels, H, W), in the wider of both dtypes."""
        if self.weight is not None:
            h = h.to(torch.promote_types(h.dtype, self.weight.dtype))
        if not self._is_faster(h):
            return super().forward(h)
        y, mean, variance = _Normalise.apply(h, self.weight, self.bias, self.eps)
        values = h.numel() // h.shape[1]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (values / (values - 1)), self.momentum)
        return y

    def _is_faster(self, h: Tensor) -> bool:
        state = (self.weight, self.bias, self.running_mean, self.running_var)
        return (
            self.training
            and h.device.type == "cpu"
            and self.weight is not None
            and h.dtype in (torch.float32, torch.float64)
            and h.ndim == 4
            and h.shape[1] == self.num_features < MANY
            and h.shape[1] % VECTOR > 0
            and h.numel() > h.shape[1]  # torch has the error for one value a channel
            and h.is_contiguous(memory_format=torch.channels_last)
            and None not in (self.momentum, self.num_batches_tracked)
            and all(t is not None and t.dtype == h.dtype for t in state)
            and not torch.compiler.is_compiling()
        )


class _Normalise(torch.autograd.Function):
    """(h, w, b, ε) ↦ (y, m, v). With ⟨·⟩ a channel's mean, c = h − m, s = w/√(v + ε):

    ∂h = s·(g − ⟨g⟩ − c·⟨gc⟩/(v + ε)), ∂w = Σ gc/√(v + ε), ∂b = Σ g.
    """

    @staticmethod
    def forward(ctx, h: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, ...]:
        rows, y = _Rows(h), torch.empty_like(h)
        m = rows.mean(rows.of(h).sum(0))
        mean, squares, spare = rows.row(m), 0, rows.spare(h)
        for h_few, y_few in rows.blocks(h, y):
            c = torch.sub(h_few, mean, out=y_few)
            squares = squares + torch.mul(c, c, out=spare[: len(c)]).sum(0)
        v = rows.mean(squares)
        inverse = (v + eps).rsqrt_()
        c = rows.of(y)
        torch.addcmul(rows.row(b), c, rows.row(inverse * w), out=c)
        ctx.save_for_backward(h, w, m, inverse)
        ctx.mark_non_differentiable(m, v)
        ctx.eps = eps
        return y, m, v

    @staticmethod
    def backward(ctx, g: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor, None]:
        h, w, m, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: torch knows the second derivative
            own = torch.ops.aten.native_batch_norm_backward
            return *own(g, h, w, None, None, m, inverse, True, ctx.eps, [True] * 3), None
        rows, dh = _Rows(h), torch.empty_like(h)
        g = g.contiguous(memory_format=torch.channels_last)
        mean, gc, spare = rows.row(m), 0, rows.spare(h)
        for h_few, g_few in rows.blocks(h, g):
            c = torch.sub(h_few, mean, out=spare[: len(h_few)])
            gc = gc + c.mul_(g_few).sum(0)
        mean_g, mean_gc, s = rows.mean(rows.of(g).sum(0)), rows.mean(gc), inverse * w
        constant, of_g = rows.row(-s * mean_g), rows.row(s)
        of_c = rows.row(-s * inverse.square() * mean_gc)
        for h_few, g_few, out in rows.blocks(h, g, dh):
            c = torch.sub(h_few, mean, out=out)
            torch.addcmul(constant, c, of_c, out=out).addcmul_(g_few, of_g)
        return dh, mean_gc * inverse * rows.values, mean_g * rows.values, None


class _Rows:
    """Images in channels_last as rows of ``pixels`` whole pixels: a row of any number of them."""

    def __init__(self, images: Tensor):
        b, self.channels, h, w = images.shape
        self.values = b * h * w  # of each channel
        self.pixels = math.gcd(self.values, PIXELS)
        self.few = max(1, BLOCK // (self.pixels * self.channels))

    def of(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) as (rows, pixels·channels), a view where it is in channels_last."""
        return images.permute(0, 2, 3, 1).reshape(-1, self.pixels * self.channels)

    def blocks(self, *images: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A few rows of each at a time: what is made of them is still in the cache."""
        return zip(*(self.of(t).split(self.few) for t in images), strict=True)

    def spare(self, images: Tensor) -> Tensor:
        """Memory for a few rows."""
        return images.new_empty(self.few, self.pixels * self.channels)

    def row(self, channels: Tensor) -> Tensor:
        """A value a channel as a row."""
        return channels.expand(self.pixels, -1).reshape(-1)

    def mean(self, sums: Tensor) -> Tensor:
        """The mean of each channel, from the sum of all rows."""
        return sums.view(self.pixels, self.channels).sum(0) / self.values
