//! What clients send.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::Error as _};
use serde_json::value::RawValue;

use std::collections::HashMap;

use crate::{
    ErrorCode, Position, RawObject, StreamId, TypeFilter,
    filter::Patterns,
    invalid::{InvalidField, Object, plain, read},
};

/// A message from a client.
#[derive(Clone, Debug, PartialEq)]
pub enum ClientMessage {
    /// Follow a project (or replay the announcements `*`).
    Subscribe {
        /// Whose events.
        stream: StreamId,
        /// Which of them.
        types: TypeFilter,
        /// Everything after this position first.
        since: Option<Position>,
    },
    /// Stop following a project.
    Unsubscribe {
        /// Whose events.
        stream: StreamId,
    },
    /// Answered with `pong`.
    Ping,
    /// Take over a former connection; only as the first message.
    Resume {
        /// The former connection's `resume_token`.
        token: String,
        /// Up to where each stream had arrived.
        positions: Vec<(StreamId, Position)>,
    },
    /// Whether the page is hidden; while it is, `latest` events wait and are folded.
    Visibility {
        /// `true`: the page does not show.
        hidden: bool,
    },
}

/// A client's own `id` of a message, sent back as it came: a string of at most 200 bytes or a number.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct MessageId(Box<RawValue>);

impl MessageId {
    fn new(raw: &str) -> Option<Self> {
        let is_string = raw.starts_with('"') && raw.len() <= 202;
        let is_number = raw.starts_with(|c: char| c == '-' || c.is_ascii_digit()) && raw.len() <= 40;
        if !is_string && !is_number {
            return None;
        }
        RawValue::from_string(raw.to_owned()).ok().map(Self)
    }
}

impl PartialEq for MessageId {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

/// A client's message that is answered with an `error`.
#[derive(Clone, Debug, PartialEq)]
pub struct RefusedMessage {
    /// What kind of mistake it is.
    pub code: ErrorCode,
    /// What is wrong, and in which field.
    pub message: String,
    /// How to mend it.
    pub hint: Option<String>,
    /// The message's id, where it could be read.
    pub id: Option<MessageId>,
    /// The project that the message named, where it could be read.
    pub project_id: Option<String>,
}

/// The message types a client may send.
const TYPES: [&str; 5] = ["subscribe", "unsubscribe", "ping", "resume", "visibility"];

impl ClientMessage {
    /// Reads a message, together with its `id`.
    pub fn parse(text: &str) -> Result<(Self, Option<MessageId>), Box<RefusedMessage>> {
        let object = RawObject::parse(text).map_err(|error| {
            let code = if error.is_data() { ErrorCode::InvalidMessage } else { ErrorCode::InvalidJson };
            let hint = Some(r#"send one JSON object in a text frame, as {"type":"ping"}"#.to_owned());
            Box::new(RefusedMessage { code, message: plain(&error), hint, id: None, project_id: None })
        })?;
        let id = object.get("id").and_then(MessageId::new);
        let refuse = |code, message: String, hint: Option<String>| {
            let project_id = object.get_str("project_id").map(|id| id.chars().take(200).collect());
            Box::new(RefusedMessage { code, message, hint, id: id.clone(), project_id })
        };
        let invalid = |invalid: InvalidField| {
            let field = invalid.field.map(|field| format!("{field}: ")).unwrap_or_default();
            refuse(ErrorCode::InvalidMessage, format!("{field}{}", invalid.message), None)
        };
        if id.is_none() && object.get("id").is_some() {
            return Err(invalid(InvalidField::new(
                "id",
                "expected a string of at most 200 bytes or a number",
            )));
        }
        let Some(name) = object.get_str("type") else {
            return Err(invalid(InvalidField::new("type", "a string is required")));
        };
        let message = match &*name {
            "subscribe" => read::<Subscribe>(text).and_then(TryInto::try_into).map_err(invalid)?,
            "unsubscribe" => {
                let fields: Unsubscribe = read(text).map_err(invalid)?;
                Self::Unsubscribe { stream: fields.project_id.0 }
            }
            "ping" => Self::Ping,
            "resume" => {
                let fields: Resume = read(text).map_err(invalid)?;
                let positions = fields.positions.unwrap_or_default();
                Self::Resume {
                    token: fields.token,
                    positions: positions
                        .into_iter()
                        .map(|(stream, Object(position))| (stream.0, position))
                        .collect(),
                }
            }
            "visibility" => Self::Visibility { hidden: read::<Visibility>(text).map_err(invalid)?.hidden },
            other => {
                let other: String = other.chars().take(100).collect();
                let hint = format!("one of {}", TYPES.join(", "));
                return Err(refuse(
                    ErrorCode::UnknownType,
                    format!("no message of type `{other}`"),
                    Some(hint),
                ));
            }
        };
        Ok((message, id))
    }
}

/// A project's id, or `*` for the announcements.
#[derive(Clone, Debug, PartialEq, Eq, Hash, JsonSchema)]
pub(crate) struct StreamName(#[schemars(with = "String", length(min = 1, max = 200))] StreamId);

impl<'de> Deserialize<'de> for StreamName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        StreamId::try_from(text.as_str()).map(Self).map_err(D::Error::custom)
    }
}

#[derive(Deserialize)]
struct Subscribe {
    project_id: StreamName,
    types: Option<Patterns>,
    since: Option<Object<Position>>,
}

impl TryFrom<Subscribe> for ClientMessage {
    type Error = InvalidField;

