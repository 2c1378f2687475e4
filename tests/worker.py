"""One process of several, for test_parallel.py: trains a little and leaves what it has become.

Usage: worker.py FOLDER, with torchrun's variables in the environment or without.
"""

import sys
from pathlib import Path

import torch

from pcdeq.experiments import data
from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.evaluation import evaluate
from pcdeq.experiments.parallel import Processes, join
from pcdeq.experiments.trainer import Trainer
from pcdeq.networks import build_network


class Double(data.ImageSet):
    """Images in float64."""

    def batch(self, *arguments):
        x, y = super().batch(*arguments)
        return x.double(), y


def freeze(network: torch.nn.Module) -> None:
    """Takes away what makes several processes differ from one: float32, and batch statistics."""
    network.double()
    for layer in network:
        if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            layer.eval()
            layer.train = lambda mode=True, layer=layer: layer


def train(processes: Processes, net: str, activation: str, count: int, batch: int, *, exact: bool):
    """Two epochs on ``count`` images; the rows, and the state dict at the end."""
    torch.manual_seed(processes.rank)  # the first one's weights must win
    network = build_network(net, activation, tol=1e-12 if exact else 1e-4, max_iter=2000)
    if exact:
        freeze(network)
    sets = data.load("mnist", sample=True)[:2]
    kind = Double if exact else data.ImageSet
    train_set, test_set = (
        kind(part.images[:: len(part) // n], part.labels[:: len(part) // n], part.mean, part.std)
        for part, n in zip(sets, (count, 100), strict=True)
    )
    config = RunConfig("mnist", net, activation, 1e-3, 2, 1.5e-2, batch, 1)
    trainer = Trainer(network, train_set, config, processes)
    rows = [trainer.epoch(epoch) for epoch in (1, 2)]
    processes.agree(network)
    test = evaluate(network, test_set, 15, processes=processes)
    figures = [value for row in rows for value in (row["train_loss"], row["train_acc"])]
    return {"figures": [*figures, test.loss, test.accuracy], "model": network.state_dict()}


def main(folder: Path) -> None:
    with join("cpu") as processes:
        results = {
            # 100 images in batches of 31, 31, 31 and 7: the parts differ.
            "linear": train(processes, "linear_pcdeq_1", "tanh", 100, 31, exact=True),
            "conv": train(processes, "multi_conv_pcdeq_2", "sigmoid", 20, 7, exact=True),
            "ordinary": train(processes, "linear_pcdeq_1", "softsign", 1000, 64, exact=False),
        }
        torch.save(results, folder / f"rank{processes.rank}.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
