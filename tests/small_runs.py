"""What tests of steps, epochs and runs share; the few digits are ``digits`` in conftest.py."""

import math

from pcdeq.experiments.config import RunConfig


def config_of(out, **flags):
    settings = {"lr": 5e-4, "epochs": 4, "weight_decay": 1.5e-2, "batch_size": 64, "milestone": 2}
    return RunConfig(
        "mnist", "linear_pcdeq_1", "tanh", out=str(out), **{**settings, "sample": True, **flags}
    )


def overflow(layer, arguments, out):
    """A hook of the layer above a block: what reaches the block backward is not finite."""
    out.register_hook(lambda gradient: gradient * math.inf)
