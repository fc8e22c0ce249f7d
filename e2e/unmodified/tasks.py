"""Celery tasks as anybody writes them, who knows of no other program; two settings make them visible."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import Celery
from celery.exceptions import Ignore, Reject

app = Celery("unmodified", broker=os.environ["CELERY_REDIS"], backend=os.environ["CELERY_REDIS"])
app.conf.update(
    result_extended=True,
    task_track_started=True,
    broker_connection_retry_on_startup=True,
    # So that a message of a worker that has died is delivered again within a test.
    broker_transport_options={"visibility_timeout": 5},
    worker_cancel_long_running_tasks_on_connection_loss=False,
)


@app.task
def add(x: int = 0, *, project_id: str) -> int:
    return x + 1


@app.task
def positional(project_id: str, x: int) -> int:
    return x


@app.task(bind=True)
def steps(self: Any, *, project_id: str, count: int = 5, pause_s: float = 0.02) -> dict[str, int]:
    for step in range(1, count + 1):
        self.update_state(state="PROGRESS", meta={"current": step, "total": count, "message": f"step {step}"})
        time.sleep(pause_s)
    return {"steps": count}


@app.task(bind=True)
def shapes(self: Any, *, project_id: str) -> None:
    for state, meta in [("PROGRESS", 42), ("PROGRESS", "half way"), ("DOWNLOADING", {"percent": 250})]:
        self.update_state(state=state, meta=meta)
        time.sleep(0.15)


@app.task
def fail(*, project_id: str) -> None:
    raise ValueError("boom")


@app.task(bind=True)
def flaky(self: Any, *, project_id: str, failures: int = 2) -> int:
    if self.request.retries < failures:
        raise self.retry(exc=OSError(f"try {self.request.retries}"), countdown=0.2, max_retries=failures)
    return int(self.request.retries)


@app.task(acks_late=True)
def late(*, project_id: str, seconds: float) -> None:
    time.sleep(seconds)


@app.task
def sleep(*, project_id: str, seconds: float) -> None:
    time.sleep(seconds)


@app.task(soft_time_limit=0.3)
def soft_limit(*, project_id: str) -> None:
    time.sleep(30)


@app.task(time_limit=0.5)
def hard_limit(*, project_id: str) -> None:
    time.sleep(30)


@app.task
def die(*, project_id: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def ignore(*, project_id: str) -> None:
    raise Ignore()


@app.task
def reject(*, project_id: str) -> None:
    raise Reject("no", requeue=False)


@app.task(bind=True)
def fail_by_hand(self: Any, *, project_id: str) -> None:
    self.update_state(state="FAILURE", meta={"exc_type": "ByHand", "exc_message": ["why"], "exc_module": ""})
    raise Ignore()


@app.task(bind=True, ignore_result=True)
def without_result(self: Any, *, project_id: str) -> None:
    self.update_state(state="PROGRESS", meta={"current": 1, "total": 2})


@app.task
def hostile(kind: str, *, project_id: str) -> Any:
    nested: Any = []
    for _ in range(300):
        nested = [nested]
    return {
        "nan": float("nan"),
        "infinity": [float("inf"), -float("inf")],
        "surrogate": "\ud800",
        "huge": 2**70,
        "deep": nested,
        "large": "x" * 5_000_000,
    }[kind]


@app.task
def gather(results: Any, *, project_id: str) -> int:
    return len(results)
