#!/usr/bin/env python3
"""Measures Tidings beside two yardsticks, on this machine, and writes the figures as Markdown.

`bench/README.md` says what the figures mean and how to get honest ones.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import random
import resource
import shlex
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
BUILT = ROOT / "target" / "bench"
TIDINGS = ROOT / "target" / "release" / "tidings"
CHANNEL = "websocket:broadcast"
# Above this share of its core the load generator measures itself.
BUSY = 0.8

# What a run of `tidings bench --json` prints, and all of those by scenario and peer.
Result: TypeAlias = "dict[str, Any]"
Results: TypeAlias = "dict[tuple[str, str], list[Result]]"
Command: TypeAlias = "Sequence[str | Path]"
Process: TypeAlias = "subprocess.Popen[bytes]"

PLAIN, PERSISTENT, LIMIT, BUN = "tidings", "tidings, on disk", "limit", "Bun"
SESSIONS = "tidings, redis-session"
PEERS = {"tidings": PLAIN, "disk": PERSISTENT, "sessions": SESSIONS, "limit": LIMIT, "bun": BUN}
# What every connection shows in scenarios with sessions, whether anybody asks for it or not.
COOKIE = "'Cookie: session=bench-{n}'"
SESSIONS_STORED = 10_000


@dataclasses.dataclass(frozen=True)
class Figure:
    """A column: where its value stands in the JSON of a run, and how it is written."""

    title: str
    path: str
    scale: float = 1
    digits: int = 0

    def of(self, result: Result) -> float | None:
        value: object = result
        for key in self.path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value * self.scale if isinstance(value, int | float) else None

    def write(self, value: float | None) -> str:
        return "" if value is None else f"{value:,.{self.digits}f}"


RATE = Figure("deliveries/s", "deliveries_per_second")
CPU = Figure("CPU µs per delivery", "cpu_us_per_delivery", digits=3)
P50 = Figure("p50 ms", "latency_us.p50", 1e-3, 2)
P99 = Figure("p99 ms", "latency_us.p99", 1e-3, 2)
P999 = Figure("p99.9 ms", "latency_us.p999", 1e-3, 2)
SERVER = Figure("server's share of its core", "server_cpu_share", digits=2)
PEAK = Figure("memory, peak MiB", "memory_peak_bytes", 2**-20, 1)
LOAD = Figure("load's share of its core", "own_cpu_share", digits=2)

CLOSED_LOOP = (RATE, CPU, P50, P99, SERVER, PEAK, LOAD)
OPEN_LOOP = (P50, P99, P999, CPU, PEAK, LOAD)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A row of the comparison: what is asked of `tidings bench`, of whom, and what is told of it.

    The first figure is the one that peers are compared by.
    """

    words: str
    arguments: str
    peers: tuple[str, ...]
    figures: tuple[Figure, ...]
    timed: bool = True
    variables: dict[str, str] = dataclasses.field(default_factory=dict)


EVERYBODY = (PLAIN, PERSISTENT, LIMIT, BUN)
WITH_PROJECTS = (PLAIN, BUN)
WITH_SESSIONS = (PLAIN, SESSIONS)

