#!/usr/bin/env python3
"""What an event costs the Redis that three nodes share, and what a project costs it that nobody uses.

    cargo build --release && bench/redis_cost.py

Starts a Redis and three nodes of its own. Redis's own CPU time is what counts: it is one thread, so events per second at which
it is full are one second by that time. The yardstick is a bare PUBLISH of the same events to three subscribers.
"""

import http.client
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

BINARY = pathlib.Path(__file__).parent.parent / "target/release/tidings"
PROJECTS = 1000
EVENTS = 20_000
ROUNDS = 3


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Redis:
    def __init__(self):
        self.port = free_port()
        arguments = ["redis-server", "--port", str(self.port), "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", self.port))
                break
            except OSError:
                time.sleep(0.05)
        self.file = self.socket.makefile("rb")

    def send(self, *commands):
        parts = []
        for command in commands:
            parts.append(b"*%d\r\n" % len(command))
            for word in command:
                word = word if isinstance(word, bytes) else str(word).encode()
                parts.append(b"$%d\r\n%s\r\n" % (len(word), word))
        self.socket.sendall(b"".join(parts))
        return [self.read() for _ in commands]

    def call(self, *command):
        return self.send(command)[0]

    def read(self):
        line = self.file.readline()[:-2]
        kind, rest = line[:1], line[1:]
        if kind in b"+:-":
            return rest.decode()
        if kind == b"$":
            return None if rest == b"-1" else self.file.read(int(rest) + 2)[:-2]
        return [self.read() for _ in range(int(rest))]

    def info(self, section):
        lines = self.call("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def cpu(self):
        info = self.info("cpu")
        return float(info["used_cpu_user_main_thread"]) + float(info["used_cpu_sys_main_thread"])

    def commands(self):
        stats = self.info("commandstats")
        calls = {name[8:]: int(value.split(",")[0][6:]) for name, value in stats.items()}
        return {name: count for name, count in calls.items() if not name.startswith("info")}

    def memory(self):
        return int(self.info("memory")["used_memory"])


class Node:
    def __init__(self, redis, folder, number):
        self.port = free_port()
        environment = dict(
            os.environ,
            REDIS_URL=f"redis://127.0.0.1:{redis.port}",
            BACKEND_PORT=str(self.port),
            CONTAINER_ID=f"node-{number}",
            TIDINGS_DRAIN_SECONDS="0",
            TIDINGS_SUBSCRIPTIONS_MAX="100000",
        )
        log = open(folder / f"{number}.log", "w")
        self.process = subprocess.Popen([BINARY, "serve"], env=environment, stderr=log, cwd=folder)
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port)
                connection.request("GET", "/readyz")
                if connection.getresponse().read() and connection is not None:
                    break
            except OSError:
                time.sleep(0.05)
        self.http = http.client.HTTPConnection("127.0.0.1", self.port)

    def publish(self, events):
        body = "\n".join(json.dumps(event) for event in events)
        self.http.request("POST", "/api/events", body, {"Content-Type": "application/x-ndjson"})
        response = self.http.getresponse()
        response.read()
        assert response.status == 202, response.status

    def subscribe(self, projects):
        """One plain WebSocket that follows projects and is drained by a thread-less read now and then."""
        ws = socket.create_connection(("127.0.0.1", self.port))
        ws.sendall(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        for start in range(0, len(projects), 50):
            for project in projects[start : start + 50]:
                text = json.dumps({"type": "subscribe", "project_id": project}).encode()
                ws.sendall(bytes([0x81, 0x80 | len(text)]) + bytes(4) + text)
            time.sleep(0.05)
            drain(ws)
        return ws


def drain(ws):
    ws.setblocking(False)
    try:
        while ws.recv(1 << 20):
            pass
    except BlockingIOError:
        pass
    ws.setblocking(True)


def event(kind, n):
    project = f"project-{n % PROJECTS}"
    if kind == "durable":
        return {"type": "file.uploaded", "project_id": project, "file": {"name": f"{n}.png", "path": f"a/{n}.png"}, "n": n}
    return {
        "type": "task.progress",
        "project_id": project,
        "task_id": f"task-{n % PROJECTS}",
        "progress": {"current": n, "total": EVENTS},
        "message": "encoding",
    }


def measure(redis, act):
    before, calls, started = redis.cpu(), redis.commands(), time.time()
    act()
    cpu, seconds = redis.cpu() - before, time.time() - started
    after = redis.commands()
    delta = {name: count - calls.get(name, 0) for name, count in after.items() if count > calls.get(name, 0)}
    return cpu, seconds, delta


def main():
    folder = pathlib.Path(tempfile.mkdtemp())
    redis = Redis()
    nodes = [Node(redis, folder, number) for number in range(3)]
    report = {}
    try:
        projects = [f"project-{n}" for n in range(PROJECTS)]
        empty = redis.memory()
        sockets = [node.subscribe(projects) for node in nodes]
        time.sleep(2)
        report["bytes per project that is followed and has no event"] = (redis.memory() - empty) / PROJECTS
        idle_cpu, idle_seconds, idle_calls = measure(redis, lambda: time.sleep(60))
        report["idle: commands per second, three nodes that follow 1,000 projects"] = sum(idle_calls.values()) / idle_seconds
        report["idle: CPU of Redis, per cent"] = 100 * idle_cpu / idle_seconds
        for kind in ["durable", "progress"]:
            for batch in [1, 100]:
                costs, counts = [], {}
                for _ in range(ROUNDS):
                    def act():
                        count = EVENTS if batch > 1 else EVENTS // 10
                        for start in range(0, count, batch):
                            # One project's events come together, as they do from a loop.
                            first = start // batch
                            events = [event(kind, first + PROJECTS * k) for k in range(batch)]
                            nodes[first % 3].publish(events)
                            if first % 20 == 0:
                                for ws in sockets:
                                    drain(ws)
                    cpu, seconds, counts = measure(redis, act)
                    count = EVENTS if batch > 1 else EVENTS // 10
                    costs.append(1e6 * (cpu - idle_cpu / idle_seconds * seconds) / count)
                    counts = {name: round(number / count, 3) for name, number in counts.items() if number / count > 0.004}
                report[f"{kind}, {batch} at once: Redis CPU per event, µs"] = statistics.median(costs)
                report[f"{kind}, {batch} at once: commands per event"] = counts
        # The yardstick: the same bytes to three subscribers, on a Redis that does nothing else.
        for ws in sockets:
            ws.close()
        bare = Redis()
        try:
            subscribers = []
            for _ in range(3):
                subscriber = socket.create_connection(("127.0.0.1", bare.port))
                subscriber.sendall(b"*2\r\n$10\r\nPSUBSCRIBE\r\n$1\r\n*\r\n")
                subscribers.append(subscriber)
            time.sleep(0.2)
            for batch in [1, 100]:
                costs = []
                for _ in range(ROUNDS):
                    before = bare.cpu()
                    for start in range(0, EVENTS, batch):
                        payloads = [json.dumps(event("progress", start + k)) for k in range(batch)]
                        bare.send(*[("PUBLISH", "project-1", payload) for payload in payloads])
                        if start % 1000 == 0:
                            for subscriber in subscribers:
                                drain(subscriber)
                    costs.append(1e6 * (bare.cpu() - before) / EVENTS)
                report[f"bare PUBLISH, {batch} at once: Redis CPU per event, µs"] = statistics.median(costs)
        finally:
            bare.process.kill()
        # What is left of a project that nobody uses: a thousand new ones with ten events each.
        before = redis.memory()
        for n in range(PROJECTS):
            nodes[0].publish([dict(event("progress", k), project_id=f"idle-{n}") for k in range(10)])
        report["bytes per idle project with ten events of 200 bytes"] = (redis.memory() - before) / PROJECTS
    finally:
        for node in nodes:
            node.process.kill()
        redis.process.kill()
    for name, value in report.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
