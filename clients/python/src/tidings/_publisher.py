"""Hands encoded events to Redis: one link per process and Redis, bounded in time, never silent.

Knows nothing of what an event means beyond three facts: whether it may be dropped, whether it may be sent
twice, and until when it is worth trying.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ._connection import ClientConnection, Command, Connection, OwnConnection, TryError
from ._encode import encode
from ._settings import (
    INGEST_FIELD,
    INGEST_STREAM,
    GivenClient,
    Settings,
    checked_target,
    effective,
)

# Only the newest progress counts, so one is not worth a wait.
_DROPPABLE = ("task.progress", "process.progress")
_PAUSES_S = (0.0, 0.1, 0.4)
_GIVE_UP_AFTER_S = 3.0
_BREAKER_S = 1.0
# A try that hung until its timeout is paid for with a longer silence, so that progress against a host that
# swallows packets cannot take more than about a sixth of a task's time.
_BREAKER_PER_SECOND_LOST = 5.0

_log = logging.getLogger("tidings")


class PublishError(Exception):
    """An event was not published, and why. Raised only where `raise_errors` is set."""


@dataclass(frozen=True)
class Message:
    """An event on its way."""

    body: bytes
    droppable: bool
    repeatable: bool
    give_up_at_s: float


def prepare(event: Mapping[str, Any]) -> Message:
    """Encodes an event; its time to be delivered runs from here, a wait in a queue included."""
    return Message(
        body=encode(event),
        droppable=event["type"] in _DROPPABLE,
        repeatable=event.get("id") is not None,
        give_up_at_s=time.monotonic() + _GIVE_UP_AFTER_S,
    )


class RedisPublisher:
    """Publishes to one Redis. Safe to share between threads and across forks.

    What `own` leaves open comes from `tidings.configure`, then from the environment, then from the defaults,
    looked up when an event is published.
    """

    def __init__(self, own: Settings | None = None) -> None:
        self._own = own or Settings()

    def publish(self, event: Mapping[str, Any]) -> bool:
        """Whether the event reached Redis. Takes about 3 s at most, and no time for progress in an outage."""
        return self.deliver(prepare(event))

    def deliver(self, message: Message) -> bool:
        """As `publish`, for an event that is encoded already."""
        if _captures:
            _captures[-1](message.body)
            return True
        settings = effective(self._own)
        try:
            _link(settings).send(settings, message)
        except PublishError:
            if settings.raise_errors:
                raise
            return False
        return True


def capture(take: Callable[[bytes], None]) -> None:
    """From now on, what this process publishes is given to `take`, and goes nowhere else."""
    _captures.append(take)


def release(take: Callable[[bytes], None]) -> None:
    """Undoes `capture`; what was captured before it is captured again."""
    _captures.remove(take)


def close_connections() -> None:
    """Closes what this module has opened; what is published later opens it anew."""
    with _links_lock:
        links = list(_links.values())
        _links.clear()
    for link in links:
        link.close()


def default_publisher() -> RedisPublisher:
    """The process's own publisher, which calls on the classes and `ProgressTask` use."""
    return _default_publisher


def lost_events() -> int:
    """How many events this process could not publish since it started."""
    return _lost.count


class _Lost:
    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.count += 1


class _Link:
    """The way to one Redis, and what is known about it being away."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._skip_until_s = 0.0
        self._down_since_s: float | None = None
        self._lost_while_down = 0

    def send(self, settings: Settings, message: Message) -> None:
        """Publishes, or counts and reports the loss and raises PublishError."""
        waits = time.monotonic() < self._skip_until_s
        if waits and (message.droppable or time.monotonic() > message.give_up_at_s):
            self._lose("not tried, because the last try has just failed")
        for pause_s in _PAUSES_S[:1] if message.droppable else _PAUSES_S:
            time.sleep(pause_s)
            began_s = time.monotonic()
            try:
                self._connection.execute(_command(settings, message.body))
            except TryError as failure:
                reason, hint = str(failure), "" if failure.hopeless else self._connection.hint
                self._open_breaker(began_s)
                if not _allows_another(failure, message) or time.monotonic() > message.give_up_at_s:
                    break
            else:
                self._is_up()
                return
        self._lose(reason, hint)

    def close(self) -> None:
        self._connection.close()

    def _open_breaker(self, began_s: float) -> None:
        now_s = time.monotonic()
        self._skip_until_s = now_s + max(_BREAKER_S, (now_s - began_s) * _BREAKER_PER_SECOND_LOST)

    def _lose(self, reason: str, hint: str = "") -> None:
        _lost.add()
        with self._lock:
            self._lost_while_down += 1
            first = self._down_since_s is None
            if first:
                self._down_since_s = time.monotonic()
        if first:
            _log.error(
                "events are lost: %s: %s.%s Further losses are counted, see tidings.lost_events().",
                self._connection.name,
                reason.rstrip("."),
                hint,
            )
        raise PublishError(f"{self._connection.name}: {reason}")

    def _is_up(self) -> None:
        self._skip_until_s = 0.0
        if self._down_since_s is None:
            return
        with self._lock:
            since_s, lost = self._down_since_s, self._lost_while_down
            self._down_since_s, self._lost_while_down = None, 0
        if since_s is not None:
            _log.warning(
                "%s takes events again; it was away for %.1f s, %d events were lost",
                self._connection.name,
                time.monotonic() - since_s,
                lost,
            )


def _command(settings: Settings, body: bytes) -> Command:
    try:
        checked_target("TIDINGS_PUBLISH_TO", settings.to)
    except ValueError as error:
        raise TryError(error, executed=False, hopeless=True) from error
    if settings.to == "channel":
        return "PUBLISH", str(settings.channel), body
    bound: Command = ()
    if settings.ingest_length_max is not None:
        bound = ("MAXLEN", "~", settings.ingest_length_max)
    return "XADD", INGEST_STREAM, *bound, "*", INGEST_FIELD, body


def _allows_another(failure: TryError, message: Message) -> bool:
    return not failure.hopeless and (failure.executed is False or message.repeatable)


_captures: list[Callable[[bytes], None]] = []
_lost = _Lost()
_default_publisher = RedisPublisher()
_links: dict[tuple[str, float, float], _Link] = {}
# Forgotten with the broadcaster that was given the client.
_links_of_clients: WeakKeyDictionary[GivenClient, _Link] = WeakKeyDictionary()
_links_lock = threading.Lock()


def _link(settings: Settings) -> _Link:
    server = settings.server
    with _links_lock:
        if isinstance(server, GivenClient):
            link = _links_of_clients.get(server)
            if link is None:
                link = _links_of_clients[server] = _Link(ClientConnection(server.client))
            return link
        key = str(server), float(settings.connect_timeout_s or 0), float(settings.socket_timeout_s or 0)
        link = _links.get(key)
        if link is None:
            link = _links[key] = _Link(OwnConnection(*key))
        return link


def _after_fork_in_child() -> None:
    # The parent's sockets are only let go, never spoken on: redis-py closes them without a shutdown when the
    # process is another. Locks may have been held by threads that do not exist here.
    global _links_lock, _lost
    _links_lock = threading.Lock()
    _links.clear()
    _links_of_clients.clear()
    _lost = _Lost()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
