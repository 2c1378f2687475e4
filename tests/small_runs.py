"""What tests of steps, epochs, runs and their folders share, beside the fixtures of conftest.py."""

import math

import torch

from pcdeq import build_network
from pcdeq.experiments import runs
from pcdeq.experiments.config import RunConfig
from pcdeq.weights import describe

HERE = {"processor": "abacus", "threads": 1, "command": "python train.py"}


def config_of(out, **flags):
    settings = {"lr": 5e-4, "epochs": 4, "weight_decay": 1.5e-2, "batch_size": 64, "milestone": 2}
    name = None if out is None else str(out)
    return RunConfig(
        "mnist", "linear_pcdeq_1", "tanh", out=name, **{**settings, "sample": True, **flags}
    )


def row_of(epoch, accuracy):
    return dict.fromkeys(runs.COLUMNS, 0.5) | {"epoch": epoch, "test_acc": accuracy}


def checkpoint_of(config, accuracies):
    """What a run has after so many epochs; its weights tell the epoch."""
    network = build_network(config.net, config.activation)
    torch.nn.init.constant_(network.classifier.bias, len(accuracies))
    optimizer = torch.optim.AdamW(network.parameters(), config.lr)
    network(torch.rand(4, 1, 28, 28)).sum().backward()
    optimizer.step()
    rows = [row_of(epoch, accuracy) for epoch, accuracy in enumerate(accuracies, 1)]
    state = {
        "rows": rows,
        "optimizer": optimizer.state_dict(),
        "flags": config.identity(),
    }
    return {**describe(network), "model": network.state_dict(), "training": state}


def overflow(layer, arguments, out):
    """A hook of the layer above a block: what reaches the block backward is not finite."""
    out.register_hook(lambda gradient: gradient * math.inf)
