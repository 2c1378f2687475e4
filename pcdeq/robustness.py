"""A whole network on a box of inputs: proofs that no point of it changes the class.

Interval arithmetic walks through the children of a network. The equilibria cost it nothing in
sharpness: z*(x) is monotone in x, so for x₋ ≤ x ≤ x₊ the block's output fills exactly the box from
z*(x₋) to z*(x₊), at the price of one enclosure. (Verifiers of other equilibrium models need
semidefinite programs: Chen et al., arXiv 2106.01453; an adjoint model: Li, Wang, Lin, ICML 2022;
or over-approximating boxes: arXiv 2112.05310.) What is lost is lost in the affine maps between
the blocks, which see their inputs as independent.

All of it is float64 with rounding accounted for. For an affine map of n terms on centre c and
radius r the computed centre is off by at most γ(|W||c| + |b|), γ = (n + 4)·2⁻⁵³ (Higham, Accuracy
and Stability of Numerical Algorithms, 3.1), and r' = |W|r + γ(|W|(|c| + r) + |b|) covers that, its
own rounding, and the rounding of c ± r.

What is proved concerns the stored weights and the true fixed points. A network as run, in float32
and stopped at its tolerance, is a little off them.
"""

import math
from collections.abc import Callable, Iterator
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from pcdeq.block import PcDEQ, PcDEQConv2d, PcDEQLinear
from pcdeq.checks import check_tensor
from pcdeq.enclosures import SMALLEST, UNIT, Operator, enclose, full_float32, product
from pcdeq.modes import evaluating

SLACK = 1e-9  # margins above it are proved: far above what is left of rounding in their last sums
INJECTION_ERROR = 1e-12  # relative, of softplus in float64: above what was measured, 6e-14


class Box(NamedTuple):
    """All h with lower ≤ h ≤ upper, componentwise; float64, shape (B, …)."""

    lower: Tensor
    upper: Tensor

    def centred(self) -> tuple[Tensor, Tensor]:
        """Centre c and radius r, with [c − r, c + r] ⊇ the box."""
        centre = (self.lower + self.upper) / 2
        radius = torch.maximum(self.upper - centre, centre - self.lower)
        return centre, radius * (1 + 4 * UNIT)


@torch.no_grad()
def robust(model: nn.Sequential, lower: Tensor, upper: Tensor, target: Tensor) -> Tensor:
    """Which boxes are proved to hold nothing but inputs of their target class.

    Args:
        model: a network, or any ``nn.Sequential`` of the layers that ``image`` knows, ending in
            ``nn.Linear``; taken in evaluation mode.
        lower, upper: corners of the boxes, as the network sees its inputs, shape (B, …).
        target: classes, int64, shape (B,).

    Returns:
        Booleans, shape (B,): true where the target's logit exceeds every other one by more than
        ``SLACK`` on the whole box. False means: not proved (so of NaN corners, too).

    Raises:
        TypeError: the model is no ``nn.Sequential``, a layer has no interval image here, or one has
            a ``forward`` of its own or a hook; or a corner is no tensor of floating dtype, or the
            targets are no tensor.
        ValueError: a lower corner is above the upper one, a target is no class, the corners differ
            in shape, or a layer does not take inputs of that shape.
    """
    _check_corners(lower, upper)
    check_tensor("targets", target)
    if target.shape != lower.shape[:1]:
        raise ValueError(
            f"targets of shape (B,) are needed, B = {len(lower)}, not {(*target.shape,)}"
        )
    *features, classifier = [*_layers(model)] or [model]
    if type(classifier) is not nn.Linear:
        raise TypeError(f"the last layer must be nn.Linear, not {type(classifier).__name__}")
    known = (target >= 0) & (target < classifier.out_features)
    if target.dtype != torch.int64 or not known.all():
        raise ValueError(f"targets must be int64 classes from 0 to {classifier.out_features - 1}")
    with evaluating(model), full_float32():
        centre, radius = _walk(features, lower, upper).centred()  # (B, n)
        weight, bias = _double(classifier)
    if centre.shape[1:] != (classifier.in_features,):
        raise ValueError(f"the last Linear takes no inputs of shape {(*centre.shape,)}")
    target = target.to(weight.device).view(-1, 1)  # (B, 1)
    # The classes' rows are subtracted first: what moves two logits together is no threat.
    rows = weight[target] - weight  # (B, K, n)
    offsets = bias[target] - bias  # (B, K)
    margin = torch.einsum("bkn,bn->bk", rows, centre) + offsets
    loss = torch.einsum(
        "bkn,bn->bk", rows.abs_(), radius + _gamma(weight) * (centre.abs() + radius)
    )
    margin -= loss + _gamma(weight) * offsets.abs()
    return (margin.scatter_(1, target, torch.inf) > SLACK).all(1).to(lower.device)


