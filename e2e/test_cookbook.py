"""The cookbook of docs/security.md, run as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from uuid import uuid4

import pytest
from tidings import SyncEventBroadcaster

from conftest import FOLDER, Browser, Process, Secrets, Service, Start, free_port, get_json, wait_until

DOCUMENT = (FOLDER.parent / "docs/security.md").read_text("utf-8")
COOKBOOK = DOCUMENT[DOCUMENT.index("## Cookbook: FastAPI") :]
ADA = {"user": "ada", "password": "lovelace"}
BOB = {"user": "bob", "password": "builder"}


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", COOKBOOK, re.MULTILINE | re.DOTALL)
    assert found, f"the cookbook has a block of {language}"
    return found[1]


def started_by_the_document(folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The programs that the shell starts, each with its arguments and what is new in its environment."""
    recorder = dedent(
        f"""\
        #!{sys.executable}
        import json, os, pathlib, sys
        path = pathlib.Path(sys.argv[0])
        path.with_suffix(".json").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
        """
    )
    programs = ("tidings", "uvicorn")
    for program in programs:
        (folder / program).write_text(recorder)
        (folder / program).chmod(0o755)
    before = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["sh", "-euc", block("sh") + "wait"], env=before, check=True, timeout=60)
    records = {program: json.loads((folder / f"{program}.json").read_text()) for program in programs}
    return {
        program: (arguments, {name: value for name, value in after.items() if before.get(name) != value})
        for program, (arguments, after) in records.items()
    }


@dataclass
class Cookbook:
    """The application and the service, with the settings that the document gives them."""

    app: str
    service: Service
    publisher: SyncEventBroadcaster
    secrets: Secrets

    def logged_in(self, who: dict[str, str]) -> Browser:
        browser = Browser()
        assert browser.post(f"{self.app}/login", who) == 200
        self.secrets.add_cookies(self.cookie(browser))
        return browser

    def cookie(self, browser: Browser) -> str:
        return browser.cookie(self.service.http)

    def upload(self, browser: Browser, project_id: str, name: str) -> int:
        return browser.post(f"{self.app}/projects/{project_id}/files", {"file_name": name})


@pytest.fixture
def cookbook(
    start: Start, redis_url: str, logs: Path, tmp_path: Path, secrets: Secrets
) -> Iterator[Cookbook]:
    started = started_by_the_document(tmp_path)
    (of_service, settings), (of_app, environment) = started["tidings"], started["uvicorn"]
    # What the machine of a test has elsewhere.
    assert settings.pop("REDIS_URL") == environment.pop("REDIS_URL") == "redis://localhost:6379"
    assert environment.pop("TIDINGS_URL") == "http://localhost:8000"
    assert of_service == ["serve"]
    assert of_app == ["cookbook:app", "--port", "8001"]
    secrets.add(ADA["password"], settings["TIDINGS_SESSION_SECRET"], settings["TIDINGS_REVOKE_KEY"])
    service = start(**settings)
    (tmp_path / "cookbook.py").write_text(block("python"), "utf-8")
    port = free_port()
    process = Process(
        *(sys.executable, "-m", "uvicorn", *of_app[:-1], str(port), "--app-dir", str(tmp_path)),
        log=logs / "cookbook.log",
        **environment,
        REDIS_URL=redis_url,
        TIDINGS_URL=service.http,
    )
    app = f"http://localhost:{port}"
    try:
        wait_until(lambda: get_json(f"{app}/openapi.json"), "the application")
        yield Cookbook(app, service, SyncEventBroadcaster(redis_url), secrets)
    finally:
        process.stop()


def test_the_settings_of_the_cookbook_are_those_that_the_document_names(tmp_path: Path) -> None:
    _, settings = started_by_the_document(tmp_path)["tidings"]
    row = next(line for line in DOCUMENT.splitlines() if line.startswith("| FastAPI or Starlette"))
    for name, value in re.findall(r"`(TIDINGS_\w+)(?:=([^`]*))?`", row):
        assert settings[name] == value or (not value and settings[name]), (
            f"{name} in the table and in the block"
        )


