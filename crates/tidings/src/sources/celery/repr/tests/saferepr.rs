//! Celery's `saferepr` for tests: prints, cuts and fails to escape as the original does, in both versions that differ.

use serde_json::Value as Json;

/// Below this depth containers are not shown: the default of `saferepr`.
const LEVELS_MAX: usize = 3;

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Celery {
    /// Leaves out closing brackets after a cut, or prints too many.
    V5_4,
    V5_7,
}

#[derive(Clone)]
pub(super) enum Value {
    Str(String),
    Int(String),
    Uuid(String),
    /// Anything of which only its own text is known.
    Printed(String),
    Bytes(Vec<u8>),
    List(Vec<Value>),
    Tuple(Vec<Value>),
    Set(Vec<Value>),
    FrozenSet(Vec<Value>),
    Dict(Vec<(Value, Value)>),
}

impl Value {
    /// From the JSON that `make_reprs.py` writes.
    pub(super) fn tagged(json: &Json) -> Self {
        if let Json::String(text) = json {
            return Self::Str(text.clone());
        }
        let (kind, content) = json.as_object().and_then(|object| object.iter().next()).expect("a tag");
        let text = || content.as_str().expect("text").to_owned();
        let list = || content.as_array().expect("a list").iter().map(Self::tagged).collect::<Vec<_>>();
        match kind.as_str() {
            "long" => Self::Str(repeated(content)),
            "int" => Self::Int(text()),
            "uuid" => Self::Uuid(text()),
            "printed" => Self::Printed(text()),
            "bytes" => Self::Bytes(from_hex(&text())),
            "list" => Self::List(list()),
            "tuple" => Self::Tuple(list()),
            "set" => Self::Set(list()),
            "frozenset" => Self::FrozenSet(list()),
            "dict" => Self::Dict(content.as_array().expect("pairs").iter().map(pair).collect()),
            other => panic!("unknown tag {other}"),
        }
    }

    pub(super) fn at(&self, name: &str) -> Option<&Self> {
        self.index_of(name).map(|index| &self.pairs()[index].1)
    }

    pub(super) fn index_of(&self, name: &str) -> Option<usize> {
        self.pairs().iter().position(|(key, _)| matches!(key, Self::Str(text) if text == name))
    }

    pub(super) fn values_as_tuple(&self) -> Self {
        Self::Tuple(self.pairs().iter().map(|(_, value)| value.clone()).collect())
    }

    fn pairs(&self) -> &[(Self, Self)] {
        let Self::Dict(pairs) = self else { panic!("no dictionary") };
        pairs
    }

    /// The project that this value names, if it does.
    pub(super) fn project(&self) -> Option<String> {
        match self {
            Self::Str(text) | Self::Int(text) | Self::Uuid(text) => Some(text.clone()),
            _ => None,
        }
    }
}

fn repeated(content: &Json) -> String {
    let times = usize::try_from(content[1].as_u64().expect("a number")).expect("a small number");
    content[0].as_str().expect("text").repeat(times)
}

fn pair(pair: &Json) -> (Value, Value) {
    (Value::tagged(&pair[0]), Value::tagged(&pair[1]))
}

fn from_hex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16).expect("hex")).expect("below 16");
    text.as_bytes().chunks(2).map(|two| digit(two[0]) << 4 | digit(two[1])).collect()
}

