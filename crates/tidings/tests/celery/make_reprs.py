"""Writes dictionaries that are hard to read back from their `saferepr`, one JSON object a line.

Each line: `celery` (its version), `maxlen` (what `saferepr` was given), `kwargs` (the dictionary, as `tagged`
writes it), `kwargs_repr` (what `saferepr` made of it), `project` (the true `project_id` as text; null if it
is none of str, int and UUID). Some have `args_repr`: the same for the tuple of the dictionary's values, and
`index`, where `project_id` stands in it.

`reprs.ndjson` beside this file is of both versions, one after the other, each by

    python make_reprs.py --lines 1500 --short --seed VERSION >> reprs.ndjson

in an environment with `celery==5.4.0` and VERSION 540, then in one with `celery==5.7.0` and 570.
"""

import argparse
import datetime
import decimal
import json
import random
import sys
import uuid

import celery
from celery.utils.saferepr import saferepr

KEY = "project_id"
VICTIM = "victim"

# What names and texts are made of, each picked for what it could make a reader believe.
FRAGMENTS = [
    "'", '"', "\\", "\\'", "{", "}", "[", "]", "(", ")", ",", ":", ", ", ": ", " ", "#", "\n", "\t", "\u2028",
    "\x00", "...", ", ...", "a", "p-1", KEY, f"'{KEY}'", f"'{KEY}': '{VICTIM}'", f"\"{KEY}\": \"{VICTIM}\"",
    f"', '{KEY}': '{VICTIM}", f"\\', '{KEY}': '{VICTIM}", f"\\\", \"{KEY}\": \"{VICTIM}\"", "b'", "u'", "')",
    "UUID('", "None", "\\x41", "\\u0041", "\u00e9", "\u65e5\u672c", "\U0001f600", "\u02bc", "\u2019", "0",
    "-1",
]  # fmt: skip

# What objects print in place of themselves.
PRINTED = [
    f"'{KEY}': '{VICTIM}'",
    f"1, '{KEY}': '{VICTIM}'",
    f"1, '{KEY}': '{VICTIM}', ...}}",
    f"1, '{KEY}': '{VICTIM}'}}",
    f"'x', '{KEY}': '{VICTIM}', 'z': {{'y': 1",
    "2}, 'w': 1",
    "2}",
    f"1, '{KEY}': '{VICTIM}', 'z': '",
    f"1, '{KEY}': '{VICTIM}', 'z': y",
    "', 'w': 1",
    "'",
    "x",
    f"1], '{KEY}': '{VICTIM}', 'z': [1",
    f"1}}, '{KEY}': '{VICTIM}', 'z': {{1",
    f"1, '{KEY}': 7, 'z': [",
    f"[1], '{KEY}': UUID('12345678-1234-5678-1234-567812345678'), 'z': [2",
    "...",
    ", ...",
    f"<Thing '{KEY}'>",
    f"Thing('{KEY}': '{VICTIM}')",
]


class Prints:
    """An object that prints itself as it likes."""

    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return self.text


class PrintsAsNumber(int):
    """A number of the application's own: these are printed by their `str`."""

    def __new__(cls, text):
        made = super().__new__(cls, 1)
        made.text = text
        return made

    def __str__(self):
        return self.text


class Long(str):
    """A text that is written to the fixture as its part and how often it is repeated."""

    def __new__(cls, part, times):
        made = super().__new__(cls, part * times)
        made.part, made.times = part, times
        return made


def tagged(value):
    """The value as JSON that says of what type it is; what is only printed, as what it prints."""
    if isinstance(value, Long):
        return {"long": [value.part, value.times]}
    if type(value) is str:
        return value
    if type(value) is int:
        return {"int": str(value)}
    if isinstance(value, uuid.UUID):
        return {"uuid": str(value)}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[tagged(key), tagged(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple, set, frozenset)):
        return {type(value).__name__: [tagged(item) for item in value]}
    return {"printed": str(value) if isinstance(value, (int, float)) else repr(value)}