def test_who_is_logged_in_sees_own_projects_and_nothing_of_others(cookbook: Cookbook) -> None:
    web, secret = f"team-a/{uuid4().hex}", f"team-b/{uuid4().hex}"
    browser, other = cookbook.logged_in(ADA), cookbook.logged_in(BOB)
    page = cookbook.service.open(cookbook.cookie(browser), origin=cookbook.app)
    assert page.subscribe(web)["type"] == "subscription.confirmed"
    refused = page.subscribe(secret)
    assert (refused["type"], refused["code"]) == ("error", "not_authorized")
    others = cookbook.service.follow(secret, cookbook.cookie(other))

    assert cookbook.publisher.project_created(secret, {"id": secret, "name": "Secret"})
    assert cookbook.upload(other, secret, "plan.pdf") == 200
    assert cookbook.upload(browser, secret, "mine.pdf") == 403
    seen = others.until("file.uploaded")
    assert [event["type"] for event in seen] == ["project.created", "file.uploaded"]
    assert cookbook.publisher.project_created(web, {"id": web, "name": "Web"})
    assert cookbook.upload(browser, web, "a.mp4") == 200
    created, uploaded = page.next(), page.next()
    assert (created["type"], created["data"]["name"]) == ("project.created", "Web")
    assert (uploaded["type"], uploaded["project_id"]) == ("file.uploaded", web)
    assert uploaded["file"] == {"name": "a.mp4", "path": "uploads/a.mp4"}
    assert page.nothing_waits()
    assert others.nothing_waits()


def test_who_is_not_logged_in_does_not_get_in(cookbook: Cookbook) -> None:
    browser = Browser()
    assert browser.post(f"{cookbook.app}/login", ADA | {"password": "wrong password"}) == 401
    assert browser.post(f"{cookbook.app}/projects/team-a/web/files", {"file_name": "a"}) == 403
    assert cookbook.cookie(browser) == ""
    code, reason = cookbook.service.turned_away(origin=cookbook.app)
    assert code == 4401
    assert "the cookie `session`" in reason


def test_a_page_of_another_site_gets_nowhere_with_the_cookie(cookbook: Cookbook) -> None:
    from websockets.exceptions import InvalidStatus

    cookie = cookbook.cookie(cookbook.logged_in(ADA))
    with pytest.raises(InvalidStatus, match="403"):
        cookbook.service.open(cookie, origin="https://evil.example")


def test_a_logout_ends_what_is_connected_and_what_was_copied(cookbook: Cookbook) -> None:
    web = f"team-a/{uuid4().hex}"
    browser, elsewhere = cookbook.logged_in(ADA), cookbook.logged_in(BOB)
    copied = cookbook.cookie(browser)
    page = cookbook.service.follow(web, copied)
    stays = cookbook.service.open(cookbook.cookie(elsewhere))
    assert cookbook.upload(browser, web, "a.mp4") == 200
    assert page.next()["type"] == "file.uploaded"

    assert browser.post(f"{cookbook.app}/logout") == 200
    removed = page.next()
    assert (removed["type"], removed["project_id"], removed["reason"]) == (
        "subscription.removed",
        web,
        "expired",
    )
    assert page.close_code() == 4401
    assert cookbook.cookie(browser) == ""
    code, reason = cookbook.service.turned_away(copied)
    assert code == 4401
    assert "revoked" in reason
    assert stays.nothing_waits()

    def logged_in_again() -> str:
        # A cookie of the same second is the same cookie.
        cookie = cookbook.cookie(cookbook.logged_in(ADA))
        return cookie if cookie != copied else ""

    again = cookbook.service.follow(web, wait_until(logged_in_again, "another cookie"))
    assert again.nothing_waits()


def test_the_cookbook_is_typed(tmp_path: Path) -> None:
    (tmp_path / "cookbook.py").write_text(block("python"), "utf-8")
    cache = FOLDER.parent / "target/mypy"
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache), "cookbook.py"]
    checked = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stdout + checked.stderr