enum Token<'a> {
    Open(&'static str),
    Close(&'static str),
    /// A container that is too deep to be shown.
    Hidden(String),
    Between(&'static str),
    Key(&'a Value),
    Str(&'a str),
    Bytes(&'a [u8]),
    Printed(String),
}

pub(super) fn saferepr(value: &Value, maxlen: i64, celery: Celery) -> String {
    let mut tokens = Vec::new();
    tokens_of(value, 0, celery, &mut tokens);
    let mut printed = String::new();
    let mut left = maxlen;
    for (at, token) in tokens.iter().enumerate() {
        if left <= 0 {
            if let (Token::Close(end), Celery::V5_7) = (token, celery) {
                printed.push_str(end);
                continue;
            }
            printed.push_str(", ...");
            let rest = if celery == Celery::V5_7 { &tokens[at..] } else { &tokens[at + 1..] };
            close_what_is_open(rest, &mut printed);
            break;
        }
        let text = print(token, left, celery);
        left -= i64::try_from(text.chars().count()).expect("short");
        printed.push_str(&text);
    }
    printed
}

fn close_what_is_open(rest: &[Token], printed: &mut String) {
    let mut depth = 0;
    for token in rest {
        match token {
            Token::Open(_) => depth += 1,
            Token::Close(end) if depth == 0 => printed.push_str(end),
            Token::Close(_) => depth -= 1,
            _ => {}
        }
    }
}

fn print(token: &Token, left: i64, celery: Celery) -> String {
    match token {
        Token::Open(text) | Token::Close(text) | Token::Between(text) => (*text).to_owned(),
        Token::Hidden(text) => text.clone(),
        Token::Key(key) => saferepr(key, left, celery),
        Token::Str(text) => format!("'{}'", cut(text, left).replace('\'', "\\'")),
        Token::Bytes(bytes) => print_bytes(bytes, usize::try_from(left).expect("positive")),
        Token::Printed(text) => cut(text, left),
    }
}

/// `celery.utils.text.truncate`.
fn cut(text: &str, left: i64) -> String {
    let left = usize::try_from(left).expect("positive");
    if text.chars().count() < left {
        return text.to_owned();
    }
    let kept: String = text.chars().take(left).collect();
    format!("{}...", kept.rsplit_once(' ').map_or(kept.as_str(), |(before, _)| before))
}

fn print_bytes(bytes: &[u8], left: usize) -> String {
    let kept = &bytes[..bytes.len().min(left)];
    let ellipsis = if kept.len() < bytes.len() { "..." } else { "" };
    let hex = || {
        kept.iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .map(|four| char::from(b"0123456789abcdef"[usize::from(four)]))
            .collect()
    };
    let text = std::str::from_utf8(kept).map_or_else(|_| hex(), str::to_owned);
    format!("b'{text}{ellipsis}'")
}

fn tokens_of<'a>(value: &'a Value, level: usize, celery: Celery, tokens: &mut Vec<Token<'a>>) {
    let (open, close, items): (_, _, &[Value]) = match value {
        Value::Str(text) => return tokens.push(Token::Str(text)),
        Value::Bytes(bytes) => return tokens.push(Token::Bytes(bytes)),
        Value::Int(text) | Value::Printed(text) => return tokens.push(Token::Printed(text.clone())),
        Value::Uuid(text) => return tokens.push(Token::Printed(format!("UUID('{text}')"))),
        Value::Set(items) if items.is_empty() => return tokens.push(Token::Printed("set()".to_owned())),
        Value::FrozenSet(items) if items.is_empty() => {
            return tokens.push(Token::Printed("frozenset()".to_owned()));
        }
        Value::Dict(_) => ("{", "}", &[]),
        Value::List(items) => ("[", "]", items),
        Value::Tuple(items) => ("(", if items.len() == 1 { ",)" } else { ")" }, items),
        Value::Set(items) => ("{", "}", items),
        Value::FrozenSet(items) => ("frozenset({", "})", items),
    };
    if level >= LEVELS_MAX {
        let hidden = format!("{open}...{close}");
        tokens.push(if celery == Celery::V5_7 { Token::Hidden(hidden) } else { Token::Printed(hidden) });
        return;
    }
    tokens.push(Token::Open(open));
    for (at, item) in items.iter().enumerate() {
        separate(at, tokens);
        tokens_of(item, level + 1, celery, tokens);
    }
    if let Value::Dict(pairs) = value {
        for (at, (key, value)) in pairs.iter().enumerate() {
            separate(at, tokens);
            tokens.push(Token::Key(key));
            tokens.push(Token::Between(": "));
            tokens_of(value, level + 1, celery, tokens);
        }
    }
    tokens.push(Token::Close(close));
}

fn separate(at: usize, tokens: &mut Vec<Token>) {
    if at > 0 {
        tokens.push(Token::Between(", "));
    }
}
