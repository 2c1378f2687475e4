"""Curves against the epoch: the lines are the measured values."""

import numpy as np
import pytest
from drawings import lines
from made_up import made_up_run

from pcdeq.experiments.curves import result_figures, run_figures
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.results import RECIPES, collect, read_metrics, read_results

LINEAR = RECIPES["mnist_linear_pcdeq_1_tanh"]


def test_result_figures_show_the_means_and_the_spread_over_seeds(tmp_path, drawn):
    for recipe, seeds in ((LINEAR, 3), (RECIPES["mnist_multi_conv_pcdeq_2_sigmoid"], 1)):
        for seed in range(seeds):
            options = {"solver": "anderson"} if seeds == 1 else {}
            made_up_run(tmp_path / "run", recipe, seed, **options)
            collect(tmp_path / "run", tmp_path)
    for name, changes in {
        "svhn_multi_conv_pcdeq_1_tanh": {"image_folder": "x"},
        "cifar_multi_conv_pcdeq_1_tanh": {"ran": 2},  # cut short: no curve
    }.items():
        made_up_run(tmp_path / "run", RECIPES[name], **changes)
        collect(tmp_path / "run", tmp_path)
    results = read_results(tmp_path)
    paths = result_figures(results, tmp_path / "figures")
    assert [path.name for path in paths] == [
        "mnist_accuracy.png", "mnist_iterations.png", "svhn_accuracy.png", "svhn_iterations.png"
    ]  # fmt: skip
    assert all(path.stat().st_size > 1000 for path in paths)
    linear, multi = drawn[0].axes
    titles = ["MNIST, linear", "MNIST, multi conv, --solver anderson"]
    assert [linear.get_title(), multi.get_title()] == titles
    assert list(lines(multi)) == ["sigmoid (n = 1)"]
    lowest = min(result.test_acc[0] for result in results[:3])
    assert [text.get_text() for text in linear.texts] == [f"below the axis: down to {lowest:.1f} %"]
    assert (linear.get_xlabel(), linear.get_ylabel()) == ("epoch", "test accuracy, %")
    mean = np.mean([result.test_acc for result in results[:3]], axis=0)
    assert np.allclose(lines(linear)["tanh (n = 3)"], mean)
    (band,) = linear.collections
    spread = np.std([result.test_acc[-1] for result in results[:3]], ddof=1)
    edges = band.get_paths()[0].vertices
    assert edges[edges[:, 0] == 40][:, 1].max() == pytest.approx(mean[-1] + spread)
    assert not multi.collections  # one seed has no spread
    assert np.allclose(lines(drawn[1].axes[0])["tanh (n = 3)"], results[0].forward_iters)
    assert "tanh † (n = 1)" in lines(drawn[2].axes[0])


def test_run_figures_show_the_metrics(tmp_path, drawn, capsys):
    made_up_run(tmp_path / "a", LINEAR)
    made_up_run(tmp_path / "b", LINEAR, seed=1, ran=1)
    paths = run_figures([tmp_path / "a", tmp_path / "b"], tmp_path / "figures")
    assert [path.name for path in paths] == ["curves.png", "iterations.png"]
    assert all(path.exists() and path.with_suffix(".pdf").exists() for path in paths)
    accuracy, loss = drawn[0].axes
    assert list(lines(accuracy)["a"]) == [row["test_acc"] for row in read_metrics(tmp_path / "a")]
    assert loss.get_yscale() == "log" and (loss.get_lines()[1].get_ydata() == 0.1).all()
    assert drawn[1].axes[0].get_lines()[1].get_ydata()[-1] == 9.0
    test, training = drawn[0].legends[0].legend_handles[:2]
    assert test.get_marker() == training.get_marker() == "o"  # as b is of one epoch
    assert test.get_markerfacecolor() != training.get_markerfacecolor() == "none"
    for name in ("_hidden", "$lr=10^-3$"):
        (tmp_path / "a").rename(tmp_path / name)
        run_figures([tmp_path / name], tmp_path / "figures")
        (tmp_path / name).rename(tmp_path / "a")
        (shown,) = drawn[-2].legends[0].texts[2:]
        assert shown.get_text().strip().replace("\\", "") == name
    with pytest.raises(RunError, match=r"complete epoch \(runs are in it: .*/\*\)"):
        run_figures([tmp_path], tmp_path / "figures")
    with pytest.raises(RunError, match=r"no run with a complete epoch$"):
        run_figures([tmp_path / "nowhere"], tmp_path / "figures")
    run_figures([tmp_path / "nowhere", tmp_path / "a"], tmp_path / "figures")
    assert "nowhere is no run with a complete epoch" in capsys.readouterr().out
    assert drawn[-2].legends[0].legend_handles[0].get_marker() == "None"
