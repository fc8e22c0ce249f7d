"""The way to Redis: both broadcasters, threads, loops, forks, and Redis being away."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import redis

import tidings
from conftest import Ingest, free_port, wait_until
from tidings import EventBroadcaster, SyncEventBroadcaster

CALLS = [
    ("project_created", ("P", {"name": "One"})),
    ("project_updated", ("P", {"name": "Two"})),
    ("project_deleted", ("P", None)),
    ("file_uploaded", ("P", {"name": "a", "path": "b/a"})),
    ("file_deleted", ("P", "b/a")),
    ("file_changed", ("P", "b/a", "modified")),
    ("workspace_changed", ("w", {"added": ["x"]}, "P")),
    ("task_started", ("t", "work", "P")),
    ("task_progress", ("t", "P", 1, 2)),
    ("task_completed", ("t", "P", {"ok": True})),
    ("task_failed", ("t", "P", "boom", "Traceback")),
    ("process_started", ("P", "x")),
    ("process_progress", ("P", "x", 50)),
    ("process_completed", ("P", "x", "done", "success")),
    ("publish", ({"type": "comment.added", "project_id": "P"},)),
]


def filled(arguments, project):
    return [in_project(argument, project) for argument in arguments]


def in_project(argument, project):
    if isinstance(argument, dict) and "type" in argument:
        return {**argument, "project_id": project}
    return project if argument == "P" else argument


def bare(events):
    return [{k: v for k, v in event.items() if k != "timestamp"} for event in events]


def test_both_broadcasters_publish_the_same_events_on_class_and_instance(server, published, project):
    async def publish_all(broadcaster):
        return [await getattr(broadcaster, name)(*filled(arguments, project)) for name, arguments in CALLS]

    for broadcaster in (SyncEventBroadcaster, SyncEventBroadcaster(redis_url=server.url)):
        assert all(getattr(broadcaster, name)(*filled(arguments, project)) for name, arguments in CALLS)
    for broadcaster in (EventBroadcaster, EventBroadcaster(redis_url=server.url)):
        assert all(asyncio.run(publish_all(broadcaster)))
    wait_until(lambda: len(published.of(project)) == 4 * len(CALLS), "all events")
    seen = bare(published.of(project))
    n = len(CALLS)
    assert seen[:n] == seen[n : 2 * n] == seen[2 * n : 3 * n] == seen[3 * n :]
    assert all("id" not in event for event in seen), "an id belongs to a running Celery task only"


def test_a_password_is_never_logged_or_raised(caplog):
    url = f"redis://user:secret@127.0.0.1:{free_port()}/0"
    with pytest.raises(tidings.PublishError) as raised:
        SyncEventBroadcaster(redis_url=url, raise_errors=True).file_deleted("p", "a")
    assert "secret" not in str(raised.value) + caplog.text
    assert "***@127.0.0.1" in caplog.text


def test_wrong_arguments_raise_before_anything_is_sent():
    with pytest.raises(ValueError, match="project_id"):
        SyncEventBroadcaster.file_deleted("", "a")
    with pytest.raises(TypeError, match="progress"):
        asyncio.run(EventBroadcaster.process_progress("p", "x", "half"))
    with pytest.raises(ValueError, match="bytes of JSON"):
        SyncEventBroadcaster.publish({"type": "a.b", "text": "x" * 2**20})


def test_a_new_loop_for_every_call_keeps_the_order(server, published, project):
    for step in range(200):
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(EventBroadcaster.task_progress("t", project, step, 200))
        loop.close()
    events = published.until(project, "task.progress", 200)
    assert [e["progress"]["current"] for e in events] == list(range(200))


def test_loops_in_many_threads_at_once(own_server, project):
    tidings.configure(redis_url=own_server.url)
    published = Ingest(own_server.url)

    def run(number):
        async def work():
            await asyncio.gather(
                *(EventBroadcaster.file_deleted(project, f"{number}/{i}") for i in range(50))
            )

        asyncio.run(work())

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = published.until(project, "file.deleted", 400)
    for number in range(8):
        mine = [e["file_path"] for e in events if e["file_path"].startswith(f"{number}/")]
        assert mine == [f"{number}/{i}" for i in range(50)]
    published.close()
    with redis.Redis.from_url(own_server.url) as client:
        connected = len([c for c in client.client_list() if c["cmd"] == "xadd"])
    assert connected == 1, "one thread sends for all loops"


def test_a_cancelled_caller_does_not_take_its_event_back(server, published, project):
    async def work():
        tasks = [asyncio.create_task(EventBroadcaster.file_deleted(project, str(i))) for i in range(50)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(work())
    published.until(project, "file.deleted", 50)


def test_what_is_under_way_when_the_interpreter_ends_is_still_sent(server, published, project):
    code = (
        "import asyncio, tidings\n"
        "async def main():\n"
        f"    tasks = [asyncio.create_task(tidings.EventBroadcaster.file_deleted({project!r}, str(i)))"
        " for i in range(20)]\n"
        "    await asyncio.sleep(0)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    published.until(project, "file.deleted", 20)
    assert done.stderr == ""


def test_parent_and_child_publish_after_a_fork(server, published, project):
    assert SyncEventBroadcaster.file_deleted(project, "before")
    asyncio.run(EventBroadcaster.file_deleted(project, "before async"))
    child = os.fork()
    if child == 0:
        ok = SyncEventBroadcaster.file_deleted(project, "child")
        gc.collect()
        ok = asyncio.run(EventBroadcaster.file_deleted(project, "child async")) and ok
        os._exit(0 if ok and tidings.lost_events() == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert SyncEventBroadcaster.file_deleted(project, "parent")
    assert asyncio.run(EventBroadcaster.file_deleted(project, "parent async"))
    events = published.until(project, "file.deleted", 6)
    assert len({e["file_path"] for e in events}) == 6


def test_forks_while_other_threads_publish(server, published, project):
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            SyncEventBroadcaster.task_progress("t", project + "-busy", 1, 2)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(10):
            child = os.fork()
            if child == 0:
                os._exit(0 if SyncEventBroadcaster.file_deleted(project, str(number)) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    published.until(project, "file.deleted", 10)


def losses(caplog):
    return [r for r in caplog.records if r.name == "tidings"]


def test_redis_away_is_counted_logged_once_and_does_not_raise(own_server, caplog):
    tidings.configure(redis_url=own_server.url)
    assert SyncEventBroadcaster.file_deleted("p", "a")
    own_server.stop()
    lost = tidings.lost_events()
    began = time.monotonic()
    assert SyncEventBroadcaster.file_deleted("p", "a") is False
    for step in range(100):
        assert SyncEventBroadcaster.task_progress("t", "p", step, 100) is False
    assert time.monotonic() - began < 3
    assert tidings.lost_events() - lost == 101
    assert len(losses(caplog)) == 1
    assert "REDIS_URL" in caplog.text

    own_server.start()
    wait_until(lambda: SyncEventBroadcaster.task_progress("t", "p", 1, 100), "progress flows again", 5)
    assert asyncio.run(EventBroadcaster.file_deleted("p", "a"))
    assert [r.levelno for r in losses(caplog)] == [logging.ERROR, logging.WARNING]
    assert f"{tidings.lost_events() - lost} events were lost" in caplog.text


def test_a_redis_that_takes_packets_and_never_answers_is_bounded(own_server):
    tidings.configure(redis_url=own_server.url, connect_timeout_s=0.5, socket_timeout_s=0.5)
    own_server.freeze()
    try:
        began = time.monotonic()
        assert SyncEventBroadcaster.file_deleted("p", "a") is False
        assert time.monotonic() - began < 4
        began = time.monotonic()
        for step in range(100):
            SyncEventBroadcaster.task_progress("t", "p", step, 100)
        assert time.monotonic() - began < 2
    finally:
        own_server.thaw()


def test_a_burst_of_async_calls_in_an_outage_ends_together(own_server):
    tidings.configure(redis_url=f"redis://127.0.0.1:{free_port()}/0")

    async def burst():
        return await asyncio.gather(*(EventBroadcaster.file_deleted("p", str(i)) for i in range(200)))

    began = time.monotonic()
    assert asyncio.run(burst()) == [False] * 200
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("droppable", [True, False])
def test_a_connection_that_went_stale_costs_no_event(own_server, droppable):
    tidings.configure(redis_url=own_server.url)
    lost = tidings.lost_events()
    assert SyncEventBroadcaster.file_deleted("p", "a")
    own_server.stop()
    own_server.start()
    if droppable:
        assert SyncEventBroadcaster.task_progress("t", "p", 1, 2)
    else:
        assert SyncEventBroadcaster.file_deleted("p", "a")
    assert tidings.lost_events() == lost


def test_a_durable_event_outlives_a_short_outage(own_server):
    tidings.configure(redis_url=own_server.url)
    assert SyncEventBroadcaster.file_deleted("p", "a")
    own_server.stop()
    threading.Timer(0.2, own_server.start).start()
    assert SyncEventBroadcaster.file_deleted("p", "a")


class Silent:
    """Reads an event and hangs up instead of answering: nobody can tell whether it was executed."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._socket.getsockname()[1]}/0"
        self.events = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer:
                while data := peer.recv(65536):
                    if b"XADD" in data:
                        self.events += 1
                        break
                    peer.sendall(b"+OK\r\n" * (data.count(b"SETINFO") or 1))

    def close(self):
        self._socket.close()


