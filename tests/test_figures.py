"""Figures: the lines are the measured values, and a missing matplotlib is a sentence."""

import sys

import numpy as np
import pytest
import torch
from made_up import made_up_run
from matplotlib.figure import Figure

from pcdeq import build_network
from pcdeq.certificates import History, history
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.figures import (
    convergence_figure,
    result_figures,
    robustness_figure,
    run_figures,
)
from pcdeq.experiments.results import RECIPES, collect, read_metrics, read_results

LINEAR = RECIPES["mnist_linear_pcdeq_1_tanh"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test saves, each once, in order."""
    figures, save = [], Figure.savefig

    def keep(figure, path):
        if figure not in figures:
            figures.append(figure)
        save(figure, path, dpi=40)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def lines(axis) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in axis.get_lines()}


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
    with pytest.raises(RunError, match=r"complete epoch \(runs are in it: .*/\*\)"):
        run_figures([tmp_path], tmp_path / "figures")
    with pytest.raises(RunError, match=r"no run with a complete epoch$"):
        run_figures([tmp_path / "nowhere"], tmp_path / "figures")
    run_figures([tmp_path / "nowhere", tmp_path / "a"], tmp_path / "figures")
    assert "nowhere is no run with a complete epoch" in capsys.readouterr().out


def test_the_certified_rate_is_a_line_of_that_slope_above_the_tail(tmp_path, drawn):
    residuals = [0.5**k * (1 + 3 / k) for k in range(1, 61)]
    made_up = History("block", residuals, residuals, [2.0**-k for k in range(60)], 0.5, 1e-4)
    path = convergence_figure([made_up], tmp_path / "made_up")
    assert path.exists() and path.with_suffix(".pdf").exists()
    forward, _, width = drawn[0].axes
    measured, rate = (line.get_ydata() for line in forward.get_lines()[:2])
    assert len(measured) == len(rate) < 60  # what drowns in rounding is left out
    assert np.allclose(rate[1:] / rate[:-1], 0.5)
    half = len(rate) // 2
    assert (rate[half:] > measured[half:]).all() and rate[-1] < 4 * measured[-1]
    assert list(lines(width)["block"])[:3] == [1, 0.5, 0.25]
    assert forward.get_yscale() == width.get_yscale() == "log"


@pytest.mark.filterwarnings("ignore:Attempting to set identical")  # a tolerance, and nothing else
def test_a_block_without_a_rate_below_one_has_no_such_line(tmp_path, drawn):
    residuals = [1 / k for k in range(1, 61)]
    convergence_figure(
        [History("block", residuals, residuals, residuals, 1.2, 1e-4)], tmp_path / "a"
    )
    assert len(drawn[0].axes[0].get_lines()) == 1 + 1 + 2  # measured, tolerance, legend
    gone = [0.0] * 60  # in one step
    convergence_figure([History("block", gone, gone, residuals, 1e-20, 1e-4)], tmp_path / "b")
    assert len(drawn[1].axes[0].get_lines()) == 1 + 1 + 2


def test_the_histories_of_a_real_network_can_be_drawn(tmp_path, drawn):
    network = build_network("linear_pcdeq_1", "tanh")
    convergence_figure(history(network, torch.rand(4, 1, 28, 28)), tmp_path / "real")
    assert "block" in lines(drawn[0].axes[0])


def test_certified_and_attacked_accuracy_bracket_the_truth(tmp_path, drawn):
    rows = [
        {"radius": 0.01, "images": 10, "certified": 20.0, "attacked": 90.0, "contradictions": 0},
        {"radius": 0.0, "images": 10, "certified": 95.0, "attacked": 95.0, "contradictions": 0},
    ]
    robustness_figure(rows, tmp_path / "r")
    (axis,) = drawn[0].axes
    assert list(lines(axis)["certified"]) == [95, 20]
    assert list(lines(axis)["under attack"]) == [95, 90]
    assert "radius" in axis.get_xlabel() and "10 images" in axis.get_ylabel()


def test_a_missing_matplotlib_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made_up_run(tmp_path / "run", LINEAR, ran=1)
    with pytest.raises(RunError, match="pip install matplotlib"):
        run_figures([tmp_path / "run"], tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
