"""Tasks of one project that send tasks of another: each project's pages are told of their own alone."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import celery
import pytest

from celery_lab import Bridge, CeleryRedis, Told, Worker
from conftest import wait_until

STARTED, COMPLETED = ("started", 0), ("completed", 0)
# Which of the two ways says first that a task has begun is chance: one of so many is told by its event.
CHILDREN = 30


@pytest.fixture(scope="module")
def worker(celery_redis: CeleryRedis, logs: Path) -> Iterator[Worker]:
    log = logs / "worker-projects.log"
    worker = Worker("prefork", 4, celery_redis.url, log, "-E", app="unmodified.rare")
    yield worker.wait()
    worker.stop()


@pytest.fixture(params=["false", "true"], ids=["without_hints", "with_hints"])
def guarded(
    request: pytest.FixtureRequest, binary: str, celery_redis: CeleryRedis, logs: Path
) -> Iterator[Bridge]:
    """A service that takes Python's text of arguments for a hint or not; with sessions it never does."""
    bridge = Bridge(binary, celery_redis.url, logs, TIDINGS_CELERY_REPR_HINTS=request.param)
    yield bridge
    bridge.stop()


def test_what_a_task_sends_for_another_project_is_told_there_alone(guarded: Bridge, worker: Worker) -> None:
    from unmodified.rare import send_on

    sender, receiver = f"p-{uuid.uuid4()}", f"p-{uuid.uuid4()}"
    pages = [guarded.service.follow(name) for name in (sender, receiver)]
    result = send_on.delay([receiver] * CHILDREN, project_id=sender)
    # Not `get`, which reads what was published for all tasks of this process, also those of other tests.
    wait_until(lambda: result.successful(), "the tasks being sent")
    children = result.result
    told = Told().take_ends(pages[1], *children)
    assert [told.sequence(child) for child in children] == [[STARTED, COMPLETED]] * CHILDREN
    # What ends last has come after everything that is wrong.
    last = send_on.delay([], project_id=sender)
    told = Told().take_ends(pages[0], result.id, last.id)
    assert {event.get("task_id", event.get("process_id")) for event in told.events} == {result.id, last.id}
    assert pages[0].nothing_waits()


def test_a_group_of_several_projects_tells_each_of_its_own_tasks(guarded: Bridge, worker: Worker) -> None:
    from unmodified.tasks import add

    names = [f"p-{uuid.uuid4()}" for _ in range(CHILDREN)]
    pages = [guarded.service.follow(name) for name in names]
    group = celery.group(add.s(1, project_id=name) for name in names).apply_async()
    for page, member in zip(pages, group, strict=True):
        told = Told().take_ends(page, member.id)
        assert told.sequence(member.id) == [STARTED, COMPLETED]
        assert {event.get("task_id") for event in told.events} == {member.id}
    for page in pages:
        assert page.nothing_waits()
