"""From Celery's signals to `task.started`, `task.completed` and `task.failed`: the one place that sends them.

Signals, and not `on_success` and its kin, which subclasses override without `super()`, and which are not
called for a killed or revoked task. Nothing here ever fails a task, and Redis being away costs it a few
seconds at most. The receivers stay connected and look only at tasks that are followed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from billiard import current_process
from celery import signals
from celery.app.task import Context
from celery.exceptions import (
    Reject,
    SoftTimeLimitExceeded,
    TaskRevokedError,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)

from .. import _events
from .._attempts import attempts, ends, event_id
from .._encode import pass_on_time_limit
from .._events import Event
from .._publisher import default_publisher
from .run import (
    PROJECT,
    argument_project,
    attempt_of,
    complain,
    complain_of_no_project,
    follows,
    installed,
    log,
    name_of,
    names_of,
    project_of,
    run_of,
)

_REASONS = (
    ((SoftTimeLimitExceeded, TimeLimitExceeded), "time_limit"),
    (WorkerLostError, "worker_lost"),
    ((TaskRevokedError, Terminated), "revoked"),
    (Reject, "rejected"),
)


def announce(task: Any) -> None:
    """Sends `task.started` for what the run is called now, unless that was done."""
    request = task.request_stack.top
    # Nobody would ever end what a task says that is called like a function.
    if request is None or request.called_directly or request.id is None:
        return
    name = name_of(task, request)
    if name is None or name in run_of(request).announced:
        return
    run_of(request).announced[name] = None
    project_id, task_id = name
    publish(_events.task_started(task_id, task.name, project_id), attempt_of(request))


def publish(event: Event, attempt: int) -> None:
    """Sends an event of an attempt; one that can be told from others by its type has an id of its own."""
    event["attempt"] = attempt
    if event["type"] != "task.progress":
        event["id"] = event_id(event["task_id"], attempt, event["type"])
    try:
        default_publisher().publish(event)
    except Exception as error:
        # A Redis that is away has been logged and counted there already.
        pass_on_time_limit(error)
        log.debug("%s of task %s was not sent: %s", event["type"], event["task_id"], error)


def flush(request: Any) -> None:
    """Sends the progress that was held back, in a run or before its end."""
    for pace in list(run_of(request).paces.values()):
        pace.flush()


def _end(task: Any, request: Any, type_: str, build: Callable[[str, str], Event]) -> None:
    """Sends the terminal event for every name under which the run was announced."""
    flush(request)
    attempt, said = attempt_of(request), False
    for project_id, task_id in names_of(task, request):
        said = True
        if ends.claim(project_id, task_id, attempt, type_):
            publish(build(task_id, project_id), attempt)
    if not said and getattr(type(task), "_tidings_follows", False):
        complain_of_no_project(task)


def _complete(task: Any, request: Any, result: Any = None) -> None:
    _end(
        task,
        request,
        "task.completed",
        lambda task_id, project_id: _events.task_completed(task_id, project_id, result),
    )


def _fail(task: Any, request: Any, error: object, reason: str, traceback: str | None = None) -> None:
    def build(task_id: str, project_id: str) -> Event:
        return {**_events.task_failed(task_id, project_id, error, traceback), "reason": reason}

    _end(task, request, "task.failed", build)


def _receiver(signal: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Connects a function to a signal for tasks that are followed, and keeps its errors from them."""

    def connect(receive: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(receive)
        def guarded(sender: Any = None, **given: Any) -> None:
            task = getattr(given["request"], "task", None) if signal is signals.task_received else sender
            try:
                if signal is signals.task_postrun and task is not None:
                    flush(task.request)
                if follows(task):
                    receive(task, **given)
            except Exception as error:
                complain(task, receive.__name__, "an event of it could not be sent: %s", error)

        signal.connect(guarded, weak=False, dispatch_uid=f"tidings.{receive.__name__}")
        return guarded

    return connect


@_receiver(signals.task_received)
def _on_received(task: Any, /, request: Any, **_: Any) -> None:
    # In the worker's main process, which reports the end of an attempt whose own process is gone.
    # Of what its signals leave out then, this remembers what cannot be found in the arguments.
    project_id = project_of(task, request)
    known = project_id == argument_project(task, request.args, request.kwargs)
    _begin(request.id, int(request.request_dict.get("retries") or 0), None if known else project_id)


@_receiver(signals.task_prerun)
def _on_prerun(task: Any, /, task_id: str, **_: Any) -> None:
    _begin(task_id, attempt_of(task.request))
    announce(task)


def _begin(task_id: str, attempt: int, project_id: str | None = None) -> None:
    attempts.begin(task_id, attempt, project_id)
    ends.reopen(task_id, attempt)


@_receiver(signals.task_success)
def _on_success(task: Any, /, result: Any, **_: Any) -> None:
    _complete(task, task.request, result)


@_receiver(signals.task_failure)
def _on_failure(
    task: Any,
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
def _on_revoked(task: Any, /, request: Any, terminated: bool, expired: bool, **_: Any) -> None:
    if expired:
        _fail(task, request, "the task expired before it began", "expired")
    elif terminated:
        if not _ended_well(task, request):
            _fail(task, request, "the task was terminated", "revoked")
    else:
        _fail(task, request, "the task was revoked before it began", "revoked")


@_receiver(signals.task_postrun)
def _on_postrun(task: Any, /, state: str | None, retval: Any, **_: Any) -> None:
    """The ends for which Celery has no signal of their own."""
    request = task.request
    if state == "IGNORED":
        if not _is_replaced(task, request, retval):
            _complete(task, request)
    # A message that was acknowledged before the task ran cannot be requeued, whatever the task asks for.
    elif state == "REJECTED" and not (getattr(retval, "requeue", False) and task.acks_late):
        _fail(task, request, getattr(retval, "reason", None) or "the task was rejected", "rejected")
    elif state is None:
        _on_unwound(task, request, sys.exc_info()[1])


def _is_replaced(task: Any, request: Any, retval: Any) -> bool:
    """Whether another task goes on under the id of this one, and ends it."""
    # Celery has no other sign of it for tasks whose `replace` is not ours.
    return run_of(request).is_replaced or (task.app in installed and str(retval) == "Replaced by new task")


def _on_unwound(task: Any, request: Any, error: BaseException | None) -> None:
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


def _is_last(task: Any) -> bool:
    """Whether a task that loses its process is not run again."""
    return not task.acks_late and not getattr(task, "retry_on_worker_lost", False)


def _request_of(task: Any, task_id: str, args: Any, kwargs: Any) -> Any:
    """The request of the run, or what can be known of it where the run itself is not."""
    request = task.request_stack.top
    if request is not None and request.id == task_id:
        return request
    project_id = attempts.project(task_id)
    stamps = {PROJECT: project_id} if project_id else {}
    return Context(id=task_id, args=args, kwargs=kwargs, retries=attempts.number(task_id), stamps=stamps)


def _goes_again(task: Any, exception: BaseException) -> bool:
    """Whether the message of a failed attempt was put back, so that the same attempt begins once more."""
    if isinstance(exception, Reject):
        return bool(exception.requeue and task.acks_late)
    hard_limit = isinstance(exception, TimeLimitExceeded)
    return bool(hard_limit and task.acks_late and getattr(task, "acks_on_timeout", True) is False)


def _ended_well(task: Any, request: Any) -> bool:
    """Whether a run that was killed had stored its result a moment before. If so, it is told as such."""
    try:
        if task.ignore_result or task.backend.as_uri() == "rpc://":
            return False
        meta = task.backend.get_task_meta(request.id, cache=False)
    except Exception as error:
        log.debug("the result of task %s could not be looked up: %s", request.id, error)
        return False
    if meta.get("status") != "SUCCESS":
        return False
    _complete(task, request, meta.get("result"))
    return True
