"""A real Redis, a real service and real Celery workers, on free ports, each ended by its own process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.error import HTTPError
from urllib.parse import unquote

import pytest
import redis
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin, Subprotocol

if TYPE_CHECKING:
    from celery_lab import Bridge, CeleryRedis

FOLDER = Path(__file__).parent
DEADLINE_S = 60.0


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    give_up_at_s = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < give_up_at_s, f"not seen within {DEADLINE_S} s: {what}"
        time.sleep(0.02)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get_json(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def post(url: str, body: Any = None, key: str = "") -> Any:
    """Posts JSON; the answer's JSON, or `None` if it has none."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or "null")


class Process:
    """A program that ends with the test, and takes its children along."""

    def __init__(self, *arguments: str, log: Path, **environment: str) -> None:
        self.log = log
        # Whoever runs the tests may have settings of their own.
        outside = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                arguments,
                cwd=FOLDER,
                stdout=output,
                stderr=output,
                env={**outside, **environment},
            )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Browser:
    """Keeps cookies as a browser does: by host, not by port; `Secure` ones for localhost, too."""

    def __init__(self) -> None:
        self._cookies = CookieJar(DefaultCookiePolicy(secure_protocols=("http", "https")))
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self._cookies))

    def post(self, url: str, body: Any = None) -> int:
        """Posts JSON, or a form as bytes; the status of the answer."""
        is_form = isinstance(body, bytes)
        headers = {"Content-Type": "application/x-www-form-urlencoded" if is_form else "application/json"}
        request = urllib.request.Request(url, body if is_form else json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=30) as answer:
                return int(answer.status)
        except HTTPError as refused:
            with refused:
                return refused.code

    def cookie(self, url: str) -> str:
        """The header that it sends along to this address; empty: none."""
        request = urllib.request.Request(url)
        self._cookies.add_cookie_header(request)
        return request.get_header("Cookie") or ""


