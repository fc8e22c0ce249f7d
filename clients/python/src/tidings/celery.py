"""`ProgressTask`: a Celery task base class that tells the project's pages what its tasks do.

    @app.task(bind=True, base=ProgressTask)
    def process_video(self, project_id, video_path):
        for i in range(100):
            self.update_progress(i + 1, 100)

`task.started`, `task.completed` and `task.failed` come from Celery's signals, not from `on_success` and its
kin, which subclasses override without `super()`, and which are not called for a killed or revoked task.
Everything about a run lives on its request: the task object is one for all threads of a process.
Nothing here ever fails a task, and Redis being away costs it a few seconds at most.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from billiard import current_process
from celery import Task, signals
from celery.app.task import Context
from celery.exceptions import (
    Reject,
    SoftTimeLimitExceeded,
    TaskRevokedError,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)

from . import _events
from ._attempts import attempts, ends, event_id
from ._encode import pass_on_time_limit
from ._events import Event
from ._publisher import default_publisher

__all__ = ["ProgressTask"]

_log = logging.getLogger("tidings")

_REASONS = (
    ((SoftTimeLimitExceeded, TimeLimitExceeded), "time_limit"),
    (WorkerLostError, "worker_lost"),
    ((TaskRevokedError, Terminated), "revoked"),
    (Reject, "rejected"),
)


@dataclass
class _Run:
    """What one run of a task has said of itself. `announced`: (project_id, task_id) with a `task.started`."""

    project_id: str | None = None
    task_id: str | None = None
    project_argument: str | None = None
    is_bound: bool = False
    is_replaced: bool = False
    announced: dict[tuple[str, str], None] = field(default_factory=dict)


class _OutsideRuns(threading.local):
    """What is set while no request is there (`task.run(...)` in a test): per thread, and never announced."""

    def __init__(self) -> None:
        self.of: dict[str, _Run] = {}


_outside_runs = _OutsideRuns()


class ProgressTask(Task):  # type: ignore[misc, unused-ignore]
    """Base class for tasks whose progress is shown: `@app.task(bind=True, base=ProgressTask)`.

    Each attempt sends `task.started` and, exactly one of them, `task.completed` or `task.failed`; a retry is
    not an end. The project is the argument `project_id`, by keyword or by position; where there is none, the
    task's code sets `self.project_id`. Events go where `tidings.configure` or the environment say, to the
    ingest stream unless told otherwise.

    A worker process that is killed, and a hard time limit, are reported by the worker's main process, which
    knows the project from the arguments alone and not what the task's code has set.
    """

    abstract = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("project_id", "task_id"):
            # `project_id = None` in a class body is how older code declares it. It would hide the property,
            # and one task's project would show in another that runs at the same time.
            if name in cls.__dict__ and not isinstance(cls.__dict__[name], property):
                if cls.__dict__[name] is not None:
                    raise TypeError(f"{cls.__name__}.{name} belongs to a run of the task, not to its class")
                delattr(cls, name)

    @property
    def project_id(self) -> str | None:
        """The project of this run, or None. Setting it sends `task.started` if none was sent yet."""
        return self._run_here().project_id or _project_argument(self, self.request)

    @project_id.setter
    def project_id(self, value: object) -> None:
        _set(self, "project_id", value)

    @property
    def task_id(self) -> str | None:
        """The id that this run's events carry: Celery's, unless the task's code sets another."""
        return self._run_here().task_id or _events.identifier(self.request.id)

    @task_id.setter
    def task_id(self, value: object) -> None:
        _set(self, "task_id", value)

    def update_progress(
        self, current: float, total: float, message: str | None = None, metadata: Any = None
    ) -> None:
        """Says that `current` of `total` steps are done. Never raises; waits for Redis about 2 s at worst."""
        try:
            _publish_progress(self, current, total, message, metadata)
        except Exception as error:
            pass_on_time_limit(error)
            _complain(self, "progress", "an update of its progress could not be sent: %s", error)

    def replace(self, sig: Any) -> Any:
        """As Celery's. A `ProgressTask` that replaces this one goes on under its id, and ends it."""
        successor = self.app.tasks.get(getattr(sig, "task", None))
        self._run_here().is_replaced = isinstance(successor, ProgressTask)
        return super().replace(sig)

    def _run_here(self) -> _Run:
        request = self.request_stack.top
        if request is None:
            return _outside_runs.of.setdefault(self.name, _Run())
        return _run_of(request)


def _run_of(request: Any) -> _Run:
    run = request.__dict__.get("_tidings_run")
    if run is None:
        run = request._tidings_run = _Run()
    return run  # type: ignore[no-any-return]


def _set(task: ProgressTask, name: str, value: object) -> None:
    text = _events.identifier(value)
    if text is None and value not in (None, ""):
        _complain(task, name, f"{name} cannot be %r: it is left as it was", value)
        return
    setattr(task._run_here(), name, text)
    try:
        _announce(task)
    except Exception as error:
        pass_on_time_limit(error)
        _complain(task, "started", "its start could not be sent: %s", error)


