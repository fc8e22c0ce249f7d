"""How often progress goes out, with a clock that the test moves."""

from __future__ import annotations

import os
import threading

import pytest
from celery import Celery

import tidings
from tidings import _publisher
from tidings._tasks import pace as module
from tidings.celery import ProgressRecorder, progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now_s = 100.0

    monkeypatch.setattr(module, "monotonic", lambda: Clock.now_s)
    return Clock


@pytest.fixture
def sent():
    return []


@pytest.fixture
def pace(clock, sent):
    return module.Pace(lambda value: sent.append(value))


def test_the_first_goes_out_at_once_then_the_newest_in_each_interval(clock, sent, pace):
    for value in range(100):
        pace.offer((value,), 10)
        clock.now_s += 0.03
    assert sent == list(range(0, 100, 4))
    pace.flush()
    pace.flush()
    assert sent[-1] == 99
    assert sent.count(99) == 1


def test_what_was_overtaken_is_not_sent_late(clock, sent, pace):
    pace.offer((1,), 10)
    pace.offer((2,), 10)
    clock.now_s += 1
    pace.offer((3,), 10)
    pace.flush()
    assert sent == [1, 3]


def test_being_full_goes_out_at_once_but_not_without_end(sent, pace):
    pace.offer((1,), 10)
    for value in range(2, 1000):
        pace.offer((value,), 10, is_full=True)
    pace.flush()
    assert sent == [1, 2, 999]


def test_without_a_rate_everything_goes_out(sent, pace):
    for value in range(5):
        pace.offer((value,), None)
    assert sent == list(range(5))


def test_an_error_while_sending_leaves_no_lock_behind(clock, pace):
    def fail(value):
        raise OSError("away")

    pace._send = fail
    with pytest.raises(OSError, match="away"):
        pace.offer((1,), 10)
    clock.now_s += 1
    sent = []
    pace._send = sent.append
    pace.offer((2,), 10)
    assert sent == [2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
def test_a_fork_neither_hangs_nor_sends_what_its_parent_holds(sent, pace):
    pace.offer((1,), 10)
    pace.offer((2,), 10)
    pace._lock.acquire()
    child = os.fork()
    if child == 0:
        pace.flush()
        pace.offer((3,), None)
        os._exit(0 if sent == [1, 3] else 1)
    pace._lock.release()
    assert os.waitpid(child, 0)[1] == 0
    pace.flush()
    assert sent == [1, 2]


@pytest.fixture
def app():
    made = Celery("paced", set_as_current=False, broker="memory://", backend="cache+memory://")
    tidings.celery.install(made)
    yield made
    tidings.celery.uninstall(made)


def steps(events):
    return [event["progress"]["current"] for event in events.of_type("task.progress")]


def test_the_rate_can_be_set_for_bars_and_for_progress_tasks(app, clock, tidings_events):
    @app.task(shared=False, bind=True)
    def bar(self, project_id):
        with progress(self, total=100) as shown:
            for _ in range(50):
                clock.now_s += 0.3
                shown.advance()

    @app.task(shared=False, bind=True, base=tidings.ProgressTask)
    def updates(self, project_id):
        for step in range(50):
            clock.now_s += 0.3
            self.update_progress(step, 100)

    updates.apply(("p1",))
    assert steps(tidings_events) == list(range(50))
    tidings.configure(progress_per_second=0.1)
    for task, expected in ((bar, [0, 34, 50]), (updates, [0, 34, 49])):
        tidings_events.clear()
        task.apply(("p1",))
        assert steps(tidings_events) == expected


def test_a_bar_is_moved_from_other_threads_of_the_task(app, tidings_events):
    @app.task(shared=False, bind=True)
    def work(self, project_id):
        with progress(self, total=400) as bar:
            lock = threading.Lock()

            def run():
                for _ in range(100):
                    with lock:
                        bar.advance()

            threads = [threading.Thread(target=run) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    work.apply(("p1",))
    assert steps(tidings_events)[-1] == 400
    assert {event["project_id"] for event in tidings_events.events} == {"p1"}
    assert tidings_events.types[-1] == "task.completed"


def test_a_bar_without_a_total_and_one_over_a_generator_have_no_end(app, tidings_events):
    @app.task(shared=False, bind=True)
    def work(self, project_id):
        for _ in progress(self, (n for n in range(3))):
            pass
        recorder = ProgressRecorder(self)
        recorder.increment_progress(by=5, description="more")

    assert work.apply(("p1",)).successful()
    assert tidings_events.of_type("task.progress")[-1]["progress"]["current"] == 5
    assert {event["progress"]["total"] for event in tidings_events.of_type("task.progress")} == {0}


def test_a_bar_never_fails_its_task(app, tidings_events, monkeypatch):
    @app.task(shared=False, bind=True)
    def wrong(self, project_id=None):
        with progress(self, total=10) as bar:
            bar.advance("one")
            bar.advance(float("nan"))
            bar.total = "many"
            bar.advance(message=object())
        ProgressRecorder(self).set_progress(None, "x")
        return "done"

    def fail(event):
        raise RuntimeError("broken")

    assert wrong.apply(("p1",)).get() == "done"
    assert wrong.apply().get() == "done"
    assert wrong() == "done"
    monkeypatch.setattr(_publisher.default_publisher(), "publish", fail)
    assert wrong.apply(("p1",)).get() == "done"


def test_a_wrong_call_says_how_it_is_meant(app):
    with pytest.raises(TypeError, match="a number of steps is total="):
        progress(app.task(unbound, shared=False), 100)
    with pytest.raises(TypeError, match=r"self of bind=True"):
        progress("task", [1])
    with pytest.raises(ValueError, match="progress_per_second must be more than 0"):
        tidings.configure(progress_per_second=0)
    with pytest.raises(TypeError, match="progress_per_second must be a number"):
        tidings.configure(progress_per_second="10")


def unbound():
    pass
