//! The names that things carry: projects, streams, event types, event ids. Each is checked once, when it enters.

use std::{fmt, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Why a string is no id, in words that follow the name of its field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidId(pub(crate) &'static str);

macro_rules! checked_string {
    ($name:ident) => {
        impl $name {
            /// The id as it is written on the wire.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<&str> for $name {
            type Error = InvalidId;

            fn try_from(text: &str) -> Result<Self, InvalidId> {
                Self::check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
                Self::try_from(&*text).map_err(D::Error::custom)
            }
        }
    };
}

/// The id of a project: 1 to 200 bytes of UTF-8, compared byte for byte.
///
/// No control or format characters, no white space at either end, no segment `.` or `..` between slashes, not `*`:
/// so that two ids that look the same are the same, and none can be read as a path or as every project.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, JsonSchema)]
pub struct ProjectId(#[schemars(length(min = 1, max = 200))] Arc<str>);

checked_string!(ProjectId);

impl ProjectId {
    fn check(text: &str) -> Result<(), InvalidId> {
        if text.is_empty() || text.len() > 200 {
            return Err(InvalidId("expected 1 to 200 bytes"));
        }
        if text == "*" {
            return Err(InvalidId("`*` is no project"));
        }
        if text.chars().any(is_control_or_format) {
            return Err(InvalidId("expected no control or format characters"));
        }
        if text.trim() != text {
            return Err(InvalidId("expected no white space at either end"));
        }
        if text.split('/').any(|segment| segment == "." || segment == "..") {
            return Err(InvalidId("expected no segment `.` or `..` between slashes"));
        }
        Ok(())
    }
}

/// Whose a session is: 1 to 200 bytes without control or format characters. An integer is the same as its digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UserId(Arc<str>);

checked_string!(UserId);

impl UserId {
    fn check(text: &str) -> Result<(), InvalidId> {
        if text.is_empty() || text.len() > 200 {
            return Err(InvalidId("expected 1 to 200 bytes"));
        }
        if text.chars().any(is_control_or_format) {
            return Err(InvalidId("expected no control or format characters"));
        }
        Ok(())
    }
}

/// Unicode general categories Cc, Cf (Unicode 16) and the line and paragraph separators, none of which shows.
fn is_control_or_format(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{AD}' | '\u{600}'..='\u{605}' | '\u{61C}' | '\u{6DD}' | '\u{70F}' | '\u{890}'..='\u{891}' | '\u{8E2}'
            | '\u{180E}' | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{2064}'
            | '\u{2066}'..='\u{206F}' | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}' | '\u{110BD}' | '\u{110CD}'
            | '\u{13430}'..='\u{1343F}' | '\u{1BCA0}'..='\u{1BCA3}' | '\u{1D173}'..='\u{1D17A}' | '\u{E0001}'
            | '\u{E0020}'..='\u{E007F}')
}

/// A stream: the events of one project in order, or the announcements `*` that every connection follows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamId {
    /// `*`: changes of projects, and custom events that belong to none.
    Announcements,
    /// The events of one project.
    Project(ProjectId),
}

impl StreamId {
    /// The stream's name on the wire: the project's id, or `*` (which no project can be called).
    pub fn as_str(&self) -> &str {
        match self {
            Self::Announcements => "*",
            Self::Project(project) => project.as_str(),
        }
    }

    /// The project whose stream this is; `None` for the announcements.
    pub fn project_id(&self) -> Option<&ProjectId> {
        match self {
            Self::Announcements => None,
            Self::Project(project) => Some(project),
        }
    }
}

impl TryFrom<&str> for StreamId {
    type Error = InvalidId;

    fn try_from(text: &str) -> Result<Self, InvalidId> {
        if text == "*" { Ok(Self::Announcements) } else { ProjectId::try_from(text).map(Self::Project) }
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What kind of event it is: two or more words of `[a-z0-9_]` joined by dots, the first starting with a letter; at
/// most 100 bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, JsonSchema)]
pub struct EventType(
    #[schemars(length(max = 100), regex(pattern = r"^[a-z][a-z0-9_]*(\.[a-z0-9_]+)+$"))] Arc<str>,
);

checked_string!(EventType);

/// The first words that only the service itself may send.
const RESERVED_WORDS: [&str; 4] = ["connection", "subscription", "system", "container"];

impl EventType {
    fn check(text: &str) -> Result<(), InvalidId> {
        let word = |word: &str| {
            !word.is_empty()
                && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        let starts_with_letter = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
        if text.len() > 100 || !text.contains('.') || !starts_with_letter || !text.split('.').all(word) {
            return Err(InvalidId(
                "expected lower-case words joined by dots, as in `task.progress`, at most 100 bytes",
            ));
        }
        Ok(())
    }

    /// The word before the first dot: what `word.*` matches.
    pub fn first_word(&self) -> &str {
        self.0.split('.').next().unwrap_or_default()
    }

    /// Whether this type belongs to the service (`connection.*`, `subscription.*`, `system.*`, `container.*`).
    pub fn is_reserved(&self) -> bool {
        RESERVED_WORDS.contains(&self.first_word())
    }
}

/// A publisher's own id for an event, 1 to 200 bytes. An id repeated within the history is the same event.
#[derive(Clone, Debug, PartialEq, Eq, Hash, JsonSchema)]
pub struct EventId(#[schemars(length(min = 1, max = 200))] Arc<str>);

checked_string!(EventId);

impl EventId {
    fn check(text: &str) -> Result<(), InvalidId> {
        if text.is_empty() || text.len() > 200 { Err(InvalidId("expected 1 to 200 bytes")) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_project_ids_are_accepted_when_nothing_hides_in_them() {
        for id in
            ["p1", "team-a/web", "Проект 7", "a..b", "...", "**", "a*", "名前", "x\u{301}", &"é".repeat(100)]
        {
            assert!(ProjectId::try_from(id).is_ok(), "{id:?}");
        }
    }

    #[test]
    fn project_ids_that_hide_something_are_refused() {
        let long = "x".repeat(201);
        for id in [
            "",
            "*",
            " p",
            "p ",
            "p\n",
            "a\u{200B}b",
            "a\u{202E}b",
            "\u{FEFF}p",
            "a/../b",
            "..",
            "./a",
            "a/.",
            "a\0b",
            "\u{a0}p",
            &long,
        ] {
            assert!(ProjectId::try_from(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn event_types_are_words_joined_by_dots() {
        for good in ["task.progress", "a.b.c", "my_app.v2", "a.0"] {
            assert!(EventType::try_from(good).is_ok(), "{good}");
        }
        let long = format!("a.{}", "b".repeat(99));
        for bad in
            ["", "task", "Task.x", "task.", ".x", "task..x", "1a.b", "task.x ", "täsk.x", "task.*", &long]
        {
            assert!(EventType::try_from(bad).is_err(), "{bad}");
        }
    }
}
