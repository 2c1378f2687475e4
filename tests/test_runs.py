"""A run's folder: refusals before anything happens, files whole or not at all."""

import csv
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import small_runs
import torch
from small_runs import HERE, checkpoint_of

from pcdeq.experiments import runs
from pcdeq.experiments.config import FLAGS
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.files import write_whole
from pcdeq.experiments.runs import Run, check_folder
from pcdeq.experiments.training import train

config_of = partial(small_runs.config_of, epochs=3, sample=False)

pytestmark = pytest.mark.usefixtures("no_flush")


def metrics(folder):
    with open(folder / runs.METRICS, newline="") as file:
        return [(int(row["epoch"]), float(row["test_acc"])) for row in csv.DictReader(file)]


# Where a run goes


def test_the_folder_is_named_after_the_run():
    name = "mnist_linear_pcdeq_1_tanh"
    assert config_of(None).folder == Path("runs") / f"{name}_seed0"
    assert config_of(None, seed=3, sample=True).folder == Path("runs") / f"{name}_sample_seed3"
    folder = config_of(None, augment=True, image_folder="x").folder
    assert folder == Path("runs") / f"{name}_aug_folder_seed0"
    assert config_of("here").folder == Path("here")


def test_a_run_is_refused_where_others_have_folders_of_their_own(finished):
    among = replace(finished, out=str(finished.folder.parent))
    with pytest.raises(ValueError, match=rf"holds runs \({finished.folder}\): name another folder"):
        check_folder(among)


def test_a_run_is_refused_where_one_is(finished):
    with pytest.raises(ValueError, match=r"already holds a run: --resume .* --overwrite"):
        check_folder(finished)
    check_folder(replace(finished, overwrite=True))
    check_folder(replace(finished, resume=True))
    with pytest.raises(ValueError, match="exclude each other"):
        check_folder(replace(finished, resume=True, overwrite=True))
    for name in runs.CONFIG, runs.METRICS, runs.BEST:  # any of the files makes it a run
        os.remove(finished.folder / name)
        with pytest.raises(ValueError, match="already holds a run"):
            check_folder(finished)
    os.remove(finished.folder / runs.LAST)
    check_folder(finished)


def test_a_folder_without_a_complete_epoch_is_free(tmp_path):
    config = config_of(tmp_path / "run")
    Run(config).begin(HERE)
    check_folder(config)
    check_folder(replace(config, lr=1.0, resume=True))


def test_one_process_at_a_time(finished):
    pytest.importorskip("fcntl")
    before = sorted(finished.folder.iterdir())
    for other in (finished, replace(finished, overwrite=True), replace(finished, resume=True)):
        refused = pytest.raises(RunError, match=r"another process is training in .*--out")
        with Run(finished).held(), refused:
            train(other)
        assert sorted(finished.folder.iterdir()) == before
    with Run(finished).held():
        pass  # it was released


def test_a_folder_that_stays_empty_goes(tmp_path):
    run = Run(config_of(tmp_path / "run"))
    with run.held():
        assert run.folder.is_dir()
    assert not run.folder.exists()


def test_who_is_refused_leaves_the_empty_folder_of_the_run_that_holds_it(tmp_path):
    pytest.importorskip("fcntl")
    run = Run(config_of(tmp_path / "run"))
    with run.held():
        for _ in range(2):
            with pytest.raises(RunError, match="another process"), run.held():
                pass
            assert run.folder.is_dir()


def test_the_first_process_speaks_for_all(finished, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="already holds a run"):
        check_folder(finished)  # a job script's RANK: this process is alone
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    check_folder(finished)


def test_every_differing_flag_is_named(finished):
    other = replace(finished, resume=True, lr=1e-3, seed=7, epochs=2, sample=True, tol=1e-5)
    with pytest.raises(ValueError) as refusal:
        check_folder(other)
    text = str(refusal.value)
    for difference in (
        "-lr 0.001 (was 0.0005)", "--seed 7 (was 0)", "-epochs 2 (was 3, and may only be raised)",
        "--sample given (was not given)", "--tol 1e-05 (was 0.0001)",
    ):  # fmt: skip
        assert difference in text
    assert text.count("(was") == 5 and "\n" not in text


