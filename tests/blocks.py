"""Blocks, signals and reference solutions that the tests of the equilibrium share.

Weights are given a chosen Perron root ρ(W), up to 0.95, so that solves take many iterations:
freshly initialised ones are solved after a few, whatever is wrong with them.
"""

import copy
import threading

import pytest
import torch
from torch import Tensor

from pcdeq.activations import ACTIVATIONS
from pcdeq.block import PcDEQ, PcDEQConv2d, PcDEQLinear
from pcdeq.implicit import PRECISIONS
from pcdeq.solvers import SOLVERS

KINDS = {"linear": PcDEQLinear, "conv": PcDEQConv2d}
SHAPES = {"linear": (3, 5), "conv": (2, 5, 4, 3)}
both = pytest.mark.parametrize("kind", KINDS)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_device = pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())


def make(kind: str, activation: str = "tanh", *, root: float = 0.9, n: int = 5, **options) -> PcDEQ:
    """A block of n features whose W has the Perron root ``root``, in float32."""
    block = KINDS[kind](n, activation=activation, **options)
    W = block.deq.f.W
    with torch.no_grad():
        W.weight_v.uniform_(0, 1)
        W.weight_g.uniform_(0.5, 1)
        z = torch.ones(1, n, *SHAPES[kind][2:], dtype=torch.float64)
        for _ in range(200):  # power iteration
            z = W.apply(z / z.norm(), W.weight().double())
        W.weight_g.mul_(root / z.norm().item())
    return block


def signal(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """An h whose equilibria are small, where σ' ≈ 1 and iterations are slow."""
    return (0.3 * torch.randn(SHAPES[kind]) - 0.5).to(dtype)


def run(block: PcDEQ, h: Tensor, probe: Tensor) -> tuple[Tensor, list[Tensor]]:
    """z*, and the gradients of ⟨probe, z*⟩ in h and the parameters."""
    h = h.clone().requires_grad_()
    z = block(h)
    gradients = torch.autograd.grad((z * probe).sum(), [h, *block.parameters()])
    return z.detach(), list(gradients)


def in_threads(work, arguments) -> None:
    """Calls ``work(*each)`` for each of the arguments, all at once."""
    threads = [threading.Thread(target=work, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def exact(block: PcDEQ, h: Tensor, probe: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The same by a float64 solve on the CPU at a tolerance of 1e-13."""
    block = copy.deepcopy(block).double().cpu()
    block.deq.solver, block.deq.precision = "picard", "fp32"
    block.deq.tol, block.deq.max_iter = 1e-13, 5000
    return run(block, h.double(), probe.double())


def distance(value: Tensor, reference: Tensor) -> float:
    return ((value.double().cpu() - reference).norm() / reference.norm()).item()
