"""Publishes project events to the Tidings service, through Redis.

`EventBroadcaster` for asyncio, `SyncEventBroadcaster` for everything else, `ProgressTask` as the base class
of Celery tasks. `configure` says where Redis is, and whether events go to the ingest stream (the default) or
to a pub/sub channel (otherwise `REDIS_URL`, `TIDINGS_PUBLISH_TO` and `REDIS_CHANNEL` do).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._broadcaster import EventBroadcaster, SyncEventBroadcaster
from ._publisher import PublishError, lost_events
from ._settings import configure

if TYPE_CHECKING:
    from .celery import ProgressTask

__all__ = [
    "EventBroadcaster",
    "ProgressTask",
    "PublishError",
    "SyncEventBroadcaster",
    "__version__",
    "configure",
    "lost_events",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Celery is an extra, and takes longer to import than all of this.
    if name != "ProgressTask":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .celery import ProgressTask
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "celery":
            raise ImportError("tidings.ProgressTask needs Celery: pip install 'tidings[celery]'") from error
        raise
    return ProgressTask


def __dir__() -> list[str]:
    return sorted(__all__)
