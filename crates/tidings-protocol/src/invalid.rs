//! Errors of `serde` put into words for whoever wrote the message: which field, and what was expected there.

use std::{borrow::Cow, fmt, marker::PhantomData};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

use crate::{
    Position,
    known::{File, Progress},
};

/// A field that is not as its type has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InvalidField {
    /// The path from the top, as in `progress.current`; `None`: the message as a whole.
    pub(crate) field: Option<String>,
    pub(crate) message: String,
}

impl InvalidField {
    pub(crate) fn new(field: &str, message: impl Into<String>) -> Self {
        Self { field: Some(field.into()), message: message.into() }
    }
}

/// A nested struct that is written as an object. Serde alone would also take its fields from an array, in their order,
/// and then a page would get an array where it expects names.
#[derive(Clone, Debug)]
pub(crate) struct Object<T>(pub(crate) T);

/// What an [`Object`] looks like, in words that follow "expected".
pub(crate) trait Shape {
    const SHAPE: &'static str;
}

impl<'de, T: Deserialize<'de> + Shape> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor(PhantomData)).map(Self)
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de> + Shape> Visitor<'de> for ObjectVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::SHAPE)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

impl<T: JsonSchema> JsonSchema for Object<T> {
    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

/// Reads `T` from JSON text, naming the field that is wrong.
pub(crate) fn read<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, InvalidField> {
    // Following the path costs as much as reading, and is needed only to say what is wrong.
    if let Ok(read) = serde_json::from_str(text) {
        return Ok(read);
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        describe(if path == "." { "" } else { &path }, &plain(error.inner()))
    })
}

/// The message of a JSON error without its place, for those whose input is not shown back as text.
pub(crate) fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let suffix = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&suffix).unwrap_or(&text).to_owned()
}

fn describe(path: &str, message: &str) -> InvalidField {
    if let Some(missing) = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
        // Inside a known object the object's whole shape helps more than the one name that is missing.
        return match shape(path) {
            Some(shape) => InvalidField::new(path, format!("expected {shape}")),
            None if path.is_empty() => InvalidField::new(missing, "is required"),
            None => InvalidField::new(&format!("{path}.{missing}"), "is required"),
        };
    }
    let field = (!path.is_empty()).then(|| path.to_owned());
    let message = match message.rsplit_once(", expected ") {
        Some((_, expected)) if expected.starts_with("an object with") => format!("expected {expected}"),
        Some((found, expected)) => {
            format!("expected {}, found {}", in_words(expected), found_in_words(found))
        }
        None => message.chars().take(300).collect(),
    };
    InvalidField { field, message }
}

fn shape(path: &str) -> Option<&'static str> {
    match path {
        "progress" => Some(Progress::SHAPE),
        "file" => Some(File::SHAPE),
        "since" => Some(Position::SHAPE),
        _ => None,
    }
}

fn in_words(expected: &str) -> &str {
    match expected {
        "f64" => "a number",
        "u64" | "u32" => "a whole number, 0 or more",
        "a sequence" => "a list",
        "unit" => "null",
        _ => expected,
    }
}

fn found_in_words(found: &str) -> String {
    const PREFIXES: [&str; 3] = ["invalid type: ", "invalid value: ", "unknown variant "];
    let found = PREFIXES.iter().find_map(|prefix| found.strip_prefix(prefix)).unwrap_or(found);
    let mut short: String = found.chars().take(80).collect();
    if short.len() < found.len() {
        short.push('…');
    }
    short
}