@torch.no_grad()
def logit_bounds(model: nn.Sequential, lower: Tensor, upper: Tensor) -> Box:
    """Bounds on each logit over each box; arguments and errors as for ``robust``.

    They are −∞ and ∞ where nothing is known: a block has a negative weight, or a corner is NaN.
    """
    _check_corners(lower, upper)
    layers = list(_layers(model))
    with evaluating(model), full_float32():
        return _walk(layers, lower, upper)


def _layers(model: nn.Sequential) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"the model must be an nn.Sequential, not {type(model).__name__}")
    _check_forward(model)
    for layer in model:
        if isinstance(layer, nn.Sequential):
            yield from _layers(layer)
        else:
            for name, module in layer.named_modules():
                if "parametrizations" not in name.split("."):  # they make the stored weight
                    _check_forward(module)
            yield layer


def _check_forward(module: nn.Module) -> None:
    """Refuses a module that does something else than its class is known for."""
    kind = type(module)
    methods = [getattr(kind, name) for name in ("forward", "inject") if hasattr(kind, name)]
    known = all(method.__module__.startswith(("torch.nn.", "pcdeq.")) for method in methods)
    if not known or vars(module).keys() & {"forward", "inject"}:
        raise TypeError(
            f"no interval image is known for {kind.__name__}, which has a forward of its own"
        )
    every = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    if module._forward_hooks or module._forward_pre_hooks or every:
        raise TypeError(f"no interval image is known for {kind.__name__} with a forward hook")


def _check_corners(lower: Tensor, upper: Tensor) -> None:
    for corner in (lower, upper):
        if not (isinstance(corner, Tensor) and corner.is_floating_point()):
            kind = getattr(corner, "dtype", type(corner).__name__)
            raise TypeError(f"corners are inputs of the network, floating tensors, not {kind}")
    if lower.shape != upper.shape:
        raise ValueError(f"corners differ in shape: {(*lower.shape,)} and {(*upper.shape,)}")


def _takes(layer: nn.Module, shape: torch.Size) -> bool:
    """Whether inputs of that shape are such as the layer is made for."""
    match layer:
        case nn.Linear():
            return shape[-1:] == (layer.in_features,)
        case PcDEQLinear():
            return shape[-1:] == (layer.deq.f.W.width,)
        case PcDEQConv2d():
            return len(shape) == 4 and shape[1] == layer.deq.f.W.width
        case nn.Conv2d():
            return len(shape) == 4 and shape[1] == layer.in_channels
        case nn.modules.batchnorm._BatchNorm():
            return shape[1:2] == (layer.num_features,)
        case nn.MaxPool2d() | nn.AvgPool2d():
            return len(shape) == 4
        case nn.Flatten():
            return len(shape) > max(layer.start_dim, 1)
    return True


def _walk(layers: list[nn.Module], lower: Tensor, upper: Tensor) -> Box:
    device = next((_lift(p).device for layer in layers for p in layer.parameters()), lower.device)
    box = Box(lower.to(device).double(), upper.to(device).double())
    if (box.lower > box.upper).any():  # an empty box would be proved to hold anything
        raise ValueError("a box has its lower corner above its upper one")
    for layer in layers:
        if not _takes(layer, box.lower.shape):
            name, shape = type(layer).__name__, (*box.lower.shape,)
            raise ValueError(f"{name} takes no inputs of shape {shape}")
        box = image(layer, box)
    # NaN is what arithmetic makes of ∞: nothing is known there.
    lower, upper = box
    return Box(lower.where(~lower.isnan(), -torch.inf), upper.where(~upper.isnan(), torch.inf))


@singledispatch
def image(layer: nn.Module, box: Box) -> Box:
    """The smallest box at hand around the layer's outputs on a box of its inputs.

    Every layer is taken in evaluation mode, as a map of real numbers given by its stored weights.

    Args:
        layer: Linear, Conv2d, BatchNorm, MaxPool2d, AvgPool2d, Flatten, ReLU, Dropout, Identity, or
            a pcDEQ layer.
        box: of its inputs.

    Raises:
        TypeError: another layer.
    """
    raise TypeError(f"no interval image is known for {type(layer).__name__}")


