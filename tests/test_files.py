"""Files: there whole or not at all."""

import os
import stat
import threading

import pytest

from pcdeq.experiments import files
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.files import alone_in, lock, write_whole


@pytest.fixture(autouse=True)
def disk(monkeypatch):
    """What the folder asks of the disk, noted; no test here waits for a flush."""
    asked = []
    rename = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: asked.append(os.fstat(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: asked.append(paths) or rename(*paths))
    return asked


def test_a_file_is_flushed_then_renamed_then_the_folder_is_flushed(tmp_path, disk):
    path = tmp_path / "last.pth"
    write_whole(path, b"weights")
    flushed, (temporary, renamed), folder = disk
    assert flushed.st_ino == path.stat().st_ino and flushed.st_size == 7
    assert (temporary.parent, renamed) == (tmp_path, path)
    assert folder.st_ino == tmp_path.stat().st_ino


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    write_whole(path, b"old")
    # Writing goes through the temporary name: the device that is always full takes its place.
    os.symlink("/dev/full", tmp_path / ".last.pth.tmp")
    with pytest.raises(RunError, match=r"last\.pth cannot be written \(No space left on device\)"):
        write_whole(path, b"new")
    assert os.listdir(tmp_path) == ["last.pth"]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert os.listdir(tmp_path) == ["last.pth"] and path.read_bytes() == b"old"
    with pytest.raises(RunError, match="No such file or directory"):
        write_whole(tmp_path / "gone" / "last.pth", b"new")


def test_what_is_obsolete_goes_only_when_the_new_file_is_on_the_disk(tmp_path):
    path, old = tmp_path / "last.pth", tmp_path / "config.json"
    old.write_bytes(b"old")
    os.symlink("/dev/full", tmp_path / ".last.pth.tmp")
    with pytest.raises(RunError, match="No space left"):
        write_whole(path, b"new", obsolete=old)
    assert os.listdir(tmp_path) == ["config.json"]
    for _ in range(2):  # it may be gone already
        write_whole(path, b"new", obsolete=old)
        assert os.listdir(tmp_path) == ["last.pth"]


def test_a_lock_lasts_as_long_as_the_file_is_open(tmp_path):
    pytest.importorskip("fcntl")
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert lock(first) and not lock(second)
    os.close(first)
    assert lock(second)
    os.close(second)


def test_the_lock_is_of_the_folder_that_is_there(tmp_path, monkeypatch):
    """Between opening and locking it, whoever held the folder may end and remove it."""
    pytest.importorskip("fcntl")
    folder, locked = tmp_path / "run", []

    def lock_late(handle):
        if not locked:
            folder.rmdir()
        locked.append(handle)
        return lock(handle)

    monkeypatch.setattr(files, "lock", lock_late)
    handle = files.make_and_lock(folder)
    assert len(locked) == 2
    with pytest.raises(BlockingIOError):
        files.make_and_lock(folder)
    os.close(handle)


def test_a_folder_that_cannot_be_flushed_has_the_file_all_the_same(tmp_path, monkeypatch):
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")  # as on some network file systems

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "last.pth", b"weights")
    assert (tmp_path / "last.pth").read_bytes() == b"weights"


def test_one_after_the_other_in_a_folder(tmp_path):
    order = []

    def second():
        with alone_in(tmp_path):
            order.append("second")

    with alone_in(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)  # it waits
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
