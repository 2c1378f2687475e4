"""The textbook implicit layer, written for clarity: what the benchmark measures against.

It is the construction of the deep equilibrium tutorials with nothing taken out: the default memory
layout, weight normalisation recomputed in each evaluation, one evaluation after the solve that
autograd records and a second one for the vector–Jacobian products, which autograd forms, and one
``.item()`` for each norm in each iteration.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcdeq.networks import Network

SIGMA = {"tanh": torch.tanh, "softsign": F.softsign, "relu6": F.relu6, "sigmoid": torch.sigmoid}


class TextbookLayer(nn.Module):
    """f(z, x) = σ(Wz + x), W = g·v/‖v‖, taking over the parameters of a pcDEQ layer."""

    def __init__(self, v: Tensor, g: Tensor, activation: str):
        super().__init__()
        self.v = nn.Parameter(v.detach().clone(memory_format=torch.contiguous_format))
        self.g = nn.Parameter(g.detach().clone(memory_format=torch.contiguous_format))
        self.activation = SIGMA[activation]

    def weight(self) -> Tensor:
        axes = tuple(range(1, self.v.ndim))
        return self.g * self.v / torch.linalg.vector_norm(self.v, dim=axes, keepdim=True)

    def product(self, z: Tensor, W: Tensor) -> Tensor:
        return F.linear(z, W) if W.ndim == 2 else F.conv2d(z, W, padding=1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.activation(self.product(z, self.weight()) + x)


def fixed_point_iteration(f, z: Tensor, tol: float = 1e-4, max_iter: int = 200):
    """z ← f(z) until the relative residual is below ``tol``: the result and the count."""
    iterations, residual = 0, float("inf")
    while residual >= tol and iterations < max_iter:
        z_new = f(z)
        residual = (z_new - z).norm().item() / (1e-5 + z_new.norm().item())
        z, iterations = z_new, iterations + 1
    return z, iterations


class TextbookBlock(nn.Module):
    """Injection, fixed point, and the implicit gradient by a hook that calls autograd."""

    def __init__(self, block: nn.Module):
        super().__init__()
        W = block.deq.f.W
        self.f = TextbookLayer(W.weight_v, W.weight_g, block.activation.name)
        self.variant = block.activation.variant
        self.iter_forward = self.iter_backward = 0

    def inject(self, h: Tensor) -> Tensor:
        return F.softplus(h, beta=5) if self.variant == 1 else F.relu(h)

    def forward(self, h: Tensor) -> Tensor:
        x = self.inject(h)
        with torch.no_grad():
            z, self.iter_forward = fixed_point_iteration(
                lambda z: self.f(z, x), torch.zeros_like(x)
            )
        z = self.f(z, x)
        if not torch.is_grad_enabled():
            return z
        z0 = z.detach().requires_grad_()
        f0 = self.f(z0, x.detach())

        def adjoint(grad: Tensor) -> Tensor:
            g, self.iter_backward = fixed_point_iteration(
                lambda g: torch.autograd.grad(f0, z0, g, retain_graph=True)[0] + grad, grad
            )
            return g

        z.register_hook(adjoint)
        return z

    @torch.no_grad()
    def clamp(self) -> None:
        self.f.v.clamp_(min=0)
        self.f.g.clamp_(min=0)


class TorchdeqBlock(TextbookBlock):
    """The same block with torchdeq's solver and gradient; W is formed once a solve.

    Args:
        block: the pcDEQ block whose parameters it takes over.
        solver: ``"fixed_point_iter"`` or ``"anderson"``.
    """

    def __init__(self, block: nn.Module, solver: str):
        from torchdeq import get_deq

        super().__init__(block)
        rule = {"tol": 1e-4, "max_iter": 200, "solver": solver, "stop_mode": "rel"}
        options = {f"{way}_{key}": value for way in "fb" for key, value in rule.items()}
        self.deq = get_deq(ift=True, **options)

    def forward(self, h: Tensor) -> Tensor:
        x, W = self.inject(h), self.f.weight()
        z, info = self.deq(
            lambda z: self.f.activation(self.f.product(z, W) + x), torch.zeros_like(x)
        )
        self.iter_forward = int(info["nstep"].max())
        return z[-1]


class Textbook(nn.Sequential):
    """Layers and textbook blocks, one after the other."""

    def clamp(self) -> None:
        for layer in self:
            if isinstance(layer, TextbookBlock):
                layer.clamp()


def torchs_own(layer: nn.Module) -> nn.Module:
    """A copy of a layer, as torch has it where this project has a faster one."""
    if isinstance(layer, nn.Flatten):
        return nn.Flatten()
    if isinstance(layer, nn.BatchNorm2d):
        plain = nn.BatchNorm2d(layer.num_features, device=layer.weight.device)
        plain.load_state_dict(layer.state_dict())
        return plain
    return copy.deepcopy(layer)


def textbook(network: Network, block_of=TextbookBlock) -> Textbook:
    """A copy of ``network`` with the same weights, textbook blocks and the default layout."""
    layers = {
        name: block_of(layer) if hasattr(layer, "deq") else torchs_own(layer)
        for name, layer in network.named_children()
    }
    model = Textbook()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.to(memory_format=torch.contiguous_format)
