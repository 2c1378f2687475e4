"""The paper's 32 rows as data: which network on which data set, and how it is trained.

Recipes of Gabor, Piotrowski, Cavalcante, "Positive Concave Deep Equilibrium Models" (ICML 2024):
AdamW, cross entropy, the learning rate times 0.1 after the milestone. This is the one place where
they stand; the training scripts' defaults and the reproduction of the tables come from here.
"""

from dataclasses import dataclass

from pcdeq.activations import allowed
from pcdeq.networks import variant_of

#: What a data set's recipe sets, by the names that ``Recipe`` has for it.
DEFAULTS: dict[str, dict[str, float]] = {
    "mnist": dict(lr=5e-4, epochs=40, weight_decay=1.5e-2, batch_size=64, milestone=30),
    "svhn": dict(lr=5e-4, epochs=80, weight_decay=2e-2, batch_size=64, milestone=70),
    "cifar": dict(lr=5e-4, epochs=120, weight_decay=2e-2, batch_size=64, milestone=100),
}


@dataclass(frozen=True)
class Recipe:
    """One row of the paper's tables.

    Attributes:
        dataset: ``"mnist"``, ``"svhn"`` or ``"cifar"``.
        net: the network's name, e.g. ``"multi_conv_pcdeq_1"``.
        activation: σ in its blocks.
        augment: whether training images are cropped and flipped at random (the wider network).
        lr: AdamW's learning rate in the epochs up to ``milestone``; a tenth of it after them.
        epochs: passes over the training set.
        weight_decay: AdamW's.
        batch_size: images in a step.
        milestone: the last epoch at the full learning rate.
    """

    dataset: str
    net: str
    activation: str
    augment: bool
    lr: float
    epochs: int
    weight_decay: float
    batch_size: int
    milestone: int

    @property
    def name(self) -> str:
        """The row's name in file names: ``"cifar_multi_conv_pcdeq_1_tanh_aug"``."""
        return row_name(self.dataset, self.net, self.activation, self.augment)


def row_name(dataset: str, net: str, activation: str, augment: bool) -> str:
    """The name of a row, whether the paper has it or not."""
    return f"{dataset}_{net}_{activation}" + "_aug" * augment


def default_activation(net: str) -> str:
    """The activation that a network has unless told: tanh for pcDEQ-1, sigmoid for pcDEQ-2."""
    return allowed(variant_of(net))[0]


def _rows(dataset: str, *kinds: str, augment: bool = False) -> tuple[Recipe, ...]:
    return tuple(
        Recipe(dataset, f"{kind}_pcdeq_{variant}", activation, augment, **DEFAULTS[dataset])
        for kind in kinds
        for variant in (1, 2)
        for activation in allowed(variant)
    )


#: All rows, in the paper's order.
ROWS: tuple[Recipe, ...] = (
    *_rows("mnist", "linear", "single_conv", "multi_conv"),
    *_rows("svhn", "single_conv", "multi_conv"),
    *_rows("cifar", "single_conv", "multi_conv"),
    *_rows("cifar", "multi_conv", augment=True),
)
