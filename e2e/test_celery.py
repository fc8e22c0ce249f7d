"""Celery tasks whose code knows nothing of the service, in every pool: the exact events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_lab import Bridge, CeleryRedis, Told, Worker, check
from conftest import Page, wait_until

STARTED, COMPLETED = ("started", 0), ("completed", 0)
POOLS = ["prefork", "threads", "solo", "gevent"]


@pytest.fixture(scope="module", params=POOLS)
def pool(request: pytest.FixtureRequest, celery_redis: CeleryRedis, logs: Path) -> Iterator[str]:
    worker = Worker(request.param, 2, celery_redis.url, logs / f"worker-{request.param}.log", "-E")
    worker.wait()
    yield str(request.param)
    worker.stop()


def test_a_task_that_succeeds(project: tuple[str, Page, Page], pool: str, bridge: Bridge) -> None:
    from unmodified.tasks import add, positional

    result = add.delay(1, project_id=project[0])
    start, end = check(project, result, STARTED, COMPLETED)
    assert start["task_name"] == "unmodified.tasks.add"
    assert "result" not in end
    assert bridge.state(project[0]) == {result.id: "task.completed"}
    # Where no argument is called `project_id` in the message, nobody is told.
    result = positional.delay(project[0], 1)
    wait_until(lambda: result.successful(), "the task succeeding")
    assert project[1].nothing_waits()


def test_a_task_that_tells_how_far_it_is(project: tuple[str, Page, Page], pool: str) -> None:
    from unmodified.tasks import shapes, steps

    told = check(project, steps.delay(project_id=project[0]), STARTED, ("progress", 0), COMPLETED)
    assert told[-2]["progress"] == {"current": 5, "total": 5, "percentage": 100}
    assert told[-2]["message"] == "step 5"
    told = check(
        project,
        shapes.delay(project_id=project[0]),
        STARTED,
        ("progress", 0),
        ("progress", 0, "DOWNLOADING"),
        COMPLETED,
    )
    assert [event["progress"]["percentage"] for event in told[1:-1]] == [0, 0, 100]
    assert [event.get("message") for event in told[1:-1]] == [None, "half way", None]


def test_a_task_that_fails(project: tuple[str, Page, Page], pool: str, bridge: Bridge) -> None:
    from unmodified.tasks import fail

    result = fail.delay(project_id=project[0])
    told = check(project, result, STARTED, ("failed", 0, "error"))
    assert told[-1]["error"] == "ValueError: boom"
    assert "traceback" not in told[-1]
    assert bridge.state(project[0]) == {result.id: "task.failed"}


def test_a_task_that_is_tried_again(project: tuple[str, Page, Page], pool: str) -> None:
    from unmodified.tasks import flaky

    told = check(
        project,
        flaky.delay(project_id=project[0]),
        STARTED,
        ("progress", 0, "retrying"),
        ("started", 1),
        ("progress", 1, "retrying"),
        ("started", 2),
        ("completed", 2),
    )
    assert told[1]["message"] == "OSError: try 0"


def test_a_task_that_ignores_its_result(project: tuple[str, Page, Page], pool: str) -> None:
    from unmodified.tasks import without_result

    result = without_result.delay(project_id=project[0])
    check(project, result, STARTED, ("progress", 0), COMPLETED)


def test_two_nodes_tell_once(
    binary: str, logs: Path, celery_redis: CeleryRedis, redis_url: str, pool: str
) -> None:
    from unmodified.tasks import flaky

    nodes = [Bridge(binary, celery_redis.url, logs, REDIS_URL=redis_url) for _ in range(2)]
    name = f"p-{uuid.uuid4()}"
    pages = [node.service.follow(name) for node in nodes]
    results = [flaky.delay(project_id=name) for _ in range(5)]
    for page in pages:
        told = Told().take_ends(page, *(result.id for result in results))
        for result in results:
            kinds = [event[:2] for event in told.sequence(result.id)]
            assert kinds == [(kind, attempt) for attempt in (0, 1) for kind in ("started", "progress")] + [
                ("started", 2),
                ("completed", 2),
            ]
        assert page.nothing_waits()
    for node in nodes:
        node.stop()
