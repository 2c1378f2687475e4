"""AdamW with less around it: torch's own, bit for bit, and its state."""

import copy
import io

import pytest
import torch
from blocks import every_device
from torch import nn

from pcdeq import build_network
from pcdeq.experiments.optimizer import AdamW


def network(device: str, name: str = "multi_conv_pcdeq_1") -> nn.Module:
    torch.manual_seed(0)
    return build_network(name, "tanh").to(device)


def torch_s(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1, fused=True)


def unfused(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1, foreach=False)


def ours(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), 1e-2, weight_decay=0.1)


def train(model: nn.Module, optimizer: AdamW | torch.optim.AdamW, steps: range) -> None:
    """Steps with made-up gradients of the layout that autograd gives."""
    for step in steps:
        draws = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=draws))
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@every_device
@pytest.mark.parametrize("name", ["linear_pcdeq_1", "multi_conv_pcdeq_1"])
def test_steps_are_those_of_torch_bit_for_bit(name, device):
    model = network(device, name)
    reference = copy.deepcopy(model)
    train(model, ours(model), range(5))
    assert not same(model, reference)
    train(reference, torch_s(reference), range(5))
    assert same(model, reference)


@every_device
@pytest.mark.parametrize("first", [ours, torch_s])
@pytest.mark.parametrize("second", [ours, torch_s])
def test_each_goes_on_from_the_state_of_the_other(first, second, device):
    """Through a file, as a checkpoint goes; the counts do not share memory there."""
    model = network(device)
    reference = copy.deepcopy(model)
    train(reference, torch_s(reference), range(6))

    optimizer = first(model)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    other = network(device)
    other.load_state_dict(checkpoint["model"])
    optimizer = second(other)
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(other, optimizer, range(3, 6))
    assert same(other, reference)
    assert {int(s["step"]) for s in optimizer.state_dict()["state"].values()} == {6}


@every_device
def test_the_state_dict_is_that_of_torch(device):
    states = []
    for make in (ours, torch_s):
        model = network(device)
        optimizer = make(model)
        train(model, optimizer, range(2))
        states.append(optimizer.state_dict())
    mine, reference = states
    assert mine["param_groups"] == reference["param_groups"]
    assert mine["state"].keys() == reference["state"].keys()
    for key, expected in reference["state"].items():
        assert mine["state"][key].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(mine["state"][key][name], value, rtol=0, atol=0)
            assert mine["state"][key][name].stride() == value.stride()


@every_device
def test_it_goes_on_from_a_state_that_was_not_fused(device):
    model = network(device)
    other = unfused(model)
    train(model, other, range(3))
    reference = copy.deepcopy(model)
    optimizer = ours(model)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(model, optimizer, range(3, 5))
    theirs = unfused(reference)
    theirs.load_state_dict(other.state_dict())
    train(reference, theirs, range(3, 5))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert optimizer.state_dict()["param_groups"][0]["fused"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda state: state["param_groups"][0].update(maximize=True), "maximize"),
        (lambda state: state["state"].clear(), "above 0"),
        (lambda state: state["state"][1]["step"].add_(1), "one count"),
        (lambda state: state["param_groups"][0]["params"].pop(), "size"),
    ],
)
def test_a_state_that_it_cannot_go_on_from_is_refused(change, words):
    model = network("cpu")
    optimizer = ours(model)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(ValueError, match=words):
        ours(network("cpu")).load_state_dict(state)


def test_the_counts_of_a_state_dict_stay_as_they_were():
    model = network("cpu", "linear_pcdeq_1")
    optimizer = ours(model)
    train(model, optimizer, range(2))
    counts = [s["step"] for s in optimizer.state_dict()["state"].values()]
    train(model, optimizer, range(2, 4))
    assert [int(c) for c in counts] == [2] * len(counts)
