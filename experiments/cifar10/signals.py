"""Ctrl-C and SIGTERM, as from a batch system that takes a machine back, end a run with a message and an exit code."""

from __future__ import annotations

import contextlib
import signal
import threading

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The signal ``number`` asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stopping():
    """Inside, SIGINT and SIGTERM raise Stopped, wherever the main thread is; a second one ends the process at once.

    A signal that the process was started to ignore (nohup, a shell's background job) stays ignored. In another
    thread than the main one, and so in somebody else's program, nothing changes.
    """
    before: dict[int, object] = {}

    def stop(number: int, _frame) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    try:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def message(stop: KeyboardInterrupt, command: str = "the same command") -> tuple[str, int]:
    """What to print, and the exit code: 128 + the signal's number, as shells give it."""
    number = signal.Signals(getattr(stop, "number", signal.SIGINT))
    why = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    return f"{why}: {command} goes on after the last whole epoch", 128 + number
