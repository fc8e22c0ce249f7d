"""From a FastAPI application to a WebSocket client."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import Service, get_json, post, wait_until


def test_what_a_request_changes_reaches_the_page(service: Service, web: str) -> None:
    page = service.follow("p1")
    post(f"{web}/projects/p1")
    post(f"{web}/projects/p1/files/a.mp4")
    created, uploaded, changed, deleted = (page.next() for _ in range(4))
    assert (created["type"], created["stream"], created["data"]["name"]) == ("project.created", "*", "New")
    assert uploaded["file"] == {"name": "a.mp4", "path": "uploads/a.mp4", "size": 7, "asset_type": "video"}
    assert (changed["file_path"], changed["change_type"]) == ("uploads/a.mp4", "modified")
    assert (deleted["type"], deleted["offset"]) == ("file.deleted", 3)
    assert page.nothing_waits()


def test_who_is_not_there_yet_finds_it_in_the_history(service: Service, web: str) -> None:
    post(f"{web}/projects/p2/files/b.mp4")
    history = wait_until(lambda: complete_history(service, "p2"), "three events in the history")
    assert [event["type"] for event in history["events"]] == ["file.uploaded", "file.changed", "file.deleted"]


def test_what_happens_while_no_service_runs_is_there_afterwards(
    web: str, request: pytest.FixtureRequest
) -> None:
    post(f"{web}/projects/p3/files/c.mp4")
    service = request.getfixturevalue("service")
    history = wait_until(lambda: complete_history(service, "p3"), "three events in the history")
    assert [event["offset"] for event in history["events"]] == [1, 2, 3]


def complete_history(service: Service, project_id: str) -> Any:
    history = get_json(f"{service.http}/api/projects/{project_id}/events")
    return history if len(history["events"]) == 3 else None
