"""SIGINT and SIGTERM end a run between two steps, never in the middle of one."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupted(Exception):
    """A signal ended the run between two steps.

    Attributes:
        status: the exit status, 128 plus the signal's number: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + number


class Signals:
    """SIGINT and SIGTERM (what Slurm sends) end a run between two steps; a second one at once.

    Inside this context a signal is noted, and ``check`` raises ``Interrupted`` for it. Outside of
    the main thread, where Python takes no signals, nothing changes.

    Attributes:
        advice: how to go on, the end of the message; without it there is no message.
    """

    def __init__(self) -> None:
        self.number, self.advice = 0, ""

    def __enter__(self) -> Signals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number

    def check(self) -> None:
        """Ends the run if a signal came."""
        if self.number:
            name = signal.Signals(self.number).name
            raise Interrupted(self.number, self.advice and f"stopped by {name}; {self.advice}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, RuntimeError):  # another process heard it first, and is gone
            self.check()
