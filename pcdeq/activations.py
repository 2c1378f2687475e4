"""σ: the concave activations of pcDEQ layers.

Each σ is nondecreasing, bounded and concave on [0, ∞), which makes z ↦ σ(Wz + x) with W ≥ 0 a
positive concave mapping (Gabor, Piotrowski, Cavalcante, ICML 2024). Where σ(0) = 0 the
input x must be strictly positive (pcDEQ-1); where σ(0) > 0 it may be any nonnegative x (pcDEQ-2).

The derivative is written in the function's own value v = σ(s), as torch's backward kernels have it:
a fixed point z* = σ(Wz* + x) is such a value, so σ'(Wz* + x) comes from z* alone, with no second
evaluation of the layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pcdeq.processor import AMD_AVX512, AVX512

try:
    import numpy as np
except ImportError:  # torch works without it
    np = None


# Where tanh is numpy's, which is vectorised. Measured with one and two threads.
NUMPY = np is not None and "AVX" in torch.backends.cpu.get_cpu_capability()
LARGE = 2**16  # elements, from where on torch's threads make up for it
FEW = 4 if AMD_AVX512 else 0  # threads, up to which they do not


@dataclass(frozen=True)
class Activation:
    """One activation σ and what the theory needs to know of it.

    Attributes:
        name: the key in ``ACTIVATIONS``.
        function: σ(s), elementwise, any floating dtype.
        function_: the same without a graph or a tracer; it may write over its argument.
        vjp: (g, v) ↦ σ'(s)·g with v = σ(s), for s ≥ 0; at relu6's kinks 0, as torch has it.
        slope: σ'(s) as a function of s ≥ 0, to a few roundings relative to itself even where σ
            saturates (1 − tanh² is not); at relu6's kink the left derivative. For proofs.
        supremum: M = sup σ; every fixed point lies in [0, M].
        variant: 1 if σ(0) = 0 (pcDEQ-1), 2 if σ(0) > 0 (pcDEQ-2).
    """

    name: str
    function: Callable[[Tensor], Tensor]
    function_: Callable[[Tensor], Tensor]
    vjp: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    supremum: float
    variant: int

    def derivative(self, v: Tensor) -> Tensor:
        """σ'(s) as a function of v = σ(s), for s ≥ 0; shape and dtype of v."""
        return self.vjp(v.new_ones(()).expand_as(v), v)

    def __reduce_ex__(self, protocol: int) -> tuple:
        if ACTIVATIONS.get(self.name) is self:
            return get_activation, (self.name,)  # pickled and copied as its name
        return super().__reduce_ex__(protocol)


def _tanh_(s: Tensor) -> Tensor:
    """tanh; in float32 numpy's where it is faster, with AVX-512 4 to 7 times on an AMD's thread.

    numpy's is exact to 1.4 units in the last place. bfloat16 goes by way of float32 with AVX-512,
    in half the time of torch's own.
    """
    if not s.is_cpu:
        return s.tanh_()
    large = s.numel() >= LARGE
    if s.dtype is torch.bfloat16 and large and AVX512:
        return s.copy_(_tanh_(s.float()))
    if s.dtype is torch.float32 and NUMPY and not (large and torch.get_num_threads() > FEW):
        v = s.numpy()  # the same memory
        np.tanh(v, v)
        return s
    return s.tanh_()


def _softsign_(s: Tensor) -> Tensor:
    return s.div_(s.abs().add_(1))


def _relu6_(s: Tensor) -> Tensor:
    return s.clamp_(0, 6)


def _tanh_vjp(g: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward.default(g, v)  # (1 − v²)·g


def _sigmoid_vjp(g: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward.default(g, v)  # v(1 − v)·g


def _softsign_vjp(g: Tensor, v: Tensor) -> Tensor:
    return (1 - v.abs()).square_().mul_(g)  # v = s/(1+|s|), so 1/(1+|s|)² = (1 − |v|)²


def _relu6_vjp(g: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.hardtanh_backward.default(g, v, 0, 6)


def _tanh_slope(s: Tensor) -> Tensor:
    return s.cosh().square_().reciprocal_()


def _softsign_slope(s: Tensor) -> Tensor:
    return (1 + s).square_().reciprocal_()


def _relu6_slope(s: Tensor) -> Tensor:
    return (s <= 6).to(s.dtype)


def _sigmoid_slope(s: Tensor) -> Tensor:
    return torch.sigmoid(s) * torch.sigmoid(-s)


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation(
            "tanh",
            torch.tanh,
            _tanh_,
            _tanh_vjp,
            _tanh_slope,
            supremum=1.0,
            variant=1,
        ),
        Activation(
            "softsign",
            F.softsign,
            _softsign_,
            _softsign_vjp,
            _softsign_slope,
            supremum=1.0,
            variant=1,
        ),
        Activation(
            "relu6",
            F.relu6,
            _relu6_,
            _relu6_vjp,
            _relu6_slope,
            supremum=6.0,
            variant=1,
        ),
        Activation(
            "sigmoid",
            torch.sigmoid,
            torch.sigmoid_,
            _sigmoid_vjp,
            _sigmoid_slope,
            supremum=1.0,
            variant=2,
        ),
    )
}


def allowed(variant: int) -> tuple[str, ...]:
    """The names of the activations that pcDEQ-``variant`` (1 or 2) may use, its default first."""
    return tuple(a.name for a in ACTIVATIONS.values() if a.variant == variant)


def get_activation(name: str) -> Activation:
    """The activation of that name.

    Raises:
        ValueError: no activation has that name; the sentence lists those that there are.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
