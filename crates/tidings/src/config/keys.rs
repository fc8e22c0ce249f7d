//! Keys with scopes: `[[keys]]` in the file, or the same as JSON in `TIDINGS_KEYS`. What is wrong is named by its place; a key
//! itself is never shown.

use std::{fmt, ops::RangeInclusive};

use serde_json::{Map, Value};
use tidings_protocol::{InvalidPattern, ProjectId, Projects, TypeFilter};

use super::{
    Environment, Layers, SettingError,
    tables::{self, Wrong, strings},
};

/// The setting that has them.
const NAME: &str = "TIDINGS_KEYS";

/// A shorter key can be guessed.
const KEY_BYTES_MIN: usize = 16;
/// A longer one would fill a request's head.
const KEY_BYTES_MAX: usize = 1024;
/// Each request is held against each of them, and each has its series of metrics.
const KEYS_MAX: usize = 1000;
const NAME_BYTES_MAX: usize = 64;
const RATE: RangeInclusive<u64> = 1..=1_000_000;
const FIELDS: [&str; 7] = ["key", "key_file", "name", "scopes", "projects", "types", "rate"];
/// Names of keys that come from elsewhere.
const RESERVED: [&str; 2] = [ADMIN, KEYLESS];

/// The name of `TIDINGS_ADMIN_KEY` in logs and metrics.
pub const ADMIN: &str = "admin";
/// That of whoever needs no key, on a developer's machine.
pub const KEYLESS: &str = "keyless";

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// `POST /api/events`.
    Publish,
    /// `POST /api/tickets`.
    Tickets,
    /// `POST /api/revoke`.
    Revoke,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 3] = [Self::Publish, Self::Tickets, Self::Revoke];

    /// The scope as a setting has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Tickets => "tickets",
            Self::Revoke => "revoke",
        }
    }
}

/// One key.
#[derive(Clone)]
pub struct KeySettings {
    /// For logs and metrics.
    pub name: String,
    /// The key itself.
    pub key: String,
    /// What it is for.
    pub scopes: Vec<Scope>,
    /// The projects that it reaches.
    pub projects: Projects,
    /// The events that it may publish.
    pub types: TypeFilter,
    /// Events per second; `None`: `TIDINGS_PUBLISH_RATE_MAX`.
    pub rate: Option<u32>,
}

impl fmt::Debug for KeySettings {
    /// Without the key: settings end up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeySettings").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Reads the keys of the file, or those of the variable.
pub(super) fn read(layers: &Layers) -> Result<Vec<KeySettings>, SettingError> {
    let Some(text) = layers.optional(NAME) else { return Ok(Vec::new()) };
    read_list(text).map_err(|wrong| wrong.in_setting(layers, NAME))
}

/// Refuses secrets that can be guessed, wherever somebody could.
pub(super) fn check_plain(layers: &Layers, environment: Environment) -> Result<(), SettingError> {
    if environment == Environment::Development {
        return Ok(());
    }
    let expected = format!(
        "expected at least {KEY_BYTES_MIN} bytes outside development; `openssl rand -hex 32` makes a good one"
    );
    if layers.optional("TIDINGS_ADMIN_KEY").is_some_and(|key| key.trim().len() < KEY_BYTES_MIN) {
        return Err(layers.error("TIDINGS_ADMIN_KEY", expected));
    }
    let keys = layers.list("TIDINGS_PUBLISH_KEYS");
    match keys.iter().position(|key| key.len() < KEY_BYTES_MIN) {
        Some(index) => {
            Err(layers
                .error("TIDINGS_PUBLISH_KEYS", format!("key {} of {}: {expected}", index + 1, keys.len())))
        }
        None => Ok(()),
    }
}

fn read_list(text: &str) -> Result<Vec<KeySettings>, Wrong> {
    let entries = tables::entries(text, KEYS_MAX, "keys")?;
    let mut keys: Vec<KeySettings> = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let place = format!("keys[{index}]");
        let key = read_key(&place, entry)?;
        if let Some(same) = keys.iter().position(|other| other.name == key.name) {
            return Err(Wrong::at(format!("{place}.name"), format!("keys[{same}] has this name, too")));
        }
        if let Some(same) = keys.iter().position(|other| other.key == key.key) {
            return Err(Wrong::at(format!("{place}.key"), format!("keys[{same}] has this key, too")));
        }
        keys.push(key);
    }
    Ok(keys)
}

