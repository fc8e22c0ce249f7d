"""Turns an event into JSON bytes that every strict parser takes and the service does not find too long.

Nearly every event is plain data, so the fast path is one `json.dumps`. Only when that fails, or when the
event is nested too deep, a copy is made in which every value is replaced by something that JSON has.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from math import isfinite
from os import PathLike, fspath
from typing import Any
from uuid import UUID

EVENT_BYTES_MAX = 1024 * 1024
"""The service refuses more than this."""

TRACEBACK_BYTES_KEPT = 8 * 1024
ERROR_BYTES_KEPT = 8 * 1024

# Parsers with a bound on nesting stop at 128; the envelope around the event needs some of it.
_DEPTH_MAX = 100
_REPR_CHARACTERS_MAX = 1000
_SHRINKABLE = ("task.", "process.")


def encode(event: Mapping[str, Any]) -> bytes:
    """The event as JSON, at most `EVENT_BYTES_MAX` long.

    Events of tasks and processes that are too long lose, in this order and only as far as needed, `result`,
    all but the end of `traceback`, `metadata`, `message` and all but the start of `error`; `omitted` names
    them.
    Raises ValueError when an event is still too long.
    """
    body = to_json(event)
    if len(body) <= EVENT_BYTES_MAX:
        return body
    if str(event.get("type", "")).startswith(_SHRINKABLE):
        body = _shrunk(dict(event))
    if len(body) <= EVENT_BYTES_MAX:
        return body
    raise ValueError(
        f"event {event.get('type')!r} is {len(body)} bytes of JSON, more than the {EVENT_BYTES_MAX} that the"
        " service takes"
    )


def to_json(value: object) -> bytes:
    """Any value as strict JSON in UTF-8."""
    try:
        body = _dumps(value)
    except Exception as error:
        pass_on_time_limit(error)
        return _dumps(_plain(value, ()))
    if body.count(b"[") + body.count(b"{") > _DEPTH_MAX and _too_deep(value):
        return _dumps(_plain(value, ()))
    return body


def pass_on_time_limit(error: BaseException) -> None:
    """Raises `error` again if it is Celery's soft time limit.

    It is an ordinary exception that may strike at any line of the task's thread: whoever swallows it keeps
    the task from ending in time.
    """
    if type(error).__name__ == "SoftTimeLimitExceeded":
        raise error


def _dumps(value: object) -> bytes:
    # Unpaired surrogates cannot be UTF-8, so they fail here instead of reaching a strict parser as an escape.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_substitute)
    return text.encode("utf-8")


def _shrunk(event: dict[str, Any]) -> bytes:
    body, omitted = b"", []
    for name in ("result", "traceback", "metadata", "message", "error"):
        value = event.get(name)
        if value is None:
            continue
        if name == "traceback":
            event[name] = _tail(str(value), TRACEBACK_BYTES_KEPT)
        elif name == "error":
            event[name] = _head(str(value), ERROR_BYTES_KEPT)
        else:
            del event[name]
        omitted.append(name)
        body = to_json({**event, "omitted": omitted})
        if len(body) <= EVENT_BYTES_MAX:
            break
    return body or to_json(event)


def _tail(text: str, bytes_max: int) -> str:
    return text.encode("utf-8", "replace")[-bytes_max:].decode("utf-8", "ignore")


def _head(text: str, bytes_max: int) -> str:
    return text.encode("utf-8", "replace")[:bytes_max].decode("utf-8", "ignore")


def _too_deep(value: object, depth: int = 0) -> bool:
    if depth > _DEPTH_MAX:
        return True
    if isinstance(value, Mapping):
        return any(_too_deep(item, depth + 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_too_deep(item, depth + 1) for item in value)
    if value is None or isinstance(value, (str, int, float)):
        return False
    return _too_deep(_substitute(value), depth + 1)


def _plain(value: object, path: tuple[int, ...]) -> object:
    """A copy of `value` in nothing but JSON's own types; `path` holds the containers around it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _plain(value.value, path)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, int):
        return _plain_int(value)
    if isinstance(value, float):
        return float(value) if isfinite(value) else None
    if id(value) in path or len(path) >= _DEPTH_MAX:
        return _plain(_repr(value), ())
    inside = (*path, id(value))
    if isinstance(value, Mapping):
        return {_key(key): _plain(item, inside) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, inside) for item in value]
    return _plain(_substitute(value), inside)


def _plain_int(value: int) -> int | str:
    try:
        int.__repr__(value)
    except ValueError:  # Python refuses to write very long numbers in decimal
        return hex(value)
    return int(value)


def _key(key: object) -> str:
    if isinstance(key, bool) or key is None:
        return json.dumps(key)
    return str(_plain(key if isinstance(key, str) else _str(key), ()))


def _substitute(value: object) -> object:
    """Something nearer to JSON for a value that JSON does not have. Never raises, never returns `value`."""
    try:
        return _known(value)
    except Exception as error:
        pass_on_time_limit(error)
        return _str(value)


def _known(value: object) -> object:
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (UUID, Decimal)):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _bytes_text(bytes(value))
    if isinstance(value, PathLike):
        path = fspath(value)
        return _bytes_text(path) if isinstance(path, bytes) else path
    if isinstance(value, AbstractSet):
        return _listed(value)
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return _duck(value)


def _duck(value: object) -> object:
    # Pydantic models, then NumPy arrays and scalars, without importing either. Asked of the class, because
    # some objects (mocks, proxies) have every attribute.
    for method, arguments in (("model_dump", {"mode": "json"}), ("tolist", {})):
        convert = getattr(type(value), method, None)
        if callable(convert):
            return convert(value, **arguments)
    return _str(value)


def _listed(values: AbstractSet[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return list(values)


def _bytes_text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")


def _str(value: object) -> str:
    try:
        return str(value)
    except Exception as error:
        pass_on_time_limit(error)
        return f"<{type(value).__name__}>"


def _repr(value: object) -> str:
    try:
        return repr(value)[:_REPR_CHARACTERS_MAX]
    except Exception as error:
        pass_on_time_limit(error)
        return f"<{type(value).__name__}>"
