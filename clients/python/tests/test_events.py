from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest

from tidings import _events

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
SOME_UUID = UUID("123e4567-e89b-12d3-a456-426614174000")


def check(event, **expected):
    assert TIMESTAMP.fullmatch(event.pop("timestamp"))
    assert event == expected


def test_project_events_carry_their_data():
    data = {"id": "p1", "name": "One"}
    check(
        _events.project_created("p1", project_data=data), type="project.created", project_id="p1", data=data
    )
    check(_events.project_updated("p1", data), type="project.updated", project_id="p1", data=data)
    check(_events.project_deleted("p1", data), type="project.deleted", project_id="p1", data=data)
    check(_events.project_deleted("p1"), type="project.deleted", project_id="p1")


@pytest.mark.parametrize(
    ("given", "file"),
    [
        (
            {"name": "a", "path": "v/b.mp4", "size": 3, "asset_type": "video"},
            {"name": "a", "path": "v/b.mp4", "size": 3, "asset_type": "video"},
        ),
        ({"path": "v/b.mp4"}, {"name": "b.mp4", "path": "v/b.mp4"}),
        ({"path": Path("v/b.mp4"), "name": None}, {"name": "b.mp4", "path": "v/b.mp4"}),
        ({"path": "C:\\v\\b.mp4"}, {"name": "b.mp4", "path": "C:\\v\\b.mp4"}),
        ("v/b.mp4", {"name": "b.mp4", "path": "v/b.mp4"}),
    ],
)
def test_an_uploaded_file_has_a_name_and_a_path(given, file):
    check(_events.file_uploaded("p1", given), type="file.uploaded", project_id="p1", file=file)


def test_file_and_workspace_events_have_the_contracts_shape():
    check(_events.file_deleted("p1", "a.txt"), type="file.deleted", project_id="p1", file_path="a.txt")
    check(
        _events.file_changed("p1", Path("a.txt"), "created"),
        type="file.changed",
        project_id="p1",
        file_path="a.txt",
        change_type="created",
    )
    changes = {"added": ["a"], "deleted": []}
    check(
        _events.workspace_changed("w1", changes), type="workspace.changed", workspace_id="w1", changes=changes
    )
    check(
        _events.workspace_changed("w1", changes, project_id="p1"),
        type="workspace.changed",
        workspace_id="w1",
        changes=changes,
        project_id="p1",
    )


def test_task_events_have_the_contracts_shape():
    ids = {"task_id": "t1", "project_id": "p1"}
    check(_events.task_started("t1", "work", "p1"), type="task.started", task_name="work", **ids)
    check(
        _events.task_started("t1", "work", "p1", {"a": 1}),
        type="task.started",
        task_name="work",
        metadata={"a": 1},
        **ids,
    )
    check(
        _events.task_progress("t1", "p1", 57, 100, "at 57"),
        type="task.progress",
        progress={"current": 57, "total": 100, "percentage": 57},
        message="at 57",
        **ids,
    )
    check(_events.task_completed("t1", "p1", [1]), type="task.completed", result=[1], **ids)
    check(_events.task_failed("t1", "p1", "boom"), type="task.failed", error="boom", **ids)
    check(
        _events.task_failed("t1", "p1", ValueError(), "Traceback"),
        type="task.failed",
        error="ValueError",
        traceback="Traceback",
        **ids,
    )


def test_process_events_have_the_contracts_shape():
    ids = {"project_id": "p1", "process_id": "x1"}
    check(_events.process_started("p1", "x1", "go"), type="process.started", message="go", **ids)
    check(_events.process_progress("p1", "x1", 40.5), type="process.progress", progress=40.5, **ids)
    check(_events.process_progress("p1", "x1", 140), type="process.progress", progress=100, **ids)
    check(
        _events.process_completed("p1", "x1", outcome="failed", error="disk full"),
        type="process.completed",
        outcome="failed",
        error="disk full",
        **ids,
    )


def test_an_own_event_passes_as_it_is_and_gets_a_timestamp():
    given = {"type": "comment.added", "project_id": "p1", "text": "hello"}
    check(_events.publish(given), **given)
    assert "timestamp" not in given
    assert (
        _events.publish({**given, "timestamp": "2026-01-01T00:00:00"})["timestamp"] == "2026-01-01T00:00:00"
    )


@pytest.mark.parametrize(
    ("current", "total", "percentage"),
    [
        (0, 0, 0),
        (5, 0, 0),
        (-1, 10, 0),
        (1, 3, 33.33),
        (57, 100, 57),
        (11, 10, 100),
        (0.5, 2.0, 25),
        (10**30, 2 * 10**30, 50),
        (Decimal(1), Decimal(4), 25),
    ],
)
def test_percentage_stays_within_0_and_100(current, total, percentage):
    assert _events.percentage(current, total) == percentage


def test_ids_may_be_uuids_and_numbers():
    event = _events.task_completed(SOME_UUID, 7)
    assert (event["task_id"], event["project_id"]) == (str(SOME_UUID), "7")


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: _events.file_deleted("", "a"), ValueError, "project_id"),
        (lambda: _events.file_deleted(None, "a"), TypeError, "project_id"),
        (lambda: _events.file_deleted("p", ""), ValueError, "file_path"),
        (lambda: _events.file_deleted("p", 3), TypeError, "file_path"),
        (lambda: _events.file_changed("p", "a", "renamed"), ValueError, "change_type"),
        (lambda: _events.file_uploaded("p", {"name": "a"}), ValueError, "path"),
        (lambda: _events.file_uploaded("p", 3), TypeError, "file_info"),
        (lambda: _events.workspace_changed("w", ["a"]), TypeError, "change_summary"),
        (lambda: _events.task_started("", "n", "p"), ValueError, "task_id"),
        (lambda: _events.task_started("t", "", "p"), ValueError, "task_name"),
        (lambda: _events.task_progress("t", "p", "1", 2), TypeError, "current"),
        (lambda: _events.task_progress("t", "p", 1, float("nan")), ValueError, "total"),
        (lambda: _events.process_progress("p", "x", "half"), TypeError, "progress"),
        (lambda: _events.process_progress("p", "x", True), TypeError, "progress"),
        (lambda: _events.process_progress("p", "", 1), ValueError, "process_id"),
        (lambda: _events.process_completed("p", "x", outcome="maybe"), ValueError, "outcome"),
        (lambda: _events.publish("x"), TypeError, "event"),
        (lambda: _events.publish({"project_id": "p"}), TypeError, "type"),
        (lambda: _events.publish({"type": "Nope"}), ValueError, "type"),
    ],
)
def test_a_wrong_argument_is_named_at_once(call, error, names):
    with pytest.raises(error, match=names):
        call()
