//! An event: checked where it enters, its text kept as the publisher wrote it.

use std::{borrow::Cow, fmt, io::Write as _, sync::Arc};

use crate::{
    EventId, EventType, Offset, ProjectId, StreamId, Timestamp,
    invalid::{InvalidField, plain},
    known::{self, Facts},
    object::{ObjectWriter, RawObject},
};

/// The largest event that is accepted unless the settings say otherwise: 1 MiB of JSON.
pub const EVENT_BYTES_MAX: usize = 1024 * 1024;

/// Members that only we may write; from a publisher they are removed.
const OUR_MEMBERS: [&str; 4] = ["offset", "epoch", "folded", "stream"];

/// An event that may be appended to its stream.
///
/// Values pass through byte for byte, unknown members too; `timestamp` is the one value that is rewritten (absent: now;
/// without a zone: UTC; else normalised to `Z`). `null` in an optional member counts as absent.
#[derive(Clone, Debug)]
pub struct Event {
    #[allow(clippy::struct_field_names, reason = "`type` is the field's name on the wire")]
    event_type: EventType,
    audience: Audience,
    workspace_id: Option<Arc<str>>,
    id: Option<EventId>,
    class: Class,
    /// The JSON object without its closing brace and without the members that the engine adds.
    open_json: String,
}

/// Whom an event is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Audience {
    /// The subscribers of the project, in the project's stream.
    Project(ProjectId),
    /// In the stream `*`: every connection whose rights include this project (`project.*`).
    RightsToProject(ProjectId),
    /// In the stream `*`: connections with rights to everything (`workspace.changed` that belongs to no project).
    RightsToEverything,
    /// In the stream `*`: every connection (custom events without a project).
    Everyone,
}

impl Audience {
    /// Whom an event of a stream is for, as far as its followers differ in that; `json`: as subscribers get it.
    pub fn of_appended(event_type: &EventType, json: &str) -> Self {
        let may_differ = event_type.first_word() == "project" || event_type.as_str() == "workspace.changed";
        if !may_differ {
            return Self::Everyone;
        }
        let now = jiff::Timestamp::UNIX_EPOCH.into();
        // What was checked once parses again; what does not is for nobody who may not see everything.
        Event::parse(json.as_bytes(), usize::MAX, now)
            .map_or(Self::RightsToEverything, |event| event.audience)
    }
}

/// What may happen to an event while a client is behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Class {
    /// Never dropped or merged.
    Durable,
    /// May be folded to the newest of its `key`, on replay or while a client is behind.
    Latest {
        /// Names what the event is about, with its type: `task.progress:t1`.
        key: Arc<str>,
    },
}

/// Why an event was refused: which field of which type, and what was expected there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidEvent {
    /// Why, for counting.
    pub reason: Reason,
    /// The type, where it could be read.
    pub event_type: Option<String>,
    /// The field, as a path from the top (`progress.current`); `None`: the event as a whole.
    pub field: Option<String>,
    /// What was expected.
    pub message: String,
}

/// The kinds of refusal: the values of the label `reason` in metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Not JSON.
    InvalidJson,
    /// JSON, but not of the shape of its type.
    InvalidEvent,
    /// A type that only the service itself may send.
    ReservedType,
    /// More bytes than allowed.
    TooLarge,
}

impl Reason {
    /// The reason as a metric's label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidJson => "invalid_json",
            Self::InvalidEvent => "invalid_event",
            Self::ReservedType => "reserved_type",
            Self::TooLarge => "too_large",
        }
    }
}

impl fmt::Display for InvalidEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(event_type) = &self.event_type {
            write!(f, "{event_type}: ")?;
        }
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for InvalidEvent {}

impl InvalidEvent {
    /// A refusal for size, made by whoever sees an event before it is read whole.
    pub fn too_large(bytes: usize, bytes_max: usize) -> Self {
        Self::new(Reason::TooLarge, format!("{bytes} bytes, and at most {bytes_max} are accepted"))
    }

    fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, event_type: None, field: None, message: message.into() }
    }

    fn of_field(event_type: Option<&str>, invalid: InvalidField) -> Self {
        Self {
            reason: Reason::InvalidEvent,
            event_type: event_type.map(|name| name.chars().take(100).collect()),
            field: invalid.field,
            message: invalid.message,
        }
    }
}

