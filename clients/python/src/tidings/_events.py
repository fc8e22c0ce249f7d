"""Builds the events of the contract, one function per call.

Pure: no clock but the one for `timestamp`, no connection, no settings. Both broadcasters and `ProgressTask`
take their events from here, so that they cannot differ. A wrong argument raises at once and names the
parameter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from decimal import Decimal
from math import isfinite
from numbers import Real
from pathlib import PurePosixPath
from typing import Any, TypeAlias
from uuid import UUID

Event: TypeAlias = dict[str, Any]

CHANGE_TYPES = ("modified", "created", "deleted")
OUTCOMES = ("success", "failed")

_TYPE = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+")
_TYPE_BYTES_MAX = 100


def project_created(project_id: str, project_data: Any) -> Event:
    """`project.created`: a project exists now; `project_data` is what a list of projects needs to show it."""
    return _project("project.created", project_id, project_data)


def project_updated(project_id: str, project_data: Any) -> Event:
    """`project.updated`: `project_data` is the project as it is now."""
    return _project("project.updated", project_id, project_data)


def project_deleted(project_id: str, project_data: Any = None) -> Event:
    """`project.deleted`: the project is gone."""
    return _project("project.deleted", project_id, project_data)


def file_uploaded(project_id: str, file_info: Mapping[str, Any] | str | os.PathLike[str]) -> Event:
    """`file.uploaded`: `file_info` has `path`, and `name` or it is the path's last part; `size` in bytes."""
    return _event("file.uploaded", project_id=_id("project_id", project_id), file=_file(file_info))


def file_deleted(project_id: str, file_path: str | os.PathLike[str]) -> Event:
    """`file.deleted`: the file at `file_path` is gone."""
    return _event(
        "file.deleted", project_id=_id("project_id", project_id), file_path=_path("file_path", file_path)
    )


def file_changed(project_id: str, file_path: str | os.PathLike[str], change_type: str) -> Event:
    """`file.changed`: `change_type` is `modified`, `created` or `deleted`."""
    return _event(
        "file.changed",
        project_id=_id("project_id", project_id),
        file_path=_path("file_path", file_path),
        change_type=_one_of("change_type", change_type, CHANGE_TYPES),
    )


def workspace_changed(
    workspace_id: str, change_summary: Mapping[str, Any], project_id: str | None = None
) -> Event:
    """`workspace.changed`: `change_summary` is `{"added", "modified", "deleted"}`, each a list of paths."""
    if not isinstance(change_summary, Mapping):
        raise TypeError(f"change_summary must be a mapping of lists of paths, not {_kind(change_summary)}")
    event = _event(
        "workspace.changed", workspace_id=_id("workspace_id", workspace_id), changes=dict(change_summary)
    )
    if project_id is not None:
        event["project_id"] = _id("project_id", project_id)
    return event


def task_started(task_id: str, task_name: str, project_id: str, metadata: Any = None) -> Event:
    """`task.started`: an attempt of the task begins."""
    return _task(
        "task.started", task_id, project_id, task_name=_id("task_name", task_name), metadata=metadata
    )


def task_progress(
    task_id: str,
    project_id: str,
    current: float,
    total: float,
    message: str | None = None,
    metadata: Any = None,
) -> Event:
    """`task.progress`: `current` of `total` steps are done; the percentage (0 to 100) is worked out here."""
    progress = {
        "current": _number("current", current),
        "total": _number("total", total),
        "percentage": percentage(current, total),
    }
    return _task(
        "task.progress", task_id, project_id, progress=progress, message=_text(message), metadata=metadata
    )


def task_completed(task_id: str, project_id: str, result: Any = None) -> Event:
    """`task.completed`: the task has ended well."""
    return _task("task.completed", task_id, project_id, result=result)


def task_failed(task_id: str, project_id: str, error: object, traceback: object = None) -> Event:
    """`task.failed`: the task has ended badly; `error` is a text or the exception itself."""
    return _task(
        "task.failed", task_id, project_id, error=error_text(error), traceback=_text(traceback) or None
    )


def process_started(project_id: str, process_id: str, message: str | None = None) -> Event:
    """`process.started`: a process that is not a Celery task begins."""
    return _process("process.started", project_id, process_id, message=_text(message))


