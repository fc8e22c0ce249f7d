"""A real Redis on a free port, readers of what is published, and real Celery workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tidings import _publisher, _settings

TESTS = Path(__file__).parent
DEADLINE_S = 15.0
NOTHING_ON_DISK = ("--save", "", "--appendonly", "no")


def parse_strictly(text: str | bytes) -> Any:
    """JSON as a strict parser reads it: no NaN, no unpaired surrogates."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    value = json.loads(text, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    give_up_at_s = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < give_up_at_s, f"not seen within {deadline_s} s: {what}"
        time.sleep(0.01)
    return value


def free_port() -> int:
    """Low enough for a Redis in cluster mode, which takes the port 10,000 above, too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port + 10_000 < 65_536:
            return port


class RedisServer:
    """A Redis that can be stopped and started again on the same port."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program, "the tests need redis-server on PATH"
        command = [program, *self._arguments, "--port", str(self.port), "--bind", "127.0.0.1"]
        self._process = subprocess.Popen(command, cwd=self._folder, stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port)
        wait_until(lambda: self._answers(client), "an answer from redis-server")
        client.close()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    @staticmethod
    def _answers(client: redis.Redis) -> bool:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


class Reader:
    """Everything that is published at one place, in order, parsed strictly."""

    def __init__(self, url: str) -> None:
        # One shape of answers, whatever redis-py takes for its default.
        self._client = redis.Redis.from_url(url, protocol=2)
        self._events: list[dict[str, Any]] = []
        self._closing = threading.Event()
        self._begin()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def of(self, project_id: str) -> list[dict[str, Any]]:
        return [event for event in list(self._events) if event.get("project_id") == project_id]

    def until(self, project_id: str, type_: str, count: int = 1) -> list[dict[str, Any]]:
        """The project's events, once `count` of the type are among them."""

        def seen() -> bool:
            return sum(event["type"] == type_ for event in self.of(project_id)) >= count

        try:
            wait_until(seen, f"{count} {type_} of {project_id}")
        except AssertionError as error:
            raise AssertionError(f"{error}; seen: {[e['type'] for e in self.of(project_id)]}") from None
        return self.of(project_id)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._client.close()

    def _read(self) -> None:
        while not self._closing.is_set():
            self._events.extend(map(parse_strictly, self._next()))

    def _begin(self) -> None:
        """Returns when nothing that is published from now on can be missed."""
        raise NotImplementedError

    def _next(self) -> list[bytes]:
        raise NotImplementedError


class Ingest(Reader):
    """Reads the ingest stream as the service does."""

    def _begin(self) -> None:
        newest: Any = self._client.xrevrange("tidings:ingest", count=1)
        self._seen = newest[0][0] if newest else b"0"

    def _next(self) -> list[bytes]:
        answer: Any = self._client.xread({"tidings:ingest": self._seen}, block=50)
        entries = answer[0][1] if answer else []
        for self._seen, fields in entries:
            assert list(fields) == [b"event"]
        return [fields[b"event"] for _, fields in entries]


class Channel(Reader):
    """Listens to a plain channel."""

    def __init__(self, url: str, name: str = "websocket:broadcast") -> None:
        self._name = name
        super().__init__(url)

    def _begin(self) -> None:
        self._pubsub = self._client.pubsub()
        self._pubsub.subscribe(self._name)
        first = self._pubsub.get_message(timeout=DEADLINE_S)
        assert first
        assert first["type"] == "subscribe"

    def _next(self) -> list[bytes]:
        message = self._pubsub.get_message(timeout=0.05)
        return [message["data"]] if message and message["type"] == "message" else []

    def close(self) -> None:
        super().close()
        self._pubsub.close()


class Worker:
    """A Celery worker as a process of its own, with its own queue."""

    def __init__(
        self,
        server: RedisServer,
        pool: str,
        folder: Path,
        events_url: str | None = None,
        application: str = "progress_app",
    ) -> None:
        self.queue = f"{pool}-{uuid.uuid4().hex[:8]}"
        self.log = folder / f"{self.queue}.log"
        environment = {**os.environ, "REDIS_URL": events_url or server.url, "TEST_BROKER": broker(server)}
        command = [sys.executable, "-m", "celery", "-A", application, "worker", "-P", pool, "-c", "2"]
        command += ["-Q", self.queue, "-n", f"{self.queue}@test", "-l", "INFO"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=TESTS, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_until(self._is_ready, "a worker that is ready", 60)
        except BaseException:
            self.stop()
            raise

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, f"the worker has ended:\n{self.text()}"
        return " ready." in self.text()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def broker(server: RedisServer) -> str:
    return f"redis://127.0.0.1:{server.port}/1"


@pytest.fixture
def project() -> str:
    return f"p-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path_factory.mktemp("redis"), *NOTHING_ON_DISK)
    yield running
    running.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that a test may stop."""
    running = RedisServer(tmp_path, *NOTHING_ON_DISK)
    yield running
    running.stop()


@pytest.fixture
def published(server: RedisServer) -> Iterator[Reader]:
    """What goes where everything goes unless told otherwise."""
    reader = Ingest(server.url)
    yield reader
    reader.close()


@pytest.fixture(autouse=True)
def fresh_settings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test begins as a process that has not published yet."""
    for name in ("REDIS_URL", "TIDINGS_PUBLISH_TO", "REDIS_CHANNEL"):
        monkeypatch.delenv(name, raising=False)
    if "server" in request.fixturenames:
        monkeypatch.setenv("REDIS_URL", request.getfixturevalue("server").url)
    monkeypatch.setattr(_settings, "_configured", _settings.Settings())
    monkeypatch.setattr(_publisher, "_links", {})
    _settings._environment.cache_clear()
    yield
    _settings._environment.cache_clear()
