"""Faults in the middle of 200 running tasks: whatever is cut, killed or restarted, pages are right soon."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from kombu.exceptions import OperationalError

from celery_lab import Bridge, CeleryRedis, Told, Worker
from conftest import Page, wait_until

TASKS = 200
STARTED, COMPLETED = ("started", 0), ("completed", 0)


@pytest.fixture(autouse=True)
def workers(celery_redis: CeleryRedis, logs: Path) -> Iterator[Worker]:
    """Enough threads for all of them to run at once."""
    worker = Worker("threads", TASKS + 10, celery_redis.url, logs / "worker-faults.log", "-E").wait()
    yield worker
    worker.stop()


@pytest.fixture
def kept(binary: str, celery_redis: CeleryRedis, logs: Path, tmp_path: Path) -> Iterator[Bridge]:
    """A service that keeps what it knows over restarts."""
    bridge = Bridge(
        binary, celery_redis.url, logs, TIDINGS_PERSIST="true", TIDINGS_DATA_DIR=str(tmp_path / "data")
    )
    yield bridge
    bridge.stop()


def history(bridge: Bridge, name: str) -> Told:
    """Everything that the project's stream has, as far as it is kept."""
    from conftest import get_json

    told, since = Told(), ""
    while True:
        page = get_json(f"{bridge.service.http}/api/projects/{name}/events?limit=1000{since}")
        told.events += page["events"]
        if len(page["events"]) < 1000:
            return told
        since = f"&since_epoch={page['epoch']}&since_offset={page['events'][-1]['offset']}"


def stuck() -> set[str]:
    """Tasks that the worker says to run: after an outage a thread may hang in the client of Celery."""
    from unmodified.tasks import app

    try:
        active = app.control.inspect(timeout=1).active() or {}
    except (redis.ConnectionError, OperationalError):
        return set()  # a connection from before Redis was restarted
    return {task["id"] for tasks in active.values() for task in tasks}


def check_in_the_middle(bridge: Bridge, fault: Callable[[], float], stuck_max: int = 0) -> None:
    """Runs 200 tasks and the fault, which says when it was over; each has one start and the end it had."""
    from unmodified.tasks import fail, steps

    name = f"p-{uuid.uuid4()}"
    page = bridge.service.follow(name)
    running = [steps.delay(project_id=name, count=20, pause_s=0.3) for _ in range(TASKS)]
    told = Told().take_until(page, lambda told: len({event["task_id"] for event in told.events}) >= TASKS)
    bridge.service.close()
    over_at = fault()
    # Where threads hang, the worker may take nothing new, either.
    more = [] if stuck_max else [fail.delay(project_id=name)]

    def open_tasks() -> set[str]:
        state = bridge.state(name)
        bridge.service.close()
        ended = {task for task, kind in state.items() if kind in ("task.completed", "task.failed")}
        return {result.id for result in (*running, *more)} - ended

    def is_right() -> bool:
        still_open = open_tasks()
        may_be_stuck = len(still_open) <= stuck_max and time.time() > over_at + 20
        return not still_open or (may_be_stuck and still_open <= stuck())

    wait_until(is_right, "every task having ended")
    still_open = open_tasks()
    right_at = time.time()
    ended_at = [result.date_done.timestamp() for result in (*running, *more) if result.date_done]
    since = "the fault" if over_at > max(ended_at) else "the last task's end"
    print(f"report: right {right_at - max(over_at, *ended_at):.1f} s after {since}, {len(still_open)} stuck")
    told = history(bridge, name)
    for result in running:
        ends = [event for event in told.sequence(result.id) if event[0] != "progress"]
        # Where Redis was away, a task may have failed for that, or its worker to say how it ended.
        if result.id in still_open:
            continue
        kind = "completed" if result.successful() else "failed"
        assert [ends[0], ends[-1][:2], len(ends)] == [STARTED, (kind, 0), 2], (result.id, ends)
    for result in more:
        assert told.sequence(result.id) == [STARTED, ("failed", 0, "error")]


def test_the_workers_connections_are_cut(kept: Bridge, celery_redis: CeleryRedis) -> None:
    def cut() -> float:
        with celery_redis.client() as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        return time.time()

    check_in_the_middle(kept, cut)


def test_redis_is_killed_and_comes_back(kept: Bridge, celery_redis: CeleryRedis) -> None:
    def restart() -> float:
        celery_redis.kill()
        wait_until(lambda: not kept.hears(), "the service noticing it")
        celery_redis.start()
        return time.time()

    check_in_the_middle(kept, restart, stuck_max=TASKS // 20)


def test_the_service_is_killed_and_comes_back(kept: Bridge) -> None:
    def restart() -> float:
        kept.kill()
        kept.start()
        return time.time()

    check_in_the_middle(kept, restart)


def test_one_of_two_nodes_is_killed(
    binary: str, celery_redis: CeleryRedis, redis_url: str, logs: Path
) -> None:
    nodes = [Bridge(binary, celery_redis.url, logs, REDIS_URL=redis_url) for _ in range(2)]
    wait_until(lambda: any(node.report()["appends"] for node in nodes), "one of them appending")
    holder = next(node for node in nodes if node.report()["appends"])
    other = next(node for node in nodes if node is not holder)

    def kill() -> float:
        holder.kill()
        return time.time()

    check_in_the_middle(other, kill)
    for node in nodes:
        node.stop()


def test_a_worker_that_dies_loses_its_tasks_and_what_is_delivered_again_starts_again(
    kept: Bridge, workers: Worker, celery_redis: CeleryRedis, logs: Path
) -> None:
    from unmodified.tasks import late, sleep

    # Nobody else takes them.
    workers.stop()
    doomed = Worker("prefork", 2, celery_redis.url, logs / "worker-doomed.log", "-E")
    saviour: Worker | None = None
    try:
        doomed.wait()
        name = f"p-{uuid.uuid4()}"
        page: Page = kept.service.follow(name)
        early, again = sleep.delay(project_id=name, seconds=60), late.delay(project_id=name, seconds=1)
        told = Told().take_until(
            page, lambda told: len(told.about(early.id)) + len(told.about(again.id)) == 2
        )
        doomed.kill()
        told.take_ends(page, early.id, again.id)
        lost = [STARTED, ("failed", 0, "lost")]
        assert (told.sequence(early.id), told.sequence(again.id)) == (lost, lost)
        # Its message is delivered again, because it was not acknowledged before.
        saviour = Worker("prefork", 2, celery_redis.url, logs / "worker-saviour.log", "-E")
        told.take_ends(page, early.id, again.id, again.id)
        assert told.sequence(again.id) == [*lost, STARTED, COMPLETED]
        assert told.about(again.id)[2]["id"] == f"celery:{again.id}:0+1:task.started"
    finally:
        for worker in (doomed, saviour):
            if worker is not None:
                worker.stop()
    kept.service.close()
