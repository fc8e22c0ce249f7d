"""The same application with one line more: the package tells of its tasks, too."""

from __future__ import annotations

from typing import Any

import tidings.celery
from tidings.celery import progress

from unmodified.tasks import app

tidings.celery.install(app)


@app.task(bind=True)
def told_twice(self: Any, project_id: str, count: int) -> int:
    for _ in progress(self, range(count)):
        self.update_state(state="PROGRESS", meta={"current": 1, "total": count})
    return count