class Page:
    """A page's connection to the service."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        assert self.next()["type"] == "connection.established"

    def next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(DEADLINE_S))
        return message

    def subscribe(self, project_id: str) -> dict[str, Any]:
        """What is answered. Nothing else may be waiting."""
        self._socket.send(json.dumps({"type": "subscribe", "project_id": project_id}))
        return self.next()

    def until(self, *types: str) -> list[dict[str, Any]]:
        """Everything up to the first event of one of these types."""
        events = [self.next()]
        while events[-1]["type"] not in types:
            events.append(self.next())
        return events

    def nothing_waits(self) -> bool:
        """Whether the answer to a ping is the next that comes: everything before it would have come first."""
        self._socket.send('{"type":"ping"}')
        return self.next()["type"] == "pong"

    def close_code(self) -> int:
        """The code with which it is closed; nothing may come before that."""
        return closing(self._socket)[0]


class Service:
    def __init__(self, port: int, log: Path) -> None:
        self.port, self.log = port, log
        self.http = f"http://localhost:{port}"
        self.websocket = f"ws://localhost:{port}/ws"
        self._sockets = ExitStack()

    def open(self, cookie: str = "", *subprotocols: str, origin: str | None = None) -> Page:
        """Connects as a page does whose browser has this cookie."""
        return Page(self._sockets.enter_context(self._connect(cookie, *subprotocols, origin=origin)))

    def turned_away(self, cookie: str = "", *subprotocols: str, origin: str | None = None) -> tuple[int, str]:
        """The code and the reason with which a page is closed that must not get in."""
        with self._connect(cookie, *subprotocols, origin=origin) as socket:
            return closing(socket)

    def follow(self, project_id: str, cookie: str = "") -> Page:
        page = self.open(cookie)
        assert page.subscribe(project_id)["type"] == "subscription.confirmed"
        return page

    def close(self) -> None:
        self._sockets.close()

    def _connect(self, cookie: str, *subprotocols: str, origin: str | None) -> ClientConnection:
        return connect(
            self.websocket,
            additional_headers={"Cookie": cookie} if cookie else None,
            origin=None if origin is None else Origin(origin),
            subprotocols=[Subprotocol(name) for name in ("tidings.v1", *subprotocols)],
            max_size=None,
        )


class Start(Protocol):
    """Starts a service with these settings; it ends with the test."""

    def __call__(self, **settings: str) -> Service: ...


class Secrets:
    """What must not be in any log: every secret that a test uses."""

    def __init__(self) -> None:
        self._values: set[str] = set()

    def add(self, *values: str) -> None:
        """Adds secrets; of what is quoted, also as it is meant."""
        for value in values:
            # What is shorter is in any log by chance.
            assert len(value) >= 8, f"too short to be looked for: {value}"
            self._values |= {value, unquote(value)}

    def add_cookies(self, header: str) -> None:
        self.add(*(cookie.partition("=")[2] for cookie in header.split("; ")))

    def check(self, log: Path) -> None:
        text = log.read_text("utf-8")
        assert "listening" in text, "the service's log"
        found = sorted(value for value in self._values if value in text)
        lines = [line for line in text.splitlines() if any(value in line for value in found)]
        assert not found, f"secrets in the log: {found}, as in {lines[:3]}"
        controls = sorted({character for character in text if not character.isprintable()} - {"\n"})
        assert not controls, f"control characters in the log: {controls}"


def closing(socket: ClientConnection) -> tuple[int, str]:
    """The code and the reason with which the other side closes, which is all that it does."""
    with pytest.raises(ConnectionClosed) as closed:
        pytest.fail(f"something came instead: {socket.recv(DEADLINE_S)!r}")
    assert closed.value.rcvd is not None, "closed without a word"
    return closed.value.rcvd.code, closed.value.rcvd.reason


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def redis_url(logs: Path) -> Iterator[str]:
    port = free_port()
    program = shutil.which("redis-server")
    assert program, "redis-server is installed by `cargo xtask test`"
    process = Process(program, "--port", str(port), "--save", "", "--dir", str(logs), log=logs / "redis.log")
    client = redis.Redis(port=port)

    def answers() -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    wait_until(answers, "redis-server")
    yield f"redis://127.0.0.1:{port}/0"
    client.close()
    process.stop()


@pytest.fixture(scope="session")
def binary() -> str:
    path = os.environ.get("TIDINGS_BINARY")
    assert path, "TIDINGS_BINARY names the binary; `cargo xtask test` sets it"
    return path


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


@pytest.fixture
def start(binary: str, redis_url: str, logs: Path, secrets: Secrets) -> Iterator[Start]:
    """Starts services, and looks through what they have logged when they have ended."""
    with ExitStack() as running:
        used = []

        def start(**settings: str) -> Service:
            port = free_port()
            log = logs / f"service-{port}.log"
            own = {
                "REDIS_URL": redis_url,
                "BACKEND_PORT": str(port),
                "TIDINGS_DRAIN_SECONDS": "0",
                "RUST_LOG": "debug",
            }
            process = Process(binary, "serve", log=log, **(own | settings))
            running.callback(process.stop)
            service = Service(port, log)
            running.callback(service.close)
            health = f"{service.http}/health/websocket"
            wait_until(
                lambda: (get_json(health) or {}).get("redis_connected"), "the service listening to Redis"
            )
            used.append(log)
            return service

        yield start
    for log in used:
        secrets.check(log)


@pytest.fixture
def service(start: Start) -> Service:
    return start()


@pytest.fixture(params=["prefork", "threads"])
def worker(request: pytest.FixtureRequest, redis_url: str, logs: Path) -> Iterator[str]:
    """A Celery worker on the existing tasks; yields the name of its pool."""
    os.environ["REDIS_URL"] = redis_url
    from existing.tasks import celery_app

    name = f"{request.param}-{free_port()}@e2e"
    arguments = [
        "-A",
        "existing.tasks",
        "worker",
        "--pool",
        request.param,
        "--concurrency",
        "2",
        "--hostname",
        name,
    ]
    process = Process(
        sys.executable, "-m", "celery", *arguments, log=logs / "worker.log", REDIS_URL=redis_url
    )
    wait_until(lambda: celery_app.control.inspect([name], timeout=0.5).ping(), "the worker")
    yield str(request.param)
    process.stop()


@pytest.fixture
def web(redis_url: str, logs: Path) -> Iterator[str]:
    """The existing FastAPI application; yields its address."""
    port = free_port()
    arguments = ["-m", "uvicorn", "existing.web:app", "--port", str(port)]
    process = Process(sys.executable, *arguments, log=logs / "web.log", REDIS_URL=redis_url)
    address = f"http://localhost:{port}"
    wait_until(lambda: get_json(f"{address}/openapi.json"), "the application")
    yield address
    process.stop()


@pytest.fixture(scope="session")
def celery_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CeleryRedis]:
    """The Redis of the unmodified tasks, which are sent from here."""
    from celery_lab import CeleryRedis

    server = CeleryRedis(tmp_path_factory.mktemp("celery"))
    os.environ["CELERY_REDIS"] = server.url
    from unmodified.tasks import app

    app.conf.update(broker_url=server.url, result_backend=server.url)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def bridge(binary: str, celery_redis: CeleryRedis, logs: Path) -> Iterator[Bridge]:
    """A service that listens to Celery, and finds out soon what is lost."""
    from celery_lab import Bridge

    bridge = Bridge(binary, celery_redis.url, logs)
    yield bridge
    bridge.stop()


@pytest.fixture
def project(bridge: Bridge) -> Iterator[tuple[str, Page, Page]]:
    """A project, a page that follows it, and one that follows another, which gets nothing."""
    name = f"p-{uuid.uuid4()}"
    page, other = bridge.service.follow(name), bridge.service.follow(f"{name}-other")
    yield name, page, other
    assert other.nothing_waits()
    bridge.service.close()
