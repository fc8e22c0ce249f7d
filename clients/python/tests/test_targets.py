"""The ingest stream and the plain channel, by every way that Redis can be had."""

from __future__ import annotations

import asyncio
import gc
import os
import threading

import pytest
import redis
import redis.asyncio
from redis.cluster import ClusterNode
from redis.crc import key_slot
from redis.sentinel import Sentinel

import tidings
from conftest import NOTHING_ON_DISK, Channel, Ingest, RedisServer, broker, wait_until
from tidings import EventBroadcaster, SyncEventBroadcaster, _publisher, _settings

INGEST = "tidings:ingest"


@pytest.fixture
def heard(server):
    """What is published on the plain channel."""
    channel = Channel(server.url)
    yield channel
    channel.close()


def effective():
    settings = _settings.effective(_publisher.RedisPublisher()._own)
    return settings.server, settings.to, settings.channel, settings.ingest_length_max


def environment(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _settings._environment.cache_clear()


def test_settings_come_from_configure_then_the_environment_then_defaults(monkeypatch):
    assert effective() == ("redis://localhost:6379/0", "ingest", "websocket:broadcast", None)
    environment(monkeypatch, REDIS_URL="redis://e/1", REDIS_CHANNEL="theirs", TIDINGS_PUBLISH_TO="")
    assert effective() == ("redis://e/1", "ingest", "theirs", None), "the service is told its channel so, too"
    environment(monkeypatch, REDIS_CHANNEL="", TIDINGS_PUBLISH_TO="channel")
    assert effective() == ("redis://e/1", "channel", "websocket:broadcast", None)
    tidings.configure(redis_url="redis://c/2", to="ingest")
    tidings.configure(ingest_length_max=7)
    assert effective() == ("redis://c/2", "ingest", "websocket:broadcast", 7)
    tidings.configure(channel="mine")
    assert effective() == ("redis://c/2", "channel", "mine", 7), "who names a channel wants it"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"redis_url": "localhost"}, "redis_url must begin with"),
        ({"redis_url": "redis+sentinel://u:secret@h/m"}, r"client=.*"),
        ({"to": "kafka"}, "to must be 'ingest' or 'channel', not 'kafka'"),
        ({"channel": ""}, "channel must not be empty"),
        ({"channel": "mine", "to": "ingest"}, "channel belongs to"),
        ({"ingest_length_max": 5, "to": "channel"}, "ingest_length_max belongs to"),
        ({"ingest_length_max": 0}, "at least 1"),
        ({"ingest_length_max": "many"}, "whole number"),
        ({"redis_url": "redis://h", "client": redis.Redis()}, "give one of them"),
        ({"client": redis.asyncio.Redis()}, r"not one of redis\.asyncio"),
        ({"client": redis.Redis().pipeline()}, "pipeline"),
        ({"client": "redis://h"}, "not str"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(wrong, told):
    for take in (tidings.configure, SyncEventBroadcaster, EventBroadcaster):
        with pytest.raises((ValueError, TypeError), match=told) as refused:
            take(**wrong)
        assert "secret" not in str(refused.value)


def test_a_target_in_the_environment_that_does_not_exist_is_logged_and_counted(server, monkeypatch, caplog):
    environment(monkeypatch, TIDINGS_PUBLISH_TO="kafka")
    lost = tidings.lost_events()
    assert SyncEventBroadcaster.file_deleted("p", "a") is False
    assert tidings.lost_events() == lost + 1
    assert "TIDINGS_PUBLISH_TO must be 'ingest' or 'channel', not 'kafka'" in caplog.text
    with pytest.raises(tidings.PublishError, match="kafka"):
        asyncio.run(EventBroadcaster(raise_errors=True).file_deleted("p", "a"))


def test_every_publisher_goes_to_the_ingest_stream_unless_told_otherwise(server, published, heard, project):
    publish_one_each(project, server)
    assert len(published.until(project, "file.deleted", 3)) == 3
    SyncEventBroadcaster(to="channel").publish({"type": "last.one", "project_id": project})
    assert [event["type"] for event in heard.until(project, "last.one")] == ["last.one"]


@pytest.mark.parametrize("by", ["configure", "environment"])
def test_every_publisher_goes_to_the_channel_when_told_so(server, published, heard, project, monkeypatch, by):
    if by == "configure":
        tidings.configure(to="channel")
    else:
        environment(monkeypatch, TIDINGS_PUBLISH_TO="channel")
    publish_one_each(project, server)
    assert len(heard.until(project, "file.deleted", 3)) == 3
    SyncEventBroadcaster(to="ingest").publish({"type": "last.one", "project_id": project})
    assert [event["type"] for event in published.until(project, "last.one")] == ["last.one"]


def publish_one_each(project, server):
    assert SyncEventBroadcaster.file_deleted(project, "sync")
    assert asyncio.run(EventBroadcaster.file_deleted(project, "async"))
    assert SyncEventBroadcaster(redis_url=server.url).file_deleted(project, "an instance")


@pytest.mark.parametrize("to", ["ingest", "channel"])
def test_the_events_of_a_task_go_where_all_go(server, published, heard, project, monkeypatch, to):
    monkeypatch.setenv("TEST_BROKER", broker(server))
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    import progress_app

    tidings.configure(to=to)
    progress_app.steps.apply((project, 2))
    here, there = (published, heard) if to == "ingest" else (heard, published)
    assert len(here.until(project, "task.completed")) == 4
    assert there.of(project) == []


def test_an_instance_has_a_channel_of_its_own(server, published, project):
    other = Channel(server.url, "another")
    try:
        assert SyncEventBroadcaster(channel="another").file_deleted(project, "a")
        assert SyncEventBroadcaster.file_deleted(project, "b")
        other.until(project, "file.deleted")
        published.until(project, "file.deleted")
        assert [e["file_path"] for e in other.of(project) + published.of(project)] == ["a", "b"]
    finally:
        other.close()


def test_the_stream_keeps_everything_unless_it_is_bounded(own_server):
    tidings.configure(redis_url=own_server.url)
    with redis.Redis.from_url(own_server.url) as client:
        for step in range(500):
            assert SyncEventBroadcaster.task_progress("t", "p", step, 500)
        assert client.xlen(INGEST) == 500
        bounded = SyncEventBroadcaster(redis_url=own_server.url, ingest_length_max=100)
        assert bounded.file_deleted("p", "newest")
        # Redis removes whole blocks of 100 entries.
        assert 100 <= client.xlen(INGEST) < 300
        (_, fields), *_ = client.xrevrange(INGEST, count=1)
        assert b"newest" in fields[b"event"]


def test_a_redis_without_memory_says_so_at_once(own_server, caplog):
    tidings.configure(redis_url=own_server.url)
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("maxmemory", 1)
    assert SyncEventBroadcaster.file_deleted("p", "a") is False
    assert "maxmemory" in caplog.text
    assert "Start it" not in caplog.text


@pytest.mark.parametrize("given", ["client", "redis_url"])
def test_an_event_waits_for_a_replica_to_become_the_primary(own_server, given):
    with redis.Redis.from_url(own_server.url) as client:
        tidings.configure(**{given: client if given == "client" else own_server.url})
        assert SyncEventBroadcaster.file_deleted("p", "before")
        client.replicaof("127.0.0.1", "1")
        promotion = threading.Timer(0.2, lambda: client.replicaof("NO", "ONE"))
        promotion.start()
        assert SyncEventBroadcaster.file_deleted("p", "after")
        promotion.join()
        assert client.xlen(INGEST) == 2


@pytest.mark.parametrize("decode_responses", [False, True])
def test_a_client_is_used_as_it_is(server, published, heard, project, decode_responses):
    with redis.Redis.from_url(server.url, decode_responses=decode_responses) as client:
        tidings.configure(redis_url="redis://127.0.0.1:1/0")
        mine = EventBroadcaster(client=client)
        assert asyncio.run(mine.file_deleted(project, "ä"))
        assert SyncEventBroadcaster(client=client, to="channel").file_deleted(project, "ä")
        for reader in (published, heard):
            assert reader.until(project, "file.deleted")[0]["file_path"] == "ä"
        del mine
        gc.collect()
        assert len(_publisher._links_of_clients) == 0


def test_a_client_survives_a_fork(server, published, project):
    with redis.Redis.from_url(server.url) as client:
        tidings.configure(client=client)
        assert SyncEventBroadcaster.file_deleted(project, "parent")
        child = os.fork()
        if child == 0:
            os._exit(0 if SyncEventBroadcaster.file_deleted(project, "child") else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert SyncEventBroadcaster.file_deleted(project, "parent")
        published.until(project, "file.deleted", 3)


def test_a_client_that_finds_no_redis_does_not_raise(own_server, caplog):
    with redis.Redis.from_url(own_server.url) as client:
        own_server.stop()
        tidings.configure(client=client)
        assert SyncEventBroadcaster.task_progress("t", "p", 1, 2) is False
        assert "the Redis that was given as client" in caplog.text
        with pytest.raises(tidings.PublishError):
            SyncEventBroadcaster(client=client, raise_errors=True).task_progress("t", "p", 1, 2)


@pytest.fixture
def cluster(tmp_path):
    """Two nodes; the first has every slot but the one of the ingest stream."""
    arguments = (*NOTHING_ON_DISK, "--cluster-enabled", "yes")
    nodes = []
    try:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            nodes.append(RedisServer(tmp_path / name, *arguments))
        form_cluster(*(redis.Redis.from_url(node.url) for node in nodes))
        yield nodes
    finally:
        for node in nodes:
            node.stop()


def form_cluster(first, second):
    moved = key_slot(INGEST.encode())
    for start in range(0, 16384, 1024):
        slots = [slot for slot in range(start, start + 1024) if slot != moved]
        first.execute_command("CLUSTER ADDSLOTS", *slots)
    second.execute_command("CLUSTER ADDSLOTS", moved)
    port = second.connection_pool.connection_kwargs["port"]
    first.execute_command("CLUSTER MEET", "127.0.0.1", port)
    for node in (first, second):
        wait_until(lambda node=node: node.cluster("info")["cluster_state"] == "ok", "a cluster")
        node.close()


def cluster_client(nodes):
    return redis.RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", node.port) for node in nodes])


def test_a_cluster_takes_events_by_its_client(cluster, project):
    published, heard = Ingest(cluster[1].url), Channel(cluster[1].url)
    try:
        with cluster_client(cluster) as client:
            tidings.configure(client=client)
            assert SyncEventBroadcaster.file_deleted(project, "a")
            assert asyncio.run(EventBroadcaster.file_deleted(project, "b"))
            assert SyncEventBroadcaster(client=client, to="channel").file_deleted(project, "c")
        published.until(project, "file.deleted", 2)
        heard.until(project, "file.deleted")
    finally:
        published.close()
        heard.close()


def test_a_cluster_by_the_url_of_one_node_is_told_what_to_do(cluster, caplog):
    assert SyncEventBroadcaster(redis_url=cluster[0].url).file_deleted("p", "a") is False
    assert "client=redis.RedisCluster(...)" in caplog.text


def test_sentinel_finds_the_primary(own_server, tmp_path, project):
    (tmp_path / "sentinel.conf").write_text(f"sentinel monitor events 127.0.0.1 {own_server.port} 1\n")
    sentinel = RedisServer(tmp_path, "sentinel.conf", "--sentinel")
    published = Ingest(own_server.url)
    try:
        client = Sentinel([("127.0.0.1", sentinel.port)]).master_for("events")
        tidings.configure(client=client)
        assert SyncEventBroadcaster.file_deleted(project, "a")
        published.until(project, "file.deleted")
        client.close()
    finally:
        published.close()
        sentinel.stop()
