"""For FastAPI: events from a route, the session that the service reads, tasks that are registered.

app = FastAPI(lifespan=tidings.fastapi.lifespan())
sessions = Sessions()

@app.post("/projects/{project_id}/files")
async def upload(project_id: str, events: Events) -> None:
    await events.file_uploaded(project_id, "a.mp4")
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any, TypeAlias

try:
    from fastapi import Depends
except ModuleNotFoundError as error:
    raise ImportError("tidings.fastapi needs FastAPI: pip install 'tidings[fastapi]'") from error

from ._broadcaster import EventBroadcaster, drain
from ._publisher import close_connections
from ._registration import register
from ._sessions import Session, Sessions
from ._settings import configure

__all__ = [
    "Events",
    "Session",
    "Sessions",
    "broadcaster",
    "lifespan",
    "register_task",
    "register_task_sync",
]

DRAIN_S = 5.0
"""An event is tried for 3 s; a server that stops is killed after 10 s by most who run it."""

Lifespan: TypeAlias = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]

_log = logging.getLogger("tidings")


def lifespan(own: Lifespan | None = None, **settings: Any) -> Lifespan:
    """What `FastAPI(lifespan=...)` takes.

    `settings` go to `tidings.configure` at the start; at the end what is still on its way is sent, within
    5 s, and connections are closed. `own` is the application's lifespan, which may publish until its end.
    """

    @asynccontextmanager
    async def run(app: Any) -> AsyncIterator[Mapping[str, Any] | None]:
        if settings:
            configure(**settings)
        try:
            if own is None:
                yield None
            else:
                async with own(app) as state:
                    yield state
        finally:
            if not await drain(DRAIN_S):
                _log.error("events are lost: some were still on their way when the application ended")
            await asyncio.to_thread(close_connections)

    return run


async def broadcaster() -> EventBroadcaster:
    """The dependency behind `Events`; a test may override it (`app.dependency_overrides`)."""
    return _events


Events = Annotated[EventBroadcaster, Depends(broadcaster)]
"""A parameter of this type is the process's `EventBroadcaster`."""

_events = EventBroadcaster()


async def register_task(
    task_id: str,
    project_id: str,
    *,
    task_name: str | None = None,
    url: str | None = None,
    key: str | None = None,
) -> bool:
    """Says to which project a Celery task belongs, best before it is sent (`apply_async(task_id=...)`).

    `task_name` is for a task that may end before anything else is heard of it. `url` is the service's
    (otherwise `TIDINGS_URL`), `key` one that may publish (otherwise `TIDINGS_PUBLISH_KEY`). Returns False
    within 3 s if that failed, and why is logged; with `configure(raise_errors=True)` it raises
    `tidings.PublishError`.
    """
    return await asyncio.to_thread(register, task_id, project_id, task_name, url, key)


def register_task_sync(
    task_id: str,
    project_id: str,
    *,
    task_name: str | None = None,
    url: str | None = None,
    key: str | None = None,
) -> bool:
    """As `register_task`, for routes without `async`."""
    return register(task_id, project_id, task_name, url, key)


def __dir__() -> list[str]:
    return sorted(__all__)
