"""Hands encoded events to Redis: one connection pool per process and URL, bounded in time, never silent.

Knows nothing of what an event means beyond three facts: whether it may be dropped, whether it may be sent
twice, and until when it is worth trying.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ._encode import encode

DEFAULT_URL = "redis://localhost:6379/0"
DEFAULT_CHANNEL = "websocket:broadcast"
CONNECT_TIMEOUT_S = 1.0
SOCKET_TIMEOUT_S = 1.0

# Only the newest progress counts, so one is not worth a wait.
_DROPPABLE = ("task.progress", "process.progress")
_PAUSES_S = (0.0, 0.1, 0.4)
_GIVE_UP_AFTER_S = 3.0
_BREAKER_S = 1.0
# A try that hung until its timeout is paid for with a longer silence, so that progress against a host that
# swallows packets cannot take more than about a sixth of a task's time.
_BREAKER_PER_SECOND_LOST = 5.0
_SCHEMES = ("redis", "rediss", "unix")

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
    """Publishes on one channel of one Redis. Safe to share between threads and across forks.

    What is not given comes from `tidings.configure`, then from `REDIS_URL` and `REDIS_CHANNEL`, then from the
    defaults, looked up when the first event is published.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        channel: str | None = None,
        *,
        connect_timeout_s: float | None = None,
        socket_timeout_s: float | None = None,
        raise_errors: bool | None = None,
    ) -> None:
        self._own = _Settings(
            _checked_url(redis_url),
            _checked_channel(channel),
            connect_timeout_s,
            socket_timeout_s,
            raise_errors,
        )

    def publish(self, event: Mapping[str, Any]) -> bool:
        """Whether the event reached Redis. Takes about 3 s at most, and no time for progress in an outage."""
        return self.deliver(prepare(event))

    def deliver(self, message: Message) -> bool:
        """As `publish`, for an event that is encoded already."""
        settings = self._own.over(_configured).over(_environment()).over(_DEFAULTS)
        try:
            _link(settings).send(str(settings.channel), message)
        except PublishError:
            if settings.raise_errors:
                raise
            return False
        return True


@dataclass(frozen=True)
class _Settings:
    redis_url: str | None = None
    channel: str | None = None
    connect_timeout_s: float | None = None
    socket_timeout_s: float | None = None
    raise_errors: bool | None = None

    def over(self, other: _Settings) -> _Settings:
        mine, theirs = vars(self), vars(other)
        return _Settings(**{name: theirs[name] if mine[name] is None else mine[name] for name in mine})


_DEFAULTS = _Settings(DEFAULT_URL, DEFAULT_CHANNEL, CONNECT_TIMEOUT_S, SOCKET_TIMEOUT_S, False)
_configured = _Settings()


def default_publisher() -> RedisPublisher:
    """The process's own publisher, which calls on the classes and `ProgressTask` use."""
    return _default_publisher


def configure(
    *,
    redis_url: str | None = None,
    channel: str | None = None,
    raise_errors: bool | None = None,
    connect_timeout_s: float | None = None,
    socket_timeout_s: float | None = None,
) -> None:
    """Sets for this process where events go; what is left out stays as it was. Forked children inherit it.

    `redis_url` is `redis://`, `rediss://` or `unix://`. With `raise_errors` an event that cannot be
    published raises `PublishError`; without, it is logged, counted, and the call returns False. Timeouts are
    in seconds.
    """
    global _configured
    given = _Settings(
        _checked_url(redis_url), _checked_channel(channel), connect_timeout_s, socket_timeout_s, raise_errors
    )
    _configured = given.over(_configured)


def lost_events() -> int:
    """How many events this process could not publish since it started."""
    return _lost.count


@cache
def _environment() -> _Settings:
    return _Settings(os.environ.get("REDIS_URL") or None, os.environ.get("REDIS_CHANNEL") or None)


def _checked_url(url: str | None) -> str | None:
    if url is not None and urlsplit(url).scheme not in _SCHEMES:
        raise ValueError(f"redis_url must begin with redis://, rediss:// or unix://, not {_masked(url)!r}")
    return url


def _checked_channel(channel: str | None) -> str | None:
    if channel == "":
        raise ValueError("channel must not be empty")
    return channel


class _Lost:
    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.count += 1


class _TryError(Exception):
    """One try failed: may the same bytes go out again, and is it worth it?"""

    def __init__(self, cause: Exception, *, executed: bool | None, hopeless: bool = False) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.executed = executed
        self.hopeless = hopeless

    def allows_another(self, message: Message) -> bool:
        return not self.hopeless and (self.executed is False or message.repeatable)


