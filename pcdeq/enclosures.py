"""Rigorous bounds on fixed points: l ≤ z* ≤ u in float64, rounding included.

f(z) = σ(Wz + x) with W ≥ 0, x ≥ 0 is monotone and has one fixed point z* in [0, M]^n (Gabor,
Piotrowski, Cavalcante, ICML 2024). Hence, componentwise and by Tarski's theorem,

    f(l) ≥ l  ⟹  l ≤ z*,          f(u) ≤ u or u = M  ⟹  z* ≤ u,

whatever produced l and u: the iterates of f from l are increasing and bounded, those from u are
decreasing, and both can only end at z*. So candidates come from cheap float32 iterations, and are
tested once in float64.

Rounding. All terms of Wz + x are nonnegative, so n products and their sum, in any order, with or
without fused operations, carry a relative error of at most (n + 1)·2⁻⁵³; σ is concave with
σ(0) ≥ 0, hence σ((1 + e)s) ≤ (1 + e)σ(s) for e ≥ 0: the relative error does not grow on the way
through σ, and σ adds four roundings of its own (torch's tanh and exp are good to one ulp) and the
factor below two. With ε = (n + 8)·2⁻⁵³ therefore f(z)(1 − ε), as computed, is at most the exact
f(z), and f(z)(1 + ε) is at least that. This needs plain sums: products are written here as matrix
products, since a library's convolution may choose Winograd's or Fourier's scheme, whose errors are
not relative ones. It also needs that nothing underflows: see ``SMALLEST``.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pcdeq.layers import ConcaveLayer

UNIT = 2.0**-53  # the unit roundoff of float64
# Injected values from here on keep every product that matters far above float64's underflow:
# W z + x ≥ x, and n products lost below 2⁻¹⁰⁷⁴ weigh less than 2⁻¹⁰⁰ of it. float32 has no smaller
# positive number than 1.4e-45; only a float64 model can violate it.
SMALLEST = 1e-290
WIDER = (8.0, 64.0)  # candidates that fail the test move outward by so many margins δ, in turn


def product(weight: Tensor, z: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    """W z as a plain sum of products: a matrix product, or one for each tap of a convolution.

    Nine matrix products on channels-last images take a quarter of the time of torch's float64
    convolution on a CPU (which forms the image of all patches), and a third of its memory.

    Args:
        weight: (m, n), or (m, c, k, k) for a convolution.
        z: (B, n), or (B, c, H, W), zero-padded by ``padding`` pixels on each side.
        stride, padding: of the convolution.

    Returns:
        (B, m), or (B, m, H', W') in channels_last; the dtype of both arguments.
    """
    if weight.dim() == 2:
        return z @ weight.t()
    m, c, k, _ = weight.shape
    patches = F.pad(z.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    batch, rows, columns, _ = patches.shape  # (B, H + 2p, W + 2p, c)
    height, width = (rows - k) // stride + 1, (columns - k) // stride + 1
    taps = weight.permute(2, 3, 1, 0).contiguous()  # (k, k, c, m)
    out = z.new_zeros(batch * height * width, m)
    for i in range(k):
        for j in range(k):
            part = patches[:, i : i + stride * height : stride, j : j + stride * width : stride]
            out.addmm_(part[:, :height, :width].reshape(-1, c), taps[i, j])
    return out.view(batch, height, width, m).permute(0, 3, 1, 2)


class Operator:
    """f(z) = σ(Wz + x) of one layer in float64, with outward rounding.

    Args:
        layer: the layer; its W, as the layer itself computes it, is cast up.
    """

    def __init__(self, layer: ConcaveLayer) -> None:
        weight = layer.W.weight().detach()
        if weight.device.type == "mps":  # which has no float64
            weight = weight.cpu()
        self.layer = layer
        self.sigma = layer.activation
        self.weight = weight.double()
        self.device = weight.device
        self.terms = weight[0].numel()  # n: products in each sum
        self.rounding = (self.terms + 8) * UNIT  # ε

    def product(self, z: Tensor) -> Tensor:
        """Wz in float64, to a relative error below ε."""
        return product(self.weight, z)

    def argument(self, z: Tensor, x: Tensor) -> Tensor:
        """Wz + x in float64, to a relative error below ε."""
        return self.product(z).add_(x)

    def image(self, z: Tensor, x: Tensor, side: int) -> Tensor:
        """f(z), rounded down (``side`` −1: at most the exact value) or up (+1: at least it)."""
        value = self.sigma.function(self.argument(z, x)).mul_(1 + side * self.rounding)
        return value.clamp_(max=self.sigma.supremum)

    def slope(self, argument: Tensor, side: int) -> Tensor:
        """σ' at an argument known to ε, rounded down or up: σ' falls, so −1 takes it larger."""
        value = self.sigma.slope(argument * (1 - side * self.rounding))
        value = value.mul_(1 + side * 16 * UNIT)
        return value.add_(1e-300) if side > 0 else value  # where an exponential underflowed

    def rough(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """z ↦ f(z) in float32 by the layer's own fast product: for candidates, no bound."""
        return self.layer.at(x.float(), self.weight.float())


