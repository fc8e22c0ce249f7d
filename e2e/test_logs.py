"""Whatever somebody tries, and whatever breaks: the log has no secret, and nothing that a terminal obeys.

Every other test here looks through its logs for its own secrets, too: `start` in conftest.py does that.
"""

from __future__ import annotations

import json
import secrets as random
import socket
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
import redis
from itsdangerous import TimestampSigner

from conftest import Secrets, Service, Start, get_json, post, wait_until

KEYS = ("publisher", "admin", "app", "wrong")
ESCAPES = "\x1b[31mred\x07\x9b\u202e\x7f"


@pytest.fixture
def redis_user(redis_url: str, secrets: Secrets) -> Iterator[tuple[redis.Redis, str, str]]:
    """The Redis, the name of a user there who needs a password, and the URL that has it."""
    name, password = f"e2e-{random.token_hex(4)}", random.token_hex(16)
    secrets.add(password)
    with redis.Redis.from_url(redis_url) as store:
        store.acl_setuser(
            name, enabled=True, passwords=[f"+{password}"], keys="*", channels="*", categories=["+@all"]
        )
        yield store, name, f"redis://{name}:{password}@{urlsplit(redis_url).netloc}/0"
        store.acl_deluser(name)


def signed(secret: str, session: object) -> str:
    return TimestampSigner(secret).sign(b64encode(json.dumps(session).encode())).decode()


def refused(url: str, body: object, key: str) -> int:
    with pytest.raises(HTTPError) as answer:
        post(url, body, key)
    answer.value.close()
    return answer.value.code


