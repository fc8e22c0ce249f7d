//! Settings that are lists of tables: `[[name]]` in the file, or the same as a JSON array in a variable. What is wrong is named by
//! its place; a value is never shown, because it may be a secret.

use serde_json::{Map, Value};

use super::{Layers, SettingError, layers::nearest};

/// What is wrong, and where.
#[derive(Debug)]
pub(super) struct Wrong {
    pub(super) place: String,
    pub(super) message: String,
}

impl Wrong {
    pub(super) fn at(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { place: place.into(), message: message.into() }
    }

    /// The same as an error of the setting that has the tables.
    pub(super) fn in_setting(self, layers: &Layers, name: &str) -> SettingError {
        layers.error_at(name, &self.place, self.message)
    }
}

/// The entries of a list of `what`, which are looked at one by one.
pub(super) fn entries(text: &str, entries_max: usize, what: &str) -> Result<Vec<Value>, Wrong> {
    let list: Value = serde_json::from_str(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        Wrong::at("", format!("expected a JSON array of {what}; not JSON at line {line}, column {column}"))
    })?;
    let Value::Array(entries) = list else {
        return Err(Wrong::at("", format!("expected a JSON array of {what}")));
    };
    if entries.len() > entries_max {
        return Err(Wrong::at("", format!("expected at most {entries_max} {what}")));
    }
    Ok(entries)
}

/// The fields of an entry, which has no others than those that are known.
pub(super) fn fields<'a>(
    place: &str,
    entry: &'a Value,
    known: &[&str],
) -> Result<&'a Map<String, Value>, Wrong> {
    let Value::Object(entry) = entry else {
        let known: Vec<_> = known.iter().map(|field| format!("`{field}`")).collect();
        return Err(Wrong::at(place, format!("expected a table with some of {}", known.join(", "))));
    };
    match entry.keys().find(|field| !known.contains(&field.as_str())) {
        Some(unknown) => {
            let nearest = nearest(unknown, known.iter().map(|field| (*field).to_owned()));
            Err(Wrong::at(format!("{place}.{unknown}"), format!("is no field of this table{nearest}")))
        }
        None => Ok(entry),
    }
}

/// The strings of a list that has at least one, each with its place.
pub(super) fn strings<'a>(place: &str, value: &'a Value) -> Result<Vec<(String, &'a str)>, Wrong> {
    let list = value.as_array().filter(|list| !list.is_empty());
    let list = list.ok_or_else(|| Wrong::at(place, "expected a list with at least one entry"))?;
    let string = |(index, value): (usize, &'a Value)| {
        let place = format!("{place}[{index}]");
        match value.as_str() {
            Some(text) => Ok((place, text)),
            None => Err(Wrong::at(place, "expected a string")),
        }
    };
    list.iter().enumerate().map(string).collect()
}