class _Link:
    """The way to one Redis: its pool, and what is known about it being away."""

    def __init__(self, url: str, connect_timeout_s: float, socket_timeout_s: float) -> None:
        self._url = url
        self._timeouts = {"socket_connect_timeout": connect_timeout_s, "socket_timeout": socket_timeout_s}
        self._lock = threading.Lock()
        self._pool: redis.ConnectionPool | None = None
        self._skip_until_s = 0.0
        self._down_since_s: float | None = None
        self._lost_while_down = 0

    def send(self, channel: str, message: Message) -> None:
        """Publishes, or counts and reports the loss and raises PublishError."""
        waits = time.monotonic() < self._skip_until_s
        if waits and (message.droppable or time.monotonic() > message.give_up_at_s):
            self._lose("not tried, because the last try has just failed")
        for pause_s in _PAUSES_S[:1] if message.droppable else _PAUSES_S:
            time.sleep(pause_s)
            began_s = time.monotonic()
            try:
                self._try(channel, message.body)
            except _TryError as failure:
                reason = str(failure)
                self._open_breaker(began_s)
                if not failure.allows_another(message) or time.monotonic() > message.give_up_at_s:
                    break
            else:
                self._is_up()
                return
        self._lose(reason)

    def _try(self, channel: str, body: bytes) -> None:
        try:
            pool = self._pool_of_this_process()
            connection = _checked_out(pool)
        except (redis.RedisError, OSError, ValueError) as error:
            hopeless = isinstance(error, (redis.AuthenticationError, ValueError))
            raise _TryError(error, executed=False, hopeless=hopeless) from error
        try:
            _exchange(connection, channel, body)
        finally:
            pool.release(connection)

    def _pool_of_this_process(self) -> redis.ConnectionPool:
        with self._lock:
            if self._pool is None:
                # The retries of redis-py multiply its timeouts and would send a PUBLISH twice; RESP2 because
                # with RESP3 the pool does not notice that Redis has closed an idle connection.
                self._pool = redis.ConnectionPool.from_url(
                    self._url, **self._timeouts, retry=Retry(NoBackoff(), 0), protocol=2
                )
            return self._pool

    def _open_breaker(self, began_s: float) -> None:
        now_s = time.monotonic()
        self._skip_until_s = now_s + max(_BREAKER_S, (now_s - began_s) * _BREAKER_PER_SECOND_LOST)

    def _lose(self, reason: str) -> None:
        _lost.add()
        with self._lock:
            self._lost_while_down += 1
            first = self._down_since_s is None
            if first:
                self._down_since_s = time.monotonic()
        if first:
            _log.error(
                "events are lost: Redis at %s: %s. Start it, or say where it is with REDIS_URL or"
                " tidings.configure(redis_url=...). Further losses are counted, see tidings.lost_events().",
                _masked(self._url),
                reason,
            )
        raise PublishError(f"Redis at {_masked(self._url)}: {reason}")

    def _is_up(self) -> None:
        self._skip_until_s = 0.0
        if self._down_since_s is None:
            return
        with self._lock:
            since_s, lost = self._down_since_s, self._lost_while_down
            self._down_since_s, self._lost_while_down = None, 0
        if since_s is not None:
            _log.warning(
                "events flow again: Redis at %s was away for %.1f s, %d events were lost",
                _masked(self._url),
                time.monotonic() - since_s,
                lost,
            )


def _checked_out(pool: redis.ConnectionPool) -> Any:
    """A connection that is open and has nothing left to read; a stale one is opened anew by the pool."""
    if redis.VERSION < (5, 3):
        return pool.get_connection("PUBLISH")
    return pool.get_connection()


def _exchange(connection: Any, channel: str, body: bytes) -> None:
    sent = False
    try:
        connection.send_command("PUBLISH", channel, body, check_health=False)
        sent = True
        connection.read_response()
    except (redis.exceptions.BusyLoadingError, redis.exceptions.ReadOnlyError) as error:
        raise _TryError(error, executed=False) from error
    except redis.ResponseError as error:
        raise _TryError(error, executed=False, hopeless=True) from error
    except (redis.RedisError, OSError) as error:
        # A command that was not written to its end is never executed; after that, nobody can tell.
        connection.disconnect()
        raise _TryError(error, executed=None if sent else False) from error
    except BaseException:
        # Interrupted half-way (a time limit, Ctrl-C): the reply must not be taken for the next command's.
        connection.disconnect()
        raise


def _masked(url: str) -> str:
    credentials, at, rest = url.rpartition("@")
    return f"{credentials.partition('://')[0]}://***@{rest}" if at else url


_lost = _Lost()
_default_publisher = RedisPublisher()
_links: dict[tuple[str, float, float], _Link] = {}
_links_lock = threading.Lock()


def _link(settings: _Settings) -> _Link:
    key = (
        str(settings.redis_url),
        float(settings.connect_timeout_s or 0),
        float(settings.socket_timeout_s or 0),
    )
    with _links_lock:
        link = _links.get(key)
        if link is None:
            link = _links[key] = _Link(*key)
        return link


def _after_fork_in_child() -> None:
    # The parent's sockets are only let go, never spoken on: redis-py closes them without a shutdown when the
    # process is another. Locks may have been held by threads that do not exist here.
    global _links_lock, _lost
    _links_lock = threading.Lock()
    _links.clear()
    _lost = _Lost()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
