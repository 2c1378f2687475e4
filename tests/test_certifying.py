"""Certificates and proved accuracy over a set: summed up batch by batch."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from truth import few, trained

from pcdeq import certify, robust
from pcdeq.experiments import certifying
from pcdeq.experiments.certifying import (
    boxes,
    certify_set,
    format_certificates,
    format_robustness,
    robust_accuracy,
)
from pcdeq.experiments.evaluation import evaluate


def test_summaries_are_those_of_the_certificates():
    model, images = trained("linear_pcdeq_1", "softsign"), few(70)
    (summary,) = certify_set(model, images, batch_size=20)
    parts = [certify(model, images.batch(slice(i, i + 20))[0])[0] for i in range(0, 70, 20)]
    assert summary["block"] == "block" and summary["images"] == 70 and summary["holds"]
    assert summary["reasons"] == {}
    for name, key in (("width", "width"), ("error", "error"), ("predicted", "predicted")):
        assert summary[key] == max(getattr(c, name).max().item() for c in parts)
    assert summary["rate_worst"] == max(c.rate_upper.max().item() for c in parts)
    rates = torch.cat([c.rate_upper for c in parts]).sort().values
    assert summary["rate_median"][1] == pytest.approx((rates[34] + rates[35]).item() / 2)
    assert summary["observed"] == max(c.observed for c in parts)
    assert json.loads(json.dumps([summary], allow_nan=False)) == [summary]


def test_a_set_with_a_violation_says_so(monkeypatch):
    model, images = trained("linear_pcdeq_1", "softsign"), few(40)
    inject = model.block.inject

    def spoilt(h):
        x = inject(h)
        x[3, 7] = 0
        return x

    monkeypatch.setattr(model.block, "inject", spoilt)
    (summary,) = certify_set(model, images, batch_size=20)
    assert not summary["holds"] and summary["rate_worst"] is None and summary["predicted"] is None
    assert sum(summary["reasons"].values()) == 2
    json.dumps(summary, allow_nan=False)
    table = format_certificates([summary])
    assert "NO" in table
    assert "block, 2 batches: 1 of 1600 injected values not positive, the first at (3, 7)" in table


def test_boxes_are_clipped_before_the_normalisation():
    images = few(30)
    svhn = replace(images, mean=(0.25,), std=(0.5,))
    lower, upper = boxes(svhn, slice(0, 30), 0.01)
    pixels = images.images[:30].double() / 255
    low, high = lower * 0.5 + 0.25, upper * 0.5 + 0.25
    torch.testing.assert_close(low, (pixels - 0.01).clamp(min=0), rtol=0, atol=1e-15)
    torch.testing.assert_close(high, (pixels + 0.01).clamp(max=1), rtol=0, atol=1e-15)
    x, _ = svhn.batch(slice(0, 30))
    assert (lower - 1e-6 <= x).all() and (x <= upper + 1e-6).all()


def test_certified_and_attacked_accuracy_bracket_the_truth():
    model, images = trained("linear_pcdeq_2", "sigmoid"), few(200)
    rows = robust_accuracy(model, images, [0.001, 0.01, 0.05], batch_size=80, steps=10)
    clean = evaluate(model, images).accuracy
    for row in rows:
        assert 0 <= row["certified"] <= row["attacked"] <= clean
        assert row["contradictions"] == 0 and row["images"] == 200
    certified, attacked = ([row[key] for row in rows] for key in ("certified", "attacked"))
    assert certified == sorted(certified, reverse=True) and certified[0] > certified[-1]
    assert attacked == sorted(attacked, reverse=True) and attacked[0] > attacked[-1]
    lower, upper = boxes(images, slice(None), 0.01)
    assert certified[1] == 100 * robust(model, lower, upper, images.labels).double().mean()
    assert re.search(rf"0\.01 +{certified[1]:.2f} % +{attacked[1]:.2f} %", format_robustness(rows))
    assert "warning" not in format_robustness(rows)
    rows[1]["contradictions"] = 2
    assert "warning: 2 proved and broken all the same" in format_robustness(rows)


@pytest.mark.parametrize("first", [0, 1])
def test_a_figure_that_is_not_known_of_a_batch_is_not_known_of_the_set(first, monkeypatch):
    model, images = trained("linear_pcdeq_1", "softsign"), few(40)
    parts, calls = certifying._figures, []

    def spoilt(certificate):
        calls.append(certificate)
        unknown = {"error": [math.nan] * 20, "smallest_injected": math.nan}
        return parts(certificate) | (unknown if len(calls) == first + 1 else {})

    monkeypatch.setattr(certifying, "_figures", spoilt)
    (summary,) = certify_set(model, images, batch_size=20)
    assert summary["error"] is None and summary["smallest_injected"] is None
    assert summary["width"] > 0


def test_one_image_is_enough():
    (summary,) = certify_set(trained("linear_pcdeq_1", "tanh"), few(1))
    assert summary["images"] == 1 and summary["holds"]
