"""More tasks as anybody writes them, for what happens rarely; how results are written is set for a worker."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from unmodified.tasks import add, app, sleep

app.conf.update(
    result_serializer=os.environ.get("RESULT_SERIALIZER", "json"),
    result_accept_content=["json", "pickle"],
    result_compression=os.environ.get("RESULT_COMPRESSION"),
)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def die_once(self: Any, *, project_id: str) -> None:
    if not self.request.delivery_info["redelivered"]:
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True, max_retries=1)
def give_up(self: Any, *, project_id: str) -> None:
    raise self.retry(exc=OSError("never"), countdown=0.1)


@app.task(bind=True)
def replaced(self: Any, *, project_id: str) -> None:
    raise self.replace(add.si(1, project_id=project_id))


@app.task
def long_error(*, project_id: str) -> None:
    raise ValueError("é" * 1_000_000)


@app.task(bind=True)
def strange_updates(self: Any, *, project_id: str) -> None:
    strange = [
        {"current": float("nan"), "total": float("inf")},
        {"message": "\ud800"},
        {"current": 2**70, "total": 2},
        {"nested": nested(500)},
    ]
    for meta in strange:
        self.update_state(state="PROGRESS", meta=meta)
        time.sleep(0.15)


@app.task
def deep(*, project_id: str) -> Any:
    return nested(400)


@app.task
def send_on(names: list[str], *, project_id: str) -> list[str]:
    """Sends a task for each of these projects, as one does that serves many."""
    return [str(sleep.delay(project_id=name, seconds=0.1).id) for name in names]
