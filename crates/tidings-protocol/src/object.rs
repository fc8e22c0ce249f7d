//! A JSON object as its members' own bytes: what is not ours passes through untouched.

use std::{
    borrow::Cow,
    collections::HashSet,
    fmt::{self, Write as _},
};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};
use serde_json::value::RawValue;

/// The members of a JSON object in their order, each value as the text that the sender wrote.
///
/// Refuses duplicate keys, because two readers could each believe another one.
#[derive(Debug)]
pub struct RawObject<'a> {
    members: Vec<Member<'a>>,
}

/// A member of an object.
#[derive(Debug)]
pub struct Member<'a> {
    /// What the key says.
    pub key: Cow<'a, str>,
    /// The key as it was written, with its quotes and escapes.
    raw_key: &'a str,
    /// The value as it was written.
    pub value: &'a str,
}

impl<'a> RawObject<'a> {
    /// Reads an object. The error says where and what, without repeating the input at length.
    pub fn parse(text: &'a str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The text of a member's value; `None` also for `null`, which counts as absent.
    pub fn get(&self, key: &str) -> Option<&'a str> {
        let member = self.members.iter().find(|member| member.key == key)?;
        Some(member.value).filter(|&value| value != "null")
    }

    /// A member's value if it is a string.
    pub fn get_str(&self, key: &str) -> Option<Cow<'a, str>> {
        self.get(key).and_then(|value| serde_json::from_str::<BorrowedStr<'a>>(value).ok()).map(|s| s.0)
    }

    /// The members, in the sender's order.
    pub fn members(&self) -> &[Member<'a>] {
        &self.members
    }
}

/// `Cow<str>` that borrows where the text has no escapes (serde's own implementation always copies).
#[derive(Deserialize)]
struct BorrowedStr<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for RawObject<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Members)
    }
}

/// Members up to which an object is small.
const SMALL_MEMBERS_MAX: usize = 24;

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = RawObject<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members: Vec<Member<'_>> = Vec::with_capacity(12);
        // The usual object is small, and then looking through its keys is quicker than hashing them.
        let mut seen: Option<HashSet<Cow<'_, str>>> = None;
        while let Some(raw_key) = map.next_key::<&'de RawValue>()?.map(RawValue::get) {
            let BorrowedStr(key) = serde_json::from_str(raw_key).map_err(A::Error::custom)?;
            let value: &'de RawValue = map.next_value()?;
            let repeated = match &mut seen {
                Some(seen) => !seen.insert(key.clone()),
                None => members.iter().any(|member| member.key == key),
            };
            if repeated {
                let key: String = key.chars().take(80).collect();
                return Err(A::Error::custom(format_args!("duplicate key `{key}`")));
            }
            members.push(Member { key, raw_key, value: value.get() });
            if members.len() == SMALL_MEMBERS_MAX {
                seen = Some(members.iter().map(|member| member.key.clone()).collect());
            }
        }
        Ok(RawObject { members })
    }
}

/// Writes a JSON object member by member, so that raw text and our own values go into one buffer.
#[derive(Debug)]
pub struct ObjectWriter(String);

impl ObjectWriter {
    /// An empty object with room for `bytes`.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut text = String::with_capacity(bytes);
        text.push('{');
        Self(text)
    }

    /// Adds a member as it was written.
    pub fn member(&mut self, member: &Member<'_>) {
        self.separate();
        self.0.push_str(member.raw_key);
        self.0.push(':');
        self.0.push_str(member.value);
    }

    /// Adds a member whose value is JSON text already.
    pub fn raw(&mut self, key: &str, value: &str) {
        self.key(key);
        self.0.push_str(value);
    }

    /// Adds a member whose value is a string.
    pub fn string(&mut self, key: &str, value: &str) {
        self.key(key);
        push_string(&mut self.0, value);
    }

    /// Adds a member whose value is written as it displays: a number.
    pub fn number(&mut self, key: &str, value: impl fmt::Display) {
        self.key(key);
        // Writing to a `String` cannot fail.
        let _ = write!(self.0, "{value}");
    }

    fn key(&mut self, key: &str) {
        self.separate();
        push_string(&mut self.0, key);
        self.0.push(':');
    }

    fn separate(&mut self) {
        if self.0.len() > 1 {
            self.0.push(',');
        }
    }

    /// The object as JSON.
    pub fn finish(mut self) -> String {
        self.0.push('}');
        self.0
    }

    /// The object without its closing brace, for whoever still has members to add.
    pub fn finish_open(self) -> String {
        self.0
    }
}

fn push_string(out: &mut String, text: &str) {
    // Keys and ids hardly ever need escapes; then their own bytes are the JSON.
    if text.bytes().all(|b| b >= 0x20 && b != b'"' && b != b'\\') {
        out.push('"');
        out.push_str(text);
        out.push('"');
    } else {
        out.push_str(&serde_json::Value::from(text).to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_keep_their_bytes() {
        let text = r#"{"a": 1.50e+3, "caf\u00e9":{ "x" : [1,  2] }, "s":"\u00e9\ud800"}"#;
        let object = RawObject::parse(text).unwrap();
        let keys: Vec<_> = object.members().iter().map(|member| &*member.key).collect();
        assert_eq!(keys, ["a", "café", "s"]);
        let mut written = ObjectWriter::with_capacity(text.len());
        object.members().iter().for_each(|member| written.member(member));
        assert_eq!(written.finish(), r#"{"a":1.50e+3,"caf\u00e9":{ "x" : [1,  2] },"s":"\u00e9\ud800"}"#);
    }

    #[test]
    fn a_key_written_twice_is_refused_however_it_is_escaped() {
        let error = RawObject::parse(r#"{"type":"a.b","t\u0079pe":"c.d"}"#).unwrap_err();
        assert!(error.to_string().contains("duplicate key `type`"), "{error}");
    }

    #[test]
    fn a_key_written_twice_is_found_among_many() {
        let many: Vec<_> = (0..200).map(|n| format!("\"k{n}\":{n}")).collect();
        assert!(RawObject::parse(&format!("{{{}}}", many.join(","))).is_ok());
        let error = RawObject::parse(&format!("{{{},\"k3\":0}}", many.join(","))).unwrap_err();
        assert!(error.to_string().contains("duplicate key `k3`"), "{error}");
    }

    #[test]
    fn deep_nesting_does_not_exhaust_the_stack() {
        let text = format!(r#"{{"type":"a.b","x":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert!(RawObject::parse(&text).is_ok());
    }
}