@contextmanager
def full_float32() -> Iterator[None]:
    """Keeps products of float32 from TensorFloat-32 and from an autocast that the caller is in.

    Candidates would be too coarse, and ``predicted_iterations`` counts on float32's rounding.
    """
    products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [product.fp32_precision for product in products]
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for product in products:
                product.fp32_precision = "ieee"
            yield
        finally:
            for product, precision in zip(products, before, strict=True):
                product.fp32_precision = precision


class Enclosure(NamedTuple):
    """Bounds on the fixed points of all x in a box, and how they were found.

    Attributes:
        lower, upper: float64, shape of x.
        steps: evaluations of f, float32 and float64 together.
        ladder: {m: l_m} for some m: float32 iterates from 0 of (1 − δ) f at ``lower_x``.
    """

    lower: Tensor
    upper: Tensor
    steps: int
    ladder: dict[int, Tensor]


def enclose(
    operator: Operator,
    lower_x: Tensor,
    upper_x: Tensor | None = None,
    *,
    tol: float = 1e-4,
    steps: int = 500,
) -> Enclosure:
    """Bounds l ≤ z*(x) ≤ u for every x with lower_x ≤ x ≤ upper_x.

    z* is monotone in x, so the lower end belongs to ``lower_x`` and the upper end to ``upper_x``,
    and each is attained but for the accuracy of the iteration. In float32, z ← (1 − δ) f(z) rises
    from 0 towards a point with f(z) = z/(1 − δ), which passes the test. From there (1 + δ) f leads
    to the upper candidate; it passes once a step changes no component by more than δ relatively,
    since f is subhomogeneous: f(u) ≤ f(u') max(u/u') ≤ u for u = (1 + δ) f(u').

    Args:
        operator: the layer.
        lower_x: injected values as the layer sees them, ≥ 0 (> 0 where σ(0) = 0), shape (B, …).
        upper_x: the same, ≥ lower_x, which is its default.
        tol: after the test, directed float64 steps are added until none changes a component by more
            than this, relatively.
        steps: at most so many, for each end, of float32 and of float64 steps.

    Returns:
        The enclosure. Where ``steps`` was too small it is wide, but sound.
    """
    upper_x = lower_x if upper_x is None else upper_x
    margin = operator.terms**0.5 * 2.0**-23  # δ: about the rounding errors of float32
    low, rising, ladder = _settle(operator.rough(lower_x), None, -margin, steps)
    high, falling, _ = _settle(operator.rough(upper_x), low.float(), margin, steps)
    low, more = _end(operator, lower_x.double(), low, -1, margin, tol, steps)
    high, most = _end(operator, upper_x.double(), high, 1, margin, tol, steps)
    return Enclosure(low, high, rising + falling + more + most, ladder)


def _settle(
    f: Callable[[Tensor | None], Tensor], z: Tensor | None, margin: float, steps: int
) -> tuple[Tensor, int, dict[int, Tensor]]:
    """z ← (1 + margin) f(z) until no component changes by more than |margin|/2 relatively.

    Returns the candidate in float64 (the last factor shrinks subnormal numbers too), the number of
    evaluations, and iterates m = 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, … before it.
    """
    ladder = {}
    step, rung = 0, 1
    for step in range(1, steps):
        new = f(z).mul_(1 + margin)
        if step == rung:
            ladder[step], rung = new, max(step + 1, step * 5 // 4)
        check = step % 4 == 0  # it costs as much as the convolution in small blocks
        settled = check and bool(((new - z).abs_() <= new * (abs(margin) / 2)).all())
        z = new
        if settled:
            break
    return f(z).double().mul_(1 + margin), step + 1, ladder


def _end(
    operator: Operator, x: Tensor, z: Tensor, side: int, margin: float, tol: float, steps: int
) -> tuple[Tensor, int]:
    """One end of the enclosure from a candidate: tested, widened where it fails, then tightened.

    Samples that keep failing start over from 0 or M, which pass.
    """
    inward = torch.minimum if side > 0 else torch.maximum
    z = z.clamp_(0, operator.sigma.supremum)
    image = operator.image(z, x, side)
    for factor in (*WIDER, None):
        failed = _each(((image - z) * side > 0) | image.isnan()).nonzero().flatten()
        if len(failed) == 0:
            break
        if factor is None:
            z[failed] = operator.sigma.supremum if side > 0 else 0.0
        else:
            z[failed] *= 1 + side * factor * margin
        image[failed] = operator.image(z[failed], x[failed], side)
    done = 1
    moving = torch.arange(len(z), device=z.device)
    while True:
        old = z[moving]
        new = inward(old, image)
        still = _each((new - old).abs_() > torch.maximum(old, new).mul_(tol))
        z[moving] = new
        moving = moving[still]
        if len(moving) == 0 or done == steps:
            return z, done
        image = operator.image(z[moving], x[moving], side)
        done += 1


def _each(flags: Tensor) -> Tensor:
    """Whether any component of a sample is flagged, shape (B,)."""
    return flags.flatten(1).any(1)
