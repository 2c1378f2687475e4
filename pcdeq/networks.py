"""The six networks of the paper, each a sequence of layers around pcDEQ blocks.

A network is an ``nn.Sequential`` whose named children stand in the order of the forward pass, so
reading a builder is reading the pass. Names and the order of random draws are those of the
authors' networks: one seed gives the same parameters, and state dicts agree key for key.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from numbers import Integral

import torch
from torch import Tensor, nn

from pcdeq.activations import allowed
from pcdeq.block import PcDEQ, PcDEQConv2d, PcDEQLinear
from pcdeq.normalisation import BatchNorm2d

DATASETS: dict[str, tuple[int, int, int]] = {  # name → C, H, W of its images
    "mnist": (1, 28, 28),
    "svhn": (3, 32, 32),
    "cifar": (3, 32, 32),
}
LINEAR_FEATURES = 80
SINGLE_CHANNELS = {"mnist": 82, "svhn": 125, "cifar": 125}
MULTI_CHANNELS = {"mnist": (12, 24, 48), "svhn": (20, 50, 80), "cifar": (20, 50, 80)}
MULTI_CHANNELS_AUGMENTED = (100, 120, 140)


class Network(nn.Sequential):
    """One of the six networks.

    Attributes:
        name: of the network, a key of ``NETWORKS``.
        activation: name of σ in its blocks.
        dataset: ``"mnist"``, ``"svhn"`` or ``"cifar"``: the shape of its images.
        augment: whether it is the wider network for augmented CIFAR-10.
        classes: number of outputs.
        class_names: of the outputs, in their order, where the images came in named folders.
    """

    def __init__(
        self,
        layers: list[tuple[str, nn.Module]],
        name: str,
        activation: str,
        dataset: str,
        augment: bool,
        classes: int,
    ):
        super().__init__(OrderedDict(layers))
        self.name = name
        self.activation = activation
        self.dataset = dataset
        self.augment = augment
        self.classes = classes
        self.class_names: tuple[str, ...] = ()
        self.to(memory_format=torch.channels_last)

    def __getitem__(self, index: int | slice) -> nn.Module:
        # nn.Sequential would make a slice with this class's constructor: a part is no Network.
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)

    @property
    def blocks(self) -> list[PcDEQ]:
        """The pcDEQ blocks, in the order of the forward pass."""
        return [layer for layer in self if isinstance(layer, PcDEQ)]

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (B, classes), of images of shape (B, C, H, W) in the parameters' dtype."""
        *features, classifier = self
        low = self.blocks[0].deq.only_low
        h = images
        # With precision "bf16" convolutions and the first linear layer run in bfloat16 as well.
        with torch.autocast(h.device.type, torch.bfloat16) if low else nullcontext():
            for layer in features:
                h = layer(h)
        return classifier(h)

    def clamp(self) -> None:
        """Projects the blocks' weights onto the nonnegative orthant, after an optimizer step."""
        for block in self.blocks:  # ``project`` would search every layer, in each step
            block.deq.f.W.clamp()


