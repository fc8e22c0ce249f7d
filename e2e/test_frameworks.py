"""Sessions of real libraries, with the settings of the table in docs/security.md."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest
import redis
import uvicorn
from flask import Flask
from tidings import SyncEventBroadcaster
from werkzeug.serving import make_server

from conftest import FOLDER, Browser, Page, Secrets, Service, Start, free_port, post, wait_until
from existing.sessions import with_fastapi_users, with_flask_session, with_starlette, with_starsessions

SECRET = "a secret of the application's: ünïcode"
KEY = "a-key-of-the-application"
KEYS = json.dumps([{"name": "app", "key": KEY, "scopes": ["revoke"]}])
# What applications have in their sessions beside what Tidings looks for.
MORE = {
    "name": "Zoë ☃ 𝄞\n\u202e",
    "cart": [{"id": 1, "price": 9.5}, None],
    "big": 2**63,
    "_flag": True,
    "": "",
}


def documented(application: str) -> dict[str, str]:
    """The settings that the table gives for an application."""
    lines = (FOLDER.parent / "docs/security.md").read_text("utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| {application}"))
    return dict(re.findall(r"`(TIDINGS_\w+)=([^`]+)`", row))


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serves an application in a thread; its address."""
    port = free_port()
    run: Callable[[], None]
    stop: Callable[[], None]
    if isinstance(app, Flask):
        wsgi = make_server("127.0.0.1", port, app, threaded=True)
        run, stop = wsgi.serve_forever, wsgi.shutdown
    else:
        asgi = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        run, stop = asgi.run, partial(setattr, asgi, "should_exit", True)
    thread = Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: is_listening(port), "the application")
        yield f"http://localhost:{port}"
    finally:
        stop()
        thread.join()


@dataclass
class World:
    """An application, its users' browser, and the service beside it."""

    app: str
    service: Service
    redis_url: str
    secrets: Secrets
    browser: Browser = field(default_factory=Browser)
    own: str = field(default_factory=lambda: f"own/{uuid4().hex}")
    other: str = field(default_factory=lambda: f"other/{uuid4().hex}")

    def post(self, path: str, body: Any = None) -> None:
        assert self.browser.post(f"{self.app}{path}", body) in (200, 204), path

    def log_in(self, projects: Any = ("own/*",)) -> None:
        # Signed in the same second, two of the same content were the same cookie.
        self.post("/login", {"user_id": 7, "projects": projects, "nonce": uuid4().hex, **MORE})

    def log_out(self) -> None:
        self.post("/logout")

    def cookie(self) -> str:
        cookie = self.browser.cookie(self.service.http)
        if cookie:
            self.secrets.add_cookies(cookie)
        return cookie

    def follow_own(self) -> Page:
        """A page that sees what is its own, and nothing else."""
        page = self.service.follow(self.own, self.cookie())
        refused = page.subscribe(self.other)
        assert (refused["type"], refused["code"]) == ("error", "not_authorized")
        publisher = SyncEventBroadcaster(self.redis_url)
        for project_id in (self.other, self.own):
            assert publisher.project_created(project_id, {"id": project_id})
            assert publisher.file_uploaded(project_id, {"name": "a.mp4", "path": "a.mp4"})
        created, uploaded = page.next(), page.next()
        assert (created["type"], created["data"]["id"]) == ("project.created", self.own)
        assert (uploaded["type"], uploaded["project_id"]) == ("file.uploaded", self.own)
        assert page.nothing_waits()
        return page

    def is_over(self, page: Page, cookie: str) -> str:
        """Checks that a page is sent away and the cookie good for nothing; why the latter."""
        removed = page.next()
        assert (removed["type"], removed["reason"]) == ("subscription.removed", "expired")
        assert page.close_code() == 4401
        code, reason = self.service.turned_away(cookie)
        assert code == 4401
        return reason


class FastAPIUsersWorld(World):
    """Its sessions say who somebody is and nothing more: the rights are in a key of the user's."""

    user_id = ""

    def log_in(self, projects: Any = ("own/*",)) -> None:
        account = {"email": "ada@example.com", "password": "lovelace, countess of"}
        self.secrets.add(account["password"])
        if not self.user_id:
            self.user_id = post(f"{self.app}/register", account)["user_id"]
        with redis.Redis.from_url(self.redis_url) as store:
            store.set(f"projects:{self.user_id}", json.dumps(projects))
        if not self.cookie():
            form = {"username": account["email"], "password": account["password"]}
            self.post("/login", urlencode(form).encode())
        self.post("/me")


@dataclass(frozen=True)
class Library:
    make: Callable[..., Any]
    settings: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    world: type[World] = World


FLASK = documented("Flask-Session on Redis")
STORED = {
    "flask-session, msgpack": Library(with_flask_session, FLASK),
    "flask-session, json": Library(
        with_flask_session,
        FLASK | {"TIDINGS_SESSION_CODEC": "json"},
        {"SESSION_SERIALIZATION_FORMAT": "json"},
    ),
    "starsessions": Library(with_starsessions, documented("starsessions on Redis")),
    "fastapi-users": Library(with_fastapi_users, documented("fastapi-users with"), world=FastAPIUsersWorld),
}
# What one starts with, how the cookie is set up, what else the service is told.
SIGNED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "as it comes": ({}, {}),
    "https only": ({"https_only": True, "same_site": "strict"}, {}),
    "another name": ({"session_cookie": "sid.2"}, {"TIDINGS_SESSION_COOKIE": "sid.2"}),
    "a prefixed name": ({"session_cookie": "__Host-s"}, {"TIDINGS_SESSION_COOKIE": "__Host-s"}),
    "for good": ({"max_age": None}, {"TIDINGS_SESSION_MAX_AGE": "31536000"}),
}


