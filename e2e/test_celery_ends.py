"""How tasks of a prefork pool end, whatever happens to them: the exact events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import celery
import pytest

from celery_lab import Bridge, CeleryRedis, Told, Worker, check
from conftest import Page, post, wait_until

STARTED, COMPLETED = ("started", 0), ("completed", 0)


@pytest.fixture(scope="module", autouse=True)
def worker(celery_redis: CeleryRedis, logs: Path) -> Iterator[Worker]:
    worker = Worker("prefork", 2, celery_redis.url, logs / "worker-ends.log").wait()
    yield worker
    worker.stop()


def test_workers_are_told_to_send_events(bridge: Bridge) -> None:
    from unmodified.tasks import without_result

    # It has started without `-E`, and the end of such a task is in an event alone.
    page = bridge.service.follow(name := f"p-{uuid.uuid4()}")

    def is_told() -> bool:
        result = without_result.delay(project_id=name)
        return ("completed", 0) in Told().take_ends(page, result.id).sequence(result.id)

    wait_until(is_told, "a task ending by its event")
    bridge.service.close()


def test_a_task_that_is_revoked_before_it_begins(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import add, app

    result = add.apply_async(kwargs={"project_id": project[0]}, countdown=60)
    wait_until(lambda: app.control.inspect().query_task(result.id) or {}, "the worker having it")
    result.revoke()
    check(project, result, STARTED, ("failed", 0, "revoked"))


def test_a_task_that_is_revoked_while_it_runs(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import sleep

    result = sleep.delay(project_id=project[0], seconds=60)
    told = Told().take_until(project[1], lambda told: bool(told.events))
    result.revoke(terminate=True)
    told.take_ends(project[1], result.id)
    assert told.sequence(result.id) == [STARTED, ("failed", 0, "revoked")]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("soft_limit", "time_limit"),
        ("hard_limit", "time_limit"),
        ("die", "worker_lost"),
        ("fail_by_hand", "error"),
    ],
)
def test_a_task_that_is_ended(project: tuple[str, Page, Page], task: str, reason: str) -> None:
    from unmodified import tasks

    check(project, getattr(tasks, task).delay(project_id=project[0]), STARTED, ("failed", 0, reason))


def test_a_task_that_nobody_knows_any_more_is_lost(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import ignore

    check(project, ignore.delay(project_id=project[0]), STARTED, ("failed", 0, "lost"))


def test_a_task_that_rejects_itself(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import reject

    # Celery 5.4 says nothing of it.
    reason = "rejected" if celery.VERSION >= (5, 5) else "lost"
    check(project, reject.delay(project_id=project[0]), STARTED, ("failed", 0, reason))


def test_a_task_that_expires(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import add

    result = add.apply_async(kwargs={"project_id": project[0]}, expires=-1)
    check(project, result, STARTED, ("failed", 0, "expired"))


def test_a_task_that_no_worker_has_is_known_by_its_registration(
    project: tuple[str, Page, Page], bridge: Bridge
) -> None:
    from unmodified.tasks import app

    task_id = str(uuid.uuid4())
    post(
        f"{bridge.service.http}/api/tasks/{task_id}",
        {"project_id": project[0], "task_name": "unmodified.gone"},
    )
    result = app.send_task("unmodified.gone", kwargs={"project_id": project[0]}, task_id=task_id)
    told = check(project, result, STARTED, ("failed", 0, "error"))
    assert told[0]["task_name"] == "unmodified.gone"
    assert "NotRegistered" in told[-1]["error"]


@pytest.mark.parametrize("kind", ["nan", "infinity", "surrogate", "huge", "deep", "large"])
def test_a_result_that_no_parser_takes(project: tuple[str, Page, Page], kind: str) -> None:
    from unmodified.tasks import hostile

    check(project, hostile.delay(kind, project_id=project[0]), STARTED, COMPLETED)


def test_a_chain_is_a_process(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import add

    steps = [add.si(step, project_id=project[0]) for step in range(3)]
    last = celery.chain(*steps).apply_async()
    first = last.parent.parent.id
    told = Told().take_ends(project[1], first, first, last.id)
    for task_id in (first, last.parent.id, last.id):
        assert told.sequence(task_id) == [STARTED, COMPLETED]
    process = told.sequence(first, "process")
    assert (process[0], process[-1]) == (("started",), ("completed", "success"))


def test_a_chain_that_breaks(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import add, fail

    first, broken, never = (
        add.si(1, project_id=project[0]),
        fail.si(project_id=project[0]),
        add.si(2, project_id=project[0]),
    )
    last = celery.chain(first, broken, never).apply_async()
    root = last.parent.parent.id
    told = Told().take_ends(project[1], root, root, last.parent.id, last.id)
    assert told.sequence(last.parent.id) == [STARTED, ("failed", 0, "error")]
    assert told.sequence(last.id) == [STARTED, ("failed", 0, "not_run")]
    assert told.sequence(root, "process")[-1] == ("completed", "failed")


def test_a_saved_group_is_a_process(project: tuple[str, Page, Page]) -> None:
    from unmodified.tasks import steps

    group = celery.group(steps.s(project_id=project[0]) for _ in range(4)).apply_async()
    group.save()
    told = Told().take_ends(project[1], group.id, *(member.id for member in group))
    process = told.sequence(group.id, "process")
    assert (process[0], process[-1]) == (("started",), ("completed", "success"))


@pytest.mark.parametrize("breaks", [False, True])
def test_a_chord(project: tuple[str, Page, Page], breaks: bool) -> None:
    from unmodified.tasks import fail, gather, steps

    header = [steps.s(project_id=project[0]) for _ in range(3)]
    if breaks:
        header.append(fail.s(project_id=project[0]))
    body = celery.chord(header)(gather.s(project_id=project[0]))
    told = Told().take_ends(project[1], body.parent.id, *(member.id for member in body.parent))
    outcome = "failed" if breaks else "success"
    process = told.sequence(body.parent.id, "process")
    assert (process[0], process[-1]) == (("started",), ("completed", outcome))
    if not breaks:
        told.take_ends(project[1], body.id)
        assert told.sequence(body.id) == [STARTED, COMPLETED]


def test_what_has_no_project_is_told_to_the_operator(bridge: Bridge) -> None:
    from unmodified.tasks import app

    app.send_task("unmodified.nowhere")

    def is_told() -> bool:
        return any("[[celery.rules]]" in known["reason"] for known in bridge.report()["without_project"])

    wait_until(is_told, "the task being counted")
