"""What the documents show is run."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

import tidings.celery
from test_fastapi import call
from tidings._tasks.run import installed

DOCUMENT = Path(__file__).parents[3] / "docs/progress-bars.md"
TASKS = ["task.started", "task.completed"]


def blocks(document):
    return re.findall(r"^```python\n(.*?)^```$", document.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def run(block):
    names = {"__name__": "proj"}
    exec(compile(block, str(DOCUMENT), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def nothing_stays_installed():
    before = list(installed)
    yield
    for app in list(installed):
        if app not in before:
            tidings.celery.uninstall(app)


@pytest.mark.parametrize("block", [b for b in blocks(DOCUMENT) if "def process_video" in b])
def test_each_task_of_the_page_shows_what_the_page_says(block, tidings_events):
    names = run(block)
    task, written = names["process_video"], []
    task.update_state = lambda **said: written.append(said["meta"]["current"])
    task.apply(("p1", "a.mp4"), throw=True)
    if "install(app)" not in block:
        assert written == list(range(1, 101))
        assert tidings_events.events == []
        return
    assert tidings_events.types[:: len(tidings_events.types) - 1] == TASKS
    shown = [event["progress"]["percentage"] for event in tidings_events.of_type("task.progress")]
    assert shown == sorted(shown)
    assert (shown[-1] == 100) if "progress(self" in block or "Recorder" in block else not shown


def test_the_application_of_the_page_publishes_registers_and_keeps_sessions(
    server, tidings_events, monkeypatch
):
    monkeypatch.setenv("TIDINGS_URL", "http://127.0.0.1:1")
    names = run(next(block for block in blocks(DOCUMENT) if "FastAPI(" in block))
    sent = []
    names["tasks"].send_task = lambda name, args, task_id: sent.append((name, task_id))
    cookie, _ = asyncio.run(call(names["api"], "/login"))
    assert cookie["httponly"]
    _, task_id = asyncio.run(call(names["api"], "/projects/p1/videos"))
    assert sent == [("proj.encode", task_id)]
    tidings_events.assert_published("file.uploaded", project_id="p1")
    cookie, _ = asyncio.run(call(names["api"], "/logout", cookie=cookie.value))
    assert cookie.value == ""


def test_the_test_of_the_page_passes():
    (block,) = (block for block in blocks(DOCUMENT) if "tidings.testing" in block)
    run(block)["test_an_upload_is_announced"]()
