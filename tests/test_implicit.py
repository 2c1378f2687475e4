"""The equilibrium as a module: its value, its gradient, its options, training and memory."""

import contextlib
import copy
import gc
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
import torch.nn.functional as F
from blocks import (
    KINDS,
    SHAPES,
    both,
    distance,
    every_activation,
    every_precision,
    every_solver,
    exact,
    make,
    run,
    signal,
)
from torch import Tensor, nn

from pcdeq.activations import ACTIVATIONS
from pcdeq.implicit import (
    PRECISIONS,
    PcDEQ,
    PcDEQLinear,
    project,
    register_projection,
)
from pcdeq.solvers import SOLVERS

# The value


@both
@every_activation
def test_output_is_a_fixed_point(kind, activation):
    block = make(kind, activation, tol=1e-12, max_iter=2000).double()
    h = signal(kind, torch.float64)
    z = block(h)
    torch.testing.assert_close(block.deq.f(z, block.inject(h)), z, rtol=1e-10, atol=1e-12)
    assert (z > 0).all() and (z <= block.activation.supremum).all()


@both
@every_activation
@every_solver
def test_the_fixed_point_is_unique(kind, activation, solver):
    """Several random nonnegative starts, one limit: the theorem, through the public solvers."""
    block = make(kind, activation).double()
    x = block.inject(signal(kind, torch.float64))
    weight = block.deq.f.W.weight().detach()
    reference = block.deq.f(iterate(block, x), x)
    for scale in (0, 0.01, 1, 30, 1000):
        start = scale * torch.rand_like(x)
        solve = SOLVERS[solver](
            lambda z: block.deq.f.evaluate(z, x, weight), start, tol=1e-12, max_iter=2000
        )
        torch.testing.assert_close(solve.z, reference, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def iterate(block: PcDEQ, x: Tensor) -> Tensor:
    """Plain iteration from zero, far beyond convergence."""
    z = torch.zeros_like(x)
    for _ in range(1500):
        z = block.deq.f(z, x)
    return z


def test_injection_of_each_variant():
    h = torch.linspace(-4, 4, 101)
    for name, activation in ACTIVATIONS.items():
        block = PcDEQLinear(3, activation=name)
        expected = F.relu(h) if activation.variant == 2 else torch.log1p(torch.exp(5 * h)) / 5
        torch.testing.assert_close(block.inject(h), expected, rtol=1e-4, atol=1e-7)
        assert block.activation is activation


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fill", [-1e30, -1e3, 1e30])
def test_extreme_inputs_give_finite_results(precision, fill):
    for name, activation in ACTIVATIONS.items():
        block = make("linear", name, precision=precision)
        h = torch.full((3, 5), fill, requires_grad=True)
        z = block(h)
        z.sum().backward()
        assert z.isfinite().all() and (z <= activation.supremum).all()
        assert h.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5)])
def test_linear_block_takes_any_number_of_leading_axes(shape):
    block = make("linear")
    h = torch.randn(shape, requires_grad=True)
    z = block(h)
    z.sum().backward()
    assert z.shape == h.grad.shape == shape
    with torch.no_grad():
        torch.testing.assert_close(z, block(h.reshape(-1, 5)).reshape(shape))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_block_takes_either_memory_layout(layout):
    block = make("conv")
    h = signal("conv")
    reference, gradients = run(block, h, torch.ones_like(h))
    z, again = run(block, h.contiguous(memory_format=layout), torch.ones_like(h))
    assert z.is_contiguous(memory_format=torch.channels_last)  # the fast one, out of either
    torch.testing.assert_close(z, reference)
    torch.testing.assert_close(again, gradients)


# The gradient


def whole_layer(block: PcDEQ):
    """The block as a function of its input and its parameters, and the parameters."""
    names, parameters = zip(*block.named_parameters(), strict=True)

    def layer(h, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (h,))

    return layer, parameters


@both
@every_activation
def test_gradcheck(kind, activation):
    block = make(kind, activation, root=0.5, n=3, tol=1e-14, max_iter=500).double()
    h = signal(kind, torch.float64)[:2, :3].requires_grad_()
    layer, parameters = whole_layer(block)
    assert torch.autograd.gradcheck(layer, (h, *parameters))


def test_gradcheck_with_anderson():
    block = make("linear", n=3, root=0.8, solver="anderson", tol=1e-14, max_iter=500).double()
    h = signal("linear", torch.float64)[:2, :3].requires_grad_()
    layer, parameters = whole_layer(block)
    assert torch.autograd.gradcheck(layer, (h, *parameters))


