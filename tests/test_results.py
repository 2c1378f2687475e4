"""Result files: what is taken in, what is refused, and that the printed command is the run's."""

import json
import shlex

import pytest
from made_up import made_up_run

from pcdeq.experiments import cli
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.recipes import ROWS
from pcdeq.experiments.results import (
    RECIPES,
    collect,
    find_runs,
    from_run,
    read_metrics,
    read_results,
)

LINEAR = RECIPES["mnist_linear_pcdeq_1_tanh"]
AUGMENTED = RECIPES["cifar_multi_conv_pcdeq_1_relu6_aug"]


def test_a_result_says_what_the_run_did(tmp_path):
    made_up_run(tmp_path / "run", LINEAR, seed=3, precision="mixed", threads=2)
    result = collect(tmp_path / "run", tmp_path / "results")
    metrics = read_metrics(tmp_path / "run")
    assert result.test_acc == [row["test_acc"] for row in metrics]
    assert (len(metrics), result.epochs, result.epochs_run, result.whole) == (40, 40, 40, True)
    assert (result.forward_iters[-1], result.backward_iters[-1]) == (12.0, 9.0)
    assert (result.seconds, result.parameters, result.seed) == (80.0, 70410, 3)
    assert (result.device, result.processor, result.threads) == ("cpu", "Slide rule", 2)
    assert result.options == {
        "solver": "picard", "precision": "mixed", "tol": 1e-4, "max_iter": 200,
        "processes": 1, "tf32": False,
    }  # fmt: skip
    assert result.versions.keys() == {"python", "torch", "torchvision", "pcdeq"}
    assert result.genuine and result.data == "torchvision"
    path = tmp_path / "results" / "mnist_linear_pcdeq_1_tanh_seed3.json"
    assert json.loads(path.read_text()) == vars(result)
    assert path.stat().st_size < 4096
    assert read_results(tmp_path / "results") == [result]


@pytest.mark.parametrize(
    "recipe, changes",
    [
        (LINEAR, {}),
        (LINEAR, {"solver": "anderson", "max_iter": 50, "seed": 4}),
        (AUGMENTED, {"precision": "bf16", "tol": 1e-3}),
        (RECIPES["svhn_single_conv_pcdeq_2_sigmoid"], {"image_folder": "digits", "ran": 2}),
    ],
)
def test_the_printed_command_is_the_run(tmp_path, monkeypatch, recipe, changes):
    monkeypatch.chdir(tmp_path)  # the clone may hold such a run
    made_up_run(tmp_path / "run", recipe, threads=3, **changes)
    result = from_run(tmp_path / "run")
    threads, python, script, *flags = shlex.split(result.command)
    assert (threads, python) == ("OMP_NUM_THREADS=3", "python")
    assert script == f"train_{recipe.dataset}.py"
    config = cli.parse(recipe.dataset, flags, augmentation=recipe.dataset == "cifar")
    made = json.loads((tmp_path / "run/config.json").read_text())
    for key, value in config.identity().items():
        assert value == made[key], key
    assert config.epochs == result.epochs_run


def test_several_processes_are_named_in_the_command(tmp_path):
    made_up_run(tmp_path / "run", LINEAR, device="cuda", processes=4)
    assert from_run(tmp_path / "run").command.startswith(
        "torchrun --nproc-per-node 4 train_mnist.py -net linear_pcdeq_1 "
    )


