"""Results of Celery tasks that are not written as plain JSON: their tasks are told all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import celery
import pytest

from celery_lab import CeleryRedis, Worker, check
from conftest import Page

STARTED, COMPLETED = ("started", 0), ("completed", 0)
SETTINGS = {"pickled": {"RESULT_SERIALIZER": "pickle"}}
if celery.VERSION >= (5, 7):
    SETTINGS["compressed"] = {"RESULT_COMPRESSION": "gzip"}


@pytest.fixture(scope="module", params=list(SETTINGS))
def written(request: pytest.FixtureRequest, celery_redis: CeleryRedis, logs: Path) -> Iterator[str]:
    """A worker that writes results so."""
    settings, log = SETTINGS[request.param], logs / f"worker-{request.param}.log"
    worker = Worker("prefork", 2, celery_redis.url, log, "-E", app="unmodified.rare", **settings)
    worker.wait()
    yield str(request.param)
    worker.stop()


def test_what_becomes_of_tasks_is_told_however_it_is_written(
    project: tuple[str, Page, Page], written: str
) -> None:
    from unmodified.tasks import add, fail, flaky

    check(project, add.delay(1, project_id=project[0]), STARTED, COMPLETED)
    told = check(project, fail.delay(project_id=project[0]), STARTED, ("failed", 0, "error"))
    # What is pickled is never unpickled.
    assert (told[-1]["error"] == "ValueError: boom") == (written == "compressed")
    check(
        project,
        flaky.delay(project_id=project[0]),
        STARTED,
        ("progress", 0, "retrying"),
        ("started", 1),
        ("progress", 1, "retrying"),
        ("started", 2),
        ("completed", 2),
    )
