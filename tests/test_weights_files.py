"""The trained networks in ``weights/``: each is whole, is what its name says, and classifies."""

import hashlib
import threading
from pathlib import Path

import pytest
import torch
from made_up import made_up_run

from pcdeq import load_network
from pcdeq.experiments.data import load
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.evaluation import evaluate
from pcdeq.experiments.files import alone_in
from pcdeq.experiments.publish import publish, read_table
from pcdeq.experiments.results import RECIPES, from_run, read_results
from pcdeq.weights import IDENTITY, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights"
FILES = sorted(WEIGHTS.glob("*.pth"))
LINEAR, SIGMOID = (RECIPES[f"mnist_linear_pcdeq_{row}"] for row in ("1_tanh", "2_sigmoid"))


def test_the_table_lists_the_files_and_the_results_have_their_accuracies():
    table = read_table(WEIGHTS)
    assert table.keys() == {path.name for path in FILES}
    last = {
        result.row: result.test_acc[-1]
        for result in read_results(ROOT / "results")
        if result.genuine and result.whole and result.seed == 0
    }
    assert {f"{row}.pth": f"{accuracy:.2f}" for row, accuracy in last.items()} == {
        name: line["accuracy"] for name, line in table.items()
    }


def test_each_file_is_whole_and_is_the_network_that_it_names():
    for path in FILES:
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        assert sha == read_table(WEIGHTS)[path.name]["sha"], path.name
        recipe, content = RECIPES[path.stem], read_checkpoint(path)
        assert content.keys() == {*IDENTITY, "model"}
        network = load_network(path)
        assert (network.name, network.activation) == (recipe.net, recipe.activation)
        assert (network.dataset, network.augment) == (recipe.dataset, recipe.augment)
        assert all(p.dtype == torch.float32 for p in network.parameters())
        assert all(p.min() >= 0 for block in network.blocks for p in block.parameters())


def test_the_mnist_networks_classify_the_shipped_digits(tmp_path):
    digits = load("mnist", root=tmp_path, sample=True)[:2]
    for path in FILES:
        if path.stem.startswith("mnist_linear"):
            network = load_network(path)
            assert all(evaluate(network, part).accuracy >= 96 for part in digits), path.name


def test_only_the_first_seeds_whole_run_on_genuine_data_is_published(tmp_path):
    for changes in ({"seed": 1}, {"ran": 39}, {"image_folder": "digits"}):
        made_up_run(tmp_path / "run", LINEAR, **changes)
        assert publish(tmp_path / "run", from_run(tmp_path / "run"), tmp_path / "w") is None
    assert not (tmp_path / "w").exists()


def test_two_that_publish_at_once_take_turns(tmp_path):
    """Each reads the table and writes it anew: the other's line would be lost."""
    made_up_run(tmp_path / "run", LINEAR)
    (tmp_path / "w").mkdir()
    arguments = (tmp_path / "run", from_run(tmp_path / "run"), tmp_path / "w")
    thread = threading.Thread(target=publish, args=arguments)
    with alone_in(tmp_path / "w"):
        thread.start()
        thread.join(0.5)
        assert not list((tmp_path / "w").iterdir())
    thread.join()
    assert read_table(tmp_path / "w").keys() == {f"{LINEAR.name}.pth"}


def test_a_published_file_holds_the_last_weights_and_no_more(tmp_path):
    for recipe in (SIGMOID, LINEAR):
        network = made_up_run(tmp_path / "run", recipe)
        result = from_run(tmp_path / "run")
        path = publish(tmp_path / "run", result, tmp_path / "w")
        first = path.read_bytes()
        assert publish(tmp_path / "run", result, tmp_path / "w").read_bytes() == first
        loaded = load_network(path)
        for name, tensor in network.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert read_checkpoint(path).keys() == {*IDENTITY, "model"}
        line = read_table(tmp_path / "w")[path.name]
        assert line["accuracy"] == f"{result.test_acc[-1]:.2f}"
        assert line["sha"] == hashlib.sha256(first).hexdigest()
    assert list(read_table(tmp_path / "w")) == [f"{LINEAR.name}.pth", f"{SIGMOID.name}.pth"]


def test_weights_of_another_epoch_than_the_results_are_refused(tmp_path):
    made_up_run(tmp_path / "run", LINEAR)
    result = from_run(tmp_path / "run")
    metrics = (tmp_path / "run/metrics.csv").read_text()
    made_up_run(tmp_path / "run", LINEAR, ran=39)
    (tmp_path / "run/metrics.csv").write_text(metrics)
    with pytest.raises(RunError, match="not of epoch 40"):
        publish(tmp_path / "run", result, tmp_path / "w")