def _announce(task: ProgressTask) -> None:
    """Sends `task.started` for what the run is called now, unless that was done."""
    request = task.request_stack.top
    # Nobody would ever end what a task says that is called like a function.
    if request is None or request.called_directly or request.id is None:
        return
    project_id, task_id = task.project_id, task.task_id
    if project_id is None or task_id is None or (project_id, task_id) in _run_of(request).announced:
        return
    _run_of(request).announced[project_id, task_id] = None
    _publish(_events.task_started(task_id, task.name, project_id), _attempt(request))


def _publish_progress(
    task: ProgressTask, current: float, total: float, message: str | None, metadata: Any
) -> None:
    project_id, task_id = task.project_id, task.task_id
    if project_id is None or task_id is None:
        _complain_of_no_project(task)
        return
    event = _events.task_progress(task_id, project_id, current, total, message, metadata)
    _publish({**event, "attempt": _attempt(task.request)})


def _end(task: ProgressTask, request: Any, type_: str, build: Callable[[str, str], Event]) -> None:
    """Sends the terminal event for every name under which the run was announced."""
    attempt, said = _attempt(request), False
    for project_id, task_id in _names(task, request):
        said = True
        if ends.claim(project_id, task_id, attempt, type_):
            _publish(build(task_id, project_id), attempt)
    if not said:
        _complain_of_no_project(task)


def _names(task: ProgressTask, request: Any) -> Iterator[tuple[str, str]]:
    run = _run_of(request)
    if run.announced:
        yield from run.announced
        return
    project_id = run.project_id or _project_argument(task, request)
    task_id = run.task_id or _events.identifier(request.id)
    if project_id is not None and task_id is not None:
        yield project_id, task_id


def _complete(task: ProgressTask, request: Any, result: Any = None) -> None:
    _end(
        task,
        request,
        "task.completed",
        lambda task_id, project_id: _events.task_completed(task_id, project_id, result),
    )


def _fail(task: ProgressTask, request: Any, error: object, reason: str, traceback: str | None = None) -> None:
    def build(task_id: str, project_id: str) -> Event:
        return {**_events.task_failed(task_id, project_id, error, traceback), "reason": reason}

    _end(task, request, "task.failed", build)


def _publish(event: Event, attempt: int | None = None) -> None:
    if attempt is not None:
        event |= {"attempt": attempt, "id": event_id(event["task_id"], attempt, event["type"])}
    try:
        default_publisher().publish(event)
    except Exception as error:
        # A Redis that is away has been logged and counted there already.
        pass_on_time_limit(error)
        _log.debug("%s of task %s was not sent: %s", event["type"], event["task_id"], error)


def _attempt(request: Any) -> int:
    return int(request.retries or 0)


def _project_argument(task: ProgressTask, request: Any) -> str | None:
    # Celery's stand-in for "no request" is shared by all threads, so nothing is kept on it.
    run = _Run() if request.id is None and request is not task.request_stack.top else _run_of(request)
    if not run.is_bound:
        run.project_argument = _bound_project(task, request.args, request.kwargs)
        run.is_bound = True
    return run.project_argument


def _bound_project(task: ProgressTask, args: Any, kwargs: Any) -> str | None:
    kwargs = dict(kwargs or {})
    if "project_id" in kwargs:
        return _events.identifier(kwargs["project_id"])
    try:
        bound = inspect.signature(task.run).bind_partial(*(args or ()), **kwargs)
    except (TypeError, ValueError):
        return None  # arguments that do not fit: Celery is about to fail the task for them
    bound.apply_defaults()
    return _events.identifier(bound.arguments.get("project_id"))


_complained: set[tuple[str, str]] = set()


def _complain(task: ProgressTask, about: str, text: str, *values: object) -> None:
    """Logs once per task and subject: a loop over a million frames makes the same mistake a million times."""
    if (task.name, about) not in _complained:
        _complained.add((task.name, about))
        _log.warning("task %s: " + text, task.name, *values)


def _complain_of_no_project(task: ProgressTask) -> None:
    _complain(
        task,
        "project",
        "its events are not sent, because no project is known: give it an argument project_id, or set"
        " self.project_id",
    )


