"""What happens to Celery tasks rarely: the exact events."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import celery
import pytest

from celery_lab import Bridge, CeleryRedis, Told, Worker, check
from conftest import Page, wait_until

STARTED, COMPLETED = ("started", 0), ("completed", 0)


@pytest.fixture(scope="module", autouse=True)
def worker(celery_redis: CeleryRedis, logs: Path) -> Iterator[Worker]:
    log = logs / "worker-rare.log"
    worker = Worker("prefork", 2, celery_redis.url, log, "-E", app="unmodified.rare")
    yield worker.wait()
    worker.stop()


@pytest.fixture(scope="module")
def talkative(binary: str, celery_redis: CeleryRedis, logs: Path) -> Iterator[Bridge]:
    """A service that lets browsers have everything."""
    words = ("RESULTS", "KWARGS", "TRACEBACKS")
    settings = {f"TIDINGS_CELERY_{word}": "true" for word in words}
    bridge = Bridge(binary, celery_redis.url, logs, **settings)
    yield bridge
    bridge.stop()


def test_a_task_whose_process_died_and_that_is_put_back_has_one_start(
    project: tuple[str, Page, Page],
) -> None:
    from unmodified.rare import die_once

    check(project, die_once.delay(project_id=project[0]), STARTED, COMPLETED)


def test_a_task_that_is_tried_in_vain_fails_with_its_last_attempt(project: tuple[str, Page, Page]) -> None:
    from unmodified.rare import give_up

    told = check(
        project,
        give_up.delay(project_id=project[0]),
        STARTED,
        ("progress", 0, "retrying"),
        ("started", 1),
        ("failed", 1, "error"),
    )
    assert told[-1]["error"] == "OSError: never"


def test_a_task_that_another_one_replaces_is_one_task(project: tuple[str, Page, Page]) -> None:
    from unmodified.rare import replaced

    check(project, replaced.delay(project_id=project[0]), STARTED, COMPLETED)


def test_a_task_that_is_revoked_while_it_waits_for_a_process(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import add, app, sleep

    busy = [sleep.delay(project_id=f"{project[0]}-busy", seconds=2) for _ in range(2)]
    wait_until(lambda: all(result.state == "STARTED" for result in busy), "both processes being busy")
    result = add.delay(1, project_id=project[0])
    wait_until(lambda: app.control.inspect().query_task(result.id) or {}, "the worker having it")
    result.revoke()
    check(project, result, STARTED, ("failed", 0, "revoked"))


def test_a_group_that_is_not_saved_is_its_tasks_and_no_process(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import add

    group = celery.group(add.s(1, project_id=project[0]) for _ in range(3)).apply_async()
    told = Told().take_ends(project[1], *(member.id for member in group))
    for member in group:
        assert told.sequence(member.id) == [STARTED, COMPLETED]
    assert told.about(group.id) == []
    assert project[1].nothing_waits()


def test_updates_that_no_parser_takes_are_updates_all_the_same(project: tuple[str, Page, Page]) -> None:
    from unmodified.rare import strange_updates

    told = check(project, strange_updates.delay(project_id=project[0]), STARTED, ("progress", 0), COMPLETED)
    assert len(told) == 6
    assert told[1]["progress"] == {"current": 0, "total": 0, "percentage": 0}
    assert told[2]["message"] == "\ufffd"
    assert told[3]["progress"] == {"current": 2, "total": 2, "percentage": 100}


def test_an_error_without_end_is_cut(project: tuple[str, Page, Page]) -> None:
    from unmodified.rare import long_error

    told = check(project, long_error.delay(project_id=project[0]), STARTED, ("failed", 0, "error"))
    assert told[-1]["error"].startswith("ValueError: é")
    assert len(told[-1]["error"].encode()) <= 4096


def test_events_have_the_ids_that_the_package_gives_them(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import add

    # Any text may be the id of a task.
    result = add.apply_async(kwargs={"project_id": project[0]}, task_id=f"ünï */[x]: {uuid.uuid4()}")
    told = check(project, result, STARTED, COMPLETED)
    assert [event["id"] for event in told] == [
        f"celery:{result.id}:0:task.started",
        f"celery:{result.id}:0:task.completed",
    ]


def test_a_project_may_be_a_uuid(bridge: Bridge) -> None:
    from unmodified.tasks import add

    page = bridge.service.follow(str(name := uuid.uuid4()))
    result = add.delay(1, project_id=name)
    assert Told().take_ends(page, result.id).sequence(result.id) == [STARTED, COMPLETED]
    bridge.service.close()


def test_a_page_that_comes_in_the_middle_sees_how_far_a_task_is(
    project: tuple[str, Page, Page], bridge: Bridge
) -> None:
    from unmodified.tasks import steps

    result = steps.delay(project_id=project[0], count=4, pause_s=1)
    Told().take_until(project[1], lambda told: ("progress", 0) in told.sequence(result.id))
    state = bridge.service.open().subscribe(project[0])["state"]
    (task,) = state["tasks"]
    assert (task["type"], task["task_id"]) == ("task.progress", result.id)
    assert task["started"]["task_name"] == "unmodified.tasks.steps"
    Told().take_ends(project[1], result.id)


@pytest.mark.parametrize("kind", ["nan", "infinity", "surrogate", "huge", "large", "deep"])
def test_a_result_that_no_parser_takes_is_json_where_browsers_get_results(
    talkative: Bridge, kind: str
) -> None:
    from unmodified.rare import deep
    from unmodified.tasks import hostile

    page = talkative.service.follow(name := f"p-{uuid.uuid4()}")
    result = deep.delay(project_id=name) if kind == "deep" else hostile.delay(kind, project_id=name)
    told = Told().take_ends(page, result.id)
    assert told.sequence(result.id) == [STARTED, COMPLETED]
    # Python's own parser takes what is not JSON: what browsers get must have none of that.
    written = json.dumps(told.events, allow_nan=False, ensure_ascii=False).encode()
    assert len(written) < 10_000
    talkative.service.close()
