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
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

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


def post(url: str, body: bytes = b"") -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=30) as answer:
        return json.load(answer)


class Process:
    """A program that ends with the test, and takes its children along."""

    def __init__(self, *arguments: str, log: Path, **environment: str) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                arguments,
                cwd=FOLDER,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
            )

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Follower:
    """A page that follows one project."""

    def __init__(self, socket: ClientConnection, project_id: str) -> None:
        self._socket = socket
        assert self.next()["type"] == "connection.established"
        self._socket.send(json.dumps({"type": "subscribe", "project_id": project_id}))
        assert self.next()["type"] == "subscription.confirmed"

    def next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(DEADLINE_S))
        return message

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


class Service:
    def __init__(self, port: int) -> None:
        self.http = f"http://localhost:{port}"
        self._websocket = f"ws://localhost:{port}/ws"
        self._sockets = ExitStack()

    def follow(self, project_id: str) -> Follower:
        socket = connect(self._websocket, subprotocols=[Subprotocol("tidings.v1")], max_size=None)
        return Follower(self._sockets.enter_context(socket), project_id)

    def close(self) -> None:
        self._sockets.close()


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
def service(binary: str, redis_url: str, logs: Path) -> Iterator[Service]:
    port = free_port()
    environment = {"REDIS_URL": redis_url, "BACKEND_PORT": str(port), "TIDINGS_DRAIN_SECONDS": "0"}
    process = Process(binary, "serve", log=logs / "service.log", **environment)
    service = Service(port)
    health = f"{service.http}/health/websocket"
    wait_until(lambda: (get_json(health) or {}).get("redis_connected"), "the service listening to Redis")
    yield service
    service.close()
    process.stop()


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