def test_an_event_is_sent_twice_only_if_its_id_makes_it_one():
    silent = Silent()
    tidings.configure(redis_url=silent.url)
    assert SyncEventBroadcaster.publish({"type": "a.b"}) is False
    assert silent.events == 1
    assert SyncEventBroadcaster.publish({"type": "a.b", "id": "x"}) is False
    assert silent.events == 4
    silent.close()


def test_a_refused_password_is_not_tried_again_and_again(own_server, caplog):
    tidings.configure(redis_url=own_server.url)
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("requirepass", "x")
    began = time.monotonic()
    assert SyncEventBroadcaster.file_deleted("p", "a") is False
    assert time.monotonic() - began < 0.3
    assert "uthentication" in caplog.text


def test_raise_errors_raises_for_both_and_for_an_instance_alone():
    url = f"redis://127.0.0.1:{free_port()}/0"
    with pytest.raises(tidings.PublishError, match=r"127\.0\.0\.1"):
        SyncEventBroadcaster(redis_url=url, raise_errors=True).file_deleted("p", "a")
    assert SyncEventBroadcaster(redis_url=url).file_deleted("p", "a") is False
    tidings.configure(redis_url=url, raise_errors=True)
    with pytest.raises(tidings.PublishError):
        asyncio.run(EventBroadcaster.file_deleted("p", "a"))
    assert SyncEventBroadcaster(raise_errors=False).file_deleted("p", "a") is False
