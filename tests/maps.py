"""A map whose fixed point is known."""

import torch
from torch import Tensor


class Map:
    """z ↦ min(Az + b, 6), which writes down what it was called with."""

    def __init__(self, A: Tensor, b: Tensor):
        self.A, self.b = A, b
        self.calls = 0
        self.least = 0.0  # entry of any argument
        self.starts_at_none = False

    def __call__(self, z: Tensor | None) -> Tensor:
        self.calls += 1
        if z is None:
            self.starts_at_none = True
            return self.b.clamp(max=6)
        self.least = min(self.least, z.min().item())
        return (z @ self.A.T + self.b).clamp(max=6)

    def to(self, dtype: torch.dtype) -> "Map":
        return Map(self.A.to(dtype), self.b.to(dtype))

    def tangent(self, fz: Tensor, r: Tensor):
        slope = (fz < 6).to(fz.dtype)
        return lambda v: slope * (v @ self.A.T) + r

    def solution(self) -> Tensor:
        eye = torch.eye(len(self.A), dtype=torch.float64)
        return torch.linalg.solve(eye - self.A.double(), self.b.double().T).T


def slow(rho: float, batch: int = 4, n: int = 7, dtype: torch.dtype = torch.float64) -> Map:
    A = torch.rand(n, n, dtype=torch.float64)
    A *= rho / torch.linalg.eigvals(A).abs().max()
    return Map(A.to(dtype), (0.05 + 0.05 * torch.rand(batch, n)).to(dtype))
