"""Who is measured: the networks with their options, the textbook, torchdeq; and their step."""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from textbook import TorchdeqBlock, textbook

from pcdeq import SOLVERS, Network, build_network
from pcdeq.experiments import data
from pcdeq.experiments.optimizer import AdamW
from pcdeq.implicit import PRECISIONS


@dataclass(frozen=True)
class Row:
    dataset: str
    network: str
    activation: str
    training_steps: int
    rounds: int
    steps: int  # of each in a round: in training too a step finds what the last one left

    @property
    def name(self) -> str:
        return f"{self.dataset} {self.network} {self.activation}"


ROWS = (
    Row("mnist", "linear_pcdeq_1", "tanh", 150, 30, 10),
    Row("mnist", "single_conv_pcdeq_1", "tanh", 4, 7, 2),
    Row("mnist", "multi_conv_pcdeq_1", "relu6", 60, 20, 5),
    Row("cifar", "multi_conv_pcdeq_1", "relu6", 25, 10, 3),
)
BATCH = 64
TEXTBOOK = "textbook"
OPTIONS = {
    f"{solver}, {precision}": {"solver": solver, "precision": precision}
    for precision in PRECISIONS
    for solver in SOLVERS
}
TORCHDEQ = {f"torchdeq {solver}": solver for solver in ("fixed_point_iter", "anderson")}


def train_step(
    model: nn.Module, optimizer: AdamW | torch.optim.AdamW, x: Tensor, y: Tensor
) -> None:
    """A step of projected AdamW; for this project as its scripts have it (``contestant``)."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = None
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    model.clamp()


def trained(row: Row, images: data.ImageSet, seed: int) -> Network:
    """The network of a row after its few training steps, where the images are."""
    torch.manual_seed(seed)
    network = build_network(row.network, row.activation, row.dataset).to(images.labels.device)
    optimizer = AdamW(network.parameters(), lr=1e-3, weight_decay=1.5e-2)
    shuffle = torch.randperm(len(images))
    for step in range(row.training_steps):
        start = step * BATCH % (len(images) - BATCH)
        train_step(network, optimizer, *images.batch(shuffle[start : start + BATCH]))
    return network


def contestant(
    name: str, row: Row, network: Network
) -> tuple[nn.Module, AdamW | torch.optim.AdamW]:
    """A model with the weights of ``network``, where they are; its optimizer, learning rate 0."""
    if name in OPTIONS:
        model = build_network(row.network, row.activation, row.dataset, **OPTIONS[name])
        model.to(network.classifier.weight.device).load_state_dict(network.state_dict())
        return model, AdamW(model.parameters(), lr=0.0, weight_decay=1e-2)
    if name == TEXTBOOK:
        model = textbook(network)
    else:
        model = textbook(network, functools.partial(TorchdeqBlock, solver=TORCHDEQ[name]))
    return model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=1e-2)


def installed_torchdeq() -> tuple[str, ...]:
    try:
        import torchdeq  # noqa: F401
    except ImportError:
        return ()
    return tuple(TORCHDEQ)
