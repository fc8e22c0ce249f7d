"""How often progress goes out. Knows neither Celery nor events: it is given values, and what sends one.

There is no timer and no thread, so nothing can outlive a task or break a fork: a value that came too soon is
held until the next one, or until `flush`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

PER_SECOND = 10.0
"""A bar cannot be seen to move more often, and the service folds what comes faster."""


class Pace:
    """The progress of one task: the first value at once, then so many a second, the last one always."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._held: tuple[Any, ...] | None = None
        self._was_full = False

    def offer(self, values: tuple[Any, ...], per_second: float | None, *, is_full: bool = False) -> None:
        """Sends `values` now or keeps them in place of those that are kept. Without `per_second`: now."""
        at_once = per_second is None or (is_full and not self._was_full)
        # Without the lock, because this is what a tight loop pays for: who loses a race here is held for less
        # than an interval.
        if not at_once and monotonic() < self._next_s:
            self._held = values
            return
        with self._lock_here():
            self._was_full = self._was_full or is_full
            self._next_s = monotonic() + (1 / per_second if per_second else 0)
            self._held = None
            self._send(*values)

    def flush(self) -> None:
        """Sends what is held back."""
        if self._held is None:
            return
        with self._lock_here():
            values, self._held = self._held, None
            if values is not None:
                self._send(*values)

    def _lock_here(self) -> threading.Lock:
        # A process that the task has forked: a thread that is not there may have held the lock, and what is
        # held back is for the parent to send.
        if self._pid != os.getpid():
            self._pid, self._lock, self._held = os.getpid(), threading.Lock(), None
        return self._lock