@pytest.mark.parametrize("field", FLAGS)
def test_each_flag_that_changes_the_numbers_counts(finished, field):
    now = getattr(finished, field)
    other = (not now) if isinstance(now, bool) else 3 if isinstance(now, float | int) else f"{now}x"
    with pytest.raises(ValueError, match=r"\(was"):
        check_folder(replace(finished, resume=True, **{field: other}))


def test_flags_that_leave_the_numbers_alone_may_change(finished):
    check_folder(
        replace(finished, resume=True, data_root="x", device="mps", certify=True, epochs=9)
    )


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    below = [tmp_path / name / "run" for name in ("file", "link")]
    for out in (tmp_path / "file", tmp_path / "link", *below, tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(ValueError, match="cannot be written") as refusal:
            check_folder(config_of(out))
        assert "\n" not in str(refusal.value)
    check_folder(config_of(tmp_path / "new" / "run"))
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(ValueError, match="no permission"):
        check_folder(config_of(tmp_path / "new" / "run"))
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"net": "linear_pcdeq_1"}', "\x00\xff"])
def test_a_damaged_config_is_named_and_a_run_goes_on_without_it(finished, content, monkeypatch):
    path, resumed = finished.folder / runs.CONFIG, replace(finished, resume=True)
    path.write_text(content or path.read_text().replace('"epochs": 3', '"epochs": "3"'))
    with pytest.raises(RunError, match=r"config\.json .*with that file removed"):
        check_folder(resumed)
    with monkeypatch.context() as patched:  # one that may not be read is not to be removed
        patched.setattr(os, "access", lambda place, mode: mode != os.R_OK)
        with pytest.raises(RunError, match=r"config\.json .*") as refusal:
            check_folder(resumed)
        assert "removed" not in str(refusal.value)
    path.unlink()
    check_folder(resumed)
    Run(resumed).begin(HERE)
    assert Run(resumed).load() is not None and runs.read_config(finished.folder)["lr"] == 5e-4


# What is written


def test_config_says_all_flags_and_where_a_run_has_been(finished):
    path = finished.folder / runs.CONFIG
    config = json.loads(path.read_text())
    assert config["lr"] == 5e-4 and config["data"] == "torchvision" and config["earlier"] == []
    assert config["processor"] == "abacus"
    again = Run(replace(finished, resume=True, epochs=9))
    again.begin({**HERE, "command": "python train.py --resume"})
    assert json.loads(path.read_text())["earlier"] == []
    again.begin({**HERE, "processor": "slide rule"})
    config = json.loads(path.read_text())
    assert (config["epochs"], config["processor"]) == (9, "slide rule")
    assert config["earlier"] == [{"processor": "abacus", "threads": 1}]


def test_where_no_epoch_was_completed_no_run_has_been(tmp_path):
    Run(config_of(tmp_path, lr=1.0)).begin({**HERE, "processor": "slide rule"})
    Run(config_of(tmp_path)).begin(HERE)
    assert runs.read_config(tmp_path)["earlier"] == []


def test_best_is_the_first_of_the_highest(tmp_path):
    config = config_of(tmp_path)
    run, accuracies, bests = Run(config), [], []
    for accuracy in (90.0, 89.0, 91.0, 91.0):
        accuracies.append(accuracy)
        run.save(checkpoint_of(config, accuracies))
        best = torch.load(tmp_path / runs.BEST, weights_only=True)
        bests.append(round(best["model"]["classifier.bias"][0].item()))
        assert "training" not in best
        assert metrics(tmp_path) == list(enumerate(accuracies, 1))
    assert bests == [1, 1, 3, 3]


def test_overwriting_keeps_the_old_run_until_there_is_an_epoch_and_then_nothing_of_it(finished):
    for name in ("notes.txt", runs.CERTIFICATES):
        (finished.folder / name).write_text("mine")
    before = {path.name: path.read_bytes() for path in finished.folder.iterdir()}
    new = replace(finished, overwrite=True, lr=0.25)
    run = Run(new)
    run.begin(HERE)
    assert {path.name: path.read_bytes() for path in finished.folder.iterdir()} == before
    assert "holds the run that was there" in run.kept(0)
    for accuracies in ([1.0], [1.0, 0.5]):
        run.save(checkpoint_of(new, accuracies))
        assert runs.read_config(finished.folder)["lr"] == 0.25
        assert metrics(finished.folder) == list(enumerate(accuracies, 1))
    names = sorted([runs.CONFIG, runs.METRICS, runs.BEST, runs.LAST, "notes.txt"])
    assert sorted(os.listdir(finished.folder)) == names


