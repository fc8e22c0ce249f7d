"""Tasks that do not mention us, on real workers; and what their application's messages are stamped with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import redis
from celery import Celery, chain, chord, group, signals

import tidings.celery
from conftest import Worker, broker, wait_until

POOLS = ["prefork", "threads", "solo"]
if importlib.util.find_spec("gevent"):
    POOLS.append("gevent")
every_pool = pytest.mark.parametrize("pool", POOLS)
prefork = pytest.mark.parametrize("pool", ["prefork"])


@pytest.fixture
def plain(server, monkeypatch):
    monkeypatch.setenv("TEST_BROKER", broker(server))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import plain_app

    plain_app.app.conf.broker_url = broker(server)
    return plain_app


@pytest.fixture(scope="module")
def workers(server, tmp_path_factory):
    running = {}

    def of(pool):
        if pool not in running:
            running[pool] = Worker(server, pool, tmp_path_factory.mktemp(pool), application="plain_app")
        return running[pool]

    yield of
    for worker in running.values():
        worker.stop()


@pytest.fixture
def queue(workers, pool):
    return workers(pool).queue


@pytest.fixture
def meta(server):
    """The last meta of a task in the result backend, once it has the status."""
    with redis.Redis.from_url(broker(server)) as client:

        def of(task_id, status="SUCCESS"):
            def ended():
                body = client.get(f"celery-task-meta-{task_id}")
                found = json.loads(body) if body else {}
                return found.get("status") == status and found

            return wait_until(ended, f"{status} of {task_id}")

        yield of


def types(events):
    return [event["type"].partition(".")[2] for event in events]


def settled(published, plain, queue, project):
    marker = f"{project}-settled"
    plain.add.apply_async((marker,), queue=queue)
    published.until(marker, "task.completed")
    return published.of(project)


@every_pool
def test_a_task_that_does_not_mention_us_starts_and_ends(plain, queue, published, project):
    result = plain.add.apply_async((project, 2, 3), queue=queue)
    started, completed = published.until(project, "task.completed")
    assert started["id"] == f"celery:{result.id}:0:task.started"
    assert started["task_name"] == "plain_app.add"
    assert completed["id"] == f"celery:{result.id}:0:task.completed"
    assert completed["result"] == 5


@every_pool
def test_its_failure_and_its_retries_are_told(plain, queue, published, project):
    plain.failing.apply_async(kwargs={"project_id": project}, queue=queue)
    _, failed = published.until(project, "task.failed")
    assert (failed["error"], failed["reason"], failed["attempt"]) == ("boom", "error", 0)
    plain.flaky.apply_async((f"{project}-2", 2), queue=queue)
    events = published.until(f"{project}-2", "task.completed")
    assert [(e["type"], e["attempt"]) for e in events] == [
        ("task.started", 0),
        ("task.started", 1),
        ("task.started", 2),
        ("task.completed", 2),
    ]


@every_pool
def test_the_project_stands_in_the_metas_of_all_that_a_task_leads_to(plain, queue, meta, project):
    called = plain.parent.apply_async((project, queue), queue=queue)
    (child,) = meta(called.id)["children"]
    steps = chain(task.set(queue=queue) for task in (plain.add.s(project), plain.then.s(), plain.then.s()))
    last = steps.apply_async()
    ids = [called.id, child[0][0], last.id, last.parent.id, last.parent.parent.id]
    assert [meta(i)["project_id"] for i in ids] == [project] * 5
    assert meta(called.id)["stamped_headers"] == ["project_id"]
    assert [meta(i).get("tidings_chain") for i in ids] == [None, None, None, 2, 3]


@prefork
def test_a_chord_and_its_members_belong_to_the_project(plain, queue, meta, published, project):
    members = group(plain.add.s(project, 1).set(queue=queue), plain.add.s(project, 2).set(queue=queue))
    result = chord(members)(plain.gather.s().set(queue=queue))
    assert meta(result.id)["project_id"] == project
    found = [meta(member.id) for member in result.parent.results]
    assert {m["group_id"] for m in found} == {result.parent.id}
    published.until(project, "task.completed", 3)


@prefork
def test_an_applications_own_stamps_stay(plain, queue, meta, project):
    signature = plain.add.s("other").set(queue=queue)
    signature.stamp(project_id=project, customer="c1")
    ended = meta(signature.apply_async().id)
    assert (ended["project_id"], ended["customer"]) == (project, "c1")
    assert sorted(ended["stamped_headers"]) == ["customer", "project_id"]
    signature.apply_async()
    assert sorted(signature.options["stamped_headers"]) == ["customer", "project_id"]


@prefork
def test_the_main_process_knows_the_project_of_a_task_that_was_killed(plain, queue, published, project):
    chain(plain.add.s(project).set(queue=queue), plain.kill_self.s().set(queue=queue)).apply_async()
    published.until(project, "task.failed")
    events = settled(published, plain, queue, project)
    assert types(events) == ["started", "completed", "started", "failed"]
    assert events[-1]["reason"] == "worker_lost"


@prefork
def test_a_hard_time_limit_ends_once(plain, queue, published, project):
    last = plain.asleep.s().set(queue=queue, time_limit=1)
    chain(plain.add.s(project).set(queue=queue), last).apply_async()
    published.until(project, "task.failed")
    events = settled(published, plain, queue, project)
    assert (types(events)[-2:], events[-1]["reason"]) == (["started", "failed"], "time_limit")


@prefork
def test_a_revoked_task_fails(plain, queue, published, project):
    result = plain.add.apply_async((project,), queue=queue, countdown=2)
    plain.app.control.revoke(result.id)
    (failed,) = published.until(project, "task.failed")
    assert (failed["reason"], failed["task_id"]) == ("revoked", result.id)


@prefork
def test_a_replacement_ends_what_it_replaces(plain, queue, published, project):
    plain.replaced.apply_async((project, queue), queue=queue)
    published.until(project, "task.completed")
    assert types(settled(published, plain, queue, project)) == ["started", "started", "completed"]


@every_pool
def test_a_progress_task_of_an_installed_application_has_one_start_and_one_end(
    plain, queue, published, project
):
    plain.both.apply_async((project,), queue=queue)
    published.until(project, "task.completed")
    assert types(settled(published, plain, queue, project)) == ["started", "progress", "completed"]


@every_pool
@pytest.mark.parametrize("task", ["bar", "items"])
def test_a_bar_in_a_tight_loop_shows_its_start_and_its_end(plain, queue, published, project, task):
    getattr(plain, task).apply_async((project, 10_000), queue=queue)
    events = published.until(project, "task.completed")
    progress = [e["progress"] for e in events if e["type"] == "task.progress"]
    assert progress[0] == {"current": 0, "total": 10_000, "percentage": 0}
    assert progress[-1] == {"current": 10_000, "total": 10_000, "percentage": 100}
    assert types(events)[-1] == "completed"


@every_pool
def test_the_recorders_last_word_goes_out_before_the_end(plain, queue, meta, published, project):
    result = plain.recorded.apply_async((project, 1000), queue=queue)
    *_, last, completed = published.until(project, "task.completed")
    assert (last["progress"]["current"], last["message"]) == (1000, "On iteration 999")
    assert last["attempt"] == 0
    assert completed["result"][0] == "PROGRESS"
    assert meta(result.id)["result"][1]["percent"] == 99.9


@prefork
def test_a_loop_that_is_left_shows_where_it_was(plain, queue, published, project):
    plain.items.apply_async((project, 1000, 7), queue=queue)
    events = published.until(project, "task.completed")
    assert events[-2]["progress"]["current"] == 7


def connected():
    return {
        name: [key for key, *_ in value.receivers or []]
        for name, value in vars(signals).items()
        if hasattr(value, "receivers")
    }


def test_uninstalling_leaves_every_signal_as_it_was(plain):
    before = connected()
    app, other = Celery("one"), Celery("two")
    tidings.celery.uninstall(plain.app)
    bare = connected()
    tidings.celery.install(app)
    tidings.celery.install(app, project_argument="workspace")
    tidings.celery.install(other)
    assert len(connected()["before_task_publish"]) == len(bare["before_task_publish"]) + 1
    tidings.celery.uninstall(app)
    tidings.celery.uninstall(app)
    tidings.celery.uninstall(other)
    assert connected() == bare
    tidings.celery.install(plain.app)
    assert connected() == before


def test_only_the_tasks_of_an_installed_application_are_told_and_stamped(tidings_events):
    mine, other = (Celery(name, broker="memory://", set_as_current=False) for name in ("mine", "other"))
    sent = []

    def see(headers, **_):
        sent.append(headers)

    def work(workspace):
        return workspace

    signals.before_task_publish.connect(see)
    tidings.celery.install(mine, project_argument="workspace")
    try:
        for app in (mine, other):
            task = app.task(work, name="same.name", shared=False)
            task.apply_async(("w1",))
            task.apply(("w1",))
    finally:
        signals.before_task_publish.disconnect(see)
        tidings.celery.uninstall(mine)
    assert [headers["stamps"] for headers in sent] == [{"project_id": "w1"}, {}]
    assert types(tidings_events.for_project("w1")) == ["started", "completed"]
    mine.tasks["same.name"].apply(("w1",))
    assert len(tidings_events.events) == 2


def test_a_task_that_is_called_eagerly_belongs_to_its_caller(plain, tidings_events):
    plain.app.conf.task_always_eager = True
    try:
        plain.parent.delay("p1", "nowhere")
    finally:
        plain.app.conf.task_always_eager = False
    told = [(e["task_name"], e["project_id"]) for e in tidings_events.of_type("task.started")]
    assert told == [("plain_app.parent", "p1"), ("plain_app.then", "p1")]


def test_what_cannot_be_installed_is_told():
    with pytest.raises(TypeError, match="Celery application, not str"):
        tidings.celery.install("proj")
    with pytest.raises(ValueError, match="project_argument must be"):
        tidings.celery.install(Celery("x"), project_argument="project id")
