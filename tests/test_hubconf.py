"""The networks through torch.hub, from a clone and without a download."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from made_up import made_up_run

from pcdeq import NETWORKS
from pcdeq.experiments.publish import publish
from pcdeq.experiments.results import RECIPES, from_run

ROOT = Path(__file__).resolve().parents[1]
ROW = RECIPES["mnist_linear_pcdeq_1_softsign"]


@pytest.fixture
def clone(tmp_path):
    """A clone with the trained weights of one row."""
    shutil.copy(ROOT / "hubconf.py", tmp_path)
    network = made_up_run(tmp_path / "run", ROW)
    publish(tmp_path / "run", from_run(tmp_path / "run"), tmp_path / "weights")
    return tmp_path, network


def load(clone: Path, name: str, **options):
    return torch.hub.load(str(clone), name, source="local", **options)


def test_the_entry_points_are_the_six_networks_and_the_list_of_weights():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    public = {name for name in vars(hubconf) if not name.startswith("_")}
    assert public == {*NETWORKS, "trained", "dependencies"}  # torch.hub lists what is callable
    assert hubconf.dependencies == ["torch"]
    assert "linear_pcdeq_2" in hubconf.linear_pcdeq_2.__doc__
    assert hubconf.trained() == sorted(path.stem for path in (ROOT / "weights").glob("*.pth"))


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_comes_by_its_name(name):
    torch.manual_seed(0)
    network = load(ROOT, name, dataset="mnist")
    assert network.name == name and not network.training
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_options_reach_the_network():
    network = load(
        ROOT,
        "multi_conv_pcdeq_1",
        activation="relu6",
        dataset="cifar",
        augment=True,
        solver="anderson",
        classes=7,
    )
    assert (network.activation, network.dataset, network.augment) == ("relu6", "cifar", True)
    assert network.classes == 7 and network.blocks[0].deq.solver == "anderson"


def test_trained_weights_are_loaded(clone):
    folder, network = clone
    loaded = load(folder, "linear_pcdeq_1", activation="softsign", pretrained=True)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "name, options",
    [
        ("linear_pcdeq_1", {"activation": "tanh"}),
        ("linear_pcdeq_2", {}),
        ("multi_conv_pcdeq_1", {"activation": "softsign", "dataset": "cifar", "augment": True}),
    ],
)
def test_a_row_without_weights_is_refused_and_those_with_are_listed(clone, name, options):
    with pytest.raises(ValueError, match=f"no trained weights for .*{name}.*{ROW.name}"):
        load(clone[0], name, pretrained=True, **options)


@pytest.mark.parametrize(
    "option, value", [("activation", "sigmoid"), ("activation", "gelu"), ("dataset", "svhn")]
)
def test_what_is_no_network_is_refused(option, value):
    with pytest.raises(ValueError, match=value):
        load(ROOT, "linear_pcdeq_1", **{option: value})
