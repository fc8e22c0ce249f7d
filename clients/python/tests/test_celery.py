"""Real workers, seen from the ingest stream."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path

import celery
import pytest
from celery import Celery

from conftest import Worker, broker, free_port, wait_until

POOLS = ("prefork", "threads", "solo")
every_pool = pytest.mark.parametrize("pool", POOLS)
prefork = pytest.mark.parametrize("pool", ["prefork"])
threads = pytest.mark.parametrize("pool", ["threads"])

REQUEUES_AS_FAILED = tuple(map(int, celery.__version__.split(".")[:2])) >= (5, 7)


@pytest.fixture(scope="session")
def app(server):
    # Without a result backend: it would listen for every result and complain when Redis goes before it.
    with Celery("sender", broker=broker(server)) as sender:
        yield sender


@pytest.fixture
def outcome(server):
    """What a task has returned, once it has."""
    with Celery("reader", broker=broker(server), backend=broker(server)) as reader:

        def of(result):
            def ended():
                meta = reader.backend.get_task_meta(result.id, cache=False)
                return meta["status"] == "SUCCESS" and meta

            return wait_until(ended, "the result")["result"]

        yield of


@pytest.fixture(scope="session")
def workers(server, tmp_path_factory):
    running = {}

    def of(pool):
        if pool not in running:
            running[pool] = Worker(server, pool, tmp_path_factory.mktemp(pool))
        return running[pool]

    yield of
    for worker in running.values():
        worker.stop()


@pytest.fixture
def worker(workers, pool):
    return workers(pool)


@pytest.fixture
def send(app, worker):
    def send_to(name, *args, **options):
        full = name if "." in name or name == "set_in_body" else f"progress_app.{name}"
        return app.send_task(full, args, options.pop("kwargs", {}), queue=worker.queue, **options)

    return send_to


def types(events):
    return [event["type"].partition(".")[2] for event in events]


def ids(events):
    return [event["id"] for event in events if "id" in event]


def settled(published, send, project):
    """The project's events, once whatever else the worker had to say has been said."""
    marker = f"{project}-settled"
    send("steps", marker, 0)
    published.until(marker, "task.completed")
    return published.of(project)


@every_pool
def test_a_hundred_steps_arrive_in_order_with_their_percentages(send, published, project):
    result = send("steps", project, 100)
    events = published.until(project, "task.completed")
    assert types(events) == ["started", *["progress"] * 100, "completed"]
    assert [e["progress"] for e in events[1:-1]] == [
        {"current": n, "total": 100, "percentage": n} for n in range(1, 101)
    ]
    assert {e["task_id"] for e in events} == {result.id}
    assert {e["attempt"] for e in events} == {0}
    assert events[0]["task_name"] == "progress_app.steps"
    assert events[-1]["result"] == 100
    assert ids(events) == [f"celery:{result.id}:0:task.started", f"celery:{result.id}:0:task.completed"]


@every_pool
def test_existing_code_runs_unchanged_and_its_started_is_one_event(send, outcome, published, project):
    result = send("existing_app.process_video", project, "videos/a.mp4")
    assert outcome(result) == {"status": "completed", "frames": 100}
    events = published.until(project, "task.completed")
    assert types(events) == [*["started"] * 3, *["progress"] * 100, "completed"]
    assert len(set(ids(events[:3]))) == 1
    assert len(set(ids(events))) == 2
    assert events[50]["message"] == "Processing frame 48"


@prefork
def test_the_project_is_found_by_keyword_by_position_and_in_the_body(send, published, project):
    number = uuid.uuid4().int >> 96
    send("steps", kwargs={"count": 1, "project_id": f"{project}-kw"})
    send("steps", number, 1)
    send("steps", uuid.UUID(int=number), 1)
    send("set_in_body", {"project": f"{project}-body"})
    for name in (f"{project}-kw", str(number), str(uuid.UUID(int=number)), f"{project}-body"):
        assert types(published.until(name, "task.completed")) == ["started", "progress", "completed"]
    assert published.of(f"{project}-body")[0]["task_name"] == "set_in_body"


@prefork
def test_every_task_id_that_was_announced_is_ended(send, published, project):
    result = send("own_task_id", project, "mine")
    events = published.until(project, "task.completed", 2)
    assert [(e["type"], e["task_id"]) for e in events] == [
        ("task.started", result.id),
        ("task.progress", result.id),
        ("task.started", "mine"),
        ("task.progress", "mine"),
        ("task.completed", result.id),
        ("task.completed", "mine"),
    ]


