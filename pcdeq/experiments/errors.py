"""What ends a program of this floor with exit status 1; the text is the sentence for the user."""

from collections.abc import Sequence


class RunError(RuntimeError):
    """A run, its folder or its results: what is wrong, what was kept, what to do."""


class DataError(RunError):
    """The images cannot be had; names the file or folder and what to do."""


def reason(error: BaseException) -> str:
    """Why, in one line: what the system says, or the first line of the text, as torch's go on."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first few of them, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
