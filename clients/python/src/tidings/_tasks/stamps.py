"""Following an application whose tasks do not mention us, and stamping what it sends with the project.

A stamp stands in everything that Celery's result backend says of a task (with `result_extended`), so that the
service finds the project there, too: for arguments by position, and for tasks that have none of their own.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, signals
from celery.utils.functional import maybe_list

from .._encode import pass_on_time_limit
from .run import PROJECT, argument_project, installed, log, running_project, stamped_project

CHAIN = "tidings_chain"
"""The stamp for how many tasks of a chain are to run yet, this one included."""

_UID = "tidings._on_publish"


def install(app: Any, *, project_argument: str = PROJECT) -> None:
    """Tells the project's pages what the tasks of `app` do, without a change in them.

    Call it in the module of the application, which workers and producers both import. Each task with an
    argument `project_argument`, by keyword or by position, sends `task.started` and `task.completed` or
    `task.failed`; tasks that it calls belong to the same project. Other applications are left alone.
    """
    if not isinstance(project_argument, str) or not project_argument.isidentifier():
        raise ValueError(f"project_argument must be the name of an argument, not {project_argument!r}")
    installed[_application(app)] = project_argument
    signals.before_task_publish.connect(_on_publish, weak=False, dispatch_uid=_UID)


def uninstall(app: Any) -> None:
    """Undoes `install`: nothing of `app` is stamped or told any more, but for tasks of `ProgressTask`."""
    installed.pop(_application(app), None)
    if not installed:
        signals.before_task_publish.disconnect(_on_publish, dispatch_uid=_UID)


def _application(app: Any) -> Any:
    # What `current_app` is: one object that stands for whichever application is current.
    app = app._get_current_object() if hasattr(app, "_get_current_object") else app
    if not isinstance(app, Celery):
        raise TypeError(f"app must be a Celery application, not {type(app).__name__}")
    return app


def _on_publish(
    sender: Any = None, body: Any = None, headers: Any = None, declare: Any = None, **_: Any
) -> None:
    try:
        # In the first version of Celery's protocol the body is a dict, and nothing can be stamped.
        app = _sender_app(sender, declare) if isinstance(body, (tuple, list)) else None
        if app is not None:
            _stamp(app, sender, body, headers)
    except Exception as error:
        pass_on_time_limit(error)
        log.warning("a message of task %s could not be stamped: %s", sender, error)


def _sender_app(name: str, declare: Any) -> Any:
    """The application that sends, if it is one of ours.

    The signal does not say; but a queue belongs to one application, while a task's name may be in several
    (`shared_task`).
    """
    queue = declare[0] if declare else None
    for app in list(installed):
        known = app.amqp.queues.get(getattr(queue, "name", None))
        if known is queue if known is not None else name in app.tasks:
            return app
    return None


def _stamp(app: Any, name: str, body: Any, headers: dict[str, Any]) -> None:
    stamps = dict(headers.get("stamps") or {})
    project_id = stamped_project(stamps)
    if PROJECT not in stamps:
        project_id = (
            argument_project(app.tasks.get(name), body[0], body[1], installed[app]) or running_project()
        )
    # A retry brings along what its first message was stamped with.
    stamps.pop(CHAIN, None)
    if project_id is not None:
        stamps[PROJECT] = project_id
        if chain := (body[2] or {}).get("chain"):
            stamps[CHAIN] = len(chain) + 1
    own = [header for header in maybe_list(headers.get("stamped_headers")) or [] if header != CHAIN]
    # New objects: Celery shares these with the signature, which may be sent again.
    added = [header for header in (PROJECT, CHAIN) if header in stamps and header not in own]
    headers["stamps"], headers["stamped_headers"] = stamps, own + added or None