def process_progress(project_id: str, process_id: str, progress: float, message: str | None = None) -> Event:
    """`process.progress`: `progress` is a percentage, held to 0 to 100."""
    value = min(100, max(0, _number("progress", progress)))
    return _process("process.progress", project_id, process_id, progress=value, message=_text(message))


def process_completed(
    project_id: str,
    process_id: str,
    message: str | None = None,
    outcome: str | None = None,
    error: object = None,
) -> Event:
    """`process.completed`: `outcome` is `success` or `failed`; `error` says why it failed."""
    return _process(
        "process.completed",
        project_id,
        process_id,
        message=_text(message),
        outcome=None if outcome is None else _one_of("outcome", outcome, OUTCOMES),
        error=None if error is None else error_text(error),
    )


def publish(event: Mapping[str, Any]) -> Event:
    """Any event, also of a type of your own: `{"type": "word.word", ...}`; `timestamp` is filled in."""
    if not isinstance(event, Mapping):
        raise TypeError(f"event must be a mapping, not {_kind(event)}")
    type_ = event.get("type")
    if not isinstance(type_, str):
        raise TypeError(f"event['type'] must be a string, not {_kind(type_)}")
    if not _TYPE.fullmatch(type_) or len(type_) > _TYPE_BYTES_MAX:
        raise ValueError(f"event['type'] must look like 'word.word', in lower case, not {type_!r}")
    built = dict(event)
    if built.get("timestamp") is None:
        built["timestamp"] = _now()
    return built


def percentage(current: float, total: float) -> float:
    """How much of `total` is done, 0 to 100; 0 when there is nothing to do."""
    if total <= 0 or current <= 0:
        return 0
    if current >= total:
        return 100
    share = round(float(current * 100 / total), 2)
    return int(share) if share.is_integer() else share


def error_text(error: object) -> str:
    """What went wrong in words; an exception without a text is named by its class."""
    text = _text(error)
    if text and text.strip():
        return text
    return type(error).__name__ if isinstance(error, BaseException) else "unknown error"


def identifier(value: object) -> str | None:
    """A project or task id as the events carry it, or None if `value` cannot be one."""
    if isinstance(value, (str, UUID)) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value) or None
    return None


def _project(type_: str, project_id: str, data: Any) -> Event:
    event = _event(type_, project_id=_id("project_id", project_id))
    if data is not None:
        event["data"] = data
    return event


def _task(type_: str, task_id: str, project_id: str, **fields: Any) -> Event:
    ids = {"task_id": _id("task_id", task_id), "project_id": _id("project_id", project_id)}
    return _event(type_, **ids, **_present(fields))


def _process(type_: str, project_id: str, process_id: str, **fields: Any) -> Event:
    ids = {"project_id": _id("project_id", project_id), "process_id": _id("process_id", process_id)}
    return _event(type_, **ids, **_present(fields))


def _event(type_: str, **fields: Any) -> Event:
    return {"type": type_, "timestamp": _now(), **fields}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _id(name: str, value: object) -> str:
    text = identifier(value)
    if text:
        return text
    if value == "":
        raise ValueError(f"{name} must not be empty")
    raise TypeError(f"{name} must be a string, not {_kind(value)}")


def _path(name: str, value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {_kind(value)}")
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError(f"{name} must be a path of text, not {_kind(path)}")
    if not path:
        raise ValueError(f"{name} must not be empty")
    return path


def _file(file_info: object) -> dict[str, Any]:
    if isinstance(file_info, (str, os.PathLike)):
        file_info = {"path": file_info}
    if not isinstance(file_info, Mapping):
        raise TypeError(f"file_info must be a mapping with 'path', not {_kind(file_info)}")
    if file_info.get("path") is None:
        raise ValueError("file_info must have a 'path'")
    path = _path("file_info['path']", file_info["path"])
    # A name of its own stays: the path may be a storage key that tells a reader nothing.
    name = _text(file_info.get("name")) or PurePosixPath(path.replace("\\", "/")).name or path
    return {**file_info, "name": name, "path": path}


def _number(name: str, value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        raise TypeError(f"{name} must be a number, not {_kind(value)}")
    if isinstance(value, int):
        return int(value)
    number = float(value)
    if not isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {number}")
    return int(number) if number.is_integer() and not isinstance(value, float) else number


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return str(value)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _kind(value: object) -> str:
    return type(value).__name__
