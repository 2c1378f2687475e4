"""pcdeq.block in training: projection, and memory that neither leaks nor grows."""

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
    SHAPES,
    both,
    every_precision,
    make,
    signal,
)
from torch import Tensor, nn

from pcdeq import implicit
from pcdeq.block import PcDEQ, PcDEQConv2d, PcDEQLinear, project, register_projection


def training_step(block: PcDEQ, optimizer, h: Tensor, target: Tensor) -> float:
    loss = F.mse_loss(block(h), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("layer", [PcDEQLinear, PcDEQConv2d])
@pytest.mark.parametrize("size", [0, -1, 8.0, "8", None])
def test_a_size_is_a_whole_number(layer, size):
    with pytest.raises(ValueError, match=r"(features|channels) must be a whole number from 1 on"):
        layer(size)


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
    monkeypatch.setattr(implicit._FixedPoint, "apply", lambda *args: calls.append(args))
    with mode():
        z = block(h)
    assert z.grad_fn is None and not z.requires_grad and not calls
    assert z.is_inference() == (mode is torch.inference_mode)
    torch.testing.assert_close(z, reference.detach())
    block(h)
    assert len(calls) == 1  # where a graph is built, it is noticed


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
