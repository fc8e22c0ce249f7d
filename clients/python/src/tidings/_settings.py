"""Where events go, and what happens when they cannot: what code, environment and defaults say, in that order.

Checks what it is given and opens no connection.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

_SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True)
class Settings:
    """What was said; None where nothing was."""

    redis_url: str | None = None
    channel: str | None = None
    connect_timeout_s: float | None = None
    socket_timeout_s: float | None = None
    raise_errors: bool | None = None

    def over(self, other: Settings) -> Settings:
        mine, theirs = vars(self), vars(other)
        return Settings(**{name: theirs[name] if mine[name] is None else mine[name] for name in mine})


DEFAULTS = Settings(
    redis_url="redis://localhost:6379/0",
    channel="websocket:broadcast",
    connect_timeout_s=1.0,
    socket_timeout_s=1.0,
    raise_errors=False,
)
_configured = Settings()


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
    said = given(
        redis_url=redis_url,
        channel=channel,
        raise_errors=raise_errors,
        connect_timeout_s=connect_timeout_s,
        socket_timeout_s=socket_timeout_s,
    )
    _configured = said.over(_configured)


def given(
    *,
    redis_url: str | None,
    channel: str | None,
    raise_errors: bool | None,
    connect_timeout_s: float | None,
    socket_timeout_s: float | None,
) -> Settings:
    """What code says in one call. Raises ValueError or TypeError when that makes no sense."""
    return Settings(
        redis_url=checked_url(redis_url),
        channel=_checked_channel(channel),
        connect_timeout_s=connect_timeout_s,
        socket_timeout_s=socket_timeout_s,
        raise_errors=raise_errors,
    )


def effective(own: Settings) -> Settings:
    """What holds now for a publisher that was given `own`."""
    return own.over(_configured).over(_environment()).over(DEFAULTS)


@cache
def _environment() -> Settings:
    return Settings(
        redis_url=os.environ.get("REDIS_URL") or None,
        channel=os.environ.get("REDIS_CHANNEL") or None,
    )


def checked_url(url: str | None) -> str | None:
    if url is None or urlsplit(url).scheme in _SCHEMES:
        return url
    raise ValueError(f"redis_url must begin with redis://, rediss:// or unix://, not {masked(url)!r}")


def masked(url: str) -> str:
    credentials, at, rest = url.rpartition("@")
    return f"{credentials.partition('://')[0]}://***@{rest}" if at else url


def _checked_channel(channel: str | None) -> str | None:
    if channel == "":
        raise ValueError("channel must not be empty")
    return channel
