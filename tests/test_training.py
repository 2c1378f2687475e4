"""Runs: equal from one seed, exact after a resume, stopped by what is not finite and by signals."""

import csv
import json
import math
import signal
from dataclasses import replace

import pytest
import torch
from processes import same, weights
from small_runs import config_of, overflow

from pcdeq import build_network
from pcdeq.experiments import certifying, data, runs, training
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.signals import Interrupted
from pcdeq.experiments.trainer import Trainer
from pcdeq.experiments.training import train
from pcdeq.weights import CheckpointError

pytestmark = pytest.mark.usefixtures("digits")


def metrics(folder):
    """The rows of ``metrics.csv``, without the time."""
    with open(folder / runs.METRICS, newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_run_leaves_its_folder(tmp_path, capsys):
    config = config_of(tmp_path / "run", epochs=3)
    result = train(config)
    out = capsys.readouterr().out.splitlines()
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == runs.COLUMNS
    assert [float(row["lr"]) for row in rows] == [5e-4, 5e-4, 5e-5]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert float(rows[2]["train_loss"]) < float(rows[0]["train_loss"])
    assert all(5 < float(row["test_acc"]) < 100 and float(row["seconds"]) > 0 for row in rows)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["parameters"] == 70410 and written["data"] == "sample"
    assert written["versions"]["torch"] == torch.__version__
    assert written["threads"] == torch.get_num_threads() and written["processes"] == 1
    best = max(result.rows, key=lambda row: row["test_acc"])
    assert out[-1] == (
        f"best {best['test_acc']:.2f} % (epoch {best['epoch']}), "
        f"last {result.rows[-1]['test_acc']:.2f} %: {config.folder}"
    )
    assert "70,410 parameters" in out[0] and "640 training and 250 test images" in out[1]
    assert len(out) == 2 + 1 + 3 + 1  # the network, the header, the epochs, the end
    train(config_of(tmp_path / "short", epochs=1, milestone=1))
    assert (
        "note: the learning rate never falls: -m 1 is not below -epochs" in capsys.readouterr().out
    )
    train(config_of(tmp_path / "low", epochs=1, precision="bf16"))
    said = capsys.readouterr().out
    assert "note: solves end at 0.00390625, as --tol 0.0001 is beyond their precision" in said
    last = torch.load(config.folder / "last.pth", weights_only=True)
    assert last["network"] == "linear_pcdeq_1" and last["classes"] == 10
    assert min(last["model"][f"block.deq.f.W.weight_{part}"].min() for part in "gv") >= 0


def test_the_first_parameters_are_those_of_the_seed(tmp_path, monkeypatch):
    seen = {}

    def note(trainer, *arguments):
        seen.update({k: v.clone() for k, v in trainer.network.state_dict().items()})
        raise RunError("enough")

    monkeypatch.setattr(training, "_train_and_test", note)
    with pytest.raises(RunError, match="enough"):
        train(config_of(tmp_path, seed=11))
    torch.manual_seed(11)
    assert same(seen, build_network("linear_pcdeq_1", "tanh").state_dict())


def test_one_seed_one_result(tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        train(config_of(tmp_path / name, seed=seed, epochs=2))
    one, again, other = (weights(tmp_path / n / "last.pth") for n in ("one", "again", "other"))
    assert same(one, again) and not same(one, other)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "again") != metrics(tmp_path / "other")


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, capsys):
    train(config_of(tmp_path / "whole"))
    for epochs in (1, 3, 4):  # across the milestone; raising -epochs is allowed
        train(config_of(tmp_path / "parts", epochs=epochs, resume=True))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for name in ("last.pth", "best.pth"):
        assert same(weights(tmp_path / "parts" / name), weights(tmp_path / "whole" / name))
    last = [
        torch.load(tmp_path / run / "last.pth", weights_only=True) for run in ("parts", "whole")
    ]
    moments = [checkpoint["training"]["optimizer"]["state"] for checkpoint in last]
    assert all(same(moments[0][index], moments[1][index]) for index in moments[1])
    capsys.readouterr()


