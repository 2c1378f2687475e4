"""SIGINT and SIGTERM end a run between two steps; a second one ends it at once.

Python calls a signal's handler between two operations of the main thread, so the first signal waits
by itself. The second one must not: a step can take long, or hang where another process is gone. So
each signal also arrives as a byte in a pipe (``signal.set_wakeup_fd``), where a thread counts them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

NUMBERS = (signal.SIGINT, signal.SIGTERM)  # from the keyboard; from Slurm, torchrun and kill


class Interrupted(Exception):
    """A signal ended the run between two steps.

    Attributes:
        status: the exit status, 128 plus the signal's number: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + number


@contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers,
) -> Iterator[None]:
    """The context in which another handler hears the signals; those ignored outside stay ignored.

    With ``signal.SIG_DFL`` a signal just ends the process, as in a wait outside of Python, where no
    handler would be called.
    """
    before = {number: signal.getsignal(number) for number in NUMBERS if _is_main()}
    heard = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in heard.items():
            signal.signal(number, old)


class Leaving:
    """The context in which a signal ends the process at once, as while imports or data are loaded.

    What a handler raises gets lost where it meets a destructor or a bare ``except``, of which big
    libraries have some: the signal is remembered, and ``Signals`` inside ends the run by it. One
    that was to be ignored, as in a shell's background, stays so here; ``Signals`` hears all.

    Attributes:
        number: of the last signal, 0 before.
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Leaving:
        self._handled = handled_by(self)
        self._handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.__exit__(None, None, None)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)


class Signals:
    """The context in which a signal is noted, and ``check`` raises ``Interrupted`` for it.

    Outside of the main thread, where Python takes no signals, nothing changes.

    Attributes:
        advice: how to go on, the end of the message; without it there is no message.
    """

    def __init__(self) -> None:
        self.number, self.advice = 0, ""

    def __enter__(self) -> Signals:
        self._main = _is_main()
        if self._main:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer)
            threading.Thread(target=_end_at_the_second, args=(reader,), daemon=True).start()
            self._handlers = [signal.signal(number, self._note) for number in NUMBERS]
            lost = [before.number for before in self._handlers if isinstance(before, Leaving)]
            self.number = max(lost, default=0)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
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
        if self._main:
            for number, handler in zip(NUMBERS, self._handlers, strict=True):
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)
        # One that came behind the last check counts; a RuntimeError may say that another process
        # heard it first, and is gone.
        if error is None or isinstance(error, RuntimeError):
            self.check()


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end_at_the_second(reader: int) -> None:
    heard = 0
    with open(reader, "rb", buffering=0) as pipe:
        while byte := pipe.read(1):  # until the other end is closed
            heard += byte[0] in NUMBERS
            if heard == 2:
                os._exit(128 + byte[0])