    fn try_from(fields: Subscribe) -> Result<Self, InvalidField> {
        let stream = fields.project_id.0;
        if stream == StreamId::Announcements && fields.since.is_none() {
            return Err(InvalidField::new(
                "since",
                "is required with `*`, which every connection follows anyway",
            ));
        }
        if stream == StreamId::Announcements && fields.types.is_some() {
            return Err(InvalidField::new("types", "cannot be used with `*`"));
        }
        let types = match fields.types {
            None => TypeFilter::everything(),
            Some(Patterns(patterns)) => {
                TypeFilter::parse(&patterns).map_err(|error| InvalidField::new("types", error.to_string()))?
            }
        };
        Ok(Self::Subscribe { stream, types, since: fields.since.map(|Object(since)| since) })
    }
}

#[derive(Deserialize)]
struct Unsubscribe {
    project_id: StreamName,
}

#[derive(Deserialize)]
struct Resume {
    token: String,
    positions: Option<HashMap<StreamName, Object<Position>>>,
}

#[derive(Deserialize)]
struct Visibility {
    hidden: bool,
}

/// The same messages for the schema. Struct variants with titles, because generators for TypeScript lose the fields of
/// newtype variants without a word.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) enum ClientMessageSchema {
    /// Follow a project. A second `subscribe` to the same project replaces the first.
    #[schemars(title = "Subscribe")]
    Subscribe {
        id: Option<MessageIdSchema>,
        project_id: StreamName,
        types: Option<Patterns>,
        since: Option<Position>,
    },
    /// Stop following a project.
    #[schemars(title = "Unsubscribe")]
    Unsubscribe { id: Option<MessageIdSchema>, project_id: StreamName },
    /// Answered with `pong`.
    #[schemars(title = "Ping")]
    Ping { id: Option<MessageIdSchema> },
    /// Take over a former connection; only as the first message.
    #[schemars(title = "Resume")]
    Resume {
        id: Option<MessageIdSchema>,
        token: String,
        #[schemars(with = "Option<HashMap<String, Position>>")]
        positions: Option<HashMap<StreamName, Position>>,
    },
    /// Whether the page is hidden.
    #[schemars(title = "Visibility")]
    Visibility { id: Option<MessageIdSchema>, hidden: bool },
}

/// A string of at most 200 bytes or a number; sent back as it came.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) enum MessageIdSchema {
    Text(#[schemars(length(max = 200))] String),
    Number(f64),
}
