"""The equilibrium as a module: z* = f(z*, x) forward, the implicit function theorem backward.

Forward, a solver finds z* without recording a graph. One recorded node then stands for the last
evaluation of f at z*, and a hook on its output turns ∂L/∂z* into the solution g of the adjoint
equation g = Jᵀg + ∂L/∂z*, J = ∂f/∂z at z*, before the node hands g on to x and W (Bai, Kolter,
Koltun, NeurIPS 2019). Memory is z* and the block's input, whatever the iterations.

At the fixed point σ'(Wz* + x) is known from z* = σ(Wz* + x) itself: neither the node nor the
hook evaluates the layer again.
"""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pcdeq.activations import Activation, get_activation
from pcdeq.injections import INJECTIONS
from pcdeq.layers import ConcaveLayer, Nonnegative, NonnegativeConv2d, NonnegativeLinear
from pcdeq.refinement import BF16_TOL, LOW, Linearised, refine
from pcdeq.solvers import SOLVERS, Solve

PRECISIONS = ("fp32", "mixed", "bf16")


class Equilibrium(nn.Module):
    """x ↦ z*, the fixed point of f(·, x).

    Args:
        f: the positive concave layer.
        solver: ``"picard"`` or ``"anderson"``, for the forward and the adjoint equation.
        precision: of the solves. ``"fp32"``: the parameters' own. ``"mixed"``: bfloat16, refined
            until the rule holds in the parameters' precision. ``"bf16"``: bfloat16, to a tolerance
            of 2⁻⁸ or ``tol``, whichever is larger; the result is in the parameters' precision.
            A float64 model computes in float64 whatever is said here.
        tol: relative tolerance of the stopping rule.
        max_iter: largest number of evaluations of one solve.

    Attributes:
        forward_solve: figures of the last forward solve (``Solve`` with ``z=None``), or ``None``.
        backward_solve: the same of the last adjoint solve.

    Raises:
        ValueError: an option is none of the above.
    """

    def __init__(
        self,
        f: ConcaveLayer,
        solver: str = "picard",
        precision: str = "fp32",
        tol: float = 1e-4,
        max_iter: int = 200,
    ):
        super().__init__()
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}: choose from {', '.join(SOLVERS)}")
        if precision not in PRECISIONS:
            raise ValueError(
                f"unknown precision {precision!r}: choose from {', '.join(PRECISIONS)}"
            )
        if not 0 < tol < 1:  # at 1 the first evaluation, whatever it is, would be the last
            raise ValueError(f"tol must be between 0 and 1, not {tol}")
        if max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, not {max_iter}")
        self.f = f
        self.solver = solver
        self.precision = precision
        self.tol = tol
        self.max_iter = max_iter
        self.forward_solve: Solve | None = None
        self.backward_solve: Solve | None = None

    @property
    def iter_forward(self) -> int:
        """Evaluations of f in the last forward solve (0 before the first)."""
        return self.forward_solve.iterations if self.forward_solve else 0

    @property
    def iter_backward(self) -> int:
        """Jacobian products in the last adjoint solve (0 before the first)."""
        return self.backward_solve.iterations if self.backward_solve else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's parameters, and of z*."""
        return self.f.W.weight_v.dtype

    @property
    def low_precision(self) -> bool:
        """Whether solves use bfloat16."""
        return self.precision != "fp32" and self.dtype == torch.float32

    @property
    def only_low(self) -> bool:
        """Whether they, the gradient of W and the convolutions in between use nothing else."""
        return self.precision == "bf16" and self.low_precision

    @property
    def tolerance(self) -> float:
        """Where the stopping rule ends a solve."""
        return max(self.tol, BF16_TOL) if self.only_low else self.tol

    def extra_repr(self) -> str:
        return (
            f"solver={self.solver}, precision={self.precision}, "
            f"tol={self.tol:g}, max_iter={self.max_iter}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """z* for an injected x ≥ 0 of shape (B, …); same shape and dtype."""
        weight = self.f.W.weight()  # W, once for the whole solve
        with torch.no_grad(), _no_autocast(x):
            z = self._solve_forward(x, weight)
        if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            return z
        z_star = _AtEquilibrium.apply(z, x, weight, self)
        # The hook holds z, not z_star: a hook that holds its own tensor is a reference cycle.
        z_star.register_hook(functools.partial(self._solve_adjoint, z, weight.detach()))
        return z_star.view_as(z_star)  # whose gradient, where someone looks at it, is ∂L/∂z*

    def _solve_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """z = σ(Wz + x), from z = 0."""

        derivative = self.f.activation.derivative

        def iteration(dtype: torch.dtype) -> Linearised:
            W, b = weight.to(dtype), x.to(dtype)
            return Linearised(self.f.at(b, W), lambda fz, r: self.f.tangent(derivative(fz), r, W))

        z, self.forward_solve = self._solve(iteration, None, nonnegative=True)
        return z

    def _solve_adjoint(self, z: Tensor, weight: Tensor, grad: Tensor | None) -> Tensor | None:
        """g = Jᵀg + ∂L/∂z*, from g = ∂L/∂z*; Jᵀg = Wᵀ(σ'∘g)."""
        if grad is None:  # as autograd says that L does not depend on z*
            return None
        if torch.is_grad_enabled():  # autograd would drop what runs through here without a word
            raise RuntimeError(
                "a pcDEQ block is differentiable once: create_graph=True is not supported"
            )
        derivative = self.f.activation.derivative

        def iteration(dtype: torch.dtype) -> Linearised:
            Wt, b, slope = transposed.to(dtype), grad.to(dtype), derivative(z).to(dtype)
            return Linearised(
                self.f.adjoint(slope, b, Wt), lambda _, r: self.f.adjoint(slope, r, Wt)
            )

        with torch.no_grad(), _no_autocast(z):
            transposed = self.f.W.transpose(weight)
            g, self.backward_solve = self._solve(iteration, grad, nonnegative=False)
        return g

    def _solve(self, iteration, start, *, nonnegative: bool):
        """One solve in the precision asked for: the solution in ``dtype``, and its figures."""
        solver, dtype = SOLVERS[self.solver], self.dtype
        rule = {"tol": self.tolerance, "max_iter": self.max_iter, "nonnegative": nonnegative}
        if not self.low_precision:
            solve = solver(iteration(dtype).f, start, **rule)
        elif not self.only_low:
            solve = refine(iteration, start, solver=solver, dtype=dtype, **rule)
        else:
            start = None if start is None else start.to(LOW)
            solve = solver(iteration(LOW).f, start, **rule)._replace(full=0)
        return solve.z.to(dtype), solve._replace(z=None)


class _AtEquilibrium(torch.autograd.Function):
    """The recorded evaluation z* = σ(Wz* + x), as a function of x and W; its value is known.

    Backward, with y = σ'∘g for the g that the hook has solved for: ∂x = y, ∂W = ∂⟨y, Wz*⟩/∂W.
    """

    @staticmethod
    def forward(ctx, z: Tensor, x: Tensor, weight: Tensor, equilibrium: Equilibrium) -> Tensor:
        ctx.save_for_backward(z)
        ctx.equilibrium = equilibrium
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[None, Tensor, Tensor | None, None]:
        (z,) = ctx.saved_tensors
        equilibrium = ctx.equilibrium
        y = equilibrium.f.activation.vjp(g, z)
        if not ctx.needs_input_grad[2]:
            return None, y, None, None
        dtype = LOW if equilibrium.only_low else z.dtype
        with _no_autocast(z):
            dW = equilibrium.f.W.weight_gradient(z.to(dtype), y.to(dtype)).to(z.dtype)
        return None, y, dW, None


class PcDEQ(nn.Module):
    """A pcDEQ layer: injection and equilibrium, h ↦ z* = σ(Wz* + x), x = inject(h).

    The variant follows from the activation: tanh, softsign and relu6 make
    pcDEQ-1, whose x = softplus(h), beta 5, is strictly positive; sigmoid makes pcDEQ-2, whose
    x = relu(h) is nonnegative. It computes in its parameters' precision, whatever comes in, also
    under ``torch.autocast``.

    After each optimizer step, call ``project`` (or ``register_projection`` once).

    Attributes:
        activation: σ.
        deq: the ``Equilibrium``, with the figures of its last solves.
    """

    def __init__(self, W: NonnegativeLinear | NonnegativeConv2d, activation: str, **options):
        super().__init__()
        self.deq = Equilibrium(ConcaveLayer(W, get_activation(activation)), **options)

    @property
    def activation(self) -> Activation:
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

    Args:
        features: length of the last axis of input and output.
        activation: ``"tanh"``, ``"softsign"``, ``"relu6"`` (pcDEQ-1) or ``"sigmoid"`` (pcDEQ-2).
        options: ``solver``, ``precision``, ``tol``, ``max_iter`` of ``Equilibrium``.
    """

    def __init__(self, features: int, *, activation: str = "tanh", **options):
        super().__init__(NonnegativeLinear(features), activation, **options)

    def forward(self, h: Tensor) -> Tensor:
        """z* of the shape of h; the axes before the last one are one batch to the stopping rule.

        Raises:
            ValueError: the last axis is not as long as the layer is wide.
        """
        features = len(self.deq.f.W.weight_v)
        if h.ndim == 0 or h.shape[-1] != features:
            raise ValueError(f"vectors must be of shape (…, {features}), not {(*h.shape,)}")
        if h.ndim == 2:
            return super().forward(h)
        return super().forward(h.reshape(-1, h.shape[-1])).view(h.shape)


class PcDEQConv2d(PcDEQ):
    """pcDEQ layer on images: h of shape (B, channels, H, W), W a 3×3 convolution with padding 1.

    Args:
        channels: of input and output.
        activation: as for ``PcDEQLinear``.
        options: ``solver``, ``precision``, ``tol``, ``max_iter`` of ``Equilibrium``.
    """

    def __init__(self, channels: int, *, activation: str = "tanh", **options):
        super().__init__(NonnegativeConv2d(channels), activation, **options)

    def forward(self, h: Tensor) -> Tensor:
        """z* of the shape of h, in channels_last.

        Raises:
            ValueError: h is no batch of images with so many channels.
        """
        channels = len(self.deq.f.W.weight_v)
        if h.ndim != 4 or h.shape[1] != channels:
            raise ValueError(f"images must be of shape (B, {channels}, H, W), not {(*h.shape,)}")
        return super().forward(h.contiguous(memory_format=torch.channels_last))


def project(model: nn.Module) -> None:
    """Projects every pcDEQ weight in ``model`` onto the nonnegative orthant, in place."""
    for module in model.modules():
        if isinstance(module, Nonnegative):
            module.clamp()


def register_projection(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> torch.utils.hooks.RemovableHandle:
    """Makes ``project(model)`` follow every ``optimizer.step()``; returns the removable handle.

    Raises:
        ValueError: there is no pcDEQ weight in ``model``, or the optimizer steps none of them.
    """
    layers = [module for module in model.modules() if isinstance(module, Nonnegative)]
    if not layers:
        raise ValueError("the model has no pcDEQ layer: there is nothing to project")
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if stepped.isdisjoint(id(p) for layer in layers for p in layer.parameters()):
        raise ValueError("the optimizer steps no pcDEQ weight of this model: it is for another one")
    return optimizer.register_step_post_hook(lambda *_: project(model))


def _no_autocast(t: Tensor) -> AbstractContextManager:
    """Keeps an autocast that the caller is in from changing the precision of a solve."""
    device = t.device.type
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
