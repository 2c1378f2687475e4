"""Figures: the lines are the measured values, and a missing matplotlib is a sentence."""

import math
import sys

import numpy as np
import pytest
import torch
from drawings import legend_of, lines

from pcdeq import build_network
from pcdeq.experiments.convergence import History, history
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.figures import convergence_figure, robustness_figure


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
    assert len(drawn[0].axes[0].get_lines()) == 1 + 1  # measured, tolerance
    gone = [0.0] * 60  # in one step
    convergence_figure([History("block", gone, gone, residuals, 1e-20, 1e-4)], tmp_path / "b")
    assert len(drawn[1].axes[0].get_lines()) == 1 + 1 + 1  # and what is dashed, in the legend


def test_a_block_without_a_certificate_has_no_width_and_says_so(tmp_path, drawn):
    residuals = [0.5**k for k in range(1, 61)]
    proved = History("block1", residuals, residuals, [1, 0.5], 0.5, 1e-4)
    broken = History("block2", residuals, residuals, [], math.inf, 1e-4)
    convergence_figure([proved, broken], tmp_path / "one")
    forward, _, width = drawn[0].axes
    assert [text.get_text() for text in width.texts] == ["no certificate of block2"]
    assert "block1" in lines(width) and len(lines(width).get("block2", [])) == 0
    assert "certified rate (slope)" in lines(forward)
    convergence_figure([broken], tmp_path / "none")
    assert "certified rate (slope)" not in lines(drawn[1].axes[0])


def test_the_histories_of_a_real_network_can_be_drawn(tmp_path, drawn):
    network = build_network("linear_pcdeq_1", "tanh")
    convergence_figure(history(network, torch.rand(4, 1, 28, 28)), tmp_path / "real")
    assert legend_of(drawn[0]) == ["certified rate (slope)", "measured", "tolerance"]
    convergence_figure(2 * history(network, torch.rand(4, 1, 28, 28)), tmp_path / "two")
    assert legend_of(drawn[1])[:3] == ["measured", "certified rate (slope)", "block"]


def test_certified_and_attacked_accuracy_bracket_the_truth(tmp_path, drawn):
    rows = [
        {"radius": 0.01, "images": 10, "certified": 20.0, "attacked": 90.0, "contradictions": 0},
        {"radius": 0.0, "images": 10, "certified": 95.0, "attacked": 95.0, "contradictions": 0},
    ]
    robustness_figure(rows, tmp_path / "r")
    (axis,) = drawn[0].axes
    assert list(lines(axis)["certified"]) == [95, 20]
    assert list(lines(axis)["under attack"]) == [95, 90]
    steps = {line.get_label(): line.get_drawstyle() for line in axis.get_lines()}
    assert steps == {"certified": "steps-pre", "under attack": "steps-post"}
    (band,) = axis.collections  # at 0.005: what the larger box proves, what the smaller one broke
    assert {y for _, y in band.get_paths()[0].vertices} == {20, 95}
    assert "radius" in axis.get_xlabel() and "10 images" in axis.get_ylabel()


def test_a_missing_matplotlib_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = {"radius": 0.01, "images": 10, "certified": 20.0, "attacked": 90.0}
    with pytest.raises(RunError, match="pip install matplotlib"):
        robustness_figure([row], tmp_path / "figures" / "r")
    assert not (tmp_path / "figures").exists()
