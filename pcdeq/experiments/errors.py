"""What ends a program of this floor with exit status 1; the text is the sentence for the user."""

from collections.abc import Sequence


class RunError(RuntimeError):
    """A run, its folder or its results: what is wrong, what was kept, what to do."""


class DataError(RunError):
    """The images cannot be had; names the file or folder and what to do."""


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first few of them, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
