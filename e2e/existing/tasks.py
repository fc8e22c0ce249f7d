"""Celery tasks with progress, as such code writes them: by hand, on the task object, with a loop per call."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from celery import Celery
from tidings import EventBroadcaster, SyncEventBroadcaster
from tidings.celery import ProgressTask

celery_app = Celery("existing", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])
celery_app.conf.broker_connection_retry_on_startup = True


@celery_app.task(base=ProgressTask, bind=True)
def process_video(self: Any, project_id: str, video_path: str) -> dict[str, Any]:
    self.project_id = project_id
    self.task_id = self.request.id

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(
            EventBroadcaster.task_started(
                task_id=self.request.id,
                task_name="process_video",
                project_id=project_id,
                metadata={"video_path": video_path},
            )
        )
    finally:
        loop.close()

    for frame in range(100):
        self.update_progress(frame + 1, 100, f"Processing frame {frame + 1}")
    return {"status": "success", "video_path": video_path}


@celery_app.task(base=ProgressTask, bind=True)
def export_video(self: Any, project_id: str, video_path: str) -> None:
    self.project_id = project_id
    self.task_id = self.request.id
    SyncEventBroadcaster.task_started(self.request.id, "export_video", project_id)
    self.update_progress(1, 2)
    raise ValueError(f"cannot export {video_path}")


@celery_app.task(base=ProgressTask, bind=True)
def count(self: Any, project_id: str, steps: int = 100) -> int:
    """Nothing set by hand: the project is found in the argument."""
    for step in range(steps):
        self.update_progress(step + 1, steps)
    return steps
