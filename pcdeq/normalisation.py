"""Batch normalisation of images in the parameters' precision; of few channels, on a CPU, faster.

In channels_last torch's threads keep their sums over the channels side by side. Where these do not
fill whole cache lines (12, 20, 24, 50 and 82 channels of the conv networks), threads write to the
same line, and two of them are slower than one. So torch's kernels are shown rows of many pixels as
the channels, whose sums are then added: on two idle cores of a Xeon, with 64 images, a third of the
time for 12 channels of 28×28 pixels, two thirds for 82, and about as much for 24 of 13×13. With one
thread, or for smaller images, torch's own way is faster.

y = w·(h − m)/√(v + ε) + b with mean m and variance v of each channel over batch and pixels
(Ioffe and Szegedy, 2015).
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

LINE = 64  # bytes of a cache line
MANY = 128  # channels, from where on what threads share no longer matters
ENOUGH = 2**13  # values of a channel, up to which the overhead of more operations is larger
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
            and h.shape[1] * h.element_size() % LINE > 0
            and h.numel() >= ENOUGH * h.shape[1]
            and torch.get_num_threads() > 1
            and h.is_contiguous(memory_format=torch.channels_last)
            and None not in (self.momentum, self.num_batches_tracked)
            and all(t is not None and t.dtype == h.dtype for t in state)
            and not torch.compiler.is_compiling()
        )


class _Normalise(torch.autograd.Function):
    """(h, w, b, ε) ↦ (y, m, v). With c = (h − m)/√(v + ε), s = w/√(v + ε) and n values a channel:

    ∂w = Σ gc, ∂b = Σ g, ∂h = s·(g − ∂b/n − c·∂w/n).
    """

    @staticmethod
    def forward(ctx, h: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, ...]:
        rows, y = _Rows(h), torch.empty_like(h)
        means, variances = torch.ops.aten.batch_norm_update_stats(rows.image(h), None, None, 0)
        m = rows.sum(means) / rows.pixels
        v = rows.sum(variances + (means - rows.row(m)).square_()) / rows.pixels
        inverse = (v + eps).rsqrt_()
        s = inverse * w
        torch.addcmul(rows.row(b - m * s), rows.of(h), rows.row(s), out=rows.of(y))
        ctx.save_for_backward(h, w, m, inverse)
        ctx.mark_non_differentiable(m, v)
        ctx.eps = eps
        return y, m, v

    @staticmethod
    def backward(ctx, g: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor, None]:
        h, w, m, inverse = ctx.saved_tensors
        own = partial(torch.ops.aten.native_batch_norm_backward, train=True, eps=ctx.eps)
        g = g.contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled():  # create_graph=True: torch knows the second derivative
            return *own(g, h, w, None, None, m, inverse, output_mask=[True] * 3), None
        rows, dh = _Rows(h), torch.empty_like(h)
        state = rows.row(w), None, None, rows.row(m), rows.row(inverse)
        _, dw, db = own(rows.image(g), rows.image(h), *state, output_mask=[False, True, True])
        dw, db, s = rows.sum(dw), rows.sum(db), inverse * w
        of_h = -s * inverse * dw / rows.values
        constant = rows.row(-s * db / rows.values - of_h * m)
        of_h, of_g = rows.row(of_h), rows.row(s)
        for h_few, g_few, out in rows.blocks(h, g, dh):
            torch.addcmul(constant, h_few, of_h, out=out).addcmul_(g_few, of_g)
        return dh, dw, db, None


class _Rows:
    """Images in channels_last as rows of ``pixels`` whole pixels: a row of any number of them."""

    def __init__(self, images: Tensor):
        b, self.channels, h, w = images.shape
        self.values = b * h * w  # of each channel
        self.pixels = math.gcd(self.values, PIXELS)
        self.length = self.pixels * self.channels
        self.few = max(1, BLOCK // self.length)

    def of(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) as (rows, length), a view where it is in channels_last."""
        return images.permute(0, 2, 3, 1).reshape(-1, self.length)

    def image(self, images: Tensor) -> Tensor:
        """The same as an image of that many channels, (1, length, rows, 1), in channels_last."""
        return images.permute(0, 2, 3, 1).reshape(1, -1, 1, self.length).permute(0, 3, 1, 2)

    def blocks(self, *images: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A few rows of each at a time: what is made of them is still in the cache."""
        return zip(*(self.of(t).split(self.few) for t in images), strict=True)

    def row(self, channels: Tensor) -> Tensor:
        """A value a channel as a row."""
        return channels.expand(self.pixels, -1).reshape(-1).contiguous()  # of one channel a view

    def sum(self, row: Tensor) -> Tensor:
        """The sum over the pixels of a row, of each channel."""
        return row.view(self.pixels, self.channels).sum(0)