SCENARIOS = {
    "fanout-100": Scenario(
        "100 subscribers, 64 events outstanding", "fanout -n 100 --outstanding 64", EVERYBODY, CLOSED_LOOP
    ),
    "fanout-1000": Scenario(
        "1,000 subscribers, 64 events outstanding", "fanout -n 1000 --outstanding 64", EVERYBODY, CLOSED_LOOP
    ),
    "fanout-10000": Scenario(
        "10,000 subscribers, 64 events outstanding",
        "fanout -n 10000 --outstanding 64",
        EVERYBODY,
        CLOSED_LOOP,
    ),
    "one": Scenario(
        "1,000 subscribers, one event at a time", "fanout -n 1000 --outstanding 1", EVERYBODY, CLOSED_LOOP
    ),
    "rate-50": Scenario("1,000 subscribers, 50 events/s", "fanout -n 1000 --rate 50", EVERYBODY, OPEN_LOOP),
    "subscriptions": Scenario(
        "1,000 connections with 10 subscriptions each to 100 projects, 64 events outstanding",
        "fanout -n 1000 --projects 100 --subscriptions 10",
        WITH_PROJECTS,
        CLOSED_LOOP,
    ),
    "filtered": Scenario(
        "1,000 subscribers, half of them see `task.*` only, half of the events are",
        "fanout -n 1000 --filtered 0.5 --type mixed",
        (PLAIN,),
        CLOSED_LOOP,
    ),
    "deflate": Scenario(
        "1,000 subscribers, half of them with compression",
        "fanout -n 1000 --deflate 0.5",
        (PLAIN,),
        (*CLOSED_LOOP, Figure("frames compressed", "compressed")),
        variables={"TIDINGS_DEFLATE": "true"},
    ),
    "without-slow": Scenario(
        "980 subscribers, 100 events/s, for comparison with the next",
        "fanout -n 980 --rate 100",
        WITH_PROJECTS,
        OPEN_LOOP,
    ),
    "with-slow": Scenario(
        "980 subscribers, 100 events/s, and 10 that never read and 10 that read 10 KB/s",
        "fanout -n 1000 --stuck 10 --slow 10 --rate 100",
        WITH_PROJECTS,
        OPEN_LOOP,
    ),
    "big": Scenario(
        "1 MB each second to 1,000 subscribers: the latency of 300 bytes, 100 times a second, to 100 others",
        "big -n 1000 --small-connections 100 --rate 100",
        WITH_PROJECTS,
        (P99, P50, P999, SERVER, PEAK, LOAD),
    ),
    "flood": Scenario(
        "10,000 events/s of one task to a reader of 20 KB/s and a fast one",
        "flood",
        (PLAIN,),
        (
            Figure("published", "published"),
            Figure("slow reader got", "slow_deliveries"),
            Figure("folded", "folded"),
            Figure("fast reader got", "fast_deliveries"),
            Figure("fast reader's p99 ms", "latency_us.p99", 1e-3, 2),
            Figure("s to catch up", "caught_up_seconds", digits=1),
            PEAK,
        ),
        timed=False,
    ),
    "storm": Scenario(
        "15,000 connections cut at once, back at once, 100 events/s over 50 projects meanwhile",
        "storm -n 15000 --projects 50 --rate 100",
        (PLAIN,),
        (
            Figure("all whole after ms", "whole_us.max", 1e-3),
            Figure("half of them after ms", "whole_us.p50", 1e-3),
            Figure("all confirmed after ms", "confirmed_us.max", 1e-3),
            Figure("server's CPU s", "cpu_seconds", digits=2),
            Figure("subscribed with since", "resume_expired"),
        ),
        timed=False,
    ),
    "idle": Scenario(
        "15,000 idle connections",
        "idle -n 15000 --duration 30",
        WITH_PROJECTS,
        (
            Figure("bytes per connection", "bytes_per_connection"),
            Figure("CPU µs per second per connection", "cpu_us_per_second_per_connection", digits=3),
            Figure("MiB at 5,000", "memory_1_bytes", 2**-20, 1),
            Figure("MiB at 10,000", "memory_2_bytes", 2**-20, 1),
            Figure("MiB at 15,000", "memory_3_bytes", 2**-20, 1),
            Figure("MiB after closing", "memory_after_bytes", 2**-20, 1),
        ),
        timed=False,
    ),
    "sessions": Scenario(
        "10,000 connections opened, 128 at a time, each with a session of its own, and 20 s in which nothing happens",
        f"idle -n 10000 --duration 20 --header {COOKIE}",
        WITH_SESSIONS,
        (
            Figure("opened and subscribed after ms", "opening_ms"),
            Figure("CPU µs to open one", "opening_cpu_us", digits=1),
            Figure("bytes per connection", "bytes_per_connection"),
            Figure("CPU µs per second per connection", "cpu_us_per_second_per_connection", digits=3),
            Figure("MiB after closing", "memory_after_bytes", 2**-20, 1),
        ),
        timed=False,
    ),
    "sessions-storm": Scenario(
        "8,000 connections with a session each cut at once, back at once, 100 events/s over 50 projects meanwhile",
        f"storm -n 8000 --projects 50 --rate 100 --header {COOKIE}",
        WITH_SESSIONS,
        (
            Figure("all whole after ms", "whole_us.max", 1e-3),
            Figure("half of them after ms", "whole_us.p50", 1e-3),
            Figure("server's CPU s", "cpu_seconds", digits=2),
        ),
        timed=False,
    ),
}