def _receiver(signal: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Connects a function to a signal for tasks of ours, and keeps what goes wrong in it from the task."""

    def connect(receive: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(receive)
        def guarded(sender: Any = None, **given: Any) -> None:
            task = getattr(given["request"], "task", None) if signal is signals.task_received else sender
            if not isinstance(task, ProgressTask):
                return
            try:
                receive(task, **given)
            except Exception as error:
                _complain(task, receive.__name__, "an event of it could not be sent: %s", error)

        signal.connect(guarded, weak=False, dispatch_uid=f"tidings.{receive.__name__}")
        return guarded

    return connect


@_receiver(signals.task_received)
def _on_received(task: ProgressTask, /, request: Any, **_: Any) -> None:
    # In the worker's main process, which reports the end of an attempt whose own process is gone.
    _begin(request.id, int(request.request_dict.get("retries") or 0))


@_receiver(signals.task_prerun)
def _on_prerun(task: ProgressTask, /, task_id: str, **_: Any) -> None:
    _begin(task_id, _attempt(task.request))
    _announce(task)


def _begin(task_id: str, attempt: int) -> None:
    attempts.begin(task_id, attempt)
    ends.reopen(task_id, attempt)


@_receiver(signals.task_success)
def _on_success(task: ProgressTask, /, result: Any, **_: Any) -> None:
    _complete(task, task.request, result)


@_receiver(signals.task_failure)
def _on_failure(
    task: ProgressTask,
    /,
    task_id: str,
    exception: BaseException,
    args: Any,
    kwargs: Any,
    einfo: Any,
    **_: Any,
) -> None:
    if _goes_again(task, exception):
        return
    request = _request_of(task, task_id, args, kwargs)
    reason = next((reason for types, reason in _REASONS if isinstance(exception, types)), "error")
    if reason in ("time_limit", "worker_lost") and _ended_well(task, request):
        return
    traceback = getattr(einfo, "traceback", None)
    _fail(task, request, exception, reason, traceback if isinstance(traceback, str) else None)


@_receiver(signals.task_revoked)
def _on_revoked(task: ProgressTask, /, request: Any, terminated: bool, expired: bool, **_: Any) -> None:
    if expired:
        _fail(task, request, "the task expired before it began", "expired")
    elif terminated:
        if not _ended_well(task, request):
            _fail(task, request, "the task was terminated", "revoked")
    else:
        _fail(task, request, "the task was revoked before it began", "revoked")


@_receiver(signals.task_postrun)
def _on_postrun(task: ProgressTask, /, state: str | None, retval: Any, **_: Any) -> None:
    """The ends for which Celery has no signal of their own."""
    request = task.request
    if state == "IGNORED" and not _run_of(request).is_replaced:
        _complete(task, request)
    # A message that was acknowledged before the task ran cannot be requeued, whatever the task asks for.
    elif state == "REJECTED" and not (getattr(retval, "requeue", False) and task.acks_late):
        _fail(task, request, getattr(retval, "reason", None) or "the task was rejected", "rejected")
    elif state is None:
        _on_unwound(task, request, sys.exc_info()[1])


def _on_unwound(task: ProgressTask, request: Any, error: BaseException | None) -> None:
    """Something that Celery does not treat as the task's outcome has left the task's code."""
    if request.is_eager:
        # An exception that is passed on to the caller.
        if error is not None:
            _fail(task, request, error, "error")
    # Outside the prefork pool, and there too before Celery 5.7, nobody else reports a task that calls
    # sys.exit: Celery trips over it. Where the main process does report it, the id makes the two one event.
    elif isinstance(error, (SystemExit, KeyboardInterrupt)) and not _is_killed(error) and _is_last(task):
        _fail(task, request, f"the task left its worker: {error!r}", "worker_lost")


def _is_killed(error: BaseException) -> bool:
    """Whether a signal has ended a pool process, which the main process sent or notices."""
    code = getattr(error, "code", None)
    in_pool_process = current_process().name != "MainProcess"
    return in_pool_process and isinstance(code, int) and code < 0


def _is_last(task: ProgressTask) -> bool:
    """Whether a task that loses its process is not run again."""
    return not task.acks_late and not getattr(task, "retry_on_worker_lost", False)


def _request_of(task: ProgressTask, task_id: str, args: Any, kwargs: Any) -> Any:
    """The request of the run, or what can be known of it where the run itself is not."""
    request = task.request_stack.top
    if request is not None and request.id == task_id:
        return request
    return Context(id=task_id, args=args, kwargs=kwargs, retries=attempts.number(task_id))


def _goes_again(task: ProgressTask, exception: BaseException) -> bool:
    """Whether the message of a failed attempt was put back, so that the same attempt begins once more."""
    if isinstance(exception, Reject):
        return bool(exception.requeue and task.acks_late)
    hard_limit = isinstance(exception, TimeLimitExceeded)
    return bool(hard_limit and task.acks_late and getattr(task, "acks_on_timeout", True) is False)


def _ended_well(task: ProgressTask, request: Any) -> bool:
    """Whether a run that was killed had stored its result a moment before. If so, it is told as such."""
    try:
        if task.ignore_result or task.backend.as_uri() == "rpc://":
            return False
        meta = task.backend.get_task_meta(request.id, cache=False)
    except Exception as error:
        _log.debug("the result of task %s could not be looked up: %s", request.id, error)
        return False
    if meta.get("status") != "SUCCESS":
        return False
    _complete(task, request, meta.get("result"))
    return True
