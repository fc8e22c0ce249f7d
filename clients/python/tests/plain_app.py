"""An application whose tasks do not mention us: two lines in its module are all that is ours."""

import os
import signal
import time

from celery import Celery, shared_task

import tidings.celery
from tidings.celery import ProgressRecorder, progress

app = Celery("plain", broker=os.environ["TEST_BROKER"], backend=os.environ["TEST_BROKER"])
app.conf.update(result_extended=True, task_track_started=True)
tidings.celery.install(app)


@app.task
def add(project_id, a=1, b=1):
    return a + b


@app.task
def then(value):
    return value


@app.task
def gather(values):
    return sum(values)


@app.task
def failing(project_id):
    raise ValueError("boom")


@app.task(bind=True, max_retries=3)
def flaky(self, project_id, failures):
    if self.request.retries < failures:
        raise self.retry(exc=OSError("not yet"), countdown=0)
    return self.request.retries


@app.task
def parent(project_id, queue):
    then.apply_async((1,), queue=queue)
    return "called"


@app.task(bind=True)
def replaced(self, project_id, queue):
    raise self.replace(add.s(project_id).set(queue=queue))


@app.task
def kill_self(value):
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def asleep(value):
    time.sleep(20)


@app.task(base=tidings.ProgressTask, bind=True)
def both(self, project_id):
    self.update_progress(1, 1)


@app.task(bind=True)
def bar(self, project_id, count):
    with progress(self, total=count) as shown:
        for step in range(count):
            shown.advance(message=f"step {step + 1}")


@app.task(bind=True)
def items(self, project_id, count, stop_at=None):
    for item in progress(self, range(count)):
        if item == stop_at:
            break


@app.task(bind=True)
def recorded(self, project_id, count):
    recorder = ProgressRecorder(self)
    for step in range(count):
        state, meta = recorder.set_progress(step + 1, count + 1, f"On iteration {step}")
    return [state, meta]


@shared_task
def shared(project_id):
    return project_id