fn read_key(place: &str, entry: &Value) -> Result<KeySettings, Wrong> {
    let entry = tables::fields(place, entry, &FIELDS)?;
    let at = |field: &str| format!("{place}.{field}");
    Ok(KeySettings {
        name: name(entry).map_err(|message| Wrong::at(at("name"), message))?,
        key: secret(place, entry)?,
        scopes: scopes(&at("scopes"), entry)?,
        projects: projects(&at("projects"), entry)?,
        types: types(&at("types"), entry)?,
        rate: rate(entry).map_err(|message| Wrong::at(at("rate"), message))?,
    })
}

fn name(entry: &Map<String, Value>) -> Result<String, String> {
    let text = entry.get("name").ok_or("is required: what logs and metrics call the key")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let name =
        text.as_str().filter(|name| (1..=NAME_BYTES_MAX).contains(&name.len()) && name.chars().all(plain));
    match name {
        Some(name) if RESERVED.contains(&name) => Err(format!("`{name}` is the name of a key of ours")),
        Some(name) => Ok(name.to_owned()),
        None => Err(format!("expected 1 to {NAME_BYTES_MAX} letters, digits, `_`, `-` or `.`")),
    }
}

/// The key, or what the file has that it names.
fn secret(place: &str, entry: &Map<String, Value>) -> Result<String, Wrong> {
    let (field, key) = match (entry.get("key"), entry.get("key_file")) {
        (Some(Value::String(key)), None) => ("key", key.clone()),
        (None, Some(Value::String(path))) => {
            let text = std::fs::read_to_string(path).map_err(|error| {
                Wrong::at(format!("{place}.key_file"), format!("cannot read `{path}`: {error}"))
            })?;
            ("key_file", text.trim().to_owned())
        }
        (Some(_), None) => return Err(Wrong::at(format!("{place}.key"), "expected a string")),
        (None, Some(_)) => return Err(Wrong::at(format!("{place}.key_file"), "expected a string")),
        _ => return Err(Wrong::at(place, "expected one of `key` and `key_file`")),
    };
    let place = format!("{place}.{field}");
    if !(KEY_BYTES_MIN..=KEY_BYTES_MAX).contains(&key.len()) {
        let expected = format!(
            "expected {KEY_BYTES_MIN} to {KEY_BYTES_MAX} bytes; `openssl rand -hex 32` makes a good one"
        );
        return Err(Wrong::at(place, expected));
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Wrong::at(
            place,
            "expected visible ASCII characters without spaces, as a header can carry",
        ));
    }
    Ok(key)
}

fn scopes(place: &str, entry: &Map<String, Value>) -> Result<Vec<Scope>, Wrong> {
    let Some(value) = entry.get("scopes") else { return Ok(vec![Scope::Publish]) };
    let scope = |(place, text): (String, &str)| {
        Scope::ALL.into_iter().find(|scope| scope.as_str() == text).ok_or_else(|| {
            let known = Scope::ALL.map(|scope| format!("`{}`", scope.as_str()));
            Wrong::at(place, format!("expected one of {}", known.join(", ")))
        })
    };
    strings(place, value)?.into_iter().map(scope).collect()
}

fn projects(place: &str, entry: &Map<String, Value>) -> Result<Projects, Wrong> {
    match entry.get("projects") {
        None => return Ok(Projects::everything()),
        Some(Value::String(text)) if text == "*" => return Ok(Projects::everything()),
        Some(Value::Array(_)) => {}
        Some(_) => return Err(Wrong::at(place, "expected `\"*\"` or a list of ids and patterns")),
    }
    let entries = strings(place, &entry["projects"])?;
    for (place, text) in &entries {
        // A pattern that no id can have the form of would be a key that does nothing.
        ProjectId::try_from(text.replace('*', "x").as_str())
            .map_err(|error| Wrong::at(place, format!("{error}, in an id or a pattern")))?;
    }
    Projects::read(entry.get("projects")).map_err(|message| Wrong::at(place, message))
}

fn types(place: &str, entry: &Map<String, Value>) -> Result<TypeFilter, Wrong> {
    let Some(value) = entry.get("types") else { return Ok(TypeFilter::everything()) };
    let entries = strings(place, value)?;
    for (place, pattern) in &entries {
        TypeFilter::parse(&[pattern]).map_err(|error| Wrong::at(place, error.to_string()))?;
    }
    let patterns: Vec<_> = entries.iter().map(|(_, pattern)| *pattern).collect();
    TypeFilter::parse(&patterns).map_err(|error: InvalidPattern| Wrong::at(place, error.to_string()))
}

