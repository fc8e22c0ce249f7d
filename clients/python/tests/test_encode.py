from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from unittest.mock import Mock
from uuid import UUID

import pytest

from conftest import parse_strictly
from tidings._encode import EVENT_BYTES_MAX, encode, to_json


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


@dataclass
class Point:
    x: float
    when: date


class Unprintable:
    def __str__(self):
        raise RuntimeError("no")

    __repr__ = __str__


class Model:
    def model_dump(self, mode):
        return {"mode": mode}


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        ([float("inf"), 1.5], [None, 1.5]),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime(2026, 1, 2, tzinfo=timezone.utc), "2026-01-02T00:00:00+00:00"),
        (timedelta(minutes=1), 60.0),
        (Decimal("1.10"), "1.10"),
        ({3, 1}, [1, 3]),
        (b"abc", "abc"),
        (b"\xff", "/w=="),
        (Path("a/b"), "a/b"),
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        (Point(float("nan"), date(2026, 1, 2)), {"x": None, "when": "2026-01-02"}),
        (OrderedDict(a=Pair(1, {2})), {"a": [1, [2]]}),
        ({1: "a", None: "b", False: "c"}, {"1": "a", "null": "b", "false": "c"}),
        ({(1, 2): "a", UUID(int=1): "b"}, {"(1, 2)": "a", str(UUID(int=1)): "b"}),
        ("a\ud800b", "a?b"),
        ({"\ud800": 1}, {"?": 1}),
        (Unprintable(), "<Unprintable>"),
        (Model(), {"mode": "json"}),
        (2**70, 2**70),
        ([10**5000], [hex(10**5000)]),
        ("é\u2028\x00", "é\u2028\x00"),
        (int, "<class 'int'>"),
    ],
)
def test_every_value_becomes_strict_json(value, expected):
    assert parse_strictly(to_json({"v": value}))["v"] == expected


def test_circles_depth_and_odd_objects_end():
    circle = {"name": "c"}
    circle["self"] = circle
    assert parse_strictly(to_json(circle))["name"] == "c"
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, deep_dict(200), Mock(), object(), [circle] * 2):
        assert depth(parse_strictly(to_json({"v": value}))) < 128


def deep_dict(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def depth(value):
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(depth, items), default=0)


def test_many_shallow_containers_are_left_alone():
    value = [{"a": [i]} for i in range(1000)]
    assert parse_strictly(to_json(value)) == value


def test_a_long_result_is_left_out_and_named():
    event = {"type": "task.completed", "task_id": "t", "result": "x" * 5_000_000, "message": "m"}
    sent = parse_strictly(encode(event))
    assert sent == {"type": "task.completed", "task_id": "t", "message": "m", "omitted": ["result"]}
    assert event["result"], "the caller's event is not touched"


def test_only_as_much_is_left_out_as_is_needed():
    event = {
        "type": "task.failed",
        "task_id": "t",
        "error": "e" * 900_000,
        "traceback": "a" * 400_000 + "end",
    }
    sent = parse_strictly(encode(event))
    assert sent["omitted"] == ["traceback"]
    assert sent["traceback"].endswith("end")
    assert len(sent["traceback"]) == 8192
    sent = parse_strictly(encode({"type": "task.failed", "error": "\u20ac" * 900_000}))
    assert (sent["omitted"], len(sent["error"].encode())) == (["error"], 8190)


def test_what_cannot_be_shortened_is_refused():
    for event in (
        {"type": "comment.added", "text": "x" * EVENT_BYTES_MAX},
        {"type": "task.progress", "a": "x" * 2**20},
    ):
        with pytest.raises(ValueError, match="bytes of JSON"):
            encode(event)


def test_one_mebibyte_exactly_is_taken():
    event = {"type": "comment.added", "text": ""}
    event["text"] = "x" * (EVENT_BYTES_MAX - len(json.dumps(event, separators=(",", ":"))))
    assert len(encode(event)) == EVENT_BYTES_MAX


def test_a_soft_time_limit_is_never_swallowed():
    from celery.exceptions import SoftTimeLimitExceeded

    class Slow:
        def __str__(self):
            raise SoftTimeLimitExceeded

    with pytest.raises(SoftTimeLimitExceeded):
        to_json({"v": Slow()})
