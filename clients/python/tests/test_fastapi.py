"""Routes of an application, called as a server calls them; Redis and HTTP are real."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from contextlib import asynccontextmanager
from http.cookies import SimpleCookie
from urllib.parse import quote

import pytest
import redis
from fastapi import FastAPI, Request, Response

import tidings
from conftest import Ingest, free_port
from tidings import PublishError, SyncEventBroadcaster
from tidings.fastapi import Events, Sessions, broadcaster, lifespan, register_task, register_task_sync


async def call(app, path, cookie=None):
    """One POST: the status, the cookies that are set, the body."""
    headers = [(b"cookie", f"session={cookie}".encode())] if cookie else []
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"},
        **{"scheme": "https", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""},
        **{"headers": headers, "server": ("test", 443), "client": ("test", 1)},
    }
    answer = {"body": b"", "cookies": SimpleCookie()}

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        answer["body"] += message.get("body", b"")
        for name, value in message.get("headers", []):
            if name == b"set-cookie":
                answer["cookies"].load(value.decode())

    await app(scope, receive, send)
    return answer["cookies"].get("session"), json.loads(answer["body"] or b"null")


def test_a_route_publishes_and_a_test_may_put_another_broadcaster_in_its_place(tidings_events):
    app = FastAPI()

    @app.post("/projects/{project_id}")
    async def delete(project_id: str, events: Events):
        return await events.file_deleted(project_id, "a")

    class Refusing:
        async def file_deleted(self, *_):
            return "refused"

    assert asyncio.run(call(app, "/projects/p1"))[1] is True
    tidings_events.assert_published("file.deleted", project_id="p1")
    app.dependency_overrides[broadcaster] = Refusing
    assert asyncio.run(call(app, "/projects/p1"))[1] == "refused"


def test_the_lifespan_configures_runs_the_applications_own_and_sends_what_is_on_its_way(own_server, project):
    order = []
    published = Ingest(own_server.url)

    @asynccontextmanager
    async def own(app):
        order.append("begins")
        yield {"db": 1}
        await tidings.EventBroadcaster.file_deleted(project, "last")
        order.append("ends")

    async def run():
        async with lifespan(own, redis_url=own_server.url)(None) as state:
            assert state == {"db": 1}
            # Nobody waits for them, and the loop is about to end.
            waiting = [
                asyncio.ensure_future(tidings.EventBroadcaster.file_deleted(project, str(n)))
                for n in range(50)
            ]
            await asyncio.sleep(0)
        for task in waiting:
            task.cancel()

    asyncio.run(run())
    assert order == ["begins", "ends"]
    paths = [e["file_path"] for e in published.until(project, "file.deleted", 51)]
    assert paths == [*map(str, range(50)), "last"]
    published.close()
    with redis.Redis.from_url(own_server.url) as client:
        assert not [c for c in client.client_list() if c["cmd"] == "xadd"], "its connections are closed"
    assert SyncEventBroadcaster.file_deleted(project, "after"), "and opened again when somebody publishes"


@pytest.fixture
def application(server):
    app, sessions = FastAPI(), Sessions(lifetime_s=1000)

    @app.post("/login/{user}")
    async def login(user: str, request: Request, response: Response):
        return await sessions.start(request, response, user, ["team-a/*"])

    @app.post("/me")
    async def me(request: Request):
        session = await sessions.read(request)
        return session and session.user_id

    @app.post("/refresh")
    async def refresh(request: Request, response: Response):
        return await sessions.refresh(request, response, projects=["team-b/*"])

    @app.post("/logout")
    async def logout(request: Request, response: Response):
        await sessions.end(request, response)

    return app


@pytest.fixture
def stored(server):
    with redis.Redis.from_url(server.url) as client:

        def of(session_id):
            body = client.get(f"session:{session_id}")
            return json.loads(body) if body else None

        def put(session_id, body):
            client.set(f"session:{session_id}", body)

        of.put = put
        of.ttl = lambda session_id: client.ttl(f"session:{session_id}")
        yield of


def test_a_session_is_written_as_the_service_reads_it_with_a_cookie_that_is_kept_safe(application, stored):
    cookie, session_id = asyncio.run(call(application, "/login/ada"))
    session = stored(session_id)
    assert (session["user_id"], session["projects"]) == ("ada", ["team-a/*"])
    assert set(session) == {"user_id", "projects", "expires_at"}
    assert 900 < stored.ttl(session_id) <= 1000
    assert cookie.value == session_id
    assert (cookie["httponly"], cookie["secure"], cookie["samesite"], cookie["path"]) == (
        True,
        True,
        "lax",
        "/",
    )
    assert cookie["max-age"] == "1000"
    assert len(session_id) >= 43


def test_a_login_gets_a_new_id_and_ends_the_session_before_it(application, stored):
    _, first = asyncio.run(call(application, "/login/ada"))
    _, second = asyncio.run(call(application, "/login/ada", cookie=first))
    assert first != second
    assert stored(first) is None
    assert stored(second)


def test_a_session_is_refreshed_while_it_lives_and_never_after_its_end(application, stored):
    _, session_id = asyncio.run(call(application, "/login/ada"))
    cookie, refreshed = asyncio.run(call(application, "/refresh", cookie=session_id))
    assert (refreshed, cookie.value) == (True, session_id)
    assert stored(session_id)["projects"] == ["team-b/*"]
    assert asyncio.run(call(application, "/me", cookie=session_id))[1] == "ada"
    cookie, _ = asyncio.run(call(application, "/logout", cookie=session_id))
    assert (cookie.value, cookie["max-age"]) == ("", "0")
    assert stored(session_id) is None
    assert asyncio.run(call(application, "/refresh", cookie=session_id)) == (None, False)
    assert asyncio.run(call(application, "/me", cookie=session_id))[1] is None


def test_what_else_an_application_keeps_in_a_session_stays_and_rubbish_is_nobodys(application, stored):
    _, session_id = asyncio.run(call(application, "/login/ada"))
    stored.put(session_id, json.dumps({**stored(session_id), "admin": True}))
    assert asyncio.run(call(application, "/refresh", cookie=session_id))[1] is True
    assert stored(session_id)["admin"] is True
    for rubbish in ("{", "[]", "{}", '{"user_id": "ada", "projects": [], "expires_at": "soon"}'):
        stored.put(session_id, rubbish)
        assert asyncio.run(call(application, "/me", cookie=session_id))[1] is None
        assert asyncio.run(call(application, "/refresh", cookie=session_id))[1] is False


@pytest.mark.parametrize("cookie", ["../x", "short", "a" * 300, "a*b" * 10])
def test_a_cookie_that_is_no_id_is_nobodys_and_not_looked_up(application, cookie):
    assert asyncio.run(call(application, "/me", cookie=cookie))[1] is None


def test_what_would_be_no_session_is_told_at_once():
    with pytest.raises(ValueError, match=r"key must have \{id\}"):
        Sessions(key="session")
    with pytest.raises(ValueError, match="needs secure=True"):
        Sessions(same_site="none", secure=False)
    with pytest.raises(ValueError, match="lifetime_s"):
        Sessions(lifetime_s=0)
    sessions = Sessions("redis://127.0.0.1:1")
    request, response = Request({"type": "http", "headers": []}), Response()
    with pytest.raises(ValueError, match="projects must be a list of ids"):
        asyncio.run(sessions.start(request, response, "ada", "team-a"))
    with pytest.raises(ValueError, match="user_id must be"):
        asyncio.run(sessions.start(request, response, "", []))


class Service(http.server.ThreadingHTTPServer):
    """Answers as the route of the service does, and remembers what it was asked."""

    def __init__(self):
        self.asked = []
        super().__init__(("127.0.0.1", 0), _Route)
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Route(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        if body["project_id"] == "elsewhere":
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/other")
            self.end_headers()
            return
        problem = {"type": "about:blank", "code": "scope", "detail": "the key is not for this project"}
        self.send_response(403 if body["project_id"] == "forbidden" else 202)
        self.end_headers()
        self.wfile.write(json.dumps(problem).encode() if body["project_id"] == "forbidden" else b"")

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def service(monkeypatch):
    with Service() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("TIDINGS_URL", running.url)
        monkeypatch.setenv("TIDINGS_PUBLISH_KEY", "k" * 16)
        yield running
        running.shutdown()
        thread.join()


def test_a_task_is_registered_from_both_kinds_of_routes(service):
    odd = "a/b?c#d e"
    assert register_task_sync("t1", "p1")
    assert asyncio.run(register_task(odd, "p2", task_name="proj.work", url=f"{service.url}/", key="other"))
    assert service.asked == [
        ("/api/tasks/t1", {"project_id": "p1"}, f"Bearer {'k' * 16}"),
        (f"/api/tasks/{quote(odd, safe='')}", {"project_id": "p2", "task_name": "proj.work"}, "Bearer other"),
    ]


def test_a_refusal_is_told_with_its_reason_and_the_key_goes_nowhere_else(service, caplog):
    assert not register_task_sync("t1", "forbidden")
    assert "403 scope: the key is not for this project" in caplog.text
    assert not register_task_sync("t1", "elsewhere")
    assert len(service.asked) == 2, "an answer that names another place is not followed"
    tidings.configure(raise_errors=True)
    with pytest.raises(PublishError, match="403 scope"):
        asyncio.run(register_task("t1", "forbidden"))
    assert "kkkk" not in caplog.text


def test_a_service_that_is_away_fails_nothing(caplog):
    assert not register_task_sync("t1", "p1", url=f"http://127.0.0.1:{free_port()}")
    assert "was not registered" in caplog.text
    with pytest.raises(ValueError, match="TIDINGS_URL"):
        register_task_sync("t1", "p1", url="ftp://x")
    with pytest.raises(ValueError, match="task_id"):
        register_task_sync("", "p1")
