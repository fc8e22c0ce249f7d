//! Dictionaries that are hard to read back, from one seed: those of `make_reprs.py`, in Rust, to have many.

use fastrand::Rng;

use super::saferepr::Value;

/// What names and texts are made of, each picked for what it could make a reader believe.
const FRAGMENTS: &[&str] = &[
    "'",
    "\"",
    "\\",
    "\\'",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    ",",
    ":",
    ", ",
    ": ",
    " ",
    "#",
    "\n",
    "\u{2028}",
    "\0",
    "...",
    ", ...",
    "a",
    "p-1",
    "project_id",
    "'project_id'",
    "'project_id': 'victim'",
    "\"project_id\": \"victim\"",
    "', 'project_id': 'victim",
    "\\', 'project_id': 'victim",
    "\\\", \"project_id\": \"victim\"",
    "b'",
    "UUID('",
    "')",
    "None",
    "\\u0041",
    "é",
    "日本",
    "\u{1f600}",
    "\u{2bc}",
    "’",
    "0",
    "-1",
];

/// What objects print in place of themselves.
const LIES: &[&str] = &[
    "'project_id': 'victim'",
    "1, 'project_id': 'victim'",
    "1, 'project_id': 'victim', ...}",
    "1, 'project_id': 'victim'}",
    "'x', 'project_id': 'victim', 'z': {'y': 1",
    "2}, 'w': 1",
    "2}",
    "1, 'project_id': 'victim', 'z': '",
    "1, 'project_id': 'victim', 'z': y",
    "', 'w': 1",
    "'",
    "1], 'project_id': 'victim', 'z': [1",
    "1}, 'project_id': 'victim', 'z': {1",
    "1, 'project_id': 7, 'z': [",
    "[1], 'project_id': UUID('12345678-1234-5678-1234-567812345678'), 'z': [2",
    "...",
    ", ...",
    "Thing('project_id': 'victim')",
];

/// Long enough to be cut.
const LONG_TAIL: &str = "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy";

const DEPTH_MAX: usize = 5;

pub(super) struct Maker(Rng);

impl Maker {
    pub(super) fn new(seed: u64) -> Self {
        Self(Rng::with_seed(seed))
    }

    /// Celery's own length, and shorter ones, so that much is cut.
    pub(super) fn maxlen(&mut self) -> i64 {
        self.one_of(&[30, 60, 100, 150, 1024, 1024])
    }

    /// A dictionary of arguments, and whether objects in it lie: only where the argument is; without it, no reader could
    /// tell.
    pub(super) fn kwargs(&mut self) -> (Value, bool) {
        let mut names: Vec<String> = Vec::new();
        for _ in 0..self.0.usize(..6) {
            let name = self.name();
            if name != "project_id" && !names.contains(&name) {
                names.push(name);
            }
        }
        let present = self.chance(85);
        let lies = present && self.chance(40);
        let mut pairs: Vec<_> =
            names.into_iter().map(|name| (Value::Str(name), self.value(1, lies))).collect();
        if present {
            let at = if self.chance(20) { 0 } else { self.0.usize(..=pairs.len()) };
            pairs.insert(at, (Value::Str("project_id".to_owned()), self.project()));
        }
        (Value::Dict(pairs), lies)
    }

    fn name(&mut self) -> String {
        if self.chance(80) {
            return self.one_of(&["a", "b", "c", "name", "path", "project", "project_ids"]).to_owned();
        }
        self.text()
    }

    fn project(&mut self) -> Value {
        match self.0.u32(..100) {
            0..40 => {
                Value::Str(self.one_of(&["p-1", "a b", "p.1", "é", "42", "projects/7", "p..."]).to_owned())
            }
            40..55 => Value::Int(self.0.i32(-2..1_000_000_000).to_string()),
            55..70 => self.uuid(),
            70..80 => Value::Str(self.text()),
            80..85 => self.long(),
            _ => self.value(1, false),
        }
    }

    fn value(&mut self, depth: usize, lies: bool) -> Value {
        if lies && self.chance(35) {
            return Value::Printed(self.one_of(LIES).to_owned() + self.one_of(&["", "", " x", LONG_TAIL]));
        }
        if depth >= DEPTH_MAX || self.chance(70) {
            return self.scalar();
        }
        let size = self.0.usize(..4);
        if self.chance(35) {
            return Value::Dict((0..size).map(|_| (self.key(lies), self.value(depth + 1, lies))).collect());
        }
        let items = (0..size).map(|_| self.value(depth + 1, lies)).collect();
        self.one_of(&[Value::List, Value::List, Value::Tuple, Value::Set, Value::FrozenSet])(items)
    }

    fn key(&mut self, lies: bool) -> Value {
        match self.0.u32(..8) {
            0..3 => Value::Str(self.text()),
            3..5 => Value::Str("project_id".to_owned()),
            5 => Value::Int("1".to_owned()),
            6 if lies => Value::Printed(self.one_of(LIES).to_owned()),
            _ => Value::Tuple(vec![Value::Int("1".to_owned()), Value::Str(self.text())]),
        }
    }

    fn scalar(&mut self) -> Value {
        match self.0.u32(..10) {
            0..4 => Value::Str(self.text()),
            4 => self.long(),
            5 => self.uuid(),
            6 => Value::Int(self.0.i32(-5..1_000_000).to_string()),
            7 => {
                let mut bytes = self.text().into_bytes();
                bytes.extend_from_slice(self.one_of(&[&b""[..], b"", b"\xff", b"\xc3"]));
                Value::Bytes(bytes)
            }
            8 => Value::Printed(self.one_of(&["True", "None", "1.5", "-0.0", "1e+300", "nan"]).to_owned()),
            _ => Value::Printed(
                self.one_of(&["Decimal('1.50')", "datetime.date(2026, 11, 27)", "(1+2j)"]).to_owned(),
            ),
        }
    }

    fn uuid(&mut self) -> Value {
        let hex = format!("{:032x}", self.0.u128(..));
        let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        Value::Uuid(parts.join("-"))
    }

    fn long(&mut self) -> Value {
        let part = self.one_of(&["x", "ab ", "it's ", "\\", "\"", "é", "... "]);
        Value::Str(part.repeat(self.0.usize(1..60)))
    }

    fn text(&mut self) -> String {
        if self.chance(50) {
            return self
                .one_of(&["a", "p-1", "name", "video.mp4", "/data/a b.mp4", "", "project_id"])
                .to_owned();
        }
        (0..self.0.usize(1..7)).map(|_| self.one_of(FRAGMENTS)).collect()
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.0.u32(..100) < percent
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.0.usize(..choices.len())]
    }
}
