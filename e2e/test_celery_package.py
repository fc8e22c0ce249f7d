"""The bridge and the Python package at once: each start and each end is told once, whoever says it first."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import celery
import pytest

from celery_lab import Bridge, CeleryRedis, Told, Worker
from conftest import Page

STARTED, COMPLETED = ("started", 0), ("completed", 0)


@pytest.fixture(scope="module")
def both(binary: str, celery_redis: CeleryRedis, redis_url: str, logs: Path) -> Iterator[Bridge]:
    """A service that gets what the package publishes, and listens to Celery."""
    bridge = Bridge(binary, celery_redis.url, logs, REDIS_URL=redis_url)
    yield bridge
    bridge.stop()


@pytest.fixture(scope="module", autouse=True)
def worker(celery_redis: CeleryRedis, redis_url: str, logs: Path) -> Iterator[Worker]:
    log = logs / "worker-installed.log"
    worker = Worker(
        "prefork", 2, celery_redis.url, log, "-E", app="unmodified.installed", REDIS_URL=redis_url
    ).wait()
    yield worker
    worker.stop()


def ends(told: Told, task_id: str) -> list[tuple[object, ...]]:
    return [event for event in told.sequence(task_id) if event[0] != "progress"]


def test_each_start_and_each_end_is_told_once(both: Bridge) -> None:
    from unmodified.installed import told_twice
    from unmodified.tasks import fail, flaky

    page: Page = both.service.follow(name := f"p-{uuid.uuid4()}")
    by_position = [told_twice.delay(name, 20) for _ in range(10)]
    failing, trying = fail.delay(project_id=name), flaky.delay(project_id=name)
    told = Told().take_ends(page, *(result.id for result in (*by_position, failing, trying)))
    # What the slower of the two says of ends comes within this.
    later = told_twice.delay(name, 1)
    told.take_ends(page, later.id)
    for result in by_position:
        assert ends(told, result.id) == [STARTED, COMPLETED]
    assert ends(told, failing.id) == [STARTED, ("failed", 0, "error")]
    assert ends(told, trying.id) == [STARTED, ("started", 1), ("started", 2), ("completed", 2)]
    state = both.state(name)
    assert set(state.values()) == {"task.completed", "task.failed"}
    both.service.close()


def test_a_chain_has_its_length_from_the_start_and_its_project_in_every_step(both: Bridge) -> None:
    from unmodified.installed import told_twice
    from unmodified.tasks import add

    page = both.service.follow(name := f"p-{uuid.uuid4()}")
    chain = celery.chain(told_twice.si(name, 2), add.si(project_id=name), told_twice.si(name, 2))
    last = chain.apply_async()
    root = last.parent.parent.id
    told = Told().take_ends(page, root, root, last.id)
    process = [event for event in told.about(root) if event["type"].startswith("process.")]
    assert process[0]["message"] == "step 1 of 3"
    assert process[-1]["outcome"] == "success"
    both.service.close()
