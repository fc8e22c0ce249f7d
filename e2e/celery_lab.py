"""Real Celery workers on tasks that nobody changed, their Redis, and what a subscriber is told of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from kombu.exceptions import OperationalError

from conftest import DEADLINE_S, FOLDER, Page, Process, Service, free_port, get_json, wait_until

ENDS = ("task.completed", "task.failed", "process.completed")


class CeleryRedis:
    """A Redis of Celery's own, that can be killed and comes back with its data."""

    def __init__(self, folder: Path) -> None:
        self._port, self._folder = free_port(), folder
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program, "redis-server is installed by `cargo xtask test`"
        arguments = [
            "--port",
            str(self._port),
            "--save",
            "",
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
        ]
        arguments += ["--dir", str(self._folder)]
        self._process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL)
        wait_until(self._answers, "Celery's Redis")

    def client(self) -> redis.Redis:
        return redis.Redis(port=self._port)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.BusyLoadingError):
            return False


class Worker:
    """A Celery worker, in a group of processes of its own, so that all of it can be killed at once."""

    def __init__(
        self,
        pool: str,
        concurrency: int,
        url: str,
        log: Path,
        *more: str,
        app: str = "unmodified.tasks",
        **environment: str,
    ) -> None:
        self.name = f"{pool}-{free_port()}@lab"
        arguments = [
            "-m",
            "celery",
            "-A",
            app,
            "worker",
            "--pool",
            pool,
            "--hostname",
            self.name,
        ]
        arguments += ["--concurrency", str(concurrency), *more]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=FOLDER,
                stdout=output,
                stderr=output,
                env={**os.environ, "CELERY_REDIS": url, **environment},
                start_new_session=True,
            )

    def wait(self) -> Worker:
        from unmodified.tasks import app

        def answers() -> bool:
            try:
                return bool(app.control.inspect([self.name], timeout=0.5).ping())
            except (redis.ConnectionError, OperationalError):
                return False  # a connection from before Redis was restarted

        try:
            wait_until(answers, "the worker")
        except BaseException:
            self.stop()
            raise
        return self

    def kill(self) -> None:
        """As when its machine loses power."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()


class Bridge:
    """A service that listens to Celery."""

    def __init__(self, binary: str, celery_url: str, logs: Path, **more: str) -> None:
        port = free_port()
        self._binary, self._log = binary, logs / f"bridge-{port}.log"
        self._settings = {
            "BACKEND_PORT": str(port),
            "TIDINGS_PERSIST": "false",
            "TIDINGS_DRAIN_SECONDS": "0",
            "TIDINGS_CELERY_BACKEND_URL": celery_url,
            "TIDINGS_CELERY_BROKER_URL": celery_url,
            "TIDINGS_CELERY_ENABLE_EVENTS": "true",
            "TIDINGS_CELERY_LOST_SECONDS": "2",
            "WS_HEARTBEAT_INTERVAL": "3600",
            **more,
        }
        self.service = Service(port, self._log)
        self.start()

    def start(self) -> None:
        self._process = Process(self._binary, "serve", log=self._log, **self._settings)
        wait_until(self.hears, "the service listening to Celery")

    def hears(self) -> bool:
        report = self.report()
        return bool(report) and all(heard for _, heard in report["ways"])

    def report(self) -> Any:
        return (get_json(f"{self.service.http}/api/doctor") or {}).get("celery")

    def kill(self) -> None:
        self._process.kill()

    def stop(self) -> None:
        self.service.close()
        self._process.stop()

    def state(self, project_id: str) -> dict[str, str]:
        """The newest event of each task that a page is given that comes only now."""
        page = self.service.open()
        confirmed = page.subscribe(project_id)
        while confirmed["type"] != "subscription.confirmed":
            confirmed = page.next()
        return {task["task_id"]: task["type"] for task in confirmed["state"]["tasks"]}


def check(project: tuple[str, Page, Page], result: Any, *expected: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Waits for the end of a task, which was told exactly so; everything that was told of it."""
    told = Told().take_ends(project[1], result.id)
    assert told.sequence(result.id) == list(expected)
    assert project[1].nothing_waits()
    return told.about(result.id)


def shortly(event: dict[str, Any]) -> tuple[Any, ...]:
    """What of an event must be exactly so."""
    kind = event["type"].split(".")[1]
    if event["type"].startswith("process."):
        return kind, *([event["outcome"]] if "outcome" in event else [])
    word = event.get("reason") or event.get("state")
    return kind, event["attempt"], *([word] if word else [])


class Told:
    """What a page was told, by the task or process that it is about."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def about(self, subject: str) -> list[dict[str, Any]]:
        ids = ("task_id", "process_id")
        return [event for event in self.events if subject in (event.get(name) for name in ids)]

    def sequence(self, subject: str, kind: str = "task") -> list[tuple[Any, ...]]:
        """Everything about it; of updates that follow one another, how many does not count."""
        about = [event for event in self.about(subject) if event["type"].startswith(kind)]
        sequence: list[tuple[Any, ...]] = []
        for event in map(shortly, about):
            if not (event[0] == "progress" and sequence and sequence[-1] == event):
                sequence.append(event)
        return sequence

    def take_until(self, page: Page, holds: Callable[[Told], bool]) -> Told:
        while not holds(self):
            event = page.next()
            if not event["type"].startswith("system."):
                self.events.append(event)
        return self

    def take_ends(self, page: Page, *subjects: str) -> Told:
        """Until each of them has ended, as often as it is named."""

        def ended(subject: str) -> bool:
            ends = [event for event in self.about(subject) if event["type"] in ENDS]
            return len(ends) >= subjects.count(subject)

        return self.take_until(page, lambda told: all(ended(subject) for subject in subjects))
