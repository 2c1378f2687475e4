"""σ: the concave activations of pcDEQ layers.

Each σ is nondecreasing, bounded and concave on [0, ∞), which makes z ↦ σ(Wz + x) with W ≥ 0 a
positive concave mapping (Gabor, Piotrowski, Cavalcante, ICML 2024). Where σ(0) = 0 the
input x must be strictly positive (pcDEQ-1); where σ(0) > 0 it may be any nonnegative x (pcDEQ-2).

The derivative is written in the function's own value v = σ(s): a fixed point z* = σ(Wz* + x) is
such a value, so σ'(Wz* + x) comes from z* alone, with no second evaluation of the layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import numpy as np
except ImportError:  # torch works without it
    np = None


def _is_amd() -> bool:
    """Whether Linux names AMD as the maker of the processor."""
    try:
        with Path("/proc/cpuinfo").open() as processors:
            return "AuthenticAMD" in processors.read(200)  # the first of maybe hundreds
    except OSError:  # another system
        return False


# Where tanh is numpy's: its own is vectorised, torch's is MKL's, which is slow on AMD's processors.
# Measured on a Zen 4 and on an Intel with AMX, with one and two threads.
NUMPY = np is not None and "AVX" in torch.backends.cpu.get_cpu_capability()
LARGE = 2**16  # elements, from where on torch's threads make up for it
FEW = 4 if _is_amd() else 0  # threads, up to which they do not


@dataclass(frozen=True)
class Activation:
    """One activation σ and what the theory needs to know of it.

    Attributes:
        name: the key in ``ACTIVATIONS``.
        function: σ(s), elementwise, any floating dtype.
        function_: the same without a graph; it may write over its argument.
        derivative: σ'(s) as a function of v = σ(s), for s ≥ 0.
        slope: σ'(s) as a function of s ≥ 0, to a few roundings relative to itself even where σ
            saturates (1 − tanh² is not); at relu6's kink the left derivative. For proofs.
        supremum: M = sup σ; every fixed point lies in [0, M].
        variant: 1 if σ(0) = 0 (pcDEQ-1), 2 if σ(0) > 0 (pcDEQ-2).
    """

    name: str
    function: Callable[[Tensor], Tensor]
    function_: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    supremum: float
    variant: int

    def __reduce__(self) -> tuple:
        return get_activation, (self.name,)  # pickled and copied as its name


def _tanh_(s: Tensor) -> Tensor:
    """numpy's where it is faster: 4 to 7 times on a thread, to 1.4 units in the last place."""
    fits = NUMPY and s.device.type == "cpu" and s.dtype == torch.float32
    few = s.numel() < LARGE or torch.get_num_threads() <= FEW
    if not (fits and few) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return s.tanh_()
    v = s.numpy()  # the same memory
    np.tanh(v, out=v)
    return s


def _softsign_(s: Tensor) -> Tensor:
    return s.div_(s.abs().add_(1))


def _relu6_(s: Tensor) -> Tensor:
    return s.clamp_(0, 6)


def _tanh_derivative(v: Tensor) -> Tensor:
    return torch.addcmul(v.new_ones(()), v, v, value=-1)  # 1 − v² in one pass


def _softsign_derivative(v: Tensor) -> Tensor:
    return (1 - v.abs()).square_()  # v = s/(1+s), so 1/(1+s)² = (1 − v)²


def _relu6_derivative(v: Tensor) -> Tensor:
    return (6 - v).mul_(v).sign_()  # 1 in between, 0 at both kinks, as torch has it


def _sigmoid_derivative(v: Tensor) -> Tensor:
    return torch.addcmul(v, v, v, value=-1)  # v(1 − v) in one pass


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
            _tanh_derivative,
            _tanh_slope,
            supremum=1.0,
            variant=1,
        ),
        Activation(
            "softsign",
            F.softsign,
            _softsign_,
            _softsign_derivative,
            _softsign_slope,
            supremum=1.0,
            variant=1,
        ),
        Activation(
            "relu6",
            F.relu6,
            _relu6_,
            _relu6_derivative,
            _relu6_slope,
            supremum=6.0,
            variant=1,
        ),
        Activation(
            "sigmoid",
            torch.sigmoid,
            torch.sigmoid_,
            _sigmoid_derivative,
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
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