def test_a_finished_run_says_so_and_reads_nothing(tmp_path, monkeypatch, capsys):
    train(config_of(tmp_path, epochs=1))
    before = (tmp_path / "last.pth").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(data, "load", None)
    result = train(config_of(tmp_path, epochs=1, resume=True))
    assert capsys.readouterr().out.startswith("finished already, after 1 epoch: best ")
    assert len(result.rows) == 1 and (tmp_path / "last.pth").read_bytes() == before


def test_a_lost_best_checkpoint_is_said(tmp_path, monkeypatch, capsys):
    accuracies = iter([90.0, 80.0, 85.0, 95.0])
    plain = training.evaluate
    monkeypatch.setattr(
        training, "evaluate", lambda *a, **k: replace(plain(*a, **k), accuracy=next(accuracies))
    )
    train(config_of(tmp_path, epochs=2))
    (tmp_path / "best.pth").unlink()
    train(config_of(tmp_path, epochs=3, resume=True))
    assert "best.pth is gone" in capsys.readouterr().out
    assert not (tmp_path / "best.pth").exists()
    train(config_of(tmp_path, epochs=4, resume=True))
    assert same(weights(tmp_path / "best.pth"), weights(tmp_path / "last.pth"))


def test_a_checkpoint_of_another_class_count_is_refused(tmp_path, monkeypatch):
    train(config_of(tmp_path, epochs=1))
    load = data.load
    monkeypatch.setattr(data, "load", lambda *a, **k: (*load(*a, **k)[:2], 12))
    with pytest.raises(CheckpointError, match=r"last\.pth: its classes is 10, not 12"):
        train(config_of(tmp_path, resume=True))


def test_an_optimizer_of_another_make_is_refused(tmp_path):
    train(config_of(tmp_path, epochs=1))
    for foreign in (
        {"state": {}, "param_groups": []},
        {"mine": 1},
        {"state": 3, "param_groups": 4},
    ):
        checkpoint = torch.load(tmp_path / "last.pth", weights_only=True)
        checkpoint["training"]["optimizer"] = foreign
        torch.save(checkpoint, tmp_path / "last.pth")
        with pytest.raises(CheckpointError, match=r"last\.pth does not fit this run"):
            train(config_of(tmp_path, resume=True))