def main() -> int:
    options = parse()
    if options.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:<14} {scenario.words}")
        return 0
    # A stop by `kill` must clean up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise_file_limit()
    if not options.inside:
        if not options.no_build:
            build(options)
        namespace = namespace_command()
        if namespace:
            os.execvp(namespace[0], [*namespace, sys.executable, __file__, *sys.argv[1:], "--inside"])
        say(
            "no network namespace of its own (needs root or user namespaces): firewall rules and connection "
            "tracking of this machine are in the figures"
        )
    else:
        loopback_up()
    results, failures = measure(options)
    text = write(options, results, failures)
    print(text)
    if options.output:
        options.output.write_text(text)
    return 1 if failures else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        action="append",
        metavar="SCENARIO",
        choices=SCENARIOS,
        help="may be given several times; see --list",
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="comma separated: %(default)s")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--duration", type=float, default=5, help="measured seconds of a run")
    parser.add_argument("--warmup", type=float, default=2, help="seconds of load before")
    parser.add_argument("--server-core", default="0")
    parser.add_argument("--load-core", default="1", help="for the load and Redis")
    parser.add_argument("--tidings", type=Path, default=TIDINGS, help="the server's binary")
    parser.add_argument("--load", type=Path, help="the binary with the load generator, if it is another one")
    parser.add_argument("--no-build", action="store_true", help="everything is built already")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables there, too")
    parser.add_argument(
        "--raw", type=Path, metavar="FILE", help="append the JSON of every run there, a line each"
    )
    parser.add_argument("--list", action="store_true", help="show the scenarios")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.peers.split(",")) - set(PEERS)
    if unknown:
        parser.error(f"--peers: unknown {', '.join(sorted(unknown))}; known are {', '.join(PEERS)}")
    options.peers = [PEERS[name] for name in options.peers.split(",")]
    options.only = options.only or list(SCENARIOS)
    options.load = options.load or options.tidings
    return options


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# Building and the namespace


def build(options: argparse.Namespace) -> None:
    BUILT.mkdir(parents=True, exist_ok=True)
    if options.tidings == TIDINGS:
        say("building tidings")
        subprocess.run(["cargo", "build", "--release", "--package", "tidings"], cwd=ROOT, check=True)
    if LIMIT in options.peers:
        source = BENCH / "peers" / "limit.c"
        subprocess.run(["cc", "-O2", "-o", BUILT / "limit", source], check=True)
    if BUN in options.peers and not bun().exists():
        say("installing Bun")
        subprocess.run(["npm", "install", "--silent", "--no-save", "--prefix", BUILT, "bun"], check=True)


def bun() -> Path:
    return BUILT / "node_modules" / ".bin" / "bun"


def namespace_command() -> list[str] | None:
    """How to run something in a network namespace of its own, as root or in a user namespace."""
    for command in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*command, "true"], stderr=subprocess.DEVNULL).returncode == 0:
                return command
    return None


def loopback_up() -> None:
    """What `ip link set lo up` does, without needing it."""
    get_flags, set_flags, is_up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("16xh", fcntl.ioctl(control, get_flags, request))
        fcntl.ioctl(control, set_flags, struct.pack("16sh14x", b"lo", flags | is_up))


# Running


