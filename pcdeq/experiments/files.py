"""Files that are there whole or not at all, and locks on what one process alone may write.

A file is written under a temporary name, flushed to the disk and renamed over the old one, and the
folder is flushed too: after a power cut there is the old file or the new one (the usual recipe of
databases and editors; see the man page of rename(2)).
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

from pcdeq.experiments.errors import RunError, reason


def write_whole(path: Path, data: bytes, *, obsolete: Path | None = None) -> None:
    """Writes a file so that it is there whole or not at all.

    Args:
        path: the file.
        data: what it holds.
        obsolete: a file that goes when the data is on the disk, just before it takes its name.

    Raises:
        RunError: the disk is full, the folder is gone, or whatever else the system says.
    """
    partial = temporary(path)
    try:
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if obsolete is not None:
                obsolete.unlink(missing_ok=True)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        message = f"{path} cannot be written ({error.strerror}); what was there before is intact"
        raise RunError(message) from None


def check_writable(folder: Path) -> None:
    """Refuses a folder, there or not, in which no file could be written; makes nothing.

    Raises:
        ValueError: with one sentence for the user.
    """
    for place in (folder, *folder.absolute().parents):
        try:
            mode = os.stat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise ValueError(
                    f"{folder} cannot be written: {place} is a link to what is not there"
                ) from None
            continue
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(folder)!r} cannot be written: {reason(error)}") from None
        if not stat.S_ISDIR(mode):
            raise ValueError(f"{folder} cannot be written: {place} is not a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{folder} cannot be written: no permission to write in {place}")
        return


def lock(file: BinaryIO | int, *, wait: bool = False) -> bool:
    """Locks an open file or folder for as long as any process holds it open; False where one does.

    With ``wait``, until that one has closed it. Always true where the system has no such locks.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


def make_and_lock(folder: Path) -> int | None:
    """Locks a folder, made when absent; returns the handle to close, or None on Windows.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made or opened.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if os.name == "nt":
            return None
        handle = os.open(folder, os.O_RDONLY)
        if not lock(handle):
            os.close(handle)
            raise BlockingIOError
        if folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
        os.close(handle)  # who had it has removed it meanwhile: the lock would be of no folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here with this folder; nothing on Windows."""
    if os.name == "nt":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


def temporary(path: Path) -> Path:
    """Where a file is written before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.tmp")


def _sync_folder(folder: Path) -> None:
    """Makes a rename in the folder last through a power cut, where the system can.

    Windows and some network file systems cannot; the file is there all the same.
    """
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