impl Event {
    /// Reads and checks an event as any publisher sends it: a JSON object of at most `bytes_max` bytes.
    pub fn parse(json: &[u8], bytes_max: usize, now: Timestamp) -> Result<Self, InvalidEvent> {
        if json.len() > bytes_max {
            return Err(InvalidEvent::too_large(json.len(), bytes_max));
        }
        let text = std::str::from_utf8(json)
            .map_err(|error| InvalidEvent::new(Reason::InvalidJson, format!("not UTF-8: {error}")))?
            .trim_ascii();
        let object = RawObject::parse(text).map_err(|error| not_an_object(&error))?;
        Self::from_object(text, &object, now)
    }

    fn from_object(text: &str, object: &RawObject<'_>, now: Timestamp) -> Result<Self, InvalidEvent> {
        let event_type = read_type(object)?;
        let refuse = |invalid| InvalidEvent::of_field(Some(event_type.as_str()), invalid);
        let timestamp = read_timestamp(object, now).map_err(refuse)?;
        let id = read_checked(object, "id", |id| EventId::try_from(id)).map_err(refuse)?;
        let facts = match known::find(event_type.as_str()) {
            Some(known) => (known.check)(text).map_err(refuse)?,
            None => Facts {
                project_id: read_checked(object, "project_id", |id| ProjectId::try_from(id))
                    .map_err(refuse)?,
                ..Facts::default()
            },
        };
        let open_json = rewrite(text.len(), object, timestamp, &facts);
        let class = match &facts.latest_key {
            Some(key) => known::latest_class(event_type.as_str(), key),
            None => Class::Durable,
        };
        let audience = match (facts.project_id, event_type.first_word()) {
            (Some(project_id), "project") => Audience::RightsToProject(project_id),
            (Some(project_id), _) => Audience::Project(project_id),
            (None, _) if facts.workspace_id.is_some() => Audience::RightsToEverything,
            (None, _) => Audience::Everyone,
        };
        let workspace_id = facts.workspace_id.map(Arc::from);
        Ok(Self { event_type, audience, workspace_id, id, class, open_json })
    }

    /// The event's type.
    pub fn event_type(&self) -> &EventType {
        &self.event_type
    }

    /// Whom the event is for.
    pub fn audience(&self) -> &Audience {
        &self.audience
    }

    /// The stream that the event belongs to.
    pub fn stream(&self) -> StreamId {
        match &self.audience {
            Audience::Project(project_id) => StreamId::Project(project_id.clone()),
            Audience::RightsToProject(_) | Audience::RightsToEverything | Audience::Everyone => {
                StreamId::Announcements
            }
        }
    }

    /// The publisher's own id, by which a repetition is known.
    pub fn id(&self) -> Option<&EventId> {
        self.id.as_ref()
    }

    /// What may happen to the event while a client is behind.
    pub fn class(&self) -> &Class {
        &self.class
    }

    /// The workspace of a `workspace.changed` that names no project: the settings may know one.
    pub fn workspace_without_project(&self) -> Option<&str> {
        self.workspace_id.as_deref().filter(|_| self.audience == Audience::RightsToEverything)
    }

    /// Gives the event to a project, as the `[workspaces]` table of the settings has it.
    pub fn assign_project(&mut self, project_id: ProjectId) {
        let mut json = ObjectWriter::with_capacity(self.open_json.len() + 64);
        // The text is our own writing; what was checked once parses again.
        let closed = format!("{}}}", self.open_json);
        if let Ok(object) = RawObject::parse(&closed) {
            object
                .members()
                .iter()
                .filter(|member| member.key != "project_id")
                .for_each(|member| json.member(member));
        }
        json.string("project_id", project_id.as_str());
        self.open_json = json.finish_open();
        self.audience = Audience::Project(project_id);
    }

    /// Gives an id to an event that came without one.
    pub fn assign_id(&mut self, id: EventId) {
        if self.id.is_none() {
            self.open_json.push_str(",\"id\":");
            self.open_json.push_str(&serde_json::Value::from(id.as_str()).to_string());
            self.id = Some(id);
        }
    }

    /// The event as its subscribers get it, at its place in the stream.
    pub fn encode(&self, offset: Offset) -> String {
        let mut json = Vec::new();
        self.encode_into(offset, &mut json);
        String::from_utf8(json).expect("made of text")
    }

    /// Writes the event as its subscribers get it behind what `json` holds.
    pub fn encode_into(&self, offset: Offset, json: &mut Vec<u8>) {
        json.reserve_exact(self.open_json.len() + 48);
        self.encode_open_into(json);
        close_with_offset(offset, json);
    }

