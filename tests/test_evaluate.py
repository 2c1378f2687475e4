"""evaluate.py and what it prints: test figures, certificates over a set, proved accuracy."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from truth import few, trained

from pcdeq.experiments import data, gallery, report, runs, training
from pcdeq.experiments.certifying import format_certificates
from pcdeq.experiments.cli import guarded
from pcdeq.experiments.config import RunConfig
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.evaluation import evaluate
from pcdeq.experiments.report import main
from pcdeq.weights import describe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model = trained("linear_pcdeq_1", "tanh")
    torch.save({**describe(model), "model": model.state_dict()}, folder / "best.pth")
    torch.save(model.state_dict(), folder / "authors.pth")
    (folder / "cut.pth").write_bytes((folder / "best.pth").read_bytes()[:5000])
    return folder


@pytest.mark.parametrize("program", ["evaluate", "plot"])
def test_a_linear_network_has_one_thread_here_too(checkpoints, program, monkeypatch, tmp_path):
    threads = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    module, name = {"evaluate": (report, "evaluate"), "plot": (gallery, "history")}[program]

    def stop(*_, **__):
        threads.append(torch.get_num_threads())
        raise RunError("enough")

    monkeypatch.setattr(module, name, stop)
    plot = ["-o", str(tmp_path)] * (program == "plot")
    with pytest.raises(RunError):
        module.main([str(checkpoints / "best.pth"), "--sample", *plot])
    assert threads == [1]


def run(capsys, *argv) -> tuple[int, str, str]:
    status = guarded(lambda: main([str(a) for a in argv]))
    return status, *capsys.readouterr()


def test_the_report_of_a_checkpoint(checkpoints, capsys):
    status, out, err = run(
        capsys, checkpoints / "best.pth", "--sample", "--first", 100, "--certify", "--eps", 0.002,
        0.02, "--device", "cpu",
    )  # fmt: skip
    assert status == 0 and err == ""
    test = evaluate(trained("linear_pcdeq_1", "tanh"), few(100))
    assert "linear_pcdeq_1 (tanh) for mnist, 70,410 parameters" in out
    assert f"accuracy {test.accuracy:.2f} %, loss {test.loss:.4f}; " in out
    assert f"{test.forward_iters:.1f} (mean), {test.forward_iters_max} (max)" in out
    assert "certificates of 100 images" in out and re.search(r"block +yes", out)
    certified = {float(r): float(p) for r, p in re.findall(r"  (0\.\d+) +([\d.]+) %", out)}
    assert list(certified) == [0.002, 0.02] and certified[0.002] > certified[0.02]


def test_without_proofs_it_prints_none(checkpoints, capsys):
    status, out, _ = run(capsys, checkpoints / "best.pth", "--sample", "--first", 50)
    assert status == 0 and "accuracy" in out and "certif" not in out


def test_unconverged_solves_are_warned_of(checkpoints, capsys):
    status, out, _ = run(
        capsys, checkpoints / "best.pth", "--sample", "--first", 50, "--max-iter", 3
    )
    assert status == 0 and "warning: the tolerance 0.0001 was not reached in 1 of the solves" in out


def test_weights_that_have_exploded_are_warned_of(capsys, tmp_path):
    model = copy.deepcopy(trained("linear_pcdeq_1", "tanh"))
    with torch.no_grad():
        model.classifier.weight.mul_(3e38)
    torch.save({**describe(model), "model": model.state_dict()}, tmp_path / "best.pth")
    _, out, _ = run(capsys, tmp_path / "best.pth", "--sample", "--first", 50)
    assert re.search("warning: the loss is (nan|inf): the weights have exploded", out)


def test_the_tolerance_in_bfloat16_is_the_one_that_holds(checkpoints, capsys):
    _, out, _ = run(
        capsys, checkpoints / "best.pth", "--sample", "--first", 50, "--precision", "bf16"
    )
    assert "picard, bf16, tolerance 0.00390625" in out


def test_negative_weights_are_warned_of(checkpoints, capsys, tmp_path):
    model = copy.deepcopy(trained("linear_pcdeq_1", "tanh"))
    with torch.no_grad():
        model.block.deq.f.W.weight_v[3, :2] = -1e-3
    torch.save({**describe(model), "model": model.state_dict()}, tmp_path / "best.pth")
    _, out, _ = run(capsys, tmp_path / "best.pth", "--sample", "--first", 50)
    assert "warning: block has 2 negative weights" in out
    gallery.main([str(tmp_path / "best.pth"), "--sample", "-o", str(tmp_path / "figures")])
    assert "warning: block has 2 negative weights" in capsys.readouterr().out


def test_a_plain_state_dict_needs_to_be_told(checkpoints, capsys):
    plain = checkpoints / "authors.pth"
    status, _, err = run(capsys, plain, "--sample")
    assert status == 1 and "plain state dict" in err and err.count("\n") == 1
    told = ("-net", "linear_pcdeq_1", "-activ", "tanh", "--dataset", "mnist")
    status, told_out, _ = run(capsys, plain, *told, "--sample", "--first", 100)
    assert status == 0
    _, out, _ = run(capsys, checkpoints / "best.pth", "--sample", "--first", 100)
    assert told_out.split("; ")[0] == out.split("; ")[0]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ((), "the following arguments are required: CHECKPOINT"),
        (("best.pth", "--eps", "0"), "'0' is not a radius between 0 and 1"),
        (("best.pth", "--eps", "nan"), "'nan' is not a radius between 0 and 1"),
        (("best.pth", "--eps", "1e400"), "'1e400' is not a radius between 0 and 1"),
        (("best.pth", "--eps", "8/255", "8"), "'8' is not a radius between 0 and 1 (pixels"),
        (("best.pth", "--eps", "8/0"), "'8/0' is not a radius between 0 and 1"),
        (("best.pth", "--eps"), "expected at least one argument"),
        (("best.pth", "--first", "0"), "'0' is not a whole number from 1 to 2147483647"),
        (("best.pth", "-b", "-3"), "'-3' is not a whole number from 1 to 2147483647"),
        (("best.pth", "-net", "big"), "invalid choice: 'big'"),
        (("best.pth", "--device", "tpu"), "'tpu' is not one of cpu"),
        (("best.pth", "--sample", "--image-folder", "x"), "not allowed with argument"),
        (
            ("best.pth", "-net", "linear_pcdeq_1", "-activ", "sigmoid", "--dataset", "mnist"),
            "linear_pcdeq_1 does not allow the activation 'sigmoid'",
        ),
        (
            ("best.pth", "-net", "linear_pcdeq_1", "-activ", "tanh", "--dataset", "svhn"),
            "linear_pcdeq_1 is for mnist only",
        ),
    ],
)
def test_usage_errors_come_before_anything_is_read(argv, sentence, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("data was read"))
    status, _, err = run(capsys, *argv)
    assert status == 2 and sentence in err and err.startswith("usage: evaluate.py")


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (("none.pth", "--sample"), "there is no such file"),
        (("cut.pth", "--sample"), "damaged"),
        (("best.pth", "--data-root", "empty"), "--sample"),
        (("best.pth", "-activ", "relu6", "--sample"), "its activation is not relu6"),
        (("best.pth", "--image-folder", "absent"), "absent"),
        (("best.pth", "--image-folder", "three"), "is for 10 classes, the images have 3"),
    ],
)
def test_later_errors_are_one_sentence(argv, sentence, checkpoints, capsys, tmp_path, monkeypatch):
    from PIL import Image

    for part in ("train", "test"):
        for name in "abc":
            folder = tmp_path / "three" / part / name
            folder.mkdir(parents=True)
            Image.new("L", (28, 28)).save(folder / "0.png")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.mnist.MNIST.mirrors", ["http://127.0.0.1:9/"])
    status, out, err = run(capsys, checkpoints / argv[0], *argv[1:])
    assert status == 1 and out == ""
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1


def test_folders_without_names_in_the_checkpoint_are_said(checkpoints, capsys, tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for name in "abcdefghij":
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            Image.new("L", (28, 28)).save(folder / "0.png")
    status, out, _ = run(capsys, checkpoints / "best.pth", "--image-folder", str(tmp_path))
    assert status == 0 and "names no classes: the folder's are taken in the order of" in out


def test_training_keeps_its_certificates(tmp_path, capsys, monkeypatch):
    load, tested = data.load, few(60)

    def small(*arguments, **flags):
        train_set, _, classes = load(*arguments, **flags)
        cut = {"images": train_set.images[::20], "labels": train_set.labels[::20]}
        return replace(train_set, **cut), tested, classes

    monkeypatch.setattr(data, "load", small)
    config = RunConfig(
        "mnist", "linear_pcdeq_1", "tanh", 1e-3, 1, 1e-2, 20, 1,
        out=str(tmp_path / "run"), sample=True, certify=True,
    )  # fmt: skip
    training.train(config)
    (summary,) = json.loads((tmp_path / "run" / runs.CERTIFICATES).read_text())
    assert summary["holds"] and summary["images"] == 60
    assert format_certificates([summary]) in capsys.readouterr().out
    training.train(replace(config, epochs=2, resume=True, certify=False))
    assert not (tmp_path / "run" / runs.CERTIFICATES).exists()  # they were of other weights


def test_the_front_door(checkpoints):
    command = [sys.executable, ROOT / "evaluate.py", checkpoints / "cut.pth"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkpoints)
    assert done.returncode == 1 and "damaged" in done.stderr and done.stderr.count("\n") == 1
