"""Where events go, and what happens when they cannot: what code, environment and defaults say, in that order.

Checks what it is given and opens no connection.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Protocol, TypeAlias
from urllib.parse import urlsplit

INGEST_STREAM = "tidings:ingest"
"""The service reads from here, so it has one name for all."""

INGEST_FIELD = "event"

To: TypeAlias = Literal["ingest", "channel"]

_TARGETS = ("ingest", "channel")
_SCHEMES = ("redis", "rediss", "unix")


class RedisClient(Protocol):
    """What is asked of a client of the application's: redis-py's `Redis` and `RedisCluster` have it."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Sends one command and returns its answer."""


@dataclass(frozen=True, eq=False)
class GivenClient:
    """A client, as one `configure` or one broadcaster was given it."""

    client: RedisClient


@dataclass(frozen=True)
class Settings:
    """What was said; None where nothing was."""

    server: str | GivenClient | None = None
    to: str | None = None
    channel: str | None = None
    ingest_length_max: int | None = None
    connect_timeout_s: float | None = None
    socket_timeout_s: float | None = None
    raise_errors: bool | None = None
    progress_per_second: float | None = None

    def over(self, other: Settings) -> Settings:
        mine, theirs = vars(self), vars(other)
        return Settings(**{name: theirs[name] if mine[name] is None else mine[name] for name in mine})


DEFAULTS = Settings(
    server="redis://localhost:6379/0",
    to="ingest",
    channel="websocket:broadcast",
    connect_timeout_s=1.0,
    socket_timeout_s=1.0,
    raise_errors=False,
)
_configured = Settings()


def configure(
    *,
    redis_url: str | None = None,
    client: RedisClient | None = None,
    to: To | None = None,
    channel: str | None = None,
    ingest_length_max: int | None = None,
    raise_errors: bool | None = None,
    connect_timeout_s: float | None = None,
    socket_timeout_s: float | None = None,
    progress_per_second: float | None = None,
) -> None:
    """Sets for this process where events go; what is left out stays as it was. Forked children inherit it.

    `redis_url` is `redis://`, `rediss://` or `unix://`. Instead of it, `client` is a client of your own, also
    of a Cluster or by Sentinel: redis-py's `Redis` or `RedisCluster`, not their asyncio twins, because a
    thread without a loop does the sending. It brings its own timeouts and its own retries.

    `to` is `"ingest"` (unless told otherwise), the stream that keeps events while no node of the service is
    up, or `"channel"`, plain pub/sub, which does not. `channel` names the channel, and chooses it.
    `ingest_length_max` bounds the stream: when it holds about so many events, the oldest are lost for a new
    one. Without it Redis' memory is the bound.

    With `raise_errors` an event that cannot be published raises `PublishError`; without, it is logged,
    counted, and the call returns False. Timeouts are in seconds.

    `progress_per_second` is how often each task's progress goes out at most: 10 for `tidings.celery.progress`
    and `ProgressRecorder`, and every update of `ProgressTask.update_progress`, unless it is set.
    """
    global _configured
    said = given(
        redis_url=redis_url,
        client=client,
        to=to,
        channel=channel,
        ingest_length_max=ingest_length_max,
        raise_errors=raise_errors,
        connect_timeout_s=connect_timeout_s,
        socket_timeout_s=socket_timeout_s,
    )
    said = replace(said, progress_per_second=_checked_rate(progress_per_second))
    _configured = said.over(_configured)


def progress_per_second() -> float | None:
    """How often a task's progress may go out, if that was said."""
    return _configured.progress_per_second


def given(
    *,
    redis_url: str | None,
    client: RedisClient | None,
    to: str | None,
    channel: str | None,
    ingest_length_max: int | None,
    raise_errors: bool | None,
    connect_timeout_s: float | None,
    socket_timeout_s: float | None,
) -> Settings:
    """What code says in one call. Raises ValueError or TypeError when that makes no sense."""
    if redis_url is not None and client is not None:
        raise ValueError("redis_url and client both say where Redis is: give one of them")
    if channel is not None:
        if to == "ingest":
            raise ValueError("channel belongs to to='channel'; the ingest stream has one name for all")
        to = "channel"
    if ingest_length_max is not None and to == "channel":
        raise ValueError("ingest_length_max belongs to to='ingest'; a channel keeps nothing")
    return Settings(
        server=_checked_client(client) if client is not None else checked_url(redis_url),
        to=checked_target("to", to),
        channel=_checked_channel(channel),
        ingest_length_max=_checked_length(ingest_length_max),
        connect_timeout_s=connect_timeout_s,
        socket_timeout_s=socket_timeout_s,
        raise_errors=raise_errors,
    )


def effective(own: Settings) -> Settings:
    """What holds now for a publisher that was given `own`."""
    return own.over(_configured).over(_environment()).over(DEFAULTS)


@cache
def _environment() -> Settings:
    # Not checked here: an application whose environment is wrong shall start, and be told when it publishes.
    return Settings(
        server=os.environ.get("REDIS_URL") or None,
        to=os.environ.get("TIDINGS_PUBLISH_TO") or None,
        channel=os.environ.get("REDIS_CHANNEL") or None,
    )


def checked_url(url: str | None) -> str | None:
    if url is None or urlsplit(url).scheme in _SCHEMES:
        return url
    raise ValueError(
        f"redis_url must begin with redis://, rediss:// or unix://, not {masked(url)!r};"
        " for a Cluster or Sentinel give tidings.configure(client=...)"
    )


def checked_target(name: str, to: str | None) -> str | None:
    if to is not None and to not in _TARGETS:
        raise ValueError(f"{name} must be 'ingest' or 'channel', not {to!r}")
    return to


def masked(url: str) -> str:
    credentials, at, rest = url.rpartition("@")
    return f"{credentials.partition('://')[0]}://***@{rest}" if at else url


def _checked_client(client: RedisClient) -> GivenClient:
    execute = getattr(client, "execute_command", None)
    if not callable(execute):
        raise TypeError(f"client must be a redis-py client, not {type(client).__name__}")
    if inspect.iscoroutinefunction(execute):
        raise TypeError("client must be redis.Redis or redis.RedisCluster, not one of redis.asyncio")
    if hasattr(client, "execute"):
        raise TypeError("client must not be a pipeline: nobody would execute it")
    return GivenClient(client)


def _checked_channel(channel: str | None) -> str | None:
    if channel == "":
        raise ValueError("channel must not be empty")
    return channel


def _checked_length(length: int | None) -> int | None:
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"ingest_length_max must be a whole number, not {type(length).__name__}")
    if length < 1:
        raise ValueError(f"ingest_length_max must be at least 1, not {length}")
    return length


def _checked_rate(per_second: float | None) -> float | None:
    if per_second is None:
        return None
    if isinstance(per_second, bool) or not isinstance(per_second, (int, float)):
        raise TypeError(f"progress_per_second must be a number, not {type(per_second).__name__}")
    if not per_second > 0:
        raise ValueError(f"progress_per_second must be more than 0, not {per_second}")
    return per_second
