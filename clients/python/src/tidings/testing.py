"""What a test needs to see what was published: nothing goes to Redis, and none has to run.

    with tidings.testing.capture() as published:
        upload(client, "a.mp4")
    published.assert_published("file.uploaded", project_id="p1")

With pytest, the fixture `tidings_events` is such a capture for one test. It holds for this process: both
broadcasters, `ProgressTask`, `install` and `progress`, eagerly (`task_always_eager`) or in Celery's own
`celery.contrib.testing.worker`; not for the processes of a prefork pool.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import _publisher

__all__ = ["Published", "capture"]

_WAIT_S = 10.0


class Published:
    """What was published, in order, as the service would read it."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        # Its lock is an RLock: waiting looks at the events, which takes it again.
        self._changed = threading.Condition()

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events so far."""
        with self._changed:
            return list(self._events)

    @property
    def types(self) -> list[str]:
        """The types of all events so far."""
        return [event["type"] for event in self.events]

    def of_type(self, type_: str) -> list[dict[str, Any]]:
        """The events of a type, or of `word.*`."""
        return [event for event in self.events if _is_of(event["type"], type_)]

    def for_project(self, project_id: str) -> list[dict[str, Any]]:
        """The events of a project."""
        return [event for event in self.events if event.get("project_id") == project_id]

    def assert_published(self, type_: str, /, **fields: Any) -> dict[str, Any]:
        """Fails unless an event of the type has all these fields; returns the first one that has."""
        found = self._matching(type_, fields)
        assert found, f"no {type_} with {fields} was published, but:\n{self._told()}"
        return found[0]

    def assert_not_published(self, type_: str, /, **fields: Any) -> None:
        """Fails if an event of the type has all these fields."""
        found = self._matching(type_, fields)
        assert not found, f"{type_} with {fields} was published:\n{found[0]}"

    def wait_for(self, type_: str, count: int = 1, timeout_s: float = _WAIT_S) -> list[dict[str, Any]]:
        """Waits until `count` events of the type are there, for a worker in another thread; returns them."""
        with self._changed:
            in_time = self._changed.wait_for(lambda: len(self.of_type(type_)) >= count, timeout_s)
        assert in_time, f"not {count} {type_} within {timeout_s} s, but:\n{self._told()}"
        return self.of_type(type_)

    def clear(self) -> None:
        """Forgets what was published so far."""
        with self._changed:
            self._events.clear()

    def _take(self, body: bytes) -> None:
        with self._changed:
            self._events.append(json.loads(body))
            self._changed.notify_all()

    def _matching(self, type_: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
        missing = object()
        return [
            event
            for event in self.of_type(type_)
            if all(event.get(name, missing) == value for name, value in fields.items())
        ]

    def _told(self) -> str:
        return "\n".join(map(str, self.events)) or "nothing at all"


@contextmanager
def capture() -> Iterator[Published]:
    """Captures what this process publishes; within another capture, it is this one's alone."""
    published = Published()
    take = published._take
    _publisher.capture(take)
    try:
        yield published
    finally:
        _publisher.release(take)


def _is_of(type_: str, pattern: str) -> bool:
    return type_.startswith(pattern[:-1]) if pattern.endswith(".*") else type_ == pattern


def __dir__() -> list[str]:
    return sorted(__all__)
