"""A real Redis on a free port, a listener on the channel, and real Celery workers."""

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A Redis that can be stopped and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program, "the tests need redis-server on PATH"
        self._process = subprocess.Popen(
            [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
        )
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


class Channel:
    """Everything that is published on the channel, in order, parsed strictly."""

    def __init__(self, url: str, name: str = "websocket:broadcast") -> None:
        self._client = redis.Redis.from_url(url)
        self._pubsub = self._client.pubsub()
        self._pubsub.subscribe(name)
        self._events: list[dict[str, Any]] = []
        first = self._pubsub.get_message(timeout=DEADLINE_S)
        assert first
        assert first["type"] == "subscribe"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def of(self, project_id: str) -> list[dict[str, Any]]:
        return [event for event in list(self._events) if event.get("project_id") == project_id]

    def all(self) -> list[dict[str, Any]]:
        return list(self._events)

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
        self._pubsub.close()
        self._client.close()

    def _listen(self) -> None:
        while not self._closing.is_set():
            message = self._pubsub.get_message(timeout=0.05)
            if message and message["type"] == "message":
                self._events.append(parse_strictly(message["data"]))


class Worker:
    """A Celery worker as a process of its own, with its own queue."""

    def __init__(self, server: RedisServer, pool: str, folder: Path, events_url: str | None = None) -> None:
        self.queue = f"{pool}-{uuid.uuid4().hex[:8]}"
        self.log = folder / f"{self.queue}.log"
        environment = {**os.environ, "REDIS_URL": events_url or server.url, "TEST_BROKER": broker(server)}
        command = [sys.executable, "-m", "celery", "-A", "progress_app", "worker", "-P", pool, "-c", "2"]
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


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path_factory.mktemp("redis"))
    yield running
    running.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that a test may stop."""
    running = RedisServer(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def channel(server: RedisServer) -> Iterator[Channel]:
    listening = Channel(server.url)
    yield listening
    listening.close()


@pytest.fixture(autouse=True)
def fresh_settings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test begins as a process that has not published yet."""
    monkeypatch.delenv("REDIS_CHANNEL", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    if "server" in request.fixturenames:
        monkeypatch.setenv("REDIS_URL", request.getfixturevalue("server").url)
    monkeypatch.setattr(_settings, "_configured", _settings.Settings())
    monkeypatch.setattr(_publisher, "_links", {})
    _settings._environment.cache_clear()
    yield
    _settings._environment.cache_clear()