class Begin:
    """Starts worlds; they end with the test."""

    def __init__(self, start: Start, redis_url: str, secrets: Secrets, running: ExitStack) -> None:
        self._start, self._redis_url, self._secrets, self._running = start, redis_url, secrets, running

    def stored(self, library: Library, **options: Any) -> World:
        app = library.make(self._redis_url, **library.options | options)
        return self._world(library.world, app, library.settings)

    def signed(self, secret: str, secrets: str, settings: dict[str, str], **options: Any) -> World:
        self._secrets.add(secret, *secrets.split(","), KEY)
        own = {"TIDINGS_AUTH": "signed-cookie", "TIDINGS_SESSION_SECRET": secrets, "TIDINGS_KEYS": KEYS}
        return self._world(World, with_starlette(secret, **options), own | settings)

    def _world(self, kind: type[World], app: Any, settings: dict[str, str]) -> World:
        address = self._running.enter_context(served(app))
        return kind(address, self._start(**settings), self._redis_url, self._secrets)


@pytest.fixture
def begin(start: Start, redis_url: str, secrets: Secrets) -> Iterator[Begin]:
    with ExitStack() as running:
        yield Begin(start, redis_url, secrets, running)


@pytest.mark.parametrize("library", STORED.values(), ids=STORED)
def test_a_stored_session_sees_its_own_until_its_user_logs_out(begin: Begin, library: Library) -> None:
    world = begin.stored(library)
    assert world.service.turned_away()[0] == 4401
    world.log_in()
    page, copied = world.follow_own(), world.cookie()
    # Nobody tells the service.
    world.log_out()
    assert "has no session" in world.is_over(page, copied)
    assert world.cookie() in ("", copied), "no other session"


@pytest.mark.parametrize("library", STORED.values(), ids=STORED)
def test_rights_that_the_application_changes_take_effect_on_what_is_connected(
    begin: Begin, library: Library
) -> None:
    world = begin.stored(library)
    world.log_in()
    page, cookie = world.follow_own(), world.cookie()
    world.log_in(["other/*"])
    assert world.cookie() == cookie
    removed = page.next()
    assert (removed["type"], removed["reason"]) == ("subscription.removed", "rights")
    assert page.subscribe(world.other)["type"] == "subscription.confirmed"


def test_a_stored_session_that_lapses_takes_its_pages_along(begin: Begin) -> None:
    world = begin.stored(STORED["flask-session, msgpack"], PERMANENT_SESSION_LIFETIME=3600)
    world.log_in()
    page, copied = world.follow_own(), world.cookie()
    key = f"session:{copied.partition('=')[2]}"
    with redis.Redis.from_url(world.redis_url) as store:
        assert 3500 < store.ttl(key) <= 3600
        # An hour later.
        store.pexpire(key, 1)
    world.is_over(page, copied)


def test_a_session_of_nobody_does_not_get_in(begin: Begin) -> None:
    world = begin.stored(STORED["starsessions"])
    world.post("/login", MORE)
    code, reason = world.service.turned_away(world.cookie())
    assert code == 4401
    assert "nobody is logged in" in reason


@pytest.mark.parametrize(("options", "settings"), SIGNED.values(), ids=SIGNED)
def test_a_signed_session_sees_its_own_until_it_is_revoked(
    begin: Begin, options: dict[str, Any], settings: dict[str, str]
) -> None:
    world = begin.signed(SECRET, SECRET, settings, **options)
    assert world.service.turned_away()[0] == 4401
    world.log_in()
    page, copied = world.follow_own(), world.cookie()
    world.log_out()
    assert world.cookie() == ""
    # The cookie is good in itself.
    assert page.nothing_waits()
    post(f"{world.service.http}/api/revoke", {"session": copied.partition("=")[2]}, KEY)
    assert "revoked" in world.is_over(page, copied)


def test_a_session_as_large_as_browsers_take_is_read(begin: Begin) -> None:
    world = begin.signed(SECRET, SECRET, {})
    world.post("/login", {"user_id": "ada", "projects": ["own/*"], "note": "ä" * 495})
    assert 4000 < len(world.cookie()) <= 4096
    world.follow_own()


def test_a_replaced_secret_is_good_as_long_as_it_is_listed(begin: Begin, start: Start) -> None:
    newer = "the secret that came after it"
    old = begin.signed(SECRET, f"{newer},{SECRET}", {})
    old.log_in()
    old.follow_own()
    new = begin.signed(newer, newer, {})
    code, reason = new.service.turned_away(old.cookie())
    assert code == 4401
    assert "not signed" in reason
    new.log_in()
    new.follow_own()
    assert old.service.follow(new.own, new.cookie()).nothing_waits()