def test_gradcheck_where_relu6_saturates():
    """Some features at 6, some in between, none near the kink."""
    block = make("linear", "relu6", root=0.8, tol=1e-14, max_iter=500).double()
    h = torch.tensor([[9.0, 0.1, 0.2, 8.0, -1.0], [0.1, 0.2, 0.3, 0.1, 0.2]]).double()
    z = block(h)
    assert 0 < (z == 6).sum() < z.numel() and (z - 6).abs()[z != 6].min() > 0.01
    layer, parameters = whole_layer(block)
    assert torch.autograd.gradcheck(layer, (h.requires_grad_(), *parameters))


@both
@every_activation
def test_gradient_is_that_of_backpropagation_through_the_iteration(kind, activation):
    block = make(kind, activation, root=0.8, tol=1e-13, max_iter=1000).double()
    h = signal(kind, torch.float64)
    probe = torch.randn_like(h)
    z, gradients = run(block, h, probe)
    h.requires_grad_()
    x = block.inject(h)
    unrolled = torch.zeros_like(x)
    for _ in range(150):
        unrolled = block.deq.f(unrolled, x)
    torch.testing.assert_close(z, unrolled.detach(), rtol=1e-10, atol=1e-12)
    reference = torch.autograd.grad((unrolled * probe).sum(), [h, *block.parameters()])
    torch.testing.assert_close(gradients, list(reference), rtol=1e-9, atol=1e-11)


@both
@every_precision
def test_a_row_of_zeros_in_v_gives_finite_outputs_and_gradients(kind, precision):
    block = make(kind, precision=precision)
    with torch.no_grad():
        block.deq.f.W.weight_v[1] = 0
    z, gradients = run(block, signal(kind), torch.ones(SHAPES[kind]))
    assert z.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0].abs().sum() > 0


@both
def test_only_what_needs_a_gradient_gets_one(kind):
    block = make(kind)
    h = signal(kind)
    block(h).sum().backward()  # a first layer: h needs none
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())
    frozen = copy.deepcopy(block).requires_grad_(False)
    h.requires_grad_()
    frozen(h).sum().backward()
    assert h.grad.abs().sum() > 0 and all(p.grad is not None for p in block.parameters())


# Solvers and precisions, against a float64 solve


TOLERANCE = {"fp32": 1e-4, "mixed": 1e-4, "bf16": 2.0**-8}


@both
@every_activation
@every_solver
@every_precision
@pytest.mark.parametrize("root", [0.6, 0.95])
def test_every_option_gives_the_same_numbers(kind, activation, solver, precision, root):
    block = make(kind, activation, root=root, solver=solver, precision=precision)
    h, probe = signal(kind), torch.rand(SHAPES[kind])
    z, gradients = run(block, h, probe)
    reference, exact_gradients = exact(block, h, probe)
    solves = block.deq.forward_solve, block.deq.backward_solve
    # A residual below tol leaves an error of ρ/(1 − ρ)·tol; a gradient has that of both solves.
    bound = 1.5 * TOLERANCE[precision] / (1 - root)
    assert distance(z, reference) < bound
    assert z.dtype == torch.float32
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert distance(ours, theirs) < 2 * bound
    assert all(s.converged for s in solves)
    assert all(s.residual < TOLERANCE[precision] for s in solves)


@every_solver
def test_float32_evaluations_of_each_precision(solver):
    counts = {}
    for precision in PRECISIONS:
        torch.manual_seed(3)
        block = make("linear", "relu6", root=0.95, solver=solver, precision=precision)
        run(block, signal("linear"), torch.ones(SHAPES["linear"]))
        counts[precision] = block.deq.forward_solve, block.deq.backward_solve
    for fp32, mixed, bf16 in zip(*counts.values(), strict=True):
        assert fp32.full == fp32.iterations > 8
        assert 1 <= mixed.full <= 4 < mixed.iterations
        assert bf16.full == 0 < bf16.iterations