def test_overwriting_loses_nothing_where_the_first_epoch_cannot_be_written(finished, monkeypatch):
    before = {path.name: path.read_bytes() for path in finished.folder.iterdir()}
    run = Run(replace(finished, overwrite=True, lr=0.25))
    run.begin(HERE)

    def full(path, data, **_):
        raise RunError("no space")

    monkeypatch.setattr(runs, "write_whole", full)
    with pytest.raises(RunError, match="no space"):
        run.save(checkpoint_of(run.config, [1.0]))
    assert {path.name: path.read_bytes() for path in finished.folder.iterdir()} == before
    assert "holds the run that was there" in run.kept(0)


def test_overwriting_is_resumed_wherever_it_crashed(finished, monkeypatch):
    """By the old run's command before the new one's first epoch is kept, by the new one's after."""
    new = replace(finished, overwrite=True, lr=0.25)

    def crash(*_):
        raise KeyboardInterrupt

    for place, resumed in ((os, finished), (Run, new)):
        run = Run(new)
        run.begin(HERE)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, "replace" if place is os else "write_json", crash)
            run.save(checkpoint_of(new, [1.0]))
        resumed = replace(resumed, overwrite=False, resume=True)
        check_folder(resumed)
        assert Run(resumed).load()["training"]["flags"] == resumed.identity()


def test_overwriting_nothing_is_a_run_like_any_other(tmp_path):
    Run(config_of(tmp_path, overwrite=True)).begin(HERE)
    assert os.listdir(tmp_path) == [runs.CONFIG]


def test_what_a_kill_left_half_written_goes(finished):
    (finished.folder / ".best.pth.tmp").write_bytes(b"half")
    Run(replace(finished, resume=True)).begin(HERE)
    assert sorted(os.listdir(finished.folder)) == sorted(
        (runs.CONFIG, runs.METRICS, runs.BEST, runs.LAST)
    )


@pytest.mark.parametrize("accuracies", [[90.0, 95.0], [90.0, 85.0]])
@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_crash_between_two_files_is_mended_by_the_next_start(
    tmp_path, monkeypatch, accuracies, written
):
    config = config_of(tmp_path, resume=True)
    run = Run(config)
    run.begin(HERE)
    run.save(checkpoint_of(config, accuracies[:1]))
    left = iter(range(written))

    def dying(path, data, **options):
        if next(left, None) is None:
            raise MemoryError("the plug is pulled")
        write_whole(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_whole", dying)
        try:
            run.save(checkpoint_of(config, accuracies))
        except MemoryError:
            pass
        else:
            assert written >= 2 + (accuracies[1] > accuracies[0])
    checkpoint = Run(config).load()
    done = accuracies if written else accuracies[:1]
    assert len(checkpoint["training"]["rows"]) == len(done)
    assert metrics(tmp_path) == list(enumerate(done, 1))
    best = torch.load(tmp_path / runs.BEST, weights_only=True)["model"]["classifier.bias"][0]
    assert round(best.item()) == done.index(max(done)) + 1


# What is read


def test_a_run_whose_last_checkpoint_is_gone_is_not_begun_over_it(tmp_path, finished):
    assert Run(finished).load() is None  # without --resume
    os.remove(finished.folder / runs.LAST)
    with pytest.raises(ValueError, match=r"no last\.pth to go on from: --overwrite"):
        check_folder(replace(finished, resume=True))
    os.remove(finished.folder / runs.METRICS)
    with pytest.raises(ValueError, match=r"no last\.pth"):
        check_folder(replace(finished, resume=True))
    os.remove(finished.folder / runs.BEST)  # no epoch was complete
    check_folder(replace(finished, resume=True))
    assert Run(replace(finished, resume=True)).load() is None