    /// Writes the event without its offset; [`close_with_offset`] ends it.
    pub fn encode_open_into(&self, json: &mut Vec<u8>) {
        json.extend_from_slice(self.open_json.as_bytes());
        if !matches!(self.audience, Audience::Project(_)) {
            json.extend_from_slice(b",\"stream\":\"*\"");
        }
    }
}

/// Ends an event that [`Event::encode_open_into`] wrote, at its place in the stream.
pub fn close_with_offset(offset: Offset, json: &mut Vec<u8>) {
    // Writing to a `Vec` cannot fail.
    let _ = write!(json, ",\"offset\":{offset}}}");
}

fn not_an_object(error: &serde_json::Error) -> InvalidEvent {
    let message = plain(error);
    let place = format!(" (line {}, column {})", error.line(), error.column());
    if error.is_data() {
        // Valid JSON so far, but not an object, or a key twice.
        let message = message.replace(", expected a JSON object", "; expected a JSON object");
        return InvalidEvent::new(Reason::InvalidEvent, message);
    }
    InvalidEvent::new(Reason::InvalidJson, format!("not JSON: {message}{place}"))
}

fn read_type(object: &RawObject<'_>) -> Result<EventType, InvalidEvent> {
    let invalid = |event_type: Option<&str>, message: &str| {
        InvalidEvent::of_field(event_type, InvalidField::new("type", message))
    };
    let Some(name) = object.get_str("type") else {
        let message = if object.get("type").is_none() { "is required" } else { "expected a string" };
        return Err(invalid(None, message));
    };
    let event_type = EventType::try_from(&*name).map_err(|error| invalid(Some(&name), error.0))?;
    if event_type.is_reserved() {
        let message = format!("`{}.*` comes from the service alone", event_type.first_word());
        return Err(InvalidEvent { reason: Reason::ReservedType, ..invalid(Some(&name), &message) });
    }
    Ok(event_type)
}

fn read_timestamp(object: &RawObject<'_>, now: Timestamp) -> Result<Timestamp, InvalidField> {
    if object.get("timestamp").is_none() {
        return Ok(now);
    }
    object
        .get_str("timestamp")
        .and_then(|text| Timestamp::parse(&text))
        .ok_or_else(|| InvalidField::new("timestamp", "expected RFC 3339, as in `2026-11-23T10:00:00.000Z`"))
}

fn read_checked<T>(
    object: &RawObject<'_>,
    key: &str,
    check: impl Fn(&str) -> Result<T, crate::InvalidId>,
) -> Result<Option<T>, InvalidField> {
    if object.get(key).is_none() {
        return Ok(None);
    }
    let text = object.get_str(key).ok_or_else(|| InvalidField::new(key, "expected a string"))?;
    check(&text).map(Some).map_err(|error| InvalidField::new(key, error.0))
}

/// The event's text with `timestamp`, a missing `project_id` and a missing percentage filled in, ours removed, and the
/// end left open for `offset`.
fn rewrite(bytes: usize, object: &RawObject<'_>, timestamp: Timestamp, facts: &Facts) -> String {
    let mut json = ObjectWriter::with_capacity(bytes + 96);
    let mut project_written = false;
    for member in object.members() {
        let (key, value) = (&*member.key, member.value);
        if OUR_MEMBERS.contains(&key) || key == "timestamp" || (key == "id" && value == "null") {
            continue;
        }
        match (key, &facts.percentage) {
            ("project_id", _) if value == "null" && facts.project_id.is_some() => continue,
            ("progress", Some(percentage)) => json.raw(key, &with_percentage(value, *percentage)),
            _ => json.member(member),
        }
        project_written |= key == "project_id";
    }
    if let (Some(project_id), false) = (&facts.project_id, project_written) {
        json.string("project_id", project_id.as_str());
    }
    json.string("timestamp", &timestamp.to_string());
    json.finish_open()
}

fn with_percentage(progress: &str, percentage: f64) -> Cow<'_, str> {
    let Ok(object) = RawObject::parse(progress) else { return progress.into() };
    let mut json = ObjectWriter::with_capacity(progress.len() + 24);
    object
        .members()
        .iter()
        .filter(|member| member.key != "percentage")
        .for_each(|member| json.member(member));
    json.number("percentage", percentage);
    json.finish().into()
}
