"""Checkpoints that are damaged, or are none: never wrong weights, and nothing in them runs."""

import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import ours, perturbed, refusal, same

from pcdeq import CheckpointError, build_network, load_network, load_weights
from pcdeq.networks import Network


def test_no_file_and_no_directory(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.pth")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    assert "is a folder: name best.pth or last.pth in it" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "no such file" in refusal(tmp_path / "file" / "none.pth")
    os.mkfifo(tmp_path / "pipe")
    assert "is no ordinary file" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize("content", [b"", b"PK", b"hello\n" * 1000, pickle.dumps({"a": 1})])
def test_files_that_are_no_archive(content, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    assert "is no checkpoint as torch saves them since 1.6, or is damaged" in refusal(path)


def test_an_archive_of_something_else(tmp_path):
    path = tmp_path / "file.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "hello")
    assert "no checkpoint" in refusal(path)


def test_a_file_in_the_old_format_of_torch(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(perturbed().state_dict(), path, _use_new_zipfile_serialization=False)
    assert "no checkpoint" in refusal(path)


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> tuple[Network, bytes]:
    model = perturbed()
    return model, ours(model, tmp_path_factory.mktemp("intact") / "best.pth").read_bytes()


def test_truncated_files(intact, tmp_path):
    _, content = intact
    path = tmp_path / "cut.pth"
    for length in [1, 100, 4096, len(content) // 2, len(content) - 100, len(content) - 1]:
        path.write_bytes(content[:length])
        refusal(path)


def test_flipped_bits_never_give_wrong_weights(intact, tmp_path):
    """A flip in the padding between parts harms nothing; any other is refused."""
    model, content = intact
    path = tmp_path / "flipped.pth"
    generator = random.Random(0)
    harmless = 0
    places = [generator.randrange(len(content)) for _ in range(60)]
    places += [generator.randrange(3000) for _ in range(20)]  # the pickle and its neighbours
    places += [len(content) - 1 - generator.randrange(1500) for _ in range(20)]  # the directory
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        fresh = build_network("linear_pcdeq_1", "tanh")
        try:
            load_weights(fresh, path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert same(fresh, model), place
            harmless += 1
    assert harmless < 20


def test_a_flipped_weight_is_refused_by_its_checksum(intact, tmp_path):
    """torch.load itself does not look at checksums: it would load this."""
    model, content = intact
    path = tmp_path / "flipped.pth"
    place = content.index(model.linear1.weight.detach().numpy().tobytes()[:64]) + 5
    damaged = bytearray(content)
    damaged[place] ^= 16
    path.write_bytes(damaged)
    silently_wrong = torch.load(path, weights_only=True)["model"]["linear1.weight"]
    assert not torch.equal(silently_wrong, model.linear1.weight)
    assert "damaged: the checksum of" in refusal(path)


class Malicious:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_nothing_in_a_file_is_executed(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    torch.save({"a": torch.ones(1), "b": Malicious(trace)}, path)
    assert "no checkpoint of tensors and plain values" in refusal(path)
    with pytest.raises(CheckpointError):
        load_network(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have run