class Dtypes(torch.overrides.TorchFunctionMode):
    """The dtypes in which the products of W are computed inside it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.linear, F.conv2d, torch.addmm, torch.conv2d):
            self.seen.append(next(a for a in args if isinstance(a, Tensor)).dtype)
        return function(*args, **(kwargs or {}))


@both
@every_precision
def test_products_are_computed_in_the_precision_asked_for(kind, precision):
    block = make(kind, precision=precision)
    with Dtypes() as dtypes, torch.no_grad():
        block(signal(kind))
    expected = {
        "fp32": {torch.float32},
        "mixed": {torch.float32, torch.bfloat16},
        "bf16": {torch.bfloat16},
    }
    assert set(dtypes.seen) == expected[precision]
    solve = block.deq.forward_solve
    skipped = 1  # the evaluation at z = 0 takes no product
    assert dtypes.seen.count(torch.float32) == solve.full - (skipped if precision == "fp32" else 0)
    assert len(dtypes.seen) == solve.iterations - skipped


@both
@every_solver
@every_precision
def test_a_float64_model_computes_in_float64_whatever_the_option(kind, solver, precision):
    block = make(kind, solver=solver, precision=precision, tol=1e-12, max_iter=1000).double()
    h, probe = signal(kind, torch.float64), torch.rand(SHAPES[kind], dtype=torch.float64)
    with Dtypes() as dtypes:
        z, gradients = run(block, h, probe)
    assert set(dtypes.seen) == {torch.float64}
    reference, exact_gradients = exact(block, h, probe)
    torch.testing.assert_close(z, reference, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients, exact_gradients, rtol=1e-8, atol=1e-9)
    assert block.deq.forward_solve.full == block.deq.iter_forward
    assert block.deq.backward_solve.full == block.deq.iter_backward


@both
def test_anderson_needs_fewer_iterations_on_a_slow_block(kind):
    iterations = {}
    for solver in SOLVERS:
        torch.manual_seed(1)
        block = make(kind, "relu6", root=0.95, solver=solver)
        run(block, signal(kind), torch.ones(SHAPES[kind]))
        iterations[solver] = block.deq.iter_forward, block.deq.iter_backward
    for fast, plain in zip(iterations["anderson"], iterations["picard"], strict=True):
        assert fast < 0.7 * plain


def test_iterations_are_those_of_the_rule():
    block = make("linear", "relu6", root=0.9)
    h = signal("linear").requires_grad_()
    probe = torch.rand(SHAPES["linear"])
    assert block.deq.iter_forward == block.deq.iter_backward == 0
    assert block.deq.forward_solve is None and block.deq.backward_solve is None
    z_star = block(h)
    (z_star * probe).sum().backward()

    x, W = block.inject(h).detach(), block.deq.f.W.weight().detach()
    f = lambda z: (z @ W.T + x).clamp(0, 6)  # noqa: E731
    assert block.deq.iter_forward == count(f, torch.zeros_like(x))
    slope = ((z_star > 0) & (z_star < 6)).float()
    assert block.deq.iter_backward == count(lambda g: (slope * g) @ W + probe, probe)
    assert block.deq.forward_solve.z is None and block.deq.backward_solve.z is None


def count(f, z: Tensor) -> int:
    for k in range(1, 201):
        fz = f(z)
        if (fz - z).norm() / (fz.norm() + 1e-5) < 1e-4:
            return k
        z = fz
    return 200


@every_solver
@every_precision
def test_max_iter_bounds_both_solves_and_is_reported(solver, precision):
    for max_iter in (1, 2, 5):
        block = make("linear", "relu6", root=0.95, solver=solver, precision=precision, tol=1e-9)
        block.deq.max_iter = max_iter
        z, gradients = run(block, signal("linear"), torch.ones(SHAPES["linear"]))
        assert z.isfinite().all() and all(g.isfinite().all() for g in gradients)
        for solve in (block.deq.forward_solve, block.deq.backward_solve):
            assert solve.iterations <= max_iter
            assert solve.converged == (solve.residual < max(1e-9, block.deq.tol))
        assert not block.deq.forward_solve.converged


def test_inputs_that_are_not_finite_end_the_solve_at_once():
    for precision in PRECISIONS:
        block = make("linear", precision=precision)
        h = signal("linear")
        h[0, 0] = float("nan")
        assert block(h).isnan().any()
        solve = block.deq.forward_solve
        assert not solve.converged and solve.residual != solve.residual and solve.iterations <= 2


@pytest.mark.parametrize(
    "option, message",
    [
        ({"solver": "newton"}, r"'newton'.*picard, anderson"),
        ({"precision": "fp16"}, r"'fp16'.*fp32, mixed, bf16"),
        ({"tol": 0.0}, "tol must be positive, not 0.0"),
        ({"tol": float("nan")}, "tol must be positive, not nan"),
        ({"max_iter": 0}, "max_iter must be at least 1, not 0"),
        ({"activation": "relu"}, r"'relu'.*tanh, softsign, relu6, sigmoid"),
    ],
)
@both
def test_wrong_options_are_refused_in_one_sentence(kind, option, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind](5, **option)


def test_options_are_shown():
    assert "solver=anderson, precision=mixed, tol=0.001, max_iter=50" in repr(
        PcDEQLinear(3, solver="anderson", precision="mixed", tol=1e-3, max_iter=50)
    )


# Training


def training_step(block: PcDEQ, optimizer, h: Tensor, target: Tensor) -> float:
    loss = F.mse_loss(block(h), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@both
@every_precision
def test_weights_stay_nonnegative_and_the_loss_falls(kind, precision):
    block = make(kind, precision=precision)
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.05)
    h, target = signal(kind), 0.2 * torch.rand(SHAPES[kind])
    losses, negative = [], False
    for _ in range(30):
        losses.append(training_step(block, optimizer, h, target))
        negative |= any((p < 0).any().item() for p in block.parameters())
        project(block)
        assert all((p >= 0).all() for p in block.parameters())
        assert (block.deq.f.W.weight() >= 0).all()
    assert negative  # without the projection they would have left the orthant
    assert losses[-1] < 0.8 * losses[0]


@both
def test_projection_as_an_optimizer_hook(kind):
    model = nn.Sequential(nn.Identity(), make(kind), make(kind))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = register_projection(optimizer, model)

    def step():
        model(signal(kind)).sum().backward()
        for p in model.parameters():
            p.grad.abs_()  # a descent into the negative
        optimizer.step()

    for _ in range(3):
        step()
        assert all((p >= 0).all() for p in model.parameters())
    handle.remove()
    step()
    assert any((p < 0).any() for p in model.parameters())


def test_projection_leaves_other_layers_alone():
    model = nn.Sequential(nn.Linear(5, 5), make("linear"))
    before = copy.deepcopy(model[0].state_dict())
    with torch.no_grad():
        model[1].deq.f.W.weight_v.sub_(0.5)
    project(model)
    assert all(torch.equal(v, before[k]) for k, v in model[0].state_dict().items())
    assert (model[1].deq.f.W.weight_v >= 0).all() and (model[1].deq.f.W.weight_v == 0).any()


class Mark(torch.autograd.Function):
    """The identity; its node is a Python object, so a weak reference tells whether it lives."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


