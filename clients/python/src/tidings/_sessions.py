"""Sessions in Redis as the service reads them with `TIDINGS_AUTH=redis-session`, and their cookie.

Unlike an event, a session that cannot be kept is an error: redis-py's, as it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import redis
from starlette.requests import HTTPConnection
from starlette.responses import Response

from ._settings import Settings, checked_url, effective

LIFETIME_S = 14 * 24 * 3600
"""As long as Starlette's own sessions."""

_TIMEOUT_S = 2.0
# What the service looks up; anything else in a cookie is nobody's session.
_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{16,200}")
_ID_BYTES = 32


@dataclass(frozen=True)
class Session:
    """Who somebody is, and what he may see: project ids and patterns (`team/*`), or `"*"` for all."""

    user_id: str | int
    projects: list[str] | Literal["*"]
    expires_at: int


class Sessions:
    """Keeps sessions where the service looks for them: at the login `start`, at the logout `end`.

    The cookie is out of reach for scripts (`HttpOnly`), goes over TLS only (`secure`; most browsers
    take it for localhost without) and is not sent along by other sites' forms (`SameSite=Lax`). `cookie` and
    `key` are the service's `TIDINGS_SESSION_COOKIE` and `TIDINGS_SESSION_KEY`. Redis is `redis_url`,
    otherwise `TIDINGS_SESSION_REDIS_URL`, otherwise where events go.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        lifetime_s: int = LIFETIME_S,
        cookie: str = "session",
        key: str = "session:{id}",
        secure: bool = True,
        same_site: Literal["lax", "strict", "none"] = "lax",
        domain: str | None = None,
    ) -> None:
        if "{id}" not in key:
            raise ValueError(f"key must have {{id}} where the session's id stands, not {key!r}")
        if lifetime_s < 1:
            raise ValueError(f"lifetime_s must be at least 1, not {lifetime_s}")
        if same_site == "none" and not secure:
            raise ValueError("same_site='none' needs secure=True: browsers drop such a cookie otherwise")
        self._url = checked_url(redis_url)
        self._lifetime_s = lifetime_s
        self._cookie, self._key = cookie, key
        self._flags: dict[str, Any] = {
            "path": "/",
            "domain": domain,
            "secure": secure,
            "httponly": True,
            "samesite": same_site,
        }
        self._client: redis.Redis | None = None

    async def start(
        self,
        request: HTTPConnection,
        response: Response,
        user_id: str | int,
        projects: Iterable[str] | Literal["*"],
    ) -> str:
        """Begins a session under a new id, which it returns, and ends the one that the browser had."""
        session_id = secrets.token_urlsafe(_ID_BYTES)
        session = _checked(user_id, projects, self._expires_at())
        await asyncio.to_thread(self._write, session_id, vars(session))
        await self._delete(request)
        self._set_cookie(response, session_id)
        return session_id

    async def read(self, request: HTTPConnection) -> Session | None:
        """The session of the request, or None."""
        session_id = self._id_of(request)
        return _session(await asyncio.to_thread(self._read, session_id)) if session_id else None

    async def refresh(
        self,
        request: HTTPConnection,
        response: Response,
        projects: Iterable[str] | Literal["*"] | None = None,
    ) -> bool:
        """Lets the session last anew, with other `projects` if given, seen by the service within 5 s.

        False if there is none (any more): one that has ended does not come back.
        """
        session_id = self._id_of(request)
        found = await asyncio.to_thread(self._read, session_id) if session_id else None
        session = _session(found)
        if session_id is None or found is None or session is None:
            return False
        if projects is None:
            projects = session.projects
        # What else the application keeps there stays.
        renewed = {**found, **vars(_checked(session.user_id, projects, self._expires_at()))}
        if not await asyncio.to_thread(self._write, session_id, renewed, exists=True):
            return False
        self._set_cookie(response, session_id)
        return True

    async def end(self, request: HTTPConnection, response: Response) -> None:
        """Ends the session; what is connected with it is closed within 5 s."""
        await self._delete(request)
        response.delete_cookie(self._cookie, **self._flags)

    async def _delete(self, request: HTTPConnection) -> None:
        if session_id := self._id_of(request):
            await asyncio.to_thread(lambda: self._redis().delete(self._key_of(session_id)))

    def _id_of(self, request: HTTPConnection) -> str | None:
        value = request.cookies.get(self._cookie, "")
        return value if _SESSION_ID.fullmatch(value) else None

    def _key_of(self, session_id: str) -> str:
        return self._key.replace("{id}", session_id)

    def _expires_at(self) -> int:
        return int(time.time()) + self._lifetime_s

    def _set_cookie(self, response: Response, session_id: str) -> None:
        response.set_cookie(self._cookie, session_id, max_age=self._lifetime_s, **self._flags)

    def _write(self, session_id: str, session: dict[str, Any], exists: bool = False) -> bool:
        body = json.dumps(session)
        key = self._key_of(session_id)
        return bool(self._redis().set(key, body, ex=self._lifetime_s, xx=exists))

    def _read(self, session_id: str) -> dict[str, Any] | None:
        body: Any = self._redis().get(self._key_of(session_id))
        try:
            found = json.loads(body) if body else None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _redis(self) -> redis.Redis:
        # Opened by the first who needs it; a second one that another thread opens meanwhile is let go unused.
        if self._client is None:
            url = self._url or os.environ.get("TIDINGS_SESSION_REDIS_URL") or effective(Settings()).server
            if not isinstance(url, str):
                raise ValueError("Sessions needs redis_url where tidings.configure was given a client")
            self._client = redis.Redis.from_url(
                url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
            )
        return self._client


def _session(found: dict[str, Any] | None) -> Session | None:
    """What is kept, unless it is over or no session of anybody: the service lets neither in."""
    try:
        session = _checked(**{name: (found or {})[name] for name in Session.__annotations__})
        return session if session.expires_at > time.time() else None
    except (KeyError, TypeError, ValueError):
        return None


def _checked(user_id: str | int, projects: Iterable[str] | Literal["*"], expires_at: int) -> Session:
    if isinstance(user_id, bool) or not isinstance(user_id, (str, int)) or user_id == "":
        raise ValueError(f"user_id must be a string or a whole number, not {user_id!r}")
    if projects == "*":
        return Session(user_id, "*", expires_at)
    if isinstance(projects, str):
        raise ValueError(f"projects must be a list of ids, or '*' for all, not {projects!r}")
    listed = list(projects)
    if not all(isinstance(project, str) and project for project in listed):
        raise ValueError(f"projects must be a list of ids, or '*' for all, not {listed!r}")
    return Session(user_id, listed, expires_at)