class Maker:
    """Dictionaries from one seed. Objects lie only in calls that have the argument: `repr.rs` says why."""

    def __init__(self, seed, short):
        self.random = random.Random(seed)
        self.long_max = 40 if short else 500
        self.fragments_max = 4 if short else 7
        self.names_max = 4 if short else 6

    def text(self):
        if self.random.random() < 0.5:
            return self.random.choice(
                ["a", "p-1", "name", "video.mp4", "/data/a b.mp4", "hello, world", "", KEY]
            )
        return "".join(self.random.choices(FRAGMENTS, k=self.random.randrange(1, self.fragments_max)))

    def long(self):
        return Long(
            self.random.choice(["x", "ab ", "it's ", "\\", '"', "\u00e9", "... "]),
            self.random.randrange(1, self.long_max),
        )

    def uuid(self):
        return uuid.UUID(int=self.random.getrandbits(128))

    def scalar(self):
        names = [True, False, None, 1.5, -0.0, 1e300]
        others = [decimal.Decimal("1.50"), datetime.date(2026, 11, 27), float("nan"), 1 + 2j, 2**70]
        kinds = [
            self.text,
            self.text,
            self.text,
            self.long,
            self.uuid,
            lambda: self.random.randrange(-5, 10**6),
            lambda: self.random.choice(names),
            lambda: self.random.choice(others),
            lambda: self.text().encode() + self.random.choice([b"", b"", b"\xff", b"\xc3"]),
        ]
        return self.random.choice(kinds)()

    def value(self, depth, lies):
        if lies and self.random.random() < 0.35:
            return self.random.choice([Prints, PrintsAsNumber])(
                self.random.choice(PRINTED) + self.random.choice(["", "", " x", "y" * 60])
            )
        if depth > 4 or self.random.random() < 0.7:
            return self.scalar()
        size = self.random.randrange(4)
        kind = self.random.choice([dict, dict, list, list, tuple, set, frozenset])
        if kind is dict:
            return {self.key(lies): self.value(depth + 1, lies) for _ in range(size)}
        if kind in (set, frozenset):
            # Of one at most: the order of more depends on the process.
            return kind(self.scalar() for _ in range(min(size, 1)))
        return kind(self.value(depth + 1, lies) for _ in range(size))

    def key(self, lies):
        kinds = [
            self.text,
            self.text,
            lambda: KEY,
            lambda: 1,
            lambda: None,
            lambda: (1, self.text()),
            lambda: b"k",
        ]
        if lies:
            kinds.append(lambda: Prints(self.random.choice(PRINTED)))
        return self.random.choice(kinds)()

    def name(self):
        return self.random.choice(["a", "b", "c", "name", "path", "project", KEY + "s", self.text()])

    def project(self):
        if self.random.random() < 0.7:
            plain = ["p-1", "a b", "p.1", "\u00e9", "42", "projects/7", "p..."]
            return self.random.choice(
                [self.random.choice(plain), self.random.randrange(-2, 10**9), self.uuid()]
            )
        if self.random.random() < 0.2:
            return self.value(1, False)
        return self.random.choice(
            [self.text(), self.long(), None, True, 1.0, b"p-1", ["p-1"], ("p-1",), {"id": "p-1"}]
        )

    def kwargs(self):
        made = {self.name(): None for _ in range(self.random.randrange(self.names_max))}
        made.pop(KEY, None)
        names = list(made)
        present = self.random.random() < 0.85
        if present:
            names.insert(0 if self.random.random() < 0.2 else self.random.randrange(len(names) + 1), KEY)
        lies = present and self.random.random() < 0.4
        return {name: self.project() if name == KEY else self.value(1, lies) for name in names}, lies


def truth(value):
    """The project as text, if it is one."""
    if isinstance(value, (str, uuid.UUID)) or type(value) is int:
        return str(value)
    return None


def line(maker, maxlens):
    kwargs, lies = maker.kwargs()
    maxlen = maker.random.choice(maxlens)
    made = {
        "celery": celery.__version__,
        "maxlen": maxlen,
        "kwargs": tagged(kwargs),
        "kwargs_repr": saferepr(kwargs, maxlen),
        "project": truth(kwargs.get(KEY)),
    }
    if KEY in kwargs and not lies and maker.random.random() < 0.3:
        made["args_repr"] = saferepr(tuple(kwargs.values()), maxlen)
        made["index"] = list(kwargs).index(KEY)
    return made


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--lines", type=int, required=True)
    options.add_argument("--seed", type=int, required=True)
    options.add_argument("--short", action="store_true", help="cut early, so that the lines are short")
    asked = options.parse_args()
    maker = Maker(asked.seed, asked.short)
    maxlens = [40, 80, 120, 200, 200, 1024] if asked.short else [1024]
    for _ in range(asked.lines):
        sys.stdout.write(json.dumps(line(maker, maxlens), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