@contextlib.contextmanager
def no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@both
@every_precision
def test_graphs_die_with_their_last_reference(kind, precision):
    """Without the collector's help: no reference cycle holds one."""
    block = make(kind, root=0.1, precision=precision)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    h = signal(kind).requires_grad_()
    graphs, outputs = [], []
    with no_garbage_collection():
        for step in range(40):
            marked = Mark.apply(h)
            z = block(marked)
            graphs.append(weakref.ref(marked.grad_fn))
            outputs.append(weakref.ref(z))
            if step % 4:  # now and then a graph is dropped without a backward pass
                z.sum().backward()
            optimizer.step()
            del marked, z
            assert graphs[-1]() is None and outputs[-1]() is None


def test_memory_does_not_grow_over_200_steps():
    """In a process of its own: here, what earlier tests have freed would hide the growth."""
    code = """
        import gc, os, resource, torch, pcdeq

        def memory():  # bytes
            try:
                return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
            except OSError:  # no Linux
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        gc.disable()
        block = pcdeq.PcDEQLinear(8)
        optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
        h = torch.randn(10_000, 8)  # 320 kB
        for step in range(200):
            block(h).square().mean().backward()
            optimizer.step()
            if step == 20:
                before = memory()
        print(memory() - before)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 20e6  # one tensor kept a step would be 58 MB


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both
def test_evaluation_builds_no_graph_and_registers_no_hook(kind, mode, monkeypatch):
    block = make(kind)
    h = signal(kind).requires_grad_()
    reference = block(h)
    calls = []
    monkeypatch.setattr(Tensor, "register_hook", lambda *args: calls.append(args))
    with mode():
        z = block(h)
    assert z.grad_fn is None and not z.requires_grad and not calls
    assert z.is_inference() == (mode is torch.inference_mode)
    torch.testing.assert_close(z, reference.detach())


@both
def test_training_holds_one_activation_whatever_the_iterations(kind):
    saved = []

    def pack(t):
        saved.append(t)
        return t

    for root in (0.3, 0.95):
        block = make(kind, "relu6", root=root)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(signal(kind).requires_grad_())
        assert block.deq.iter_forward > 5
        full = [t for t in saved if t.shape == SHAPES[kind]]
        assert len(full) <= 2  # h and z*
        saved.clear()