@contextlib.contextmanager
def running(command: Command, variables: dict[str, str], core: str, log: Path) -> Iterator[Process]:
    """A process on a core of its own with these variables and no others; it ends with the block."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": tempfile.gettempdir(), **variables}
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", core, *command],
            env=environment,
            stdout=output,
            stderr=output,
            cwd=log.parent,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """Below the range that the system takes clients' ports from: those of the run before are not free for a while."""
    while True:
        port = random.randint(10_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("0.0.0.0", port))
            return port


def wait_for(port: int, process: Process, log: Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"did not start: {log.read_text(errors='replace')[-500:]}")


def server(
    peer: str, scenario: Scenario, options: argparse.Namespace, port: int, redis: int, folder: Path
) -> tuple[list[str | Path], dict[str, str]]:
    """How a peer is started: its command and its variables."""
    url = f"redis://127.0.0.1:{redis}"
    if peer == LIMIT:
        return [BUILT / "limit", str(port), str(redis), CHANNEL, "1"], {}
    if peer == BUN:
        return [bun(), BENCH / "peers" / "bun_gateway.ts"], {"PORT": str(port), "REDIS_URL": url}
    variables = {
        "TIDINGS_ENGINE": "embedded",
        "TIDINGS_PERSIST": "true" if peer == PERSISTENT else "false",
        "TIDINGS_DATA_DIR": str(folder / "data"),
        "TIDINGS_AUTH": "redis-session" if peer == SESSIONS else "none",
        "REDIS_URL": url,
        **scenario.variables,
    }
    return [options.tidings.resolve(), "serve", "--listen", f"127.0.0.1:{port}"], variables


