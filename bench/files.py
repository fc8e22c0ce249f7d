#!/usr/bin/env python3
"""What the file watcher makes of real tools: whether it adds up, how many messages it takes, how long, and how much memory.

A service watches a folder; a subscriber adds up what it is told, and reads the folder anew where an event only counts. After each
scenario that must be what lies there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = 20_000
DEADLINE = 180.0
# Nothing may come after it has added up.
AFTER = 4.0


def snapshot(root: Path) -> dict[str, int]:
    files = {}
    for folder, folders, names in os.walk(root):
        base = os.path.relpath(folder, root)
        if ".git" in folders:
            folders.remove(".git")
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in names + links:
            path = os.path.normpath(os.path.join(base, name))
            with contextlib.suppress(FileNotFoundError):
                files[path] = os.lstat(os.path.join(folder, name)).st_size
    return files


class Subscriber(threading.Thread):
    """Adds up the events of project `p`."""

    def __init__(self, port: int, root: Path) -> None:
        super().__init__(daemon=True)
        self.root, self.port = root, port
        self.files = snapshot(root)
        self.events: list[dict] = []
        self.wrong: list[str] = []
        # It has read the folder, and may know of files before it is told of them: then the counts alone have to add up.
        self.has_read = False
        self.last = time.monotonic()
        self.confirmed = threading.Event()
        self.start()
        assert self.confirmed.wait(20)

    def run(self) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/sse?project_id=p") as answer:
            for line in answer:
                if line.startswith(b"data:"):
                    event = json.loads(line[5:])
                    if event["type"] == "subscription.confirmed":
                        self.confirmed.set()
                    elif event["type"].startswith(("file.", "workspace.")):
                        self.add(event)

    def add(self, event: dict) -> None:
        known = self.files
        match event["type"]:
            case "file.uploaded":
                path = event["file"]["path"]
                if path in known and not self.has_read:
                    self.wrong.append(f"twice: {path}")
                known[path] = event["file"]["size"]
            case "file.changed":
                if event["file_path"] not in known and not self.has_read:
                    self.wrong.append(f"changed and unknown: {event['file_path']}")
                known[event["file_path"]] = event["size"]
            case "file.deleted":
                if known.pop(event["file_path"], None) is None and not self.has_read:
                    self.wrong.append(f"deleted and unknown: {event['file_path']}")
            case "workspace.changed" if event.get("truncated"):
                self.files, self.has_read = snapshot(self.root), True
            case "workspace.changed":
                changes = event["changes"]
                for path in changes["added"] + changes["modified"]:
                    with contextlib.suppress(FileNotFoundError):
                        known[path] = os.lstat(self.root / path).st_size
                for path in changes["deleted"]:
                    if known.pop(path, None) is None and not self.has_read:
                        self.wrong.append(f"deleted and unknown: {path}")
        self.events.append(event)
        self.last = time.monotonic()


def counted(events: list[dict]) -> int:
    """How many files more there are by what the events say."""
    total = 0
    for event in events:
        if event["type"] == "workspace.changed":
            if event.get("truncated"):
                total += sum(c.get("added", 0) - c.get("deleted", 0) for c in event["counts"].values())
            else:
                total += len(event["changes"]["added"]) - len(event["changes"]["deleted"])
        else:
            total += {"file.uploaded": 1, "file.deleted": -1}.get(event["type"], 0)
    return total


def status(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return 0.0


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Bench:
    def __init__(
        self, tidings: Path, folder: Path, wrap: list[str] | None = None, more: dict | None = None
    ) -> None:
        self.folder, self.root = folder, folder / "files"
        self.root.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        table = {"path": str(self.root), "project": "p", **(more or {})}
        env = {
            "PATH": os.environ["PATH"],
            "BACKEND_PORT": str(self.port),
            "TIDINGS_DATA_DIR": str(folder / "data"),
            "TIDINGS_WATCH": json.dumps([table]),
            "TIDINGS_LOG_FORMAT": "text",
        }
        self.log = open(folder / "log", "w+")
        command = [*(wrap or []), str(tidings), "serve"]
        self.process = subprocess.Popen(command, env=env, cwd=folder, stderr=self.log, stdout=self.log)
        until(lambda: self.health() == "healthy", "the service")
        self.subscriber = Subscriber(self.port, self.root)

    def health(self) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/websocket") as answer:
                return json.load(answer)["status"]
        except OSError:
            return ""

    def said(self, words: str) -> bool:
        return words in Path(self.log.name).read_text()

    def measure(
        self, name: str, act: Callable[[Path], object], expected: dict[str, int] | None = None
    ) -> None:
        s, pid = self.subscriber, self.process.pid
        seen, files_before, cpu_before = len(s.events), len(s.files), cpu(pid)
        begun = time.monotonic()
        act(self.root)
        done = time.monotonic()
        want = snapshot(self.root) if expected is None else expected
        try:
            until(lambda: s.files == want, name)
        except TimeoutError:
            missing = sorted(set(want.items()) ^ set(s.files.items()))[:5]
            s.wrong.append(f"{name}: does not add up: {missing}")
        messages = len(s.events) - seen
        time.sleep(AFTER)
        events, added_up = s.events[seen:], s.last
        if len(events) - messages and s.files != want:
            s.wrong.append(f"{name}: something came after it had added up")
        if files_before + counted(events) != len(want):
            s.wrong.append(
                f"{name}: the counts do not add up: {files_before} + {counted(events)} != {len(want)}"
            )
        kinds: dict[str, int] = {}
        for event in events:
            kinds[event["type"]] = kinds.get(event["type"], 0) + 1
        told = ", ".join(f"{count} `{kind}`" for kind, count in sorted(kinds.items()))
        verdict = "yes" if not s.wrong else "NO: " + "; ".join(s.wrong[:3])
        row = (name, verdict, len(events), told, f"{done - begun:.1f}", f"{max(0.0, added_up - done):.1f}")
        row += (f"{cpu(pid) - cpu_before:.1f}", f"{status(pid, 'VmRSS'):.0f}")
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
        s.wrong.clear()
        s.has_read = False

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def until(check: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not check():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.02)


def run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def tree(root: Path, files: int, text: str = "x") -> None:
    for number in range(files):
        path = root / f"d{number % 200:03}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text} {number}\n")


def repository(path: Path) -> None:
    """Two branches, each file another in the other one."""
    path.mkdir()
    git = ["git", "-c", "user.name=b", "-c", "user.email=b@example.com"]
    run(*git, "init", "-q", "-b", "main", cwd=path)
    for branch, text in (("main", "one"), ("other", "two and longer")):
        if branch != "main":
            run(*git, "checkout", "-q", "-b", branch, cwd=path)
        tree(path, FILES, text)
        run(*git, "add", "-A", cwd=path)
        run(*git, "commit", "-q", "-m", branch, cwd=path)
    run(*git, "checkout", "-q", "main", cwd=path)


def upload(path: Path) -> None:
    chunk = os.urandom(1 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(2048):
            file.write(chunk)


def atomic_saves(root: Path) -> None:
    """As VS Code and others do it."""
    for number in range(10):
        draft = root / f"notes.txt.{number}.tmp~"
        draft.write_text(f"saved {number}")
        draft.replace(root / "notes.txt")
        time.sleep(0.02)


def vim(root: Path) -> None:
    for options in ("backupcopy=no", "backupcopy=yes"):
        run(
            "vim",
            "-u",
            "NONE",
            "-n",
            "-es",
            "-c",
            f"set backup writebackup {options} backupdir=.",
            "-c",
            "normal ohello",
            "-c",
            "wq",
            "edited.txt",
            cwd=root,
        )
        with contextlib.suppress(FileNotFoundError):
            (root / "edited.txt~").unlink()
        time.sleep(0.02)


def renames(root: Path) -> None:
    for number in range(100):
        (root / "renamed" / str(number)).rename(root / "renamed" / f"to-{number}")


@contextlib.contextmanager
def folder(base: Path, name: str) -> Iterator[Path]:
    path = base / name
    path.mkdir()
    yield path
    shutil.rmtree(path)


def tools(tidings: Path, base: Path) -> None:
    outside = base / "outside"
    outside.mkdir()
    repository(outside / "repository")
    tree(outside / "source", 5000)
    tree(outside / "moved", 5000)
    with folder(base, "tools") as path:
        bench = Bench(tidings, path)
        bench.measure(
            f"git clone, {FILES:,} files",
            lambda root: run("git", "clone", "-q", outside / "repository", root / "clone"),
        )
        bench.measure(
            "git checkout, every file another",
            lambda root: run("git", "checkout", "-q", "origin/other", cwd=root / "clone"),
        )
        if shutil.which("npm"):
            (bench.root / "package").mkdir()
            bench.measure(
                "npm install express",
                lambda root: run(
                    "npm", "install", "--no-audit", "--no-fund", "express@4", cwd=root / "package"
                ),
            )
        (bench.root / "edited.txt").write_text("text\n")
        (bench.root / "notes.txt").write_text("text\n")
        until(lambda: "notes.txt" in bench.subscriber.files, "two files")
        time.sleep(2)
        if shutil.which("vim"):
            bench.measure("vim saves twice", vim)
        bench.measure("10 atomic saves in 0.2 s", atomic_saves)
        if shutil.which("rsync"):
            bench.measure(
                "rsync, 5,000 files", lambda root: run("rsync", "-a", f"{outside}/source/", root / "synced")
            )
            tree(outside / "source", 50, "changed")
            bench.measure(
                "rsync, 50 of them changed",
                lambda root: run("rsync", "-a", f"{outside}/source/", root / "synced"),
            )
        bench.measure("an upload of 2 GB in chunks of 1 MB", lambda root: upload(root / "upload.bin"))
        (bench.root / "upload.bin").unlink()
        (bench.root / "renamed").mkdir()
        for number in range(100):
            (bench.root / "renamed" / str(number)).write_text(str(number))
        until(
            lambda: "renamed/99" in bench.subscriber.files and "upload.bin" not in bench.subscriber.files,
            "100 files",
        )
        time.sleep(2)
        bench.measure("100 renames", renames)
        bench.measure("a folder of 5,000 moved in", lambda root: (outside / "moved").rename(root / "moved"))
        bench.measure("and out", lambda root: (root / "moved").rename(outside / "moved"))
        bench.measure("rm -r of the clone", lambda root: shutil.rmtree(root / "clone"))
        bench.end()


def watches_of_100(tidings: Path, base: Path) -> None:
    with folder(base, "limit") as path:
        tree(path / "files", 2000)
        limit = 'echo 100 > /proc/sys/user/max_inotify_watches && exec "$@"'
        bench = Bench(tidings, path, ["unshare", "-U", "-r", "sh", "-c", limit, "sh"])
        assert bench.said("fs.inotify.max_user_watches"), "the limit was not told"
        bench.measure("200 folders with 100 inotify watches", lambda root: tree(root, 2000, "changed"))
        bench.end()


def overflow(tidings: Path, base: Path) -> None:
    with folder(base, "overflow") as path:
        tree(path / "files", 5000)
        bench = Bench(tidings, path)
        bench.process.send_signal(signal.SIGSTOP)
        try:
            tree(bench.root, 20_000, "while it cannot listen")
        finally:
            bench.process.send_signal(signal.SIGCONT)
        bench.measure("the kernel's queue runs over", lambda root: None)
        assert bench.said("fs.inotify.max_queued_events"), "the overflow was not told"
        bench.end()


def unreadable(tidings: Path, base: Path) -> None:
    if os.getuid() != 0:
        return
    with folder(base, "unreadable") as path:
        tree(path / "files", 1000)
        os.chown(path, 65534, 65534)
        base.chmod(0o755)
        bench = Bench(tidings, path, ["setpriv", "--reuid=65534", "--clear-groups"])
        known = snapshot(bench.root)

        def close(root: Path) -> None:
            (root / "d000").chmod(0)
            (root / "d001" / "seen").write_text("x")
            (root / "d000" / "unseen").write_text("x")

        bench.measure("a folder that may not be read", close, {**known, "d001/seen": 1})
        bench.measure("and may again", lambda root: (root / "d000").chmod(0o755))
        assert bench.said("cannot be read; what was known"), "it was not told"
        bench.end()


def disk_full(tidings: Path, base: Path) -> None:
    with folder(base, "full") as path:
        bench = Bench(tidings, path)
        watched, state = path / "beside", path / "state"
        watched.mkdir()
        state.mkdir()
        if (
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", state], check=False).returncode
            != 0
        ):
            bench.end()
            return
        log = open(path / "watch.log", "w+")
        process = subprocess.Popen(
            [
                tidings,
                "watch",
                watched,
                "--project",
                "p",
                "--service",
                f"http://127.0.0.1:{bench.port}",
                "--state",
                state,
            ],
            stderr=log,
            cwd=path,
        )
        try:
            until(lambda: "baseline" in Path(log.name).read_text(), "the baseline")
            bench.subscriber.root = bench.root = watched
            bench.measure("no room for the state", lambda root: tree(root, 3000))
            assert "cannot be kept" in Path(log.name).read_text(), "it was not told"
        finally:
            process.terminate()
            process.wait(60)
            subprocess.run(["umount", state], check=False)
        bench.end()


def million(tidings: Path, base: Path) -> None:
    with folder(base, "million") as path:
        tree(path / "files", 1_000_000)
        begun = time.monotonic()
        bench = Bench(tidings, path)
        print(
            f"baseline of 1,000,000 files: {time.monotonic() - begun:.1f} s, {status(bench.process.pid, 'VmRSS'):.0f} MB"
        )
        bench.measure("one of 1,000,000 changes", lambda root: (root / "d000" / "f0").write_text("otherwise"))
        bench.end()
        begun = time.monotonic()
        bench = Bench(tidings, path)
        print(
            f"the next start: {time.monotonic() - begun:.1f} s, {status(bench.process.pid, 'VmRSS'):.0f} MB"
        )
        bench.end()


SCENARIOS = {f.__name__: f for f in (tools, watches_of_100, overflow, unreadable, disk_full, million)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tidings", type=Path, default=ROOT / "target" / "release" / "tidings")
    parser.add_argument("--only", action="append", choices=SCENARIOS)
    parser.add_argument("--in", dest="base", type=Path, help="a folder on the disk to measure on")
    arguments = parser.parse_args()
    print("| scenario | adds up | messages | which | tool s | then s | CPU s | RSS MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=arguments.base) as base:
        for name in arguments.only or SCENARIOS:
            SCENARIOS[name](arguments.tidings.resolve(), Path(base))
    return 0


if __name__ == "__main__":
    sys.exit(main())
