"""From a real Celery task, through a real Redis, to a WebSocket client."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import Service


def check_hundred_steps(events: list[dict[str, Any]], task_id: str) -> None:
    assert [event["offset"] for event in events] == list(range(1, 103))
    assert {event["task_id"] for event in events} == {task_id}
    assert [event["type"] for event in events] == ["task.started", *["task.progress"] * 100, "task.completed"]
    progress = [event["progress"] for event in events[1:-1]]
    assert progress == [{"current": step, "total": 100, "percentage": step} for step in range(1, 101)]


def test_a_task_of_100_steps_reaches_its_project_and_no_other(service: Service, worker: str) -> None:
    from existing.tasks import count

    ours, others = service.follow(f"{worker}-ours"), service.follow(f"{worker}-others")
    task_id = count.delay(f"{worker}-ours").id
    events = ours.until("task.completed", "task.failed")
    check_hundred_steps(events, task_id)
    assert events[0]["task_name"] == "existing.tasks.count"
    assert events[-1]["result"] == 100
    assert ours.nothing_waits()
    assert others.nothing_waits()


def test_existing_code_works_with_only_the_import_changed(service: Service, worker: str) -> None:
    from existing.tasks import process_video

    page = service.follow(f"{worker}-video")
    task_id = process_video.delay(f"{worker}-video", "movies/a.mp4").id
    events = page.until("task.completed", "task.failed")
    # The start that the task sends by hand and the one that is sent for it are one.
    check_hundred_steps(events, task_id)
    assert events[50]["message"] == "Processing frame 50"
    assert events[-1]["result"] == {"status": "success", "video_path": "movies/a.mp4"}
    assert page.nothing_waits()


def test_a_failing_task_says_why(service: Service, worker: str) -> None:
    from existing.tasks import export_video

    page = service.follow(f"{worker}-failing")
    export_video.delay(f"{worker}-failing", "movies/b.mp4")
    events = page.until("task.completed", "task.failed")
    assert [event["type"] for event in events] == ["task.started", "task.progress", "task.failed"]
    assert events[-1]["error"] == "cannot export movies/b.mp4"
    assert "ValueError: cannot export movies/b.mp4" in events[-1]["traceback"]
    assert page.nothing_waits()


@pytest.mark.parametrize("worker", ["threads"], indirect=True)
def test_tasks_of_two_projects_at_once_do_not_mix(service: Service, worker: str) -> None:
    from existing.tasks import process_video

    pages = {name: service.follow(name) for name in ("left", "right")}
    tasks = {name: process_video.delay(name, f"{name}.mp4").id for name in pages}
    for name, page in pages.items():
        check_hundred_steps(page.until("task.completed", "task.failed"), tasks[name])
        assert page.nothing_waits()