class Flatten(nn.Flatten):
    """``nn.Flatten`` whose gradient stays in channels_last.

    Else average pooling in front of it copies its own gradient, 64 times as large, to that layout.
    """

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) as (B, C·H·W)."""
        if h.requires_grad and h.ndim == 4:
            h = h.view_as(h)  # the hook is ours, and goes with this pass
            h.register_hook(_channels_last)
        return super().forward(h)


def _channels_last(g: Tensor | None) -> Tensor | None:
    return None if g is None else g.contiguous(memory_format=torch.channels_last)


def _linear(dataset: str, augment: bool, classes: int, block: Callable) -> list:
    c, h, w = DATASETS[dataset]
    n = LINEAR_FEATURES
    return [
        ("flatten", nn.Flatten()),  # (B, C·H·W)
        ("linear1", nn.Linear(c * h * w, n)),
        ("bn1", nn.BatchNorm1d(n)),
        ("block", block(PcDEQLinear, n)),
        ("bn2", nn.BatchNorm1d(n)),
        ("classifier", nn.Linear(n, classes)),
    ]


def _single_conv(dataset: str, augment: bool, classes: int, block: Callable) -> list:
    c, h, w = DATASETS[dataset]
    n = SINGLE_CHANNELS[dataset]
    return [
        ("conv1", nn.Conv2d(c, n, 3, padding=1)),
        ("bn1", BatchNorm2d(n)),
        ("block", block(PcDEQConv2d, n)),
        ("maxpool", nn.MaxPool2d(3, stride=1, padding=1)),
        ("bn2", BatchNorm2d(n)),
        ("avgpool", nn.AvgPool2d(8)),
        ("flatten", Flatten()),  # (B, n·(H//8)·(W//8))
        ("classifier", nn.Linear(n * (h // 8) * (w // 8), classes)),
    ]


def _multi_conv(dataset: str, augment: bool, classes: int, block: Callable) -> list:
    c1, c2, c3 = MULTI_CHANNELS_AUGMENTED if augment else MULTI_CHANNELS[dataset]
    return [
        ("conv1", nn.Conv2d(DATASETS[dataset][0], c1, 3, padding=1)),
        ("bn1", BatchNorm2d(c1)),
        ("block1", block(PcDEQConv2d, c1)),
        ("maxpool1", nn.MaxPool2d(3, stride=1, padding=1)),
        ("bn2", BatchNorm2d(c1)),
        ("downsample1", nn.Conv2d(c1, c2, 3, stride=2)),
        ("bn3", BatchNorm2d(c2)),
        ("block2", block(PcDEQConv2d, c2)),
        ("maxpool2", nn.MaxPool2d(3, stride=1, padding=1)),
        ("bn4", BatchNorm2d(c2)),
        ("downsample2", nn.Conv2d(c2, c3, 3, stride=2)),
        ("bn5", BatchNorm2d(c3)),
        ("block3", block(PcDEQConv2d, c3)),
        ("maxpool3", nn.MaxPool2d(3, stride=1, padding=1)),
        ("bn6", BatchNorm2d(c3)),
        ("avgpool", nn.AvgPool2d(4)),
        ("flatten", nn.Flatten()),  # (B, c3): AvgPool2d leaves one pixel
        ("classifier", nn.Linear(c3, classes)),
    ]


def _builder(architecture: Callable, variant: int) -> Callable[..., Network]:
    name = f"{architecture.__name__.strip('_')}_pcdeq_{variant}"

    def build(
        activation: str = allowed(variant)[0],
        dataset: str = "mnist",
        augment: bool = False,
        classes: int = 10,
        **solver_options,
    ) -> Network:
        check_network(name, activation, dataset, augment, classes)

        def block(kind: type[PcDEQ], size: int) -> PcDEQ:
            return kind(size, activation=activation, **solver_options)

        layers = architecture(dataset, augment, classes, block)
        return Network(layers, name, activation, dataset, augment, classes)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""The network ``{name}``; arguments as for ``build_network``."""
    return build


linear_pcdeq_1 = _builder(_linear, 1)
linear_pcdeq_2 = _builder(_linear, 2)
single_conv_pcdeq_1 = _builder(_single_conv, 1)
single_conv_pcdeq_2 = _builder(_single_conv, 2)
multi_conv_pcdeq_1 = _builder(_multi_conv, 1)
multi_conv_pcdeq_2 = _builder(_multi_conv, 2)

NETWORKS: dict[str, Callable[..., Network]] = {
    build.__name__: build
    for build in (
        linear_pcdeq_1,
        linear_pcdeq_2,
        single_conv_pcdeq_1,
        single_conv_pcdeq_2,
        multi_conv_pcdeq_1,
        multi_conv_pcdeq_2,
    )
}


def build_network(
    name: str,
    activation: str,
    dataset: str = "mnist",
    augment: bool = False,
    classes: int = 10,
    **solver_options,
) -> Network:
    """Builds one of the six networks, freshly initialised from torch's global generator.

    Args:
        name: a key of ``NETWORKS``.
        activation: one that the variant allows: see ``activations.allowed``.
        dataset: ``"mnist"``, ``"svhn"`` or ``"cifar"``.
        augment: the wider multi-conv network for augmented CIFAR-10.
        classes: number of outputs.
        solver_options: ``solver``, ``precision``, ``tol``, ``max_iter`` of ``Equilibrium``.

    Raises:
        ValueError: there is no such network, or value of an option; the sentence says which there
            are.
        TypeError: there is no such option.
    """
    check_network(name, activation, dataset, augment, classes)
    return NETWORKS[name](activation, dataset, augment, classes, **solver_options)


def variant_of(name: str) -> int:
    """1 or 2: which pcDEQ the network of that name is."""
    return int(name[-1])


def check_network(
    name: str, activation: str, dataset: str, augment: bool = False, classes: int = 10
) -> None:
    """Refuses what is not one of the paper's networks.

    Raises:
        ValueError: one sentence that says what is wrong and what there is instead.
    """
    if name not in tuple(NETWORKS):  # a list is no key
        raise ValueError(f"unknown network {name!r}: choose from {', '.join(NETWORKS)}")
    if activation not in allowed(variant_of(name)):
        raise ValueError(
            f"{name} does not allow the activation {activation!r}: "
            f"choose from {', '.join(allowed(variant_of(name)))}"
        )
    check_dataset(dataset)
    if name.startswith("linear") and dataset != "mnist":
        raise ValueError(f"{name} is for mnist only: choose a conv network for {dataset}")
    if augment and not (name.startswith("multi_conv") and dataset == "cifar"):
        raise ValueError(
            f"augmentation is for the multi_conv networks on cifar, not for {name} on {dataset}"
        )
    if not isinstance(classes, Integral) or classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, not {classes!r}")


def check_dataset(name: str) -> None:
    """Refuses what is not one of the paper's data sets.

    Raises:
        ValueError: the sentence says which there are.
    """
    if name not in tuple(DATASETS):
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
