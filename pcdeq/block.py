"""The pcDEQ layer, h ↦ z* = σ(Wz* + x) with x = inject(h), on vectors and on images.

A module for any network; the six of the paper are built of it. What keeps W ≥ 0 in training is
``project``, by hand or as an optimizer's hook.
"""

import torch
from torch import Tensor, nn

from pcdeq.activations import Activation, get_activation
from pcdeq.checks import check_count, check_module, check_tensor
from pcdeq.implicit import OPTIONS, Equilibrium
from pcdeq.injections import INJECTIONS
from pcdeq.layers import ConcaveLayer, Nonnegative, NonnegativeConv2d, NonnegativeLinear


class PcDEQ(nn.Module):
    """A pcDEQ layer: injection and equilibrium, h ↦ z* = σ(Wz* + x), x = inject(h).

    The variant follows from the activation: tanh, softsign and relu6 make
    pcDEQ-1, whose x = softplus(h), beta 5, is strictly positive; sigmoid makes pcDEQ-2, whose
    x = relu(h) is nonnegative. It computes in its parameters' precision, whatever comes in, also
    under ``torch.autocast``.

    After each optimizer step, call ``project`` (or ``register_projection`` once).

    Args:
        W: the nonnegative linear map.
        activation: name of σ.
        options: ``solver``, ``precision``, ``tol``, ``max_iter`` of ``Equilibrium``.

    Attributes:
        activation: σ.
        deq: the ``Equilibrium``, with the figures of its last solves.
    """

    def __init__(self, W: NonnegativeLinear | NonnegativeConv2d, activation: str, **options):
        super().__init__()
        if unknown := options.keys() - OPTIONS:
            raise TypeError(
                f"{type(self).__name__} has no option {min(unknown)!r}: choose from "
                f"activation, {', '.join(OPTIONS)}; .to() sets dtype and device"
            )
        self.deq = Equilibrium(ConcaveLayer(W, get_activation(activation)), **options)

    @property
    def activation(self) -> Activation:
        """σ."""
        return self.deq.f.activation

    def extra_repr(self) -> str:
        return f"pcDEQ-{self.activation.variant}, {self.activation.name}"

    def inject(self, h: Tensor) -> Tensor:
        """x > 0 (pcDEQ-1) or x ≥ 0 (pcDEQ-2), shape and dtype of h."""
        return INJECTIONS[self.activation.variant](h)

    def forward(self, h: Tensor) -> Tensor:
        """z* of the shape of h, in the parameters' dtype.

        Raises:
            TypeError: h is complex.
        """
        if h.is_complex():
            raise TypeError("a pcDEQ layer is for real inputs: σ is concave on [0, ∞)")
        return self.deq(self.inject(h.to(self.deq.dtype)))


class PcDEQLinear(PcDEQ):
    """pcDEQ layer on vectors: h of shape (…, features), W a features × features matrix.

    z* = σ(Wz* + x), where x > 0 is softplus(h), beta 5 (pcDEQ-1), or x ≥ 0 is relu(h) (pcDEQ-2).
    After each optimizer step W has to be projected: ``project``, ``register_projection``. Figures
    of the solves: ``deq.forward_solve``, ``deq.backward_solve``.

    Args:
        features: length of the last axis of input and output.
        activation: ``"tanh"``, ``"softsign"``, ``"relu6"`` (pcDEQ-1) or ``"sigmoid"`` (pcDEQ-2).
        options: ``solver``, ``precision``, ``tol``, ``max_iter`` of ``Equilibrium``.

    Raises:
        ValueError: there is no such size, activation, or value of an option.
        TypeError: there is no such option.
    """

    def __init__(self, features: int, *, activation: str = "tanh", **options):
        check_count("features", features)
        super().__init__(NonnegativeLinear(features), activation, **options)

    def forward(self, h: Tensor) -> Tensor:
        """z* of the shape of h; the axes before the last one are one batch to the stopping rule.

        Raises:
            TypeError: h is complex, or no tensor.
            ValueError: the last axis is not as long as the layer is wide.
        """
        check_tensor("the input", h)
        features = self.deq.f.W.width
        if h.ndim == 0 or h.shape[-1] != features:
            raise ValueError(f"vectors must be of shape (…, {features}), not {(*h.shape,)}")
        if h.ndim == 2:
            return super().forward(h)
        return super().forward(h.reshape(-1, h.shape[-1])).view(h.shape)


class PcDEQConv2d(PcDEQ):
    """pcDEQ layer on images: h of shape (B, channels, H, W), W a 3×3 convolution with padding 1.

    All else is as with ``PcDEQLinear``: z* = σ(W∗z* + x), the projection, the figures.

    Args:
        channels: of input and output.
        activation: as for ``PcDEQLinear``.
        options: ``solver``, ``precision``, ``tol``, ``max_iter`` of ``Equilibrium``.

    Raises:
        ValueError: there is no such size, activation, or value of an option.
        TypeError: there is no such option.
    """

    def __init__(self, channels: int, *, activation: str = "tanh", **options):
        check_count("channels", channels)
        super().__init__(NonnegativeConv2d(channels), activation, **options)

    def forward(self, h: Tensor) -> Tensor:
        """z* of the shape of h, in channels_last.

        Raises:
            TypeError: h is complex, or no tensor.
            ValueError: h is no batch of images with so many channels.
        """
        check_tensor("the input", h)
        channels = self.deq.f.W.width
        if h.ndim != 4 or h.shape[1] != channels:
            raise ValueError(f"images must be of shape (B, {channels}, H, W), not {(*h.shape,)}")
        return super().forward(h.contiguous(memory_format=torch.channels_last))


def project(model: nn.Module) -> None:
    """Projects every pcDEQ weight in ``model`` onto the nonnegative orthant, in place.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is no pcDEQ weight in it.
    """
    for layer in _nonnegative(model):
        layer.clamp()


def _nonnegative(model: nn.Module) -> list[Nonnegative]:
    check_module(model)
    layers = [module for module in model.modules() if isinstance(module, Nonnegative)]
    if not layers:
        raise ValueError("the model has no pcDEQ layer: there is nothing to project")
    return layers


def register_projection(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> torch.utils.hooks.RemovableHandle:
    """Makes ``project(model)`` follow every ``optimizer.step()``; returns the removable handle.

    A copy of the optimizer (``copy.deepcopy``, ``pickle``) has to be registered again: torch drops
    its hooks.

    Raises:
        TypeError: ``optimizer`` is none, or ``model`` is no module.
        ValueError: there is no pcDEQ weight in ``model``, or the optimizer steps none of them.
    """
    if not hasattr(optimizer, "register_step_post_hook") or not isinstance(model, nn.Module):
        kinds = f"{type(optimizer).__name__} and {type(model).__name__}"
        raise TypeError(f"the optimizer comes first, then the model, not {kinds}")
    layers = _nonnegative(model)
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if stepped.isdisjoint(id(p) for layer in layers for p in layer.parameters()):
        raise ValueError("the optimizer steps no pcDEQ weight of this model: it is for another one")
    return optimizer.register_step_post_hook(lambda *_: project(model))
