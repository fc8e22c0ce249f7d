"""Celery tasks that the project's pages can watch.

Without a change in any task, `tidings.celery.install(app)` tells when they start and end:

    app = Celery("proj")
    tidings.celery.install(app)

Within a task, `progress` moves a bar, and `ProgressRecorder` is that of celery-progress:

    @app.task(bind=True)
    def process_video(self, project_id, video_path):
        for frame in progress(self, frames_of(video_path)):
            ...

`ProgressTask` is a base class that does both for its tasks, with or without `install`.
"""

from __future__ import annotations

import threading
from typing import Any

from celery import Task

from . import _events
from ._encode import pass_on_time_limit
from ._settings import progress_per_second
from ._tasks.progress import Progress, ProgressRecorder, progress, say_progress
from ._tasks.run import Run, complain, follows, project_of, run_of
from ._tasks.signals import announce
from ._tasks.stamps import install, uninstall

__all__ = ["Progress", "ProgressRecorder", "ProgressTask", "install", "progress", "uninstall"]


class _OutsideRuns(threading.local):
    """What is set while no request is there (`task.run(...)` in a test): per thread, and never announced."""

    def __init__(self) -> None:
        self.of: dict[str, Run] = {}


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
    _tidings_follows = True

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
        return self._run_here().project_id or project_of(self, self.request)

    @project_id.setter
    def project_id(self, value: object) -> None:
        self._set("project_id", value)

    @property
    def task_id(self) -> str | None:
        """The id that this run's events carry: Celery's, unless the task's code sets another."""
        return self._run_here().task_id or _events.identifier(self.request.id)

    @task_id.setter
    def task_id(self, value: object) -> None:
        self._set("task_id", value)

    def update_progress(
        self, current: float, total: float, message: str | None = None, metadata: Any = None
    ) -> None:
        """Says that `current` of `total` steps are done. Never raises; waits for Redis about 2 s at worst.

        Every update goes out, unless `tidings.configure(progress_per_second=...)` says otherwise.
        """
        request, per_second = self.request_stack.top, progress_per_second()
        say_progress(self, request, current, total, message, metadata, per_second=per_second)

    def replace(self, sig: Any) -> Any:
        """As Celery's. A task that is followed and replaces this one goes on under its id, and ends it."""
        successor = self.app.tasks.get(getattr(sig, "task", None))
        self._run_here().is_replaced = successor is not None and follows(successor)
        return super().replace(sig)

    def _run_here(self) -> Run:
        request = self.request_stack.top
        if request is None:
            return _outside_runs.of.setdefault(self.name, Run())
        return run_of(request)

    def _set(self, name: str, value: object) -> None:
        text = _events.identifier(value)
        if text is None and value not in (None, ""):
            complain(self, name, f"{name} cannot be %r: it is left as it was", value)
            return
        setattr(self._run_here(), name, text)
        try:
            announce(self)
        except Exception as error:
            pass_on_time_limit(error)
            complain(self, "started", "its start could not be sent: %s", error)


def __dir__() -> list[str]:
    return sorted(__all__)