@every_pool
def test_a_failing_task_tells_its_error_and_traceback(send, published, project):
    send("failing", project)
    started, failed = published.until(project, "task.failed")
    assert (started["type"], failed["error"], failed["reason"]) == ("task.started", "boom", "error")
    assert "ValueError: boom" in failed["traceback"]
    assert "progress_app.py" in failed["traceback"]


@prefork
def test_an_exception_without_a_text_is_named_by_its_class(send, published, project):
    send("failing", project, "")
    assert published.until(project, "task.failed")[-1]["error"] == "ValueError"


@every_pool
def test_retries_go_on_and_end_once(send, published, project):
    send("flaky", project, 2)
    events = published.until(project, "task.completed")
    assert [(e["type"], e["attempt"]) for e in events] == [
        ("task.started", 0),
        ("task.started", 1),
        ("task.started", 2),
        ("task.completed", 2),
    ]
    assert len(set(ids(events))) == 4


@prefork
def test_retries_that_run_out_fail_once(send, published, project):
    send("never", project)
    published.until(project, "task.failed")
    events = settled(published, send, project)
    assert [(e["type"], e["attempt"]) for e in events] == [
        ("task.started", 0),
        ("task.started", 1),
        ("task.failed", 1),
    ]


@every_pool
def test_a_task_revoked_before_it_began_fails(app, send, published, project):
    result = send("steps", project, 5, countdown=2)
    app.control.revoke(result.id)
    (failed,) = published.until(project, "task.failed")
    assert (failed["reason"], failed["attempt"], failed["task_id"]) == ("revoked", 0, result.id)


@prefork
def test_a_task_that_expires_fails(send, published, project):
    send("steps", project, 5, expires=-1)
    (failed,) = published.until(project, "task.failed")
    assert failed["reason"] == "expired"


@prefork
def test_a_terminated_task_fails_once(app, send, published, project):
    result = send("asleep", project)
    published.until(project, "task.progress")
    app.control.revoke(result.id, terminate=True)
    published.until(project, "task.failed")
    events = settled(published, send, project)
    assert types(events) == ["started", "progress", "failed"]
    assert events[-1]["reason"] == "revoked"


@prefork
@pytest.mark.parametrize("task", ["asleep", "busy"])
def test_a_soft_time_limit_ends_the_task(send, published, project, task):
    send(task, project, soft_time_limit=1)
    events = published.until(project, "task.failed")
    assert events[-1]["reason"] == "time_limit"
    assert "SoftTimeLimitExceeded" in events[-1]["traceback"]
    assert types(settled(published, send, project)).count("failed") == 1


@prefork
def test_a_hard_time_limit_ends_the_task_once(send, published, project):
    result = send("asleep", project, time_limit=1)
    published.until(project, "task.failed")
    events = settled(published, send, project)
    assert types(events) == ["started", "progress", "failed"]
    assert events[-1]["reason"] == "time_limit"
    assert events[-1]["id"] == f"celery:{result.id}:0:task.failed"


@prefork
def test_a_killed_process_fails_its_task_once(send, published, project, tmp_path):
    marker = tmp_path / "pid"
    send("asleep", project, str(marker))
    published.until(project, "task.progress")
    os.kill(int(marker.read_text()), signal.SIGKILL)
    published.until(project, "task.failed")
    events = settled(published, send, project)
    assert types(events) == ["started", "progress", "failed"]
    assert events[-1]["reason"] == "worker_lost"


@prefork
def test_the_attempt_of_a_killed_retry_is_known_to_the_main_process(send, published, project):
    send("kill_self", project, retries=2)
    assert [e["attempt"] for e in published.until(project, "task.failed")] == [2, 2]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_task_that_exits_fails(send, published, project, pool):
    """In the prefork pool both the process and, from Celery 5.7, the main process say so, with one id."""
    send("exits", project)
    published.until(project, "task.failed")
    events = settled(published, send, project)
    assert set(types(events)) == {"started", "failed"}
    assert len(set(ids(events))) == 2
    assert {e["reason"] for e in events[1:]} == {"worker_lost"}


@every_pool
def test_an_ignored_task_does_not_spin(send, published, project):
    send("ignored", project)
    assert types(published.until(project, "task.completed")) == ["started", "completed"]


@every_pool
@pytest.mark.parametrize("requeue", [False, True])
def test_a_rejected_task_that_never_runs_again_fails(send, published, project, requeue):
    """Without acks_late the message is acknowledged before the task runs: requeueing it does nothing."""
    send("rejected", project, requeue)
    published.until(project, "task.failed")
    events = settled(published, send, project)
    assert set(types(events)) == {"started", "failed"}
    assert len(set(ids(events))) == 2
    assert {e["reason"] for e in events[1:]} == {"rejected"}