fn rate(entry: &Map<String, Value>) -> Result<Option<u32>, String> {
    let Some(value) = entry.get("rate") else { return Ok(None) };
    let rate = value.as_u64().filter(|rate| RATE.contains(rate)).and_then(|rate| u32::try_from(rate).ok());
    let expected =
        || format!("expected a whole number from {} to {}, events per second", RATE.start(), RATE.end());
    rate.map(Some).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const KEY: &str = "0123456789abcdef";

    #[track_caller]
    fn check_wrong(list: &Value, place: &str, words: &str) {
        let Err(wrong) = read_list(&list.to_string()) else { panic!("{list} was taken") };
        assert_eq!(wrong.place, place, "{list}: {}", wrong.message);
        assert!(wrong.message.contains(words), "{list}: {}", wrong.message);
        assert!(!wrong.message.contains(KEY), "{}", wrong.message);
    }

    #[test]
    fn a_key_publishes_everything_unless_it_says_less() {
        let keys = read_list(&json!([{"name": "web", "key": KEY}]).to_string()).unwrap_or_else(|_| panic!());
        let key = &keys[0];
        assert_eq!((key.scopes.as_slice(), key.rate), (&[Scope::Publish][..], None));
        assert!(key.projects.is_everything() && key.types == TypeFilter::everything());
        assert!(!format!("{key:?}").contains(KEY), "{key:?}");
        let less = json!([{"name": "ci", "key": KEY, "scopes": ["tickets", "revoke"], "projects": ["p1", "team-a/*"],
            "types": ["task.*", "file.uploaded"], "rate": 50}]);
        let keys = read_list(&less.to_string()).unwrap_or_else(|_| panic!());
        assert_eq!(keys[0].scopes, [Scope::Tickets, Scope::Revoke]);
        assert_eq!(keys[0].projects, Projects::listed(&["p1", "team-a/*"]));
        assert_eq!(keys[0].rate, Some(50));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_place_and_never_by_the_key() {
        let with = |field: &str, value: Value| {
            let mut key = json!({"name": "web", "key": KEY});
            key[field] = value;
            json!([{"name": "ok", "key": "fedcba9876543210"}, key])
        };
        for (field, value, place, words) in [
            ("types", json!(["task.*", "Task"]), "keys[1].types[1]", "`word.*`"),
            ("types", json!([]), "keys[1].types", "at least one"),
            ("types", json!("task.*"), "keys[1].types", "a list"),
            ("scopes", json!(["publish", "read"]), "keys[1].scopes[1]", "`publish`, `tickets`, `revoke`"),
            ("scopes", json!(null), "keys[1].scopes", "a list"),
            ("projects", json!("p1"), "keys[1].projects", "a list of ids and patterns"),
            ("projects", json!(null), "keys[1].projects", "a list of ids and patterns"),
            ("projects", json!(["p1", "../x"]), "keys[1].projects[1]", "no segment"),
            ("projects", json!([7]), "keys[1].projects[0]", "a string"),
            ("rate", json!(0), "keys[1].rate", "from 1 to 1000000"),
            ("rate", json!("5"), "keys[1].rate", "from 1 to 1000000"),
            ("name", json!("a b"), "keys[1].name", "letters, digits"),
            ("name", json!("admin"), "keys[1].name", "of ours"),
            ("name", json!("ok"), "keys[1].name", "keys[0] has this name"),
            ("key", json!("fedcba9876543210"), "keys[1].key", "keys[0] has this key"),
            ("key", json!("short-one"), "keys[1].key", "16 to 1024 bytes"),
            ("key", json!("with a space in it"), "keys[1].key", "without spaces"),
            ("key", json!(1234), "keys[1].key", "a string"),
            ("key_file", json!("/x"), "keys[1]", "one of `key` and `key_file`"),
            ("scope", json!(["publish"]), "keys[1].scope", "did you mean `scopes`?"),
        ] {
            check_wrong(&with(field, value), place, words);
        }
        check_wrong(
            &json!([{"name": "web", "key_file": "/nowhere/key"}]),
            "keys[0].key_file",
            "`/nowhere/key`",
        );
        check_wrong(&json!([{"key": KEY}]), "keys[0].name", "is required");
        check_wrong(&json!([KEY]), "keys[0]", "a table");
        check_wrong(&json!({"name": "web", "key": KEY}), "", "a JSON array");
        let Err(wrong) = read_list(&format!("[{{\"key\":\"{KEY}\",}}]")) else { panic!("it is no JSON") };
        assert!(wrong.message.contains("line 1") && !wrong.message.contains(KEY), "{}", wrong.message);
    }

    #[test]
    fn a_key_may_lie_in_a_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, format!("{KEY}\n")).unwrap();
        let list = json!([{"name": "web", "key_file": path}]);
        let keys = read_list(&list.to_string()).unwrap_or_else(|wrong| panic!("{}", wrong.message));
        assert_eq!(keys[0].key, KEY);
    }
}
