"""Ends a command on SIGTERM or SIGINT with one line and exit code 128 + signal, whatever the command was doing.

The first signal raises `Stopped` in the main thread, so that leases are released and temporary folders removed. While
the main thread waits for Java, an exception would leave Java's answer on the connection, where the next call would read
it. A command with a JVM therefore passes `end_calls`, which ends the JVM, so that the waiting call fails by itself.
Errors after a signal follow from it and are not reported. A second signal, or an end that takes longer than 20 s, ends
the process at once. Inside `deferred`, the first signal is only recorded: the work checks `received` at its next safe
point and ends by itself, which may take longer. On the driver and in the trainer; imports no Spark.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# Longest time from the first signal to the end of the process.
_END_SECONDS = 20.0
# Inside `deferred`, a second signal within this time repeats the first one: a terminal signals the parent process and
# its child, and the parent then signals the child too.
_SAME_REQUEST_SECONDS = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The first signal that this process received, if any.
_received: list[int] = []


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end. Not an `Exception`, so that `except Exception` does not catch it."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number, self.exit_code = number, 128 + number
        name = signal.Signals(number).name
        self.message = f"stopped by {name}{message}; run the same command again to continue"


def received() -> Stopped | None:
    """The signal that is ending this process; None if none was received."""
    return Stopped(_received[0]) if _received else None


def is_taken(handler: object) -> bool:
    """Whether a signal's handler was installed by `stops_on_signals`.

    Args:
        handler: the result of `signal.getsignal`.
    """
    return getattr(handler, "__module__", None) == __name__


@contextlib.contextmanager
def stops_on_signals(
    waits_for_call: Callable[[FrameType | None], bool] = lambda frame: False,
    end_calls: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Handles SIGTERM and SIGINT while the block runs. Does nothing outside the main thread.

    Args:
        waits_for_call: receives the interrupted frame; returns whether the main thread is in a call that only
            `end_calls` may end.
        end_calls: ends these calls, so that they raise; runs in a separate thread.

    Raises:
        Stopped: a signal arrived while the block runs, outside a call that only `end_calls` may end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int) -> None:
        end_calls()
        time.sleep(_END_SECONDS)
        print(f"miniplm: {Stopped(number).message}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    def handle(number: int, frame: FrameType | None) -> None:
        if _received:
            os._exit(128 + number)
        _received.append(number)
        threading.Thread(target=end, args=(number,), name="stopping", daemon=True).start()
        if not waits_for_call(frame):
            raise Stopped(number)

    with _handled_by(handle):
        try:
            yield
        finally:
            _received.clear()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Records SIGTERM and SIGINT while the block runs, instead of raising `Stopped`; the work asks `received`.

    A second signal, if it comes 5 s or more after the first, ends the process at once. Does nothing outside the main
    thread, and outside `stops_on_signals`.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not is_taken(signal.getsignal(signal.SIGTERM)):
        yield
        return
    first = 0.0

    def record(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not _received:
            first = time.monotonic()
            _received.append(number)
        elif time.monotonic() - first >= _SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    with _handled_by(record):
        yield


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Gives the signals to a handler while the block runs, except signals that the process ignores."""
    before = {
        number: signal.signal(number, handler) for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
