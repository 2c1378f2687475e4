"""The data of the convergence picture: residuals and widths, evaluation by evaluation."""

import copy
import math

import pytest
import torch
from torch import nn
from truth import digits, trained

from pcdeq import PcDEQLinear, certify
from pcdeq.experiments.convergence import history

NETS = [
    ("linear_pcdeq_1", "tanh"),
    ("linear_pcdeq_2", "sigmoid"),
    ("multi_conv_pcdeq_2", "sigmoid"),
]


@pytest.mark.parametrize("name, activation", NETS)
def test_histories_fall_at_the_certified_rate(name, activation):
    model = trained(name, activation, 12 if "conv" in name else 250)
    images = digits()[2][:10]
    done = []
    histories = history(model, images, steps=40, after_step=lambda: done.append(1))
    assert len(done) == 2 * 40 * len(histories)
    certificates = certify(model, images)
    assert [h.name for h in histories] == [c.name for c in certificates]
    for h in histories:
        assert len(h.forward) == len(h.backward) == 40 and len(h.width) == 41
        assert h.width[0] == 1 and h.width == sorted(h.width, reverse=True)
        assert h.width[-1] < 1e-6 and h.forward[-1] < 1e-7 and h.backward[-1] < 1e-7
        assert h.tol == 1e-4 and 0 < h.rate < 1
        for residuals in (h.forward, h.backward):
            tail = [r for r in residuals if r > 1e-11][-6:]
            ratio = (tail[-1] / tail[0]) ** (1 / (len(tail) - 1))
            assert ratio < h.rate * 1.02


def test_the_tolerance_is_the_one_that_the_precision_has():
    model = copy.deepcopy(trained("linear_pcdeq_2", "sigmoid"))
    model.block.deq.precision = "bf16"
    assert history(model, digits()[2][:20], steps=3)[0].tol == 2**-8


def test_the_network_runs_once_and_is_left_as_it_was():
    block, seen = PcDEQLinear(6), []
    block.deq.register_forward_hook(lambda *_: seen.append(block.training))
    history(nn.Sequential(block), torch.rand(4, 6), steps=2)
    assert seen == [False] and block.training


def test_without_the_theorem_nothing_is_enclosed():
    model = nn.Sequential(PcDEQLinear(2, activation="softsign"))
    with torch.no_grad():
        model[0].deq.f.W.weight_v[:] = torch.tensor([[0.9, 0.4], [-0.9, 0.2]])
        model[0].deq.f.W.weight_g[:] = torch.tensor([[0.9], [1.2]])
    h = torch.tensor([[0.5, -0.5]])
    (found,) = history(model, h, steps=60)
    assert found.width == [] and found.rate == math.inf
    block = copy.deepcopy(model[0]).double()
    block.deq.tol = 1e-13
    slopes = block.activation.derivative(block(h.double()))
    rate = torch.linalg.eigvals(slopes.mT * block.deq.f.W.weight()).abs().max().item()
    for residuals in (found.forward, found.backward):
        shown = [r for r in residuals if r > 1e-13]
        assert (shown[-1] / shown[-11]) ** (1 / 10) == pytest.approx(rate, rel=0.05)


def test_what_has_no_history_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        history(nn.Sequential(PcDEQLinear(3)), torch.rand(0, 3))
    with pytest.raises(ValueError, match="no pcDEQ block"):
        history(nn.Linear(3, 3), torch.rand(2, 3))
