"""What applications' tests are given."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker

import tidings.testing
from tidings import EventBroadcaster, SyncEventBroadcaster


def test_it_captures_both_broadcasters_without_a_redis():
    with tidings.testing.capture() as published:
        assert SyncEventBroadcaster.file_deleted("p1", "a")
        assert asyncio.run(EventBroadcaster().publish({"type": "comment.added", "project_id": "p2"}))
    assert published.types == ["file.deleted", "comment.added"]
    assert [e["file_path"] for e in published.for_project("p1")] == ["a"]
    assert published.of_type("file.*") == published.of_type("file.deleted") == published.events[:1]
    assert published.assert_published("comment.added", project_id="p2") == published.events[1]
    published.assert_not_published("comment.added", project_id="p1")


def test_what_is_missing_is_told_with_what_is_there(tidings_events):
    SyncEventBroadcaster.file_deleted("p1", "a")
    with pytest.raises(
        AssertionError, match=r"no file.uploaded with \{\} was published, but:\n.*file.deleted"
    ):
        tidings_events.assert_published("file.uploaded")
    with pytest.raises(AssertionError, match="was published"):
        tidings_events.assert_not_published("file.*", project_id="p1")
    with pytest.raises(AssertionError, match=r"not 2 file\.deleted"):
        tidings_events.wait_for("file.deleted", 2, timeout_s=0)
    tidings_events.clear()
    assert tidings_events.events == []


def test_the_inner_of_two_captures_takes_all(tidings_events):
    with tidings.testing.capture() as inner:
        SyncEventBroadcaster.file_deleted("p1", "a")
    SyncEventBroadcaster.file_deleted("p1", "b")
    assert [e["file_path"] for e in inner.events + tidings_events.events] == ["a", "b"]


@pytest.fixture
def app(project):
    made = Celery("tested", set_as_current=False, broker="memory://", backend="cache+memory://")
    # The broker in memory is one for all tests of the process.
    made.conf.task_default_queue = project
    tidings.celery.install(made)

    @made.task(name="plain", shared=False)
    def plain(project_id):
        return "ok"

    @made.task(name="based", shared=False, bind=True, base=tidings.ProgressTask)
    def based(self, project_id):
        self.update_progress(1, 2)

    yield made
    tidings.celery.uninstall(made)


def test_it_captures_eager_tasks(app, tidings_events):
    app.conf.task_always_eager = True
    app.tasks["plain"].delay("p1")
    app.tasks["based"].delay("p2")
    assert tidings_events.types == ["task.started", "task.completed", *BASED]
    tidings_events.assert_published("task.completed", project_id="p1", result="ok")


BASED = ["task.started", "task.progress", "task.completed"]


def test_it_captures_celerys_own_worker_in_this_process(app, tidings_events):
    with start_worker(app, perform_ping_check=False, pool="solo"):
        app.tasks["based"].delay("p1")
        tidings_events.wait_for("task.completed")
    assert tidings_events.types == BASED


def test_the_fixture_is_there_wherever_the_package_is_installed(tmp_path):
    (tmp_path / "test_app.py").write_text(
        "from tidings import SyncEventBroadcaster\n"
        "def test_upload(tidings_events):\n"
        "    SyncEventBroadcaster.file_deleted('p1', 'a')\n"
        "    tidings_events.assert_published('file.deleted', project_id='p1')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr
