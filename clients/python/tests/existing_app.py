"""An application as it was written before this package: nothing in it but the import is ours."""

import asyncio
import os

from celery import Celery

from tidings import EventBroadcaster, ProgressTask, SyncEventBroadcaster

celery_app = Celery("existing", broker=os.environ["TEST_BROKER"], backend=os.environ["TEST_BROKER"])
celery_app.conf.task_track_started = True


@celery_app.task(bind=True, base=ProgressTask)
def process_video(self, project_id, video_path):
    """Process a video file with progress updates."""
    self.project_id = project_id
    self.task_id = self.request.id

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(
        EventBroadcaster.task_started(
            task_id=self.request.id,
            task_name="process_video",
            project_id=project_id,
            metadata={"video_path": video_path},
        )
    )
    loop.close()

    SyncEventBroadcaster.task_started(self.request.id, "process_video", project_id)

    total_frames = 100
    for frame in range(total_frames):
        self.update_progress(current=frame + 1, total=total_frames, message=f"Processing frame {frame + 1}")

    return {"status": "completed", "frames": total_frames}
