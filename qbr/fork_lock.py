"""A lock for what a process does once, in whichever thread comes first."""

from __future__ import annotations

import os
import threading


class ForkLock:
    """threading.Lock, open in a forked child: no thread there could release what one of the parent's held."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def acquire(self) -> None:
        self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
