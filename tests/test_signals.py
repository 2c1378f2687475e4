"""Signals are noted until a step ends; a second one does not wait for that."""

import signal
import subprocess
import threading

import pytest
from processes import start

from pcdeq.experiments.signals import NUMBERS, Interrupted, Leaving, Signals, handled_by

ONE_LONG_OPERATION = """
import hashlib
from pcdeq.experiments.signals import Signals
with Signals():
    print("here", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted_and_raised_where_asked(number):
    before = [signal.getsignal(each) for each in NUMBERS]
    done = False
    with pytest.raises(Interrupted) as stop, Signals() as signals:
        signals.check()
        signals.advice = "go on"
        signal.raise_signal(number)
        done = True
        signals.check()
    assert done and str(stop.value) == f"stopped by {number.name}; go on"
    assert stop.value.status == 128 + number
    assert [signal.getsignal(each) for each in NUMBERS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_behind_the_last_check_is_not_lost():
    with pytest.raises(Interrupted, match="go on"), Signals() as signals:
        signals.advice = "go on"
        signals.check()
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_got_lost_while_libraries_were_loaded_ends_the_run(number):
    before = signal.signal(number, signal.SIG_DFL)  # a shell's background ignores SIGINT
    try:
        with Leaving():
            try:
                signal.raise_signal(number)
            except BaseException as error:  # as a library's bare except
                kind = KeyboardInterrupt if number == signal.SIGINT else SystemExit
                assert isinstance(error, kind)
            with pytest.raises(Interrupted) as stop, Signals() as signals:
                signals.check()
        assert stop.value.status == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored_while_libraries_are_loaded():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Leaving() as leaving:
            signal.raise_signal(signal.SIGINT)
        assert leaving.number == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_wait_outside_of_python_ends_at_the_signal_itself():
    handlers = {}
    before = [signal.getsignal(number) for number in NUMBERS]
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Leaving() as leaving:
            with handled_by(signal.SIG_DFL):
                handlers = {number: signal.getsignal(number) for number in NUMBERS}
            assert signal.getsignal(signal.SIGTERM) is leaving
    finally:
        for number, handler in zip(NUMBERS, before, strict=True):
            signal.signal(number, handler)
    assert handlers == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}


def test_what_another_process_breaks_is_the_signal_that_it_heard_first():
    with pytest.raises(Interrupted, match=r"^$"), Signals():
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="peer"), Signals():
        raise RuntimeError("Connection closed by peer")


def test_outside_of_the_main_thread_nothing_changes():
    seen = []

    def enter():
        with Signals() as signals:
            seen.append(signal.getsignal(signal.SIGINT))
            signals.check()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_a_second_signal_does_not_wait_for_the_operation_in_progress():
    process = start("-c", ONE_LONG_OPERATION)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, "")