# What stops a run


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("linear1", "epoch 2, step 3: the forward solve of block is not finite"),
        ("classifier", "epoch 2, step 3: the loss is (nan|inf), though every forward solve"),
        ("backward", "epoch 2, step 3: the backward solve of block is not finite"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(
    tmp_path, monkeypatch, where, sentence
):
    train(config_of(tmp_path / "good", epochs=1))
    plain, count = Trainer.step, iter(range(1, 100))

    def poisoned(trainer, x, y, share):
        if next(count) == 13:  # ten steps an epoch
            if where == "backward":
                trainer.network.bn2.register_forward_hook(overflow)
            else:
                torch.nn.init.constant_(trainer.network.get_submodule(where).bias, math.inf)
                trainer.network.get_submodule(where).bias.data[0] = math.nan
        return plain(trainer, x, y, share)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(RunError, match=sentence + ".*; .*run up to epoch 1$"):
        train(config_of(tmp_path / "run"))
    for name in ("last.pth", "best.pth"):
        assert same(weights(tmp_path / "run" / name), weights(tmp_path / "good" / name))
    assert len(metrics(tmp_path / "run")) == 1


def test_an_epoch_that_ends_in_a_poisoned_step_is_not_kept(tmp_path, monkeypatch):
    """The last step's gradient can overflow while its loss was finite: the test pass tells."""
    plain = training.evaluate
    monkeypatch.setattr(
        training, "evaluate", lambda *a, **k: replace(plain(*a, **k), loss=math.nan)
    )
    with pytest.raises(RunError, match="epoch 1: the loss on the test set is nan; no epoch"):
        train(config_of(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_unconverged_solves_are_counted_and_warned_of_once_an_epoch(tmp_path, capsys):
    result = train(config_of(tmp_path, epochs=2, max_iter=1))
    assert [row["unconverged"] for row in result.rows] == [20, 20]  # ten steps, both directions
    out = capsys.readouterr().out
    assert out.count("warning: ") == 2
    assert "the tolerance was not reached in 20 of the solves of epoch 2 (--max-iter 1)" in out


def test_a_last_batch_of_one_image_is_left_out_and_said_once(tmp_path, digits, capsys):
    digits["train"] = 129
    train(config_of(tmp_path, epochs=2))
    assert capsys.readouterr().out.count("the last batch of each epoch, of 1, is left out") == 1
    rows = metrics(tmp_path)
    assert (float(rows[0]["train_acc"]) * 128 / 100).is_integer()


@pytest.mark.parametrize(("batch_size", "size"), [(1, 640), (64, 1)])
def test_batches_that_are_always_too_small_are_refused(tmp_path, digits, batch_size, size):
    digits["train"] = size
    with pytest.raises(RunError, match=r"batches of 1 are too small: .* at least 2 in all"):
        train(config_of(tmp_path, batch_size=batch_size))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("during", ["step", "test"])
def test_a_signal_ends_the_run_between_two_steps(tmp_path, monkeypatch, number, during):
    train(config_of(tmp_path / "good", epochs=1))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    owner, name = (Trainer, "step") if during == "step" else (training, "evaluate")
    plain, calls = getattr(owner, name), []

    def raising(*arguments, **options):
        calls.append(name)
        if len(calls) == (15 if during == "step" else 2):
            signal.raise_signal(number)
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, raising)
    with pytest.raises(Interrupted, match=r"run up to epoch 1, --resume goes on$") as stop:
        train(config_of(tmp_path / "run"))
    assert stop.value.status == 128 + number
    assert len(calls) == (15 if during == "step" else 2)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert same(weights(tmp_path / "run" / "last.pth"), weights(tmp_path / "good" / "last.pth"))


def test_certificates_come_at_the_end_and_a_signal_in_them_loses_nothing(
    tmp_path, monkeypatch, capsys
):
    plain = certifying.certify

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return plain(*arguments)

    config = config_of(tmp_path / "run", epochs=1, milestone=1, certify=True)
    with monkeypatch.context() as patched:
        patched.setattr(certifying, "certify", interrupted)
        with pytest.raises(Interrupted, match=r"run up to epoch 1, --resume goes on$"):
            train(config)
    assert not (config.folder / runs.CERTIFICATES).exists()
    before = weights(config.folder / "last.pth")
    train(replace(config, resume=True))
    (row,) = json.loads((config.folder / runs.CERTIFICATES).read_text())
    assert row["images"] == 250 and row["holds"]
    assert "certificates of 250 images" in capsys.readouterr().out
    assert same(weights(config.folder / "last.pth"), before)
    train(replace(config, resume=True, epochs=2, milestone=1, certify=False))
    assert "certificates.json, of older weights, goes with the next" in capsys.readouterr().out
    assert not (config.folder / runs.CERTIFICATES).exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(lambda t: t.long(), "holds whole numbers"), (lambda t: t * math.nan, "is not finite")],
)
def test_a_run_does_not_go_on_with_weights_of_no_use(tmp_path, damage, sentence):
    path = tmp_path / "run" / "last.pth"
    train(config_of(path.parent, epochs=1))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["linear1.weight"] = damage(checkpoint["model"]["linear1.weight"])
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=f"of no use: its linear1.weight {sentence}"):
        train(config_of(path.parent, epochs=2, resume=True))


def test_a_run_does_not_go_on_with_other_images(tmp_path, digits):
    train(config_of(tmp_path / "run", epochs=1))
    state = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["training"]
    digits["train"] -= 1
    with pytest.raises(CheckpointError, match="comes from other training images"):
        train(config_of(tmp_path / "run", epochs=2, resume=True))
    digits["train"] += 1
    train(config_of(tmp_path / "run", epochs=2, resume=True))
    assert isinstance(state["images"], int)