def run_once(peer: str, scenario: Scenario, options: argparse.Namespace, redis: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="tidings-bench-") as name, contextlib.ExitStack() as stack:
        folder, port = Path(name), free_port()
        command, variables = server(peer, scenario, options, port, redis, folder)
        log = folder / "server.log"
        process = stack.enter_context(running(command, variables, options.server_core, log))
        wait_for(port, process, log)
        # The listener may be there before the subscription to Redis is.
        time.sleep(0.5)
        arguments = shlex.split(scenario.arguments)
        if arguments[0] != "idle":
            arguments += ["--publish", f"redis://127.0.0.1:{redis}#{CHANNEL}"]
        if scenario.timed:
            arguments += ["--duration", str(options.duration), "--warmup", str(options.warmup)]
        arguments += ["--url", f"ws://127.0.0.1:{port}/ws", "--pid", str(process.pid), "--json"]
        load = ["taskset", "--cpu-list", options.load_core, options.load.resolve(), "bench", *arguments]
        bench = stack.enter_context(
            ended(subprocess.Popen(load, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        )
        out, error = bench.communicate()
        if not out:
            raise RuntimeError(error.decode(errors="replace").strip() or f"ended with {bench.returncode}")
        result: Result = json.loads(out)
        return result


def store_sessions(port: int) -> None:
    """Puts a session for each connection into Redis."""
    commands = []
    for number in range(SESSIONS_STORED):
        value = json.dumps({"user_id": f"user-{number}", "projects": ["bench-*"]}).encode()
        words = [b"SET", b"session:bench-%d" % number, value]
        commands.append(b"*3\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))
    with socket.create_connection(("127.0.0.1", port)) as redis:
        redis.sendall(b"".join(commands))
        answers = redis.makefile("rb")
        for _ in commands:
            assert answers.readline() == b"+OK\r\n"


@contextlib.contextmanager
def ended(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def measure(options: argparse.Namespace) -> tuple[Results, list[str]]:
    """Every scenario and peer in turn, again and again: what changes on the machine then changes for all."""
    results: Results = {}
    failures = []
    with tempfile.TemporaryDirectory(prefix="tidings-bench-") as name:
        port, log = free_port(), Path(name) / "redis.log"
        command = [
            "redis-server",
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        with running(command, {}, options.load_core, log) as redis:
            wait_for(port, redis, log)
            store_sessions(port)
            for repetition in range(1, options.repetitions + 1):
                for key in options.only:
                    peers = [peer for peer in SCENARIOS[key].peers if peer in options.peers]
                    random.shuffle(peers)
                    for peer in peers:
                        say(f"{repetition}/{options.repetitions} {key}: {peer}")
                        try:
                            result = run_once(peer, SCENARIOS[key], options, port)
                        except RuntimeError as error:
                            failures.append(f"{key}, {peer}: {error}")
                            say(f"  failed: {error}")
                            continue
                        results.setdefault((key, peer), []).append(result)
                        if options.raw:
                            line = {"scenario": key, "peer": peer, "repetition": repetition, **result}
                            with options.raw.open("a") as raw:
                                print(json.dumps(line), file=raw)
    return results, failures


# Writing


def write(options: argparse.Namespace, results: Results, failures: list[str]) -> str:
    lines = [*surroundings(options), ""]
    for key in options.only:
        scenario = SCENARIOS[key]
        rows = [(peer, results[key, peer]) for peer in scenario.peers if (key, peer) in results]
        if rows:
            lines += [f"**{scenario.words}** (`{key}`)", "", *table(scenario, rows), ""]
    lines += [f"- failed: {failure}" for failure in failures]
    return "\n".join(lines).rstrip() + "\n"


def table(scenario: Scenario, rows: list[tuple[str, list[Result]]]) -> list[str]:
    first = scenario.figures[0]
    titles = ["", *(figure.title for figure in scenario.figures), "spread", "to tidings", "errors"]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    own = median(first, dict(rows).get(PLAIN, []))
    for peer, runs in rows:
        values = [value for run in runs if (value := first.of(run)) is not None]
        middle = median(first, runs)
        spread = f"{first.write(min(values))} to {first.write(max(values))}" if values else ""
        ratio = f"{middle / own:.2f}" if middle is not None and own else ""
        figures = [figure.write(median(figure, runs)) for figure in scenario.figures]
        busy = any((LOAD.of(run) or 0) > BUSY for run in runs)
        lines.append(
            "| "
            + " | ".join([peer + (" (load saturated)" if busy else ""), *figures, spread, ratio, told(runs)])
            + " |"
        )
    return lines


def median(figure: Figure, runs: list[Result]) -> float | None:
    values = [value for run in runs if (value := figure.of(run)) is not None]
    return statistics.median(values) if values else None


def told(runs: list[Result]) -> str:
    """Errors and closed connections of all runs together."""
    counts: dict[str, int] = {}
    for run in runs:
        for kind, count in run.get("errors", {}).items():
            counts[kind] = counts.get(kind, 0) + count
        for reason, count in run.get("slow_closed", {}).items():
            counts[f"slow closed ({reason})"] = counts.get(f"slow closed ({reason})", 0) + count
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "none"


def surroundings(options: argparse.Namespace) -> list[str]:
    """What a reader must know to judge the figures."""
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    model = models[0].split(":", 1)[1].strip() if models else platform.machine()
    versions = [version([options.tidings, "--version"]), version(["redis-server", "--version"])]
    if BUN in options.peers:
        versions.append("Bun " + version([bun(), "--version"]))
    namespace = "a network namespace of its own" if options.inside else "the machine's network namespace"
    return [
        f"{time.strftime('%Y-%m-%d')}, {model}, {os.cpu_count()} cores, Linux {platform.release()}; "
        f"server on core {options.server_core}, load and Redis on core {options.load_core}, over loopback in "
        f"{namespace}, congestion control `{congestion.read_text().strip()}`. "
        f"{', '.join(filter(None, versions))}. Medians of {options.repetitions} "
        f"runs of {options.duration:g} s, peers in turn; *spread* is the least and the greatest of the first "
        "figure, *to tidings* its ratio to that of `tidings`."
    ]


def version(command: Command) -> str:
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().split(" malloc")[0]
    return ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("stopped; nothing is left running")
        sys.exit(130)
