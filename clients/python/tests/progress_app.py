"""Tasks that do what tasks do to a base class."""

import os
import signal
import sys
import time
from datetime import datetime, timezone

from celery.exceptions import Ignore, Reject

from existing_app import celery_app as app
from tidings import ProgressTask, SyncEventBroadcaster


class Overriding(ProgressTask):
    """Overrides every hook and calls super() in none; declares the attributes as older base classes did."""

    project_id = None
    task_id = None

    def before_start(self, task_id, args, kwargs):
        pass

    def on_success(self, retval, task_id, args, kwargs):
        raise RuntimeError("a hook of the user's")

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        pass

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)


@app.task(bind=True, base=ProgressTask)
def steps(self, project_id, count, pause_s=0.0):
    for step in range(count):
        self.update_progress(step + 1, count, metadata={"project": project_id})
        time.sleep(pause_s)
    return count


@app.task(bind=True, base=ProgressTask, name="set_in_body")
def set_in_body(self, thing):
    self.project_id = thing["project"]
    self.update_progress(1, 1)


@app.task(bind=True, base=ProgressTask)
def own_task_id(self, project_id, name):
    self.update_progress(1, 2)
    self.task_id = name
    self.update_progress(2, 2)


@app.task(bind=True, base=ProgressTask)
def failing(self, project_id, text="boom"):
    raise ValueError(text)


@app.task(bind=True, base=ProgressTask, max_retries=3)
def flaky(self, project_id, failures):
    if self.request.retries < failures:
        raise self.retry(exc=OSError("not yet"), countdown=0)
    return self.request.retries


@app.task(bind=True, base=ProgressTask, autoretry_for=(OSError,), default_retry_delay=0, max_retries=1)
def never(self, project_id):
    raise OSError("never")


@app.task(bind=True, base=ProgressTask)
def asleep(self, project_id, marker=None):
    if marker:
        with open(marker, "a") as file:
            file.write(f"{os.getpid()}\n")
    self.update_progress(1, 2)
    time.sleep(20)


@app.task(bind=True, base=ProgressTask)
def busy(self, project_id):
    while True:
        self.update_progress(1, 2)


@app.task(bind=True, base=ProgressTask)
def kill_self(self, project_id):
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True, base=ProgressTask)
def exits(self, project_id):
    sys.exit(3)


@app.task(bind=True, base=ProgressTask)
def ignored(self, project_id):
    raise Ignore


@app.task(bind=True, base=ProgressTask)
def rejected(self, project_id, requeue):
    raise Reject("not for me", requeue=requeue)


@app.task(bind=True, base=ProgressTask, acks_late=True)
def requeued_once(self, project_id, marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        raise Reject("again", requeue=True)
    return "done"


@app.task(bind=True, base=ProgressTask)
def replaced(self, project_id):
    raise self.replace(steps.s(project_id, 1).set(queue=self.request.delivery_info["routing_key"]))


@app.task(bind=True, base=Overriding)
def overridden(self, project_id, fail=False):
    self.update_progress(1, 1)
    if fail:
        raise ValueError("boom")


@app.task(bind=True, base=ProgressTask)
def hostile(self, project_id, what):
    if what == "progress":
        self.update_progress("one", None)
        self.update_progress(1, 0, message=object(), metadata={"x": float("nan"), (1, 2): {self}})
        self.update_progress(2, float("inf"))
        self.project_id = {"not": "an id"}
        return datetime(2026, 1, 2, tzinfo=timezone.utc)
    return "x" * 5_000_000


@app.task(bind=True, base=ProgressTask)
def hand_sent_failure(self, project_id):
    SyncEventBroadcaster.task_failed(self.request.id, project_id, "sent by hand")
    return "all the same"


@app.task(bind=True, base=ProgressTask)
def no_project(self):
    for _ in range(10):
        self.update_progress(1, 2)
    return "ok"


@app.task(bind=True, base=ProgressTask)
def calls_another(self, project_id):
    steps("inner", 2)
    self.update_progress(1, 1)
