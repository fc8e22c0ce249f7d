"""One run of a Celery task: its project, its names, and what was said under them.

Everything about a run lives on its request: the task object is one for all threads of a process.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from celery._state import _task_stack

from .. import _events
from .pace import Pace

PROJECT = "project_id"
"""What the project is called in stamps, and the argument unless `install` says otherwise."""

Name = tuple[str, str]
"""(project_id, task_id)"""

log = logging.getLogger("tidings")

installed: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""The applications whose tasks are followed without mentioning us, each with the argument for the project."""


@dataclass
class Run:
    """What one run of a task has said of itself. `announced`: the names with a `task.started`."""

    project_id: str | None = None
    task_id: str | None = None
    found_project: str | None = None
    is_bound: bool = False
    is_replaced: bool = False
    announced: dict[Name, None] = field(default_factory=dict)
    paces: dict[Name, Pace] = field(default_factory=dict)


def follows(task: Any) -> bool:
    """Whether starts and ends of this task are told: a `ProgressTask`, or one of an installed application."""
    return getattr(type(task), "_tidings_follows", False) or getattr(task, "app", None) in installed


def run_of(request: Any) -> Run:
    run = request.__dict__.get("_tidings_run")
    if run is None:
        run = request._tidings_run = Run()
    return run  # type: ignore[no-any-return]


def attempt_of(request: Any) -> int:
    return int(request.retries or 0)


def project_of(task: Any, request: Any) -> str | None:
    """What the task's code has set, else its stamp, its argument, or the project of the task it is within."""
    # Celery's stand-in for "no request" is shared by all threads, so nothing is kept on it.
    run = Run() if request.id is None and request is not task.request_stack.top else run_of(request)
    if run.project_id is None and not run.is_bound:
        run.is_bound = True
        run.found_project = (
            stamped_project(getattr(request, "stamps", None))
            or argument_project(task, request.args, request.kwargs)
            or (running_project(request) if getattr(request, "is_eager", False) else None)
        )
    return run.project_id or run.found_project


def name_of(task: Any, request: Any) -> Name | None:
    project_id = project_of(task, request)
    task_id = run_of(request).task_id or _events.identifier(request.id)
    return None if project_id is None or task_id is None else (project_id, task_id)


def names_of(task: Any, request: Any) -> Iterator[Name]:
    """Every name under which the run was announced, or the one that it has."""
    announced = run_of(request).announced
    name = name_of(task, request)
    yield from announced or ([name] if name else [])


def stamped_project(stamps: Any) -> str | None:
    value = (stamps or {}).get(PROJECT)
    if isinstance(value, (list, tuple)):
        # Two stamps of one name are merged to a list: nobody can say which of them it is.
        value = value[0] if len(value) == 1 else None
    return _events.identifier(value)


def argument_project(task: Any, args: Any, kwargs: Any, name: str | None = None) -> str | None:
    """The project among the arguments; of a task that is not known here (None) only by keyword."""
    name = name or _argument_of(task)
    kwargs = dict(kwargs or {})
    if name in kwargs:
        return _events.identifier(kwargs[name])
    if task is None:
        return None
    try:
        bound = inspect.signature(task.run).bind_partial(*(args or ()), **kwargs)
    except (TypeError, ValueError):
        return None  # arguments that do not fit: Celery is about to fail the task for them
    bound.apply_defaults()
    return _events.identifier(bound.arguments.get(name))


def _argument_of(task: Any) -> str:
    app = getattr(task, "app", None)
    return PROJECT if app is None else installed.get(app, PROJECT)


def running_project(but: Any = None) -> str | None:
    """The project of the task that this thread is running, other than that of the request `but`."""
    for task in reversed(_task_stack.stack):
        request = task.request
        if request is not but and not request.called_directly and request.id is not None:
            return project_of(task, request)
    return None


_complained: set[tuple[str, str]] = set()


def complain(task: Any, about: str, text: str, *values: object) -> None:
    """Logs once per task and subject: a loop over a million frames makes the same mistake a million times."""
    name = getattr(task, "name", None) or type(task).__name__
    if (name, about) not in _complained:
        _complained.add((name, about))
        log.warning("task %s: " + text, name, *values)


def complain_of_no_project(task: Any) -> None:
    complain(
        task,
        "project",
        "its events are not sent, because no project is known: give it an argument %s, or set"
        " self.project_id where it is a ProgressTask",
        _argument_of(task),
    )
