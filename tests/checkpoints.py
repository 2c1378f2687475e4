"""Networks, their checkpoints, and how one is refused."""

import copy
from pathlib import Path

import pytest
import torch

from pcdeq import CheckpointError, build_network, load_weights
from pcdeq.networks import Network
from pcdeq.weights import describe


def perturbed(name: str = "linear_pcdeq_1", activation: str = "tanh", *args, **kwargs) -> Network:
    """A network whose every state-dict entry differs from any other's."""
    model = build_network(name, activation, *args, **kwargs)
    for t in model.state_dict().values():
        t.add_(torch.rand_like(t.float()).to(t.dtype) * 0.1 if t.is_floating_point() else 3)
    return model.eval()


def ours(model: Network, path: Path, **changes) -> Path:
    torch.save({**describe(model), "model": model.state_dict(), **changes}, path)
    return path


def authors(model: Network, path: Path) -> Path:
    """A bare state dict, as the authors' scripts save it."""
    torch.save(model.state_dict(), path)
    return path


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refusal(path: Path, model: Network | None = None) -> str:
    """The sentence with which ``load_weights`` refuses, having changed nothing."""
    model = model or build_network("linear_pcdeq_1", "tanh")
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, path)
    sentence = str(error.value)
    assert same(model, before)
    assert sentence.startswith(str(path)) and "\n" not in sentence
    return sentence.removeprefix(str(path))
