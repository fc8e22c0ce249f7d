"""Which attempt of which Celery task this process is in, and how each ended.

Gives the events of one attempt the same ids whoever sends them (the task's own code or `ProgressTask`), so
that the service delivers each once, and keeps one attempt from being reported both completed and failed.
Must not import Celery: code without it publishes too.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from typing import Any

from ._events import Event

TERMINAL = ("task.completed", "task.failed")

_WITH_ID = ("task.started", *TERMINAL)
_WITH_ATTEMPT = (*_WITH_ID, "task.progress")

# Far more than a worker holds at once; what it bounds is a process that runs for months.
_REMEMBERED_MAX = 10_000


def event_id(task_id: str, attempt: int, type_: str) -> str:
    """The id that makes an event of an attempt one event, however often it is sent."""
    return f"celery:{task_id}:{attempt}:{type_}"


def stamp(event: Event) -> Event:
    """Adds `id` and `attempt` to the event of a Celery task that is running here, in this thread.

    Has to be called in the thread that runs the task. An event that already has an id keeps it.
    """
    type_ = event["type"]
    if type_ not in _WITH_ATTEMPT or event.get("id") is not None:
        return event
    attempt = _running_attempt(event.get("task_id"))
    if attempt is None:
        return event
    event.setdefault("attempt", attempt)
    if type_ in _WITH_ID:
        event["id"] = event_id(event["task_id"], attempt, type_)
    if type_ in TERMINAL:
        ends.claim(event.get("project_id"), event["task_id"], attempt, type_, by_hand=True)
    return event


def _running_attempt(task_id: object) -> int | None:
    celery = sys.modules.get("celery")
    if celery is None or task_id is None:
        return None
    state = sys.modules.get("celery._state")
    # A task called as a function inside another has no id; the one that the worker runs is below it.
    for find in (getattr(celery, "current_task", None), getattr(state, "get_current_worker_task", None)):
        attempt = _attempt_if(find, task_id)
        if attempt is not None:
            return attempt
    return None


def _attempt_if(task: Any, task_id: object) -> int | None:
    try:
        request = (task() if getattr(task, "__name__", "") == "get_current_worker_task" else task).request
        return int(request.retries or 0) if request.id is not None and str(request.id) == task_id else None
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None  # no task is running in this thread


class _Remembered(OrderedDict[Any, Any]):
    """A dict that forgets what was put in first."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > _REMEMBERED_MAX:
            self.popitem(last=False)


class Attempts:
    """The tasks that this process has received or begun: the attempt, and a project that it was told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known = _Remembered()

    def begin(self, task_id: str, attempt: int, project_id: str | None = None) -> None:
        """The attempt is about to run, here or in a child of this process."""
        with self._lock:
            if attempt or project_id:
                self._known[task_id] = attempt, project_id
            else:
                self._known.pop(task_id, None)

    def number(self, task_id: str) -> int:
        """The newest attempt of the task that is known; the first is 0."""
        with self._lock:
            return int(self._known.get(task_id, (0, None))[0])

    def project(self, task_id: str) -> str | None:
        """The project that the task was received with, where its arguments do not say it."""
        with self._lock:
            project_id: str | None = self._known.get(task_id, (0, None))[1]
            return project_id


class Ends:
    """How attempts have ended: the first to say so decides."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known = _Remembered()

    def claim(
        self, project_id: str | None, task_id: str, attempt: int, type_: str, *, by_hand: bool = False
    ) -> bool:
        """Whether this terminal event may go out.

        What the task's code sends by hand always may, and then the automatic one may follow with the same id
        (it counts if the first was lost) unless it says the opposite.
        """
        with self._lock:
            known = self._known.get((task_id, attempt), {})
            first = known.get(project_id)
            if first is None or (first == (type_, True) and not by_hand):
                self._known[task_id, attempt] = {**known, project_id: (type_, by_hand)}
                return True
            return by_hand

    def reopen(self, task_id: str, attempt: int) -> None:
        """The attempt runs (again): a task id that is used anew ends anew."""
        with self._lock:
            self._known.pop((task_id, attempt), None)


attempts = Attempts()
ends = Ends()


def _after_fork_in_child() -> None:
    # A lock may have been held by a thread that does not exist in the child.
    attempts._lock = threading.Lock()
    ends._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
