"""For ``torch.hub.load``: the six networks by name, with the trained weights of ``weights/``.

    torch.hub.load("CLONE", "linear_pcdeq_1", source="local", activation="tanh", pretrained=True)

Nothing is downloaded from a clone. Which rows have trained weights: ``trained()``.
"""

from pathlib import Path as _Path

from pcdeq import NETWORKS as _NETWORKS
from pcdeq import build_network as _build_network
from pcdeq import load_weights as _load_weights
from pcdeq.experiments.recipes import default_activation as _default_activation
from pcdeq.experiments.recipes import row_name as _row_name

dependencies = ["torch"]

_WEIGHTS = _Path(__file__).resolve().parent / "weights"


def trained():
    """Names of the rows that have trained weights, ``<dataset>_<network>_<activation>[_aug]``."""
    return sorted(path.stem for path in _WEIGHTS.glob("*.pth"))


def _entry(name):
    def load(pretrained=False, activation=None, dataset="mnist", augment=False, **options):
        activation = activation or _default_activation(name)
        network = _build_network(name, activation, dataset, augment, **options)
        if pretrained:
            row = _row_name(dataset, name, activation, augment)
            if row not in trained():
                have = ", ".join(trained()) or "none yet"
                raise ValueError(f"there are no trained weights for {row}; there are for: {have}")
            _load_weights(network, _WEIGHTS / f"{row}.pth")
        return network.eval()

    load.__name__ = name
    load.__doc__ = f"""The network {name}, in evaluation mode.

    Args:
        pretrained: load the row's trained weights; else they are drawn at random.
        activation: tanh (the default), softsign or relu6 for pcDEQ-1, sigmoid for pcDEQ-2.
        dataset: "mnist", "svhn" or "cifar".
        augment: the wider network for augmented CIFAR-10.
        options: of ``pcdeq.build_network``: classes, solver, precision, tol, max_iter.

    Raises:
        ValueError: there is no such network, or there are no trained weights for it; the message
            lists those that there are.
    """
    return load


globals().update({name: _entry(name) for name in _NETWORKS})
