"""Progress as a task says it: a bar, and the recorder of celery-progress. For tasks of any base class.

Nothing here ever fails the task: what cannot be shown is logged once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from math import isfinite
from types import TracebackType
from typing import Any, Generic, TypeVar

from .. import _events
from .._encode import pass_on_time_limit
from .._settings import progress_per_second
from .pace import PER_SECOND, Pace
from .run import Name, attempt_of, complain, complain_of_no_project, name_of, run_of
from .signals import flush, publish

T = TypeVar("T")


def say_progress(
    task: Any,
    request: Any,
    current: float,
    total: float,
    message: str | None = None,
    metadata: Any = None,
    *,
    per_second: float | None,
) -> None:
    """Sends or holds back how far a run of the task is. Raises nothing but Celery's time limit."""
    try:
        # What cannot be sent must not take the place of what can.
        if not (isfinite(current) and isfinite(total)):
            raise ValueError(f"current and total must be finite numbers, not {current} and {total}")
        name = name_of(task, request) if request is not None else None
        if name is None:
            complain_of_no_project(task)
            return
        values = current, total, message, metadata
        _pace(request, name).offer(values, per_second, is_full=current >= total > 0)
    except Exception as error:
        pass_on_time_limit(error)
        complain(task, "progress", "an update of its progress could not be sent: %s", error)


def _pace(request: Any, name: Name) -> Pace:
    paces = run_of(request).paces
    pace = paces.get(name)
    if pace is None:
        project_id, task_id = name

        def send(current: float, total: float, message: str | None, metadata: Any) -> None:
            event = _events.task_progress(task_id, project_id, current, total, message, metadata)
            publish(event, attempt_of(request))

        # setdefault: two threads of the task may both have found none.
        pace = paces.setdefault(name, Pace(send))
    return pace


class _Teller:
    """Tells how far a run is, from any of its threads: `self.request` is there in one of them only."""

    def __init__(self, task: Any) -> None:
        self.task = task
        stack = getattr(task, "request_stack", None)
        if stack is None:
            raise TypeError(f"task must be the task itself (self of bind=True), not {type(task).__name__}")
        self._request = stack.top

    def say(self, current: float, total: float, message: str | None) -> None:
        request = self.task.request_stack.top if self._request is None else self._request
        per_second = progress_per_second() or PER_SECOND
        say_progress(self.task, request, current, total, message, per_second=per_second)

    def flush(self) -> None:
        """Sends what was held back."""
        try:
            if self._request is not None:
                flush(self._request)
        except Exception as error:
            pass_on_time_limit(error)
            complain(self.task, "progress", "an update of its progress could not be sent: %s", error)


class Progress(Generic[T]):
    """A bar that a task moves; made by `progress`. `current`, `total` and `message` say where it stands."""

    def __init__(self, task: Any, items: Iterable[T], total: float | None, message: str | None) -> None:
        self.current: float = 0
        self.total = total
        self.message = message
        self._items = items
        self._teller = _Teller(task)

    def advance(self, n: float = 1, message: str | None = None) -> None:
        """`n` more steps are done; `message` stays until another is given."""
        try:
            self.current += n
        except TypeError as error:
            complain(self._teller.task, "progress", "an update of its progress could not be sent: %s", error)
            return
        if message is not None:
            self.message = message
        self._say()

    def __enter__(self) -> Progress[T]:
        self._say()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._teller.flush()

    def __iter__(self) -> Iterator[T]:
        self._say()
        try:
            for item in self._items:
                yield item
                self.advance()
        finally:
            self._teller.flush()

    def _say(self) -> None:
        # A total of 0 is how the protocol says that nobody knows it.
        self._teller.say(self.current, self.total or 0, self.message)


def progress(
    task: Any, items: Iterable[T] = (), *, total: float | None = None, message: str | None = None
) -> Progress[T]:
    """Shows how far a task is, at most ten times a second; the last state always goes out.

        for frame in progress(self, frames): ...

        with progress(self, total=100) as bar:
            bar.advance(5, message="frame 5")

    `self` is the task (`bind=True`), of whatever base class. Without a `total` it is the number of `items`,
    if they know it; else the bar has no end.
    """
    if not isinstance(items, Iterable):
        raise TypeError(f"items must be iterable, not {type(items).__name__}; a number of steps is total=")
    if total is None and isinstance(items, Sized):
        total = len(items) or None
    return Progress(task, items, total, message)


class ProgressRecorder:
    """The recorder of celery-progress, shown by Tidings: only the import changes.

    What is recorded goes to the project's pages, at most ten times a second and the last one always. Nothing
    is written to the result backend.
    """

    def __init__(self, task: Any) -> None:
        self.task = task
        self.current: float = 0
        self.total: float = 0
        self.description = ""
        self._teller = _Teller(task)

    def set_progress(self, current: float, total: float, description: str = "") -> tuple[str, dict[str, Any]]:
        """`current` of `total` are done. Returns a state and its meta, as the recorder of celery-progress."""
        self.current, self.total = current, total
        if description:
            self.description = description
        self._teller.say(current, total, self.description or None)
        meta = {
            "pending": False,
            "current": current,
            "total": total,
            "percent": _percent(current, total),
            "description": description,
        }
        return "PROGRESS", meta

    def increment_progress(self, by: float = 1, description: str = "") -> None:
        """`by` more are done; the total is the one that was set last, 0 where nobody knows it."""
        self.set_progress(self.current + by, self.total, description)


def _percent(current: float, total: float) -> float:
    try:
        return _events.percentage(current, total)
    except (ArithmeticError, TypeError, ValueError):
        return 0  # not a number, which was logged where it was to be sent