@image.register
def _(layer: nn.Linear, box: Box) -> Box:
    weight, bias = _double(layer)
    return _affine(weight, bias, box, lambda w, h: h @ w.t())


@image.register
def _(layer: nn.Conv2d, box: Box) -> Box:
    sizes = layer.stride, layer.padding, layer.kernel_size
    plain = (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
    if not plain or any(len(set(pair)) > 1 for pair in sizes):
        raise TypeError(f"no interval image is known for {layer}")
    stride, padding = layer.stride[0], layer.padding[0]
    weight, bias = _double(layer)
    return _affine(weight, bias.view(-1, 1, 1), box, lambda w, h: product(w, h, stride, padding))


@image.register
def _(layer: nn.modules.batchnorm._BatchNorm, box: Box) -> Box:
    if layer.weight is None or layer.running_mean is None:
        raise TypeError(f"no interval image is known for {layer}")
    shape = (-1, *[1] * (box.lower.dim() - 2))  # (C, 1, 1) for images
    weight, bias = (t.view(shape) for t in _double(layer))
    mean, variance = _lift(layer.running_mean), _lift(layer.running_var)
    scale = weight / (variance + layer.eps).sqrt().view(shape)  # may be negative
    centre, radius = box.centred()
    size = scale.abs() * (centre.abs() + mean.abs().view(shape) + radius) + bias.abs()
    radius = scale.abs() * radius + 16 * UNIT * size
    centre = (centre - mean.view(shape)) * scale + bias
    return Box(centre - radius, centre + radius)


@image.register
def _(layer: PcDEQ, box: Box) -> Box:
    operator = Operator(layer.deq.f)
    lower, upper = box
    if not (operator.weight >= 0).all():  # no theorem, no bounds
        return Box(torch.full_like(lower, -torch.inf), torch.full_like(upper, torch.inf))
    lower, upper = layer.inject(lower), layer.inject(upper)
    if operator.sigma.variant == 1:
        # The stored layer, in its own dtype, lets no x fall below the least normal number.
        least = torch.finfo(layer.deq.dtype).tiny
        lower = (lower * (1 - INJECTION_ERROR)).clamp_(min=least)
        lower = lower.where(~(lower < SMALLEST), 0)  # of a float64 layer: 0 is below, and safe
        upper = (upper * (1 + INJECTION_ERROR)).clamp_(min=max(least, SMALLEST))
    vectors = operator.weight.dim() == 2
    if vectors:
        lower, upper = (t.reshape(-1, t.shape[-1]) for t in (lower, upper))
    # Vectors are cheap enough to be enclosed to the last digits.
    found = enclose(operator, lower, upper, tol=1e-12 if vectors else 1e-4)
    return Box(found.lower.view(box.lower.shape), found.upper.view(box.lower.shape))


@image.register(nn.MaxPool2d)
@image.register(nn.Flatten)
def _(layer: nn.Module, box: Box) -> Box:
    if getattr(layer, "return_indices", False):
        raise TypeError(f"no interval image is known for {layer}")
    return Box(layer(box.lower), layer(box.upper))


@image.register
def _(layer: nn.ReLU, box: Box) -> Box:
    return Box(box.lower.relu(), box.upper.relu())  # the layer itself may write to its argument


@image.register
def _(layer: nn.AvgPool2d, box: Box) -> Box:
    if layer.divisor_override is not None:  # it may be negative
        raise TypeError(f"no interval image is known for {layer}")
    gamma = (math.prod(_pair(layer.kernel_size)) + 4) * UNIT
    lower, upper = box
    return Box(layer(lower) - gamma * layer(lower.abs()), layer(upper) + gamma * layer(upper.abs()))


@image.register(nn.Dropout)
@image.register(nn.Identity)
def _(layer: nn.Module, box: Box) -> Box:
    return box  # in evaluation mode


def _affine(weight: Tensor, bias: Tensor, box: Box, apply: Callable) -> Box:
    """W h + b on a box; see the head of the file."""
    centre, radius = box.centred()
    gamma = _gamma(weight)
    radius = apply(weight.abs(), radius + gamma * (centre.abs() + radius)) + gamma * bias.abs()
    centre = apply(weight, centre) + bias
    return Box(centre - radius, centre + radius)


def _gamma(weight: Tensor) -> float:
    return (weight[0].numel() + 8) * UNIT  # four more than needed


def _double(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64; zeros for a bias that is not there."""
    weight = _lift(layer.weight)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else _lift(layer.bias)
    return weight, bias


def _lift(t: Tensor) -> Tensor:
    return (t.cpu() if t.device.type == "mps" else t).detach().double()
