"""One command to Redis, tried once: over connections of our own, or through a client of the application's.

Knows nothing of events. Tells what a failed try means: may the same bytes go out again, and is it worth it?
"""

from __future__ import annotations

import threading
from typing import Any, Protocol, TypeAlias

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    ReadOnlyError,
    TryAgainError,
)
from redis.retry import Retry

from ._encode import pass_on_time_limit
from ._settings import RedisClient, checked_url, masked

Command: TypeAlias = tuple[str | bytes | int, ...]

# Answers that say "not now": Redis starts, or another node is becoming the primary.
_PASSING = (BusyLoadingError, ClusterDownError, MasterDownError, ReadOnlyError, TryAgainError)


class TryError(Exception):
    """A try failed. `executed` is None when nobody can tell; `hopeless`: the next would fail like it."""

    def __init__(self, cause: Exception, *, executed: bool | None, hopeless: bool = False) -> None:
        super().__init__(_told(cause))
        self.executed = executed
        self.hopeless = hopeless


class Connection(Protocol):
    """A way to one Redis, safe to share between threads."""

    name: str
    """What it is called in what a user reads."""

    hint: str
    """What helps when nothing answers there."""

    def close(self) -> None:
        """Lets go of what is open; the next command opens it anew."""

    def execute(self, command: Command) -> None:
        """Returns when Redis has executed the command, else raises TryError."""


class OwnConnection:
    """A pool of connections of our own: waits no longer than it was told, and never repeats a command."""

    def __init__(self, url: str, connect_timeout_s: float, socket_timeout_s: float) -> None:
        self.name = f"Redis at {masked(url)}"
        self.hint = " Start it, or say where it is with REDIS_URL or tidings.configure(redis_url=...)."
        self._url = url
        self._timeouts = {"socket_connect_timeout": connect_timeout_s, "socket_timeout": socket_timeout_s}
        self._lock = threading.Lock()
        self._pool: redis.ConnectionPool | None = None

    def execute(self, command: Command) -> None:
        try:
            pool = self._pool_of_this_process()
            connection = _checked_out(pool)
        except (redis.RedisError, OSError, ValueError) as error:
            hopeless = isinstance(error, (redis.AuthenticationError, ValueError))
            raise TryError(error, executed=False, hopeless=hopeless) from error
        try:
            _exchange(connection, command)
        finally:
            pool.release(connection)

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.disconnect()

    def _pool_of_this_process(self) -> redis.ConnectionPool:
        with self._lock:
            if self._pool is None:
                checked_url(self._url)
                # The retries of redis-py multiply its timeouts and would send an event twice; RESP2 because
                # with RESP3 the pool does not notice that Redis has closed an idle connection.
                self._pool = redis.ConnectionPool.from_url(
                    self._url, **self._timeouts, retry=Retry(NoBackoff(), 0), protocol=2
                )
            return self._pool


class ClientConnection:
    """A client of the application's, with its timeouts and retries."""

    def __init__(self, client: RedisClient) -> None:
        self.name = f"Redis by the {type(client).__name__} that was given as client"
        self.hint = ""
        self._client = client

    def close(self) -> None:
        """The application's client is the application's to close."""

    def execute(self, command: Command) -> None:
        try:
            self._client.execute_command(*command)
        except redis.ResponseError as error:
            raise _refused(error) from error
        except BusyLoadingError as error:
            raise TryError(error, executed=False) from error
        except Exception as error:
            pass_on_time_limit(error)
            raise TryError(error, executed=None) from error


def _checked_out(pool: redis.ConnectionPool) -> Any:
    """A connection that is open and has nothing left to read; a stale one is opened anew by the pool."""
    if redis.VERSION < (5, 3):
        return pool.get_connection("PUBLISH")
    return pool.get_connection()


def _exchange(connection: Any, command: Command) -> None:
    sent = False
    try:
        connection.send_command(*command, check_health=False)
        sent = True
        connection.read_response()
    except _PASSING as error:
        # Not kept: when the name points to another primary by now, only a new connection finds it.
        connection.disconnect()
        raise TryError(error, executed=False) from error
    except redis.ResponseError as error:
        raise _refused(error) from error
    except (redis.RedisError, OSError) as error:
        # A command that was not written to its end is never executed; after that, nobody can tell.
        connection.disconnect()
        raise TryError(error, executed=None if sent else False) from error
    except BaseException:
        # Interrupted half-way (a time limit, Ctrl-C): the reply must not be taken for the next command's.
        connection.disconnect()
        raise


def _refused(error: redis.ResponseError) -> TryError:
    return TryError(error, executed=False, hopeless=not isinstance(error, _PASSING))


def _told(cause: Exception) -> str:
    # Redis' own text in older redis-py; newer ones keep a slot and an address of it.
    if isinstance(cause, AskError) or str(cause).startswith(("MOVED ", "ASK ")):
        return "it belongs to a Redis Cluster: give tidings.configure(client=redis.RedisCluster(...))"
    return str(cause) or type(cause).__name__