def sent(service: Service, head: str, body: bytes = b"") -> None:
    """Sends what no library would, and waits for whatever is answered."""
    with socket.create_connection(("localhost", service.port), timeout=30) as raw:
        raw.sendall(head.replace("\n", "\r\n").encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body)
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(65536):
            pass


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nobody is let in cookie=an%20old-secret", "secrets in the log"),
        ("nobody is let in cookie=an old-secret", "secrets in the log"),
        ("nobody is let in name=\x1b[31m", "control characters in the log"),
    ],
)
def test_what_must_not_be_in_a_log_is_found_there(tmp_path: Path, line: str, words: str) -> None:
    secrets, log = Secrets(), tmp_path / "service.log"
    secrets.add_cookies("session=an%20old-secret")
    log.write_text("INFO listening\n")
    secrets.check(log)
    log.write_text(f"INFO listening\n{line}\n")
    with pytest.raises(AssertionError, match=words):
        secrets.check(log)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_secret_and_no_escape_is_logged_at_debug_level(
    redis_user: tuple[redis.Redis, str, str], start: Start, secrets: Secrets, log_format: str
) -> None:
    store, redis_name, url = redis_user
    keys = {name: f"{name}-{random.token_hex(16)}" for name in KEYS}
    signing, wrong_signing, session_id, rubbish_id = (random.token_hex(16) for _ in range(4))
    secrets.add(*keys.values(), signing, wrong_signing, session_id, rubbish_id)
    service = start(
        REDIS_URL=url,
        TIDINGS_LOG_FORMAT=log_format,
        TIDINGS_AUTH="redis-session,signed-cookie,ticket",
        TIDINGS_SESSION_SECRET=signing,
        TIDINGS_PUBLISH_KEYS=keys["publisher"],
        TIDINGS_ADMIN_KEY=keys["admin"],
        TIDINGS_KEYS=json.dumps([{"name": "app", "key": keys["app"], "scopes": ["tickets", "revoke"]}]),
    )

    # Sessions and tickets that are good, and some that are not.
    of_ada = {"user_id": f"ada-{random.token_hex(4)}", "projects": ["own"]}
    store.set(f"session:{session_id}", json.dumps(of_ada))
    secret_content = random.token_hex(16)
    store.set(f"session:{rubbish_id}", json.dumps({"user_id": {secret_content: ESCAPES}}))
    cookie = signed(signing, of_ada | {"password": secret_content})
    forged, mangled = signed(wrong_signing, of_ada), signed(signing, [secret_content, ESCAPES])
    ticket = post(f"{service.http}/api/tickets", of_ada, keys["app"])["ticket"]
    never_given = random.token_hex(32)
    secrets.add(secret_content, cookie, forged, mangled, ticket, never_given)
    pages = [service.follow("own", f"session={value}") for value in (session_id, cookie)]
    pages.append(service.open("", f"tidings.ticket.{ticket}"))
    for protocol in (ticket, never_given):
        assert service.turned_away("", f"tidings.ticket.{protocol}")[0] == 4401
    for value in (forged, mangled, random.token_hex(16), '"quoted value"', "%1b%5b31m"):
        assert service.turned_away(f"session={value}")[0] == 4401
    assert service.turned_away(f"session={rubbish_id}")[0] == 1013

    # Keys that are wrong, or where they do not belong.
    event = {"type": "custom.happened", "project_id": "own"}
    assert post(f"{service.http}/api/events", event, keys["publisher"])["accepted"] == 1
    for path, body, key in (
        ("/api/events", event, keys["wrong"]),
        ("/api/events", event, keys["app"]),
        ("/api/revoke", {"session": cookie}, keys["publisher"]),
        ("/api/tickets", of_ada, keys["wrong"]),
        (f"/api/events?key={keys['wrong']}&token={cookie}", event, ""),
    ):
        assert refused(f"{service.http}{path}", body, key) in (401, 403), path
    assert service.turned_away("", "tidings.v1", origin=f"http://localhost:{service.port}")[0] == 4401

    # What would be obeyed by a terminal, wherever it may stand.
    get = f"Host: localhost:{service.port}\nConnection: close"
    for head in (
        f"GET /{ESCAPES} HTTP/1.1\n{get}",
        f"GET /ws?token={cookie}&x=%1b%5b31m HTTP/1.1\n{get}",
        f"GET /api/projects/%1b%5b31m/events HTTP/1.1\n{get}\nCookie: session={session_id}",
        f"GET /ws HTTP/1.1\n{get}\nCookie: session={cookie}{ESCAPES}",
        f"GET /ws HTTP/1.1\n{get}\nOrigin: http://{ESCAPES}\nUser-Agent: {ESCAPES}",
        f"GET /ws HTTP/1.1\n{get}\nAuthorization: Basic {keys['wrong']}",
        f"{cookie} {ESCAPES}",
    ):
        sent(service, head)
    named = {"type": f"custom.{ESCAPES}", "project_id": ESCAPES, "id": ESCAPES, "task_id": ESCAPES}
    assert refused(f"{service.http}/api/events", named, keys["publisher"]) == 422
    for text in (json.dumps(named), json.dumps(named, ensure_ascii=False), ESCAPES, cookie):
        store.publish("websocket:broadcast", text)
        store.xadd("tidings:ingest", {"event": text})
        store.xadd("tidings:ingest", {ESCAPES: text})
    assert pages[0].until("custom.happened")
    assert pages[0].subscribe(ESCAPES)["type"] == "error"

    # The password is refused for a while.
    store.acl_setuser(redis_name, enabled=False)
    store.client_kill_filter(user=redis_name)
    health = f"{service.http}/health/websocket"
    wait_until(lambda: not (get_json(health) or {}).get("redis_connected"), "an outage")
    wait_until(lambda: service.turned_away(f"session={session_id}")[0] == 1013, "no verdict")
    store.acl_setuser(redis_name, enabled=True)
    wait_until(lambda: (get_json(health) or {}).get("status") == "healthy", "the end of the outage")

    # All that was good ends.
    assert post(f"{service.http}/api/revoke", {"session": cookie}, keys["app"]) is None
    assert pages[1].until("subscription.removed")
    assert pages[1].close_code() == 4401
    assert post(f"{service.http}/api/revoke", {"user_id": of_ada["user_id"]}, keys["admin"]) is None
    assert service.turned_away(f"session={cookie}")[0] == 4401
    secrets.check(service.log)
