"""Tells the service over HTTP to which project a Celery task belongs, before anybody could see it run."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

from . import _events
from ._publisher import PublishError
from ._settings import Settings, effective

TIMEOUT_S = 3.0
"""As long as an event may take: a request of the application's waits for it."""

_ANSWER_BYTES_MAX = 64 * 1024

_log = logging.getLogger("tidings")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key goes to the service it is for, and to nobody whom an answer names."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def register(
    task_id: object, project_id: object, task_name: str | None, url: str | None, key: str | None
) -> bool:
    """Whether the service took it. What is wrong is logged, or raised as PublishError with `raise_errors`."""
    task, project = _id("task_id", task_id), _id("project_id", project_id)
    named = {} if task_name is None else {"task_name": task_name}
    request = urllib.request.Request(
        f"{_service(url)}/api/tasks/{quote(task, safe='')}",
        json.dumps({"project_id": project, **named}).encode(),
        {"Content-Type": "application/json", **_authorization(key)},
        method="POST",
    )
    try:
        _opener.open(request, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        with error:
            reason = f"{error.code} {_problem(error)}"
    except (OSError, HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error) or type(error).__name__
    else:
        return True
    if effective(Settings()).raise_errors:
        raise PublishError(f"task {task} was not registered: {reason}")
    _log.error("task %s was not registered, its events may not be shown: %s", task, reason)
    return False


def _service(url: str | None) -> str:
    url = url or os.environ.get("TIDINGS_URL") or "http://localhost:8000"
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"url (or TIDINGS_URL) must begin with http:// or https://, not {url!r}")
    return url.rstrip("/")


def _authorization(key: str | None) -> dict[str, str]:
    key = key or os.environ.get("TIDINGS_PUBLISH_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _id(name: str, value: object) -> str:
    text = _events.identifier(value)
    if text is None:
        raise ValueError(f"{name} must be a string that is not empty, not {value!r}")
    return text


def _problem(error: urllib.error.HTTPError) -> str:
    """What the service says of it (RFC 9457), or what HTTP does."""
    try:
        problem = json.loads(error.read(_ANSWER_BYTES_MAX))
        told = [problem[name] for name in ("code", "detail", "hint") if problem.get(name)]
        return ": ".join(map(str, told)) or str(problem.get("title") or error.reason)
    except (OSError, HTTPException, ValueError, AttributeError):
        return str(error.reason)
