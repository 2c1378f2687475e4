"""The 32 rows: the paper's recipes, in its order, each a network that can be built."""

from inspect import signature

import pytest

from pcdeq import Equilibrium
from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.recipes import DEFAULTS, ROWS, default_activation
from pcdeq.implicit import OPTIONS
from pcdeq.networks import NETWORKS, check_network

# lr, epochs, weight decay, batch size, milestone
PAPER = {
    "mnist": (5e-4, 40, 1.5e-2, 64, 30),
    "svhn": (5e-4, 80, 2e-2, 64, 70),
    "cifar": (5e-4, 120, 2e-2, 64, 100),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_row_is_a_network_with_its_data_sets_recipe(row):
    check_network(row.net, row.activation, row.dataset, row.augment)
    settings = (row.lr, row.epochs, row.weight_decay, row.batch_size, row.milestone)
    assert settings == PAPER[row.dataset]


def test_the_rows_are_32_in_the_papers_order():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) == 32
    assert names[:4] == [
        "mnist_linear_pcdeq_1_tanh",
        "mnist_linear_pcdeq_1_softsign",
        "mnist_linear_pcdeq_1_relu6",
        "mnist_linear_pcdeq_2_sigmoid",
    ]
    assert names[-1] == "cifar_multi_conv_pcdeq_2_sigmoid_aug"
    counted = [(row.dataset, row.augment) for row in ROWS]
    assert [counted.count((d, False)) for d in DEFAULTS] == [12, 8, 8]
    assert counted.count(("cifar", True)) == 4
    assert counted == sorted(counted, key=[*dict.fromkeys(counted)].index)  # none interleaved
    kinds = [row.net.partition("_pcdeq")[0] for row in ROWS[:12]]
    assert kinds == ["linear"] * 4 + ["single_conv"] * 4 + ["multi_conv"] * 4


def test_the_programs_solve_by_default_as_the_layer_does():
    _, *options = signature(Equilibrium).parameters.items()
    assert tuple(name for name, _ in options) == OPTIONS
    for name, parameter in options:
        assert getattr(RunConfig, name) == parameter.default


def test_default_activations():
    assert {net: default_activation(net) for net in NETWORKS} == {
        net: "tanh" if net.endswith("1") else "sigmoid" for net in NETWORKS
    }
