"""The equilibrium as a module: z* = f(z*, x) forward, the implicit function theorem backward.

To autograd a solve is one node, (x, W) ↦ z*. Forward, a solver finds z* without recording a graph.
Backward, the same solver turns ∂L/∂z* into the solution g of the adjoint equation
g = Jᵀg + ∂L/∂z*, J = ∂f/∂z at z*, and the evaluation z* = f(z*, x) hands g on to x and W (Bai,
Kolter, Koltun, NeurIPS 2019). Memory is z* and the block's input, whatever the iterations.

At the fixed point σ'(Wz* + x) is known from z* = σ(Wz* + x) itself: nothing evaluates the layer
again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from numbers import Real

import torch
from torch import Tensor, nn

from pcdeq.checks import check_count
from pcdeq.layers import ConcaveLayer
from pcdeq.refinement import LOW, Linearised, refine
from pcdeq.solvers import SOLVERS, Solve

PRECISIONS = ("fp32", "mixed", "bf16")
OPTIONS = ("solver", "precision", "tol", "max_iter")


class Equilibrium(nn.Module):
    """x ↦ z*, the fixed point of f(·, x).

    Args:
        f: the positive concave layer.
        solver: ``"picard"`` or ``"anderson"``, for the forward and the adjoint equation.
        precision: of the solves. ``"fp32"``: the parameters' own. ``"mixed"``: bfloat16, refined
            until the rule holds in the parameters' precision. ``"bf16"``: bfloat16; the result is
            in the parameters' precision. A float64 model computes in float64 whatever is said here.
        tol: relative tolerance of the stopping rule; at least the unit roundoff of the precision
            in which it is to hold counts (2⁻⁸ in bfloat16).
        max_iter: largest number of evaluations of one solve.

    Attributes:
        forward_solve: figures of the last forward solve, or ``None``: ``iterations``, ``full``
            (those of them in the parameters' precision), ``residual``, ``converged``.
        backward_solve: the same of the last adjoint solve.

    Raises:
        ValueError: an option is none of the above, now or where it is set later.
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
        self.f = f
        self.solver = solver
        self.precision = precision
        self.tol = tol
        self.max_iter = max_iter
        self.forward_solve: Solve | None = None
        self.backward_solve: Solve | None = None

    def __setattr__(self, name: str, value: object) -> None:
        if name in OPTIONS:
            _check_option(name, value)
        super().__setattr__(name, value)

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
        """Of the layer's parameters, and of z* as it leaves."""
        return self.f.W.weight_v.dtype

    @property
    def uses_low(self) -> bool:
        """Whether solves use bfloat16."""
        return self.precision != "fp32" and self.dtype == torch.float32

    @property
    def only_low(self) -> bool:
        """Whether solves use bfloat16 alone: nothing is refined in the parameters' precision."""
        return self.precision == "bf16" and self.uses_low

    @property
    def tolerance(self) -> float:
        """Where the stopping rule ends a solve: at ``tol``, or the unit roundoff of its dtype.

        Iterates in that dtype may never come closer to each other.
        """
        return max(self.tol, torch.finfo(LOW if self.only_low else self.dtype).eps / 2)

    def extra_repr(self) -> str:
        return (
            f"solver={self.solver}, precision={self.precision}, "
            f"tol={self.tol:g}, max_iter={self.max_iter}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """z* for an injected x ≥ 0 of shape (B, …); same shape, in the parameters' dtype."""
        if torch.compiler.is_compiling():  # it would unroll the loops, anew for every residual
            return torch.compiler.disable(self._solved)(x)
        return self._solved(x)

    def _solved(self, x: Tensor) -> Tensor:
        weight = self.f.W.weight()  # W, once for the whole solve
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _FixedPoint.apply(x, weight, self)
        with torch.no_grad():
            return self._solve_forward(x, weight).to(weight.dtype)

    def _solve_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """z = σ(Wz + x), from z = 0."""
        derivative = self.f.activation.derivative

        def iteration(dtype: torch.dtype) -> Linearised:
            W, b = weight.to(dtype), x.to(dtype)
            return Linearised(self.f.at(b, W), lambda fz, r: self.f.tangent(derivative(fz), r, W))

        with _no_autocast(x):
            z, self.forward_solve = self._solve(iteration, None, nonnegative=True)
        return z

    def _solve_adjoint(self, z: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """g = Jᵀg + ∂L/∂z*, from g = ∂L/∂z*; Jᵀg = Wᵀ(σ'∘g)."""
        derivative, transposed = self.f.activation.derivative, self.f.W.transpose(weight)

        def iteration(dtype: torch.dtype) -> Linearised:
            Wt, b, slope = transposed.to(dtype), grad.to(dtype), derivative(z).to(dtype)
            return Linearised(
                self.f.adjoint(slope, b, Wt), lambda _, r: self.f.adjoint(slope, r, Wt)
            )

        with _no_autocast(z):
            g, self.backward_solve = self._solve(iteration, grad, nonnegative=False)
        return g

    def _solve(
        self,
        iteration: Callable[[torch.dtype], Linearised],
        start: Tensor | None,
        *,
        nonnegative: bool,
    ) -> tuple[Tensor, Solve]:
        """One solve in the precision asked for: the solution in it, and its figures."""
        solver, dtype = SOLVERS[self.solver], self.dtype
        rule = {"tol": self.tolerance, "max_iter": self.max_iter, "nonnegative": nonnegative}
        if not self.uses_low:
            solve = solver(iteration(dtype).f, start, **rule)
        elif not self.only_low:
            solve = refine(iteration, start, solver=solver, dtype=dtype, **rule)
        else:
            start = None if start is None else start.to(LOW)
            solve = solver(iteration(LOW).f, start, **rule)._replace(full=0)
        return solve.z, solve._replace(z=None)


def _check_option(name: str, value: object) -> None:
    choices = {"solver": SOLVERS, "precision": PRECISIONS}.get(name)
    if choices and value not in tuple(choices):
        raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")
    # At 1 the first evaluation, whatever it is, would be the last.
    if name == "tol" and not (isinstance(value, Real) and 0 < value < 1):
        raise ValueError(f"tol must be a number between 0 and 1, not {value!r}")
    if name == "max_iter":
        check_count(name, value)


class _FixedPoint(torch.autograd.Function):
    """(x, W) ↦ z*, with the gradient of the implicit function theorem.

    With the adjoint solution g and y = σ'∘g: ∂x = y, ∂W = ∂⟨y, Wz*⟩/∂W.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, equilibrium: Equilibrium) -> Tensor:
        z = equilibrium._solve_forward(x, weight)
        ctx.save_for_backward(z, weight)
        ctx.equilibrium = equilibrium
        return z.to(weight.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a pcDEQ block is differentiable once: create_graph=True is not supported"
            )
        (z, weight), equilibrium = ctx.saved_tensors, ctx.equilibrium
        g = equilibrium._solve_adjoint(z, weight, grad)
        z = z.to(g.dtype)  # no other, unless the precision has been changed since
        y, dW = equilibrium.f.activation.vjp(g, z), None
        if ctx.needs_input_grad[1]:
            with _no_autocast(z):
                dW = equilibrium.f.W.weight_gradient(z, y).to(weight.dtype)
        return y.to(weight.dtype), dW, None


def _no_autocast(t: Tensor) -> AbstractContextManager:
    """Keeps an autocast that the caller is in from changing the precision of a solve."""
    device = t.device.type
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