def test_a_run_that_moved_names_both_machines(tmp_path):
    made_up_run(tmp_path / "run", LINEAR)
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"earlier": [config | {"device_name": "Abacus"}]}))
    assert from_run(tmp_path / "run").processor == "Abacus and Slide rule"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"sample": True}, "sample"),
        ({"lr": 1e-3}, "lr 0.001 is not the recipe's 0.0005"),
        ({"weight_decay": 0.0}, "weight_decay"),
        ({"batch_size": 128}, "batch_size"),
        ({"milestone": 40}, "milestone"),
        ({"ran": 41}, "41 epochs"),
        ({"net": "linear_pcdeq_2"}, "none of the paper's rows"),
        ({"tf32": None}, "does not say"),
        ({"parameters": 69_762}, "another number of classes"),
    ],
)
def test_what_is_no_row_of_the_paper_is_refused(tmp_path, changes, why):
    made_up_run(tmp_path / "run", LINEAR, **changes)
    with pytest.raises(RunError, match=why):
        collect(tmp_path / "run", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_run_without_an_epoch_or_with_damaged_metrics_is_refused(tmp_path):
    made_up_run(tmp_path / "run", LINEAR)
    metrics = tmp_path / "run/metrics.csv"
    for text in (metrics.read_text() + "41,x\n", metrics.read_text().replace("test_acc", "acc")):
        metrics.write_text(text)
        with pytest.raises(RunError, match="run"):
            from_run(tmp_path / "run")
    metrics.unlink()
    with pytest.raises(RunError, match="0 epochs"):
        from_run(tmp_path / "run")


def test_the_same_run_again_changes_nothing_and_another_is_refused(tmp_path):
    made_up_run(tmp_path / "a", LINEAR)
    made_up_run(tmp_path / "b", LINEAR, device_name="Abacus")
    result = collect(tmp_path / "a", tmp_path)
    assert collect(tmp_path / "a", tmp_path) == result
    with pytest.raises(RunError, match="another run of this row and seed"):
        collect(tmp_path / "b", tmp_path)
    assert read_results(tmp_path) == [result]


def test_a_longer_run_replaces_one_that_was_cut_short_and_no_other_does(tmp_path):
    stands = 0
    for epochs in (5, 3, 5, 7, 40, 39):
        made_up_run(tmp_path / "run", LINEAR, ran=epochs, device_name=f"machine of {epochs}")
        if epochs > stands:
            assert collect(tmp_path / "run", tmp_path).whole == (epochs == 40)
            stands = epochs
        elif epochs < stands:
            with pytest.raises(RunError, match="another run"):
                collect(tmp_path / "run", tmp_path)
        assert [result.epochs_run for result in read_results(tmp_path)] == [stands]


def test_an_image_folder_has_a_result_of_its_own(tmp_path):
    for name, changes in (("genuine", {}), ("folder", {"image_folder": "digits"})):
        made_up_run(tmp_path / name, LINEAR, **changes)
        collect(tmp_path / name, tmp_path)
    stem = "mnist_linear_pcdeq_1_tanh"
    assert {path.name for path in tmp_path.glob("*.json")} == {
        f"{stem}_seed0.json", f"{stem}_folder_seed0.json"
    }  # fmt: skip
    assert [result.genuine for result in read_results(tmp_path)] == [True, False]


def test_results_come_in_the_papers_order_and_seed_by_seed(tmp_path):
    wanted = [(ROWS[29], 1), (ROWS[12], 10), (ROWS[12], 9), (ROWS[0], 0)]
    for recipe, seed in wanted:
        made_up_run(tmp_path / "run", recipe, seed)
        collect(tmp_path / "run", tmp_path)
    found = [(result.row, result.seed) for result in read_results(tmp_path)]
    assert found == [
        (recipe.name, seed)
        for recipe, seed in [(ROWS[0], 0), (ROWS[12], 9), (ROWS[12], 10), (ROWS[29], 1)]
    ]


def test_a_damaged_or_misnamed_result_is_named(tmp_path):
    made_up_run(tmp_path / "run", LINEAR)
    collect(tmp_path / "run", tmp_path)
    (good,) = tmp_path.glob("*.json")
    text = good.read_text()
    fields = json.loads(text)
    changes = ({"options": {}}, {"test_acc": []}, {"epochs_run": "x"}, {"seconds": None})
    changes += ({"test_acc": [None] * len(fields["test_acc"])}, {"versions": {}})
    typed = [json.dumps(fields | change) for change in changes]
    foreign = text.replace('"row": "mnist', '"row": "cifar')
    for damaged in (text[:-20], "{}", "[]", foreign, *typed):
        good.write_text(damaged)
        with pytest.raises(RunError, match=good.name):
            read_results(tmp_path)
    good.write_text(text)
    good.rename(tmp_path / "mnist_linear_pcdeq_1_tanh_seed7.json")
    with pytest.raises(RunError, match="holds the result of"):
        read_results(tmp_path)


def test_runs_are_found_in_places_and_one_level_below(tmp_path):
    for name in ("x/b", "x/a", "y"):
        made_up_run(tmp_path / name, LINEAR, ran=1)
    found = find_runs([tmp_path / "x", tmp_path / "y"])
    assert found == [tmp_path / "x/a", tmp_path / "x/b", tmp_path / "y"]
    with pytest.raises(RunError, match="holds no run"):
        find_runs([tmp_path / "y", tmp_path / "nowhere"])
