"""What certificates are tested against: 40-digit arithmetic, dense matrices, trained networks."""

import copy
import functools

import mpmath
import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from pcdeq import ACTIVATIONS, PcDEQConv2d, PcDEQLinear, build_network
from pcdeq.experiments import data

mpmath.mp.dps = 40
SIGMA = {
    "tanh": mpmath.tanh,
    "softsign": lambda s: s / (1 + s),
    "relu6": lambda s: min(s, mpmath.mpf(6)),
    "sigmoid": lambda s: 1 / (1 + mpmath.exp(-s)),
}
# The derivative from the left and from the right, which differ at relu6's kink.
SLOPE = {
    "tanh": lambda s, left: mpmath.sech(s) ** 2,
    "softsign": lambda s, left: 1 / (1 + s) ** 2,
    "relu6": lambda s, left: mpmath.mpf(s < 6 or (left and s == 6)),
    "sigmoid": lambda s, left: 1 / (2 + mpmath.exp(s) + mpmath.exp(-s)),
}


def block_of(W: torch.Tensor, activation: str, dtype=torch.float32):
    """A pcDEQ block with this W, exactly (rows in weight normalisation with g = ‖v‖)."""
    kind = PcDEQLinear if W.dim() == 2 else PcDEQConv2d
    block = kind(len(W), activation=activation).to(dtype)
    with torch.no_grad():
        block.deq.f.W.weight_v.copy_(W)
        norms = block.deq.f.W.weight_v.flatten(1).norm(dim=1)
        block.deq.f.W.weight_g.copy_(norms.view_as(block.deq.f.W.weight_g))
    return block


def exact(values: torch.Tensor) -> mpmath.matrix:
    """The floats of a vector or a matrix, exactly."""
    rows = values.detach().double().tolist()
    return mpmath.matrix(rows)


def apply_exactly(block, z: mpmath.matrix, x: mpmath.matrix) -> mpmath.matrix:
    """f(z) in 40 digits."""
    return (exact(block.deq.f.W.weight()) * z + x).apply(SIGMA[block.activation.name])


def jacobian_exactly(block, z: mpmath.matrix, x: mpmath.matrix, left: bool) -> mpmath.matrix:
    """J(z) = diag(σ'(Wz + x))·W in 40 digits."""
    W = exact(block.deq.f.W.weight())
    slopes = (W * z + x).apply(lambda s: SLOPE[block.activation.name](s, left))
    return mpmath.diag(list(slopes)) * W


def fixed_point_exactly(block, x: mpmath.matrix) -> mpmath.matrix:
    """z* in 40 digits by Newton's method from M, which decreases to it since f is concave."""
    n = len(x)
    z = mpmath.matrix([mpmath.mpf(block.activation.supremum)] * n)
    for _ in range(400):
        J = jacobian_exactly(block, z, x, left=False)
        new = z - mpmath.lu_solve(mpmath.eye(n) - J, z - apply_exactly(block, z, x))
        done = max(abs(a - b) for a, b in zip(new, z, strict=True)) < mpmath.mpf(10) ** -36
        z = new
        if done:
            return z
    raise ArithmeticError("Newton's method did not converge")


def radius_exactly(J: mpmath.matrix) -> mpmath.mpf:
    """The spectral radius."""
    values = mpmath.eig(J, right=False) if J.rows > 1 else [J[0, 0]]
    return max(abs(value) for value in values)


def spectral_radius(J: torch.Tensor) -> float:
    return float(np.abs(np.linalg.eigvals(J.double().numpy())).max())


def dense(block, height: int, width: int) -> torch.Tensor:
    """A block's convolution as a matrix, float64, entry by entry from its definition."""
    kernel = block.deq.f.W.weight().detach().double()  # (c, c, 3, 3)
    c = len(kernel)
    matrix = torch.zeros(c, height, width, c, height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            for a in range(3):
                for b in range(3):
                    p, q = i + a - 1, j + b - 1
                    if 0 <= p < height and 0 <= q < width:
                        matrix[:, i, j, :, p, q] = kernel[:, :, a, b]
    return matrix.view(c * height * width, c * height * width)


@functools.cache
def digits():
    """The shipped digits: images in [0, 1], float32 (N, 1, 28, 28), labels; training, then test."""
    train, test, _ = data.load("mnist", sample=True)
    return *train.batch(slice(None)), *test.batch(slice(None))


@functools.cache
def trained(name: str, activation: str, steps: int = 250):
    """A network after some steps on the shipped digits, in evaluation mode. Shared: copy it."""
    torch.manual_seed(0)
    model = build_network(name, activation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1.5e-2)
    images, labels, *_ = digits()
    for _ in range(steps):
        batch = torch.randint(len(images), (32,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp()
    return model.eval()


def injected(model, images: torch.Tensor) -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """Every block with the x that reaches it."""
    seen = []
    hooks = [
        b.deq.register_forward_pre_hook(lambda _, args, b=b: seen.append((b, args[0])))
        for b in model.blocks
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


def random_weight(n: int, radius: float, density: float, seed: int) -> torch.Tensor:
    """Nonnegative n × n, float32, of this spectral radius as far as it has one; often reducible."""
    random = np.random.default_rng(seed)
    W = random.random((n, n)) ** 3 * (random.random((n, n)) < density)
    own = np.abs(np.linalg.eigvals(W)).max()
    if own > 1e-3:
        W *= radius / own
    return torch.tensor(W, dtype=torch.float32)


def is_below(a: mpmath.matrix, b: mpmath.matrix) -> bool:
    return all(p <= q for p, q in zip(a, b, strict=True))


@st.composite
def weights_and_inputs(draw, most: int):
    """σ, W ≥ 0 with up to ``most`` rows and spectral radius up to 50, x from 1e-8 to 1e3."""
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    n = draw(st.integers(1, most))
    radius = draw(st.one_of(st.floats(0, 2), st.floats(0, 50)))
    density = draw(st.sampled_from([0.2, 0.6, 1.0]))
    W = random_weight(n, radius, density, draw(st.integers(0, 2**16)))
    exponents = draw(st.lists(st.floats(-8, 3), min_size=n, max_size=n))
    return activation, W, 10 ** torch.tensor(exponents, dtype=torch.float64)


def network(name, activation, *, double=False):
    """A copy of a trained network."""
    model = copy.deepcopy(trained(name, activation, 12 if "conv" in name else 250))
    if double:  # solved far beyond the tolerance of the comparison
        model = model.double()
        for block in model.blocks:
            block.deq.tol, block.deq.max_iter = 1e-14, 5000
    return model


def around(images, radius):
    """The corners of boxes of that radius, in float64."""
    images = images.double()
    return (images - radius).clamp(0, 1), (images + radius).clamp(0, 1)


def few(count: int) -> data.ImageSet:
    """The first shipped test digits, as a set."""
    return data.load("mnist", sample=True)[1].some(count)
