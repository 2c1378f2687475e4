"""What a run does not go on from: damaged files, pickles that run code, other runs' checkpoints."""

import random
from dataclasses import replace

import pytest
import torch
from small_runs import checkpoint_of, row_of

from pcdeq.experiments import runs
from pcdeq.experiments.runs import Run
from pcdeq.weights import CheckpointError


def equal(one, other):
    """Whether two checkpoints hold the same tensors and values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("name", [runs.LAST, runs.BEST])
def test_damage_is_refused_or_harmless(finished, name):
    run = Run(replace(finished, resume=True))
    path = finished.folder / name
    whole = path.read_bytes()
    expected = run.load()
    for tenth in range(10):  # from the empty file on
        path.write_bytes(whole[: tenth * len(whole) // 10])
        with pytest.raises(CheckpointError, match=str(path)):
            run.load()
    dice, harmless = random.Random(0), 0
    for _ in range(100):
        place = dice.randrange(len(whole))
        flipped = bytes([whole[place] ^ 1 << dice.randrange(8)])
        path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        try:
            found = run.load()
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            harmless += 1
            assert equal(found, expected)
    assert harmless < 50
    path.write_bytes(whole)
    assert equal(run.load(), expected)


class Malice:
    """Unpickled without care, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", [runs.LAST, runs.BEST])
def test_a_pickle_that_would_run_code_does_not(finished, tmp_path, name):
    trap = tmp_path / "trap"
    for content in (Malice(trap), checkpoint_of(finished, [1.0]) | {"extra": Malice(trap)}):
        torch.save(content, finished.folder / name)
        with pytest.raises(CheckpointError, match=name):
            Run(replace(finished, resume=True)).load()
    assert not trap.exists()
    torch.load(finished.folder / name, weights_only=False)  # the trap was armed
    assert trap.exists()


def test_foreign_checkpoints_are_refused(finished):
    run, path = Run(replace(finished, resume=True)), finished.folder / runs.LAST
    good = checkpoint_of(finished, [90.0, 80.0])

    def refused(content, match):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=match) as refusal:
            run.load()
        assert str(path) in str(refusal.value)

    refused({name: value for name, value in good.items() if name != "training"}, "no run to go on")
    refused(good["model"], "no run to go on")
    other = checkpoint_of(replace(finished, seed=5, lr=1.0), [90.0])
    refused(other, r"another run: -lr 0.0005 \(was 1.0\), --seed 0 \(was 5\)")
    for broken in ({"rows": []}, {"rows": [1]}, {"rows": [{"epoch": 1}]}, {"optimizer": 3}):
        refused({**good, "training": {**good["training"], **broken}}, "no run to go on")
    rows = [row_of(1, 90.0), row_of(3, 80.0)]
    refused({**good, "training": {**good["training"], "rows": rows}}, "no run to go on")
