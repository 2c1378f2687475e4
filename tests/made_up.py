"""Run folders as training leaves them, with made-up figures: what the tests of results are fed."""

import random
from functools import cache
from pathlib import Path

import torch

from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.machine import environment
from pcdeq.experiments.recipes import Recipe
from pcdeq.experiments.runs import Run
from pcdeq.networks import Network, build_network
from pcdeq.weights import describe

build = cache(build_network)


def made_up_run(folder: Path, recipe: Recipe, seed: int = 0, ran: int = 0, **changes) -> Network:
    """Writes the folder of a run of ``ran`` epochs (0: the recipe's); returns its network.

    Args:
        changes: of the run's configuration, or of where it ran (``device_name``, ``threads``).
    """
    settings = {key: value for key, value in vars(recipe).items()} | {"seed": seed}
    fields = RunConfig.__dataclass_fields__
    config = RunConfig(
        **settings
        | {k: v for k, v in changes.items() if k in fields}
        | {"out": str(folder), "overwrite": True}
    )
    where = environment(torch.device("cpu")) | {"device_name": "Slide rule", "threads": 1}
    where |= {key: value for key, value in changes.items() if key not in fields}
    network = build(recipe.net, recipe.activation, recipe.dataset, recipe.augment)
    run = Run(config)
    run.begin({"parameters": sum(p.numel() for p in network.parameters()), **where})
    draw = random.Random(f"{recipe.name} {seed}")
    rows = [
        {
            "epoch": epoch, "lr": config.lr, "train_loss": 0.1, "train_acc": 99.0,
            "test_loss": 0.2, "test_acc": round(98 - 5 / epoch + draw.gauss(0, 0.1), 2),
            "forward_iters": 8 + epoch / 10, "backward_iters": 5 + epoch / 10,
            "unconverged": 0, "seconds": 2.0,
        }
        for epoch in range(1, (ran or recipe.epochs) + 1)
    ]  # fmt: skip
    state = {"rows": rows, "optimizer": {"state": {}}, "flags": config.identity()}
    run.save({**describe(network), "model": network.state_dict(), "training": state})
    return network
