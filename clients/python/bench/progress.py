"""What progress costs a task: calls in a tight loop, beside Celery's own `update_state`.

    python bench/progress.py        # starts the redis-server that is on PATH, on a free port

The task runs in this process; Redis is real. Each figure is the median of the runs, per call.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from celery import Celery

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tidings
from conftest import NOTHING_ON_DISK, RedisServer
from tidings.celery import ProgressRecorder, ProgressTask, progress

RUNS = 7
HELD_BACK, SENT = 100_000, 2_000
"""Calls in a run: enough to take tens of milliseconds."""


def measured(label: str, count: int, run: Callable[[], object]) -> None:
    run()
    took = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        took.append((time.perf_counter() - began) / count * 1e6)
    print(f"{label:42} {statistics.median(took):8.2f} µs  ({min(took):.2f} to {max(took):.2f})")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), *NOTHING_ON_DISK)
        try:
            measure(server.url)
        finally:
            server.stop()


def measure(url: str) -> None:
    app = Celery("bench", broker="memory://", backend=url)
    app.conf.task_store_eager_result = True
    tidings.configure(redis_url=url)

    @app.task(bind=True)
    def bar(self, project_id):
        shown = progress(self, total=HELD_BACK * 10)
        measured("bar.advance(), 10 a second", HELD_BACK, lambda: [shown.advance() for _ in range(HELD_BACK)])
        recorder = ProgressRecorder(self)
        measured(
            "ProgressRecorder.set_progress, 10 a second",
            HELD_BACK,
            lambda: [recorder.set_progress(n, HELD_BACK * 2) for n in range(HELD_BACK)],
        )
        measured("no call: the loop itself", HELD_BACK, lambda: [None for _ in range(HELD_BACK)])
        states = range(SENT)
        measured(
            "self.update_state (Celery)",
            SENT,
            lambda: [self.update_state(state="PROGRESS", meta={"current": n, "total": SENT}) for n in states],
        )

    @app.task(bind=True, base=ProgressTask)
    def updates(self, project_id):
        measured(
            "update_progress, every one sent",
            SENT,
            lambda: [self.update_progress(n, SENT * 2) for n in range(SENT)],
        )
        tidings.configure(progress_per_second=10)
        measured(
            "update_progress, 10 a second",
            HELD_BACK,
            lambda: [self.update_progress(n, HELD_BACK * 2) for n in range(HELD_BACK)],
        )

    bar.apply(("p1",), throw=True)
    updates.apply(("p1",), throw=True)


if __name__ == "__main__":
    main()
