#!/usr/bin/env python3
"""Updates of Celery tasks in tight loops: what reaches a client, and what they cost the service.

    target/python/bin/python bench/celery.py [--rate 5000] [--seconds 10] [--tasks 20] [--repetitions 3]

Needs `redis-server`, the packages of the end-to-end tests and a release build. What is published is what a worker writes: the
state is kept and published in one transaction. Beside it the same updates on the plain channel, as many and at the
same times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

ROOT = Path(__file__).resolve().parent.parent
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BATCH = 50


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, redis.RedisError):
            if condition():
                return
        time.sleep(0.05)
    raise SystemExit("it did not start")


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def state(task: str, step: int, total: int) -> tuple[str, str]:
    meta = {
        "status": "PROGRESS",
        "result": {"current": step, "total": total, "message": f"step {step}"},
        "traceback": None,
        "children": [],
        "date_done": None,
        "name": "app.loop",
        "args": [],
        "kwargs": {"project_id": "p"},
        "worker": "w1@bench",
        "retries": 0,
        "queue": "celery",
        "task_id": task,
    }
    return f"celery-task-meta-{task}", json.dumps(meta)


def event(task: str, step: int, total: int) -> tuple[str, str]:
    progress = {"current": step, "total": total}
    body = {"type": "task.progress", "project_id": "p", "task_id": task, "attempt": 0, "progress": progress}
    return "websocket:broadcast", json.dumps({**body, "message": f"step {step}"})


def publish(client: redis.Redis, by_celery: bool, options: argparse.Namespace) -> float:
    """Publishes all of it; how late the last batch was, in seconds."""
    count = options.rate * options.seconds
    each = count // options.tasks
    begun, late = time.monotonic(), 0.0
    for first in range(0, count, BATCH):
        due = begun + first / options.rate
        late = time.monotonic() - due
        if late < 0:
            time.sleep(-late)
        pipe = client.pipeline(transaction=False)
        for number in range(first, min(first + BATCH, count)):
            task, step = f"t{number % options.tasks}", number // options.tasks + 1
            key, body = (state if by_celery else event)(task, step, each)
            if by_celery:
                pipe.execute_command("MULTI")
                pipe.set(key, body, ex=60)
            pipe.publish(key, body)
            if by_celery:
                pipe.execute_command("EXEC")
        pipe.execute()
    return late


def count_messages(url: str, counts: Counter[str], last: dict[str, int]) -> None:
    with contextlib.suppress(ConnectionClosed, OSError), connect(url, max_size=None) as page:
        page.send(json.dumps({"type": "subscribe", "project_id": "p"}))
        for text in page:
            message = json.loads(text)
            counts[message["type"]] += 1
            if message["type"] == "task.progress":
                last[message["task_id"]] = message["progress"]["current"]


def run(by_celery: bool, options: argparse.Namespace) -> dict[str, float]:
    redis_port, port = free_port(), free_port()
    redis_url = f"redis://127.0.0.1:{redis_port}/0"
    setting = "TIDINGS_CELERY_BACKEND_URL" if by_celery else "REDIS_URL"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        program = shutil.which("redis-server") or "redis-server"
        stack.enter_context(
            running(
                program, "--port", str(redis_port), "--save", "", "--dir", folder, "--loglevel", "warning"
            )
        )
        client = redis.Redis(port=redis_port)
        until(client.ping)
        service = stack.enter_context(
            running(
                str(options.tidings),
                "serve",
                BACKEND_PORT=str(port),
                TIDINGS_PERSIST="false",
                TIDINGS_ENGINE="embedded",
                TIDINGS_DRAIN_SECONDS="0",
                **{setting: redis_url},
            )
        )
        source = "celery" if by_celery else "redis_channel"
        metrics = f"http://127.0.0.1:{port}/metrics"
        line = f'tidings_source_up{{source="{source}"}} 1'
        until(lambda: line in urllib.request.urlopen(metrics, timeout=5).read().decode())
        counts: Counter[str] = Counter()
        last: dict[str, int] = {}
        threading.Thread(
            target=count_messages, args=(f"ws://127.0.0.1:{port}/ws", counts, last), daemon=True
        ).start()
        until(lambda: counts["subscription.confirmed"])
        before = cpu_s(service)
        late = publish(client, by_celery, options)
        each = options.rate * options.seconds // options.tasks
        until(lambda: len(last) == options.tasks and set(last.values()) == {each})
        used = cpu_s(service) - before
        return {
            "published": options.rate * options.seconds,
            "reached": counts["task.progress"],
            "cpu_s": used,
            "cpu_us": used * 1e6 / (options.rate * options.seconds),
            "late_s": late,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=int, default=5000)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--tidings", type=Path, default=ROOT / "target" / "release" / "tidings")
    options = parser.parse_args()
    print("| source | updates | reached a client | CPU, µs per update | publisher late, s |")
    print("| --- | --- | --- | --- | --- |")
    medians = {}
    for by_celery in (True, False):
        runs = [run(by_celery, options) for _ in range(options.repetitions)]
        median = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
        medians[by_celery] = median
        name = "Celery bridge" if by_celery else "plain channel"
        figures = (median["published"], median["reached"], median["cpu_us"], max(median["late_s"], 0))
        print("| {} | {:.0f} | {:.0f} | {:.1f} | {:.2f} |".format(name, *figures))
    print(f"\nratio of CPU: {medians[True]['cpu_s'] / medians[False]['cpu_s']:.2f}")


if __name__ == "__main__":
    main()
