"""A step against one written out, an epoch against its steps."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from processes import same
from small_runs import config_of, overflow

from pcdeq import build_network
from pcdeq.experiments import data
from pcdeq.experiments.trainer import Trainer

pytestmark = pytest.mark.usefixtures("digits")


def test_a_step_is_the_one_written_out():
    config = config_of("unused", lr=1e-2)
    images, _, _ = data.load("mnist", sample=True)
    networks = []
    for _ in range(2):
        torch.manual_seed(3)
        networks.append(build_network("linear_pcdeq_1", "tanh"))
    network, written = networks
    trainer = Trainer(network, images, config)
    optimizer = torch.optim.AdamW(written.parameters(), 1e-2, weight_decay=1.5e-2, fused=True)
    for first in range(0, 640, 64):
        x, y = images.batch(slice(first, first + 64), torch.Generator().manual_seed(first))
        loss, right = trainer.step(x, y)
        optimizer.zero_grad()
        logits = written(x)
        expected = F.cross_entropy(logits, y)
        expected.backward()
        optimizer.step()
        for parameter in written.block.deq.f.W.parameters():
            parameter.data.clamp_(min=0)
        assert loss == expected.item()
        assert right == (logits.argmax(1) == y).sum().item()
    assert same(network.state_dict(), written.state_dict())
    assert (network.block.deq.f.W.weight_v == 0).any()  # the projection had something to do


def test_figures_of_an_epoch_are_means_over_images_and_over_steps(monkeypatch, digits):
    digits["train"] = 150  # 64, 64 and 22
    images, _, _ = data.load("mnist", sample=True)
    network = build_network("linear_pcdeq_1", "tanh").eval()
    trainer = Trainer(network, images, config_of("unused"))
    steps, plain = [], trainer.step

    def noted(x, y, share):
        assert network.training
        loss, right = plain(x, y, share)
        deq = network.block.deq
        steps.append((loss, right, len(y), deq.iter_forward, deq.iter_backward, share))
        return loss, right

    monkeypatch.setattr(trainer, "step", noted)
    row = trainer.epoch(1)
    losses, rights, sizes, forward, backward, shares = zip(*steps, strict=True)
    assert sizes == (64, 64, 22) and set(shares) == {1.0}
    mean = sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / 150
    assert row["train_loss"] == pytest.approx(mean, rel=1e-12)
    assert row["train_acc"] == 100 * sum(rights) / 150
    assert row["forward_iters"] == sum(forward) / 3
    assert row["backward_iters"] == sum(backward) / 3
    assert row["unconverged"] == 0


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(monkeypatch):
    images, _, _ = data.load("mnist", sample=True)
    trainer = Trainer(build_network("linear_pcdeq_1", "tanh"), images, config_of("unused"))
    monkeypatch.setattr(trainer, "step", lambda x, y, share: (0.0, 0))
    orders, crops = [], []

    def batch(indices, generator):
        orders[-1] += indices.tolist()
        crops[-1].append(torch.rand(1, generator=generator).item())
        return torch.zeros(len(indices), 1, 28, 28), torch.zeros(len(indices), dtype=torch.long)

    monkeypatch.setattr(images, "batch", batch)
    for deq in (block.deq for block in trainer.network.blocks):
        deq.forward_solve = deq.backward_solve = type(
            "Solve", (), {"iterations": 1, "converged": 1}
        )
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1)):
        orders.append([])
        crops.append([])
        trainer.config.seed = seed
        trainer.epoch(epoch)
    assert all(sorted(order) == list(range(640)) for order in orders)
    assert orders[3] == orders[0] and crops[3] == crops[0]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({tuple(draws) for draws in crops}) == 3


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_is_not_finite_is_not_taken(where):
    images, _, _ = data.load("mnist", sample=True)
    network = build_network("linear_pcdeq_1", "tanh")
    trainer = Trainer(network, images, config_of("unused"))
    x, y = images.batch(slice(0, 64))
    if where == "forward":
        x = x * math.nan
    else:
        network.bn2.register_forward_hook(overflow)
    before = {name: value.clone() for name, value in network.named_parameters()}
    with pytest.raises(FloatingPointError, match=f"the {where} solve of block"):
        trainer.step(x, y)
    assert same(before, dict(network.named_parameters()))


def test_memory_does_not_grow_with_the_steps():
    images, _, _ = data.load("mnist", sample=True)
    trainer = Trainer(build_network("linear_pcdeq_1", "tanh"), images, config_of("unused"))
    gc.collect()
    gc.disable()  # what only the collector frees counts as growth
    try:
        counts = []
        for epoch in (1, 2, 3):
            trainer.epoch(epoch)
            counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[2] <= counts[1]