@every_pool
def test_a_requeued_task_goes_on(send, published, project, tmp_path):
    send("requeued_once", project, str(tmp_path / "seen"))
    events = published.until(project, "task.completed")
    assert types(events) == ["started", "started", "completed"]
    assert len(set(ids(events))) == 2


@prefork
def test_a_replacement_ends_what_it_replaces(send, published, project):
    result = send("replaced", project)
    published.until(project, "task.completed")
    events = settled(published, send, project)
    assert types(events) == ["started", "started", "progress", "completed"]
    assert {e["task_id"] for e in events} == {result.id}


@every_pool
@pytest.mark.parametrize("fail", [False, True])
def test_hooks_that_are_overridden_without_super_change_nothing(send, published, project, fail):
    send("overridden", project, fail)
    end = "failed" if fail or not REQUEUES_AS_FAILED else "completed"
    published.until(project, f"task.{end}")
    assert types(settled(published, send, project)) == ["started", "progress", end]


@threads
def test_tasks_at_the_same_time_never_mix_their_projects(send, published, project):
    results = {f"{project}-{n}": send("steps", f"{project}-{n}", 50, 0.005) for n in range(4)}
    for name, result in results.items():
        events = published.until(name, "task.completed")
        assert types(events) == ["started", *["progress"] * 50, "completed"]
        assert {e["task_id"] for e in events} == {result.id}
        assert {e["metadata"]["project"] for e in events[1:-1]} == {name}


@prefork
def test_wrong_progress_and_odd_results_do_not_hurt_the_task(send, outcome, published, project):
    result = send("hostile", project, "progress")
    events = published.until(project, "task.completed")
    assert types(events) == ["started", "progress", "completed"]
    assert events[-1]["result"] == "2026-01-02T00:00:00+00:00"
    assert outcome(result)


@prefork
def test_a_result_of_five_megabytes_is_left_out(send, published, project):
    send("hostile", project, "large")
    completed = published.until(project, "task.completed")[-1]
    assert completed["omitted"] == ["result"]
    assert "result" not in completed


@prefork
def test_an_attempt_is_never_both_failed_and_completed(send, published, project):
    send("hand_sent_failure", project)
    published.until(project, "task.failed")
    assert types(settled(published, send, project)) == ["started", "failed"]


@prefork
def test_a_task_without_a_project_runs_and_is_told_once(worker, outcome, send):
    assert outcome(send("no_project")) == "ok"
    assert worker.text().count("no project is known") == 1


@prefork
def test_a_task_called_as_a_function_announces_nothing(send, published, project):
    send("calls_another", project)
    assert types(published.until(project, "task.completed")) == ["started", "progress", "completed"]
    assert published.of("inner") == []


@every_pool
def test_redis_for_events_away_costs_a_task_only_seconds(server, app, outcome, tmp_path, pool):
    worker = Worker(server, pool, tmp_path, events_url=f"redis://127.0.0.1:{free_port()}/0")
    try:
        began = time.monotonic()
        result = app.send_task("progress_app.steps", ("p", 100), queue=worker.queue)
        assert outcome(result) == 100
        assert time.monotonic() - began < 4
        wait_until(lambda: "events are lost" in worker.text(), "the loss in the log")
        assert worker.text().count("events are lost") == 1
    finally:
        worker.stop()


def test_an_eager_task_publishes_too(server, published, project, monkeypatch):
    monkeypatch.setenv("TEST_BROKER", broker(server))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import progress_app

    progress_app.steps.apply((project, 2))
    progress_app.failing.apply((project,))
    with pytest.raises(ValueError, match="boom"):
        progress_app.failing.apply((project,), throw=True)
    assert types(published.until(project, "task.failed", 2)) == [
        *("started", "progress", "progress", "completed"),
        *("started", "failed") * 2,
    ]


def test_values_set_outside_a_run_stay_in_their_thread(server, published, project, monkeypatch):
    monkeypatch.setenv("TEST_BROKER", broker(server))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import threading

    import progress_app

    task = progress_app.steps
    task.project_id = project
    seen = []
    thread = threading.Thread(target=lambda: seen.append(task.project_id))
    thread.start()
    thread.join()
    assert (task.project_id, seen) == (project, [None])
    task.update_progress(1, 2)
    assert published.of(project) == []


def test_a_class_cannot_hide_the_properties():
    from tidings import ProgressTask

    class Declares(ProgressTask):
        project_id = None

    assert isinstance(Declares.project_id, property)
    with pytest.raises(TypeError, match="project_id"):
        type("Shares", (ProgressTask,), {"project_id": "p1"})
