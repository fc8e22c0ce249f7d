//! What is published, and what clients write down about what they are told: the evidence that the checker judges.

use std::sync::Arc;

use serde_json::{Value, json};

/// Projects by number: `p0`, `p1`, …
pub(crate) type Project = u16;
/// Publishers by number.
pub(crate) type Publisher = u16;
/// A life of a stream.
pub(crate) type Epoch = Arc<str>;

pub(crate) fn project_id(project: Project) -> String {
    format!("p{project}")
}

pub(crate) fn project_of(id: &str) -> Option<Project> {
    id.strip_prefix('p')?.parse().ok()
}

/// What names an event: each publisher counts from 1 in each project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Number {
    pub(crate) publisher: Publisher,
    pub(crate) n: u32,
}

/// An event of these tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Numbered {
    pub(crate) project: Project,
    pub(crate) number: Number,
    /// How often the very same message was published on purpose.
    pub(crate) copies: u32,
}

impl Numbered {
    /// As JSON, first sent at this moment.
    pub(crate) fn json(self, sent_ms: u64, padding: usize) -> Value {
        let Numbered { project, number: Number { publisher, n }, copies } = self;
        let mut event = json!({"type": "test.numbered", "project_id": project_id(project),
            "publisher": publisher, "n": n, "copies": copies, "sent_ms": sent_ms});
        if padding > 0 {
            event["padding"] = Value::String("x".repeat(padding));
        }
        event
    }
}

/// A place in a stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) epoch: Epoch,
    pub(crate) offset: u64,
}

/// Something that a client was told, or that happened to it.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) at_ms: u64,
    pub(crate) heard: Heard,
}

/// What it was.
#[derive(Clone, Debug)]
pub(crate) enum Heard {
    /// `connection.established` from this node.
    Connected { node: Arc<str> },
    /// `connection.resumed` (true) or `resume_expired` (false).
    Resumed(bool),
    /// `subscription.confirmed`. It `rewinds` when the client had asked twice, with the same `since`, because its resume was
    /// not answered in time; then what came in between comes again.
    Confirmed { project: Project, place: Place, recovered: Option<bool>, has_state: bool, rewinds: bool },
    /// `subscription.removed`, which nobody asked for here.
    Removed { project: Project, reason: Arc<str> },
    /// An event.
    Event { event: Numbered, offset: u64, folded: u64 },
    /// An event that is none of those published, or not one for this client.
    Strange(String),
    /// A position in `system.heartbeat`.
    Position { project: Project, offset: u64 },
    /// `system.degraded`.
    Degraded,
    /// `system.recovered`, with what became of events meanwhile.
    Recovered { gap: Arc<str> },
    /// `container.reconnect`.
    Appointment { in_ms: u64 },
    /// The end of a connection: its close code, 1006 for a cut, and what the client saw of it.
    Closed { code: u16, why: String },
    /// The client closed without a word, because the test wanted it away.
    Left,
}

/// What a publisher knows to be taken.
#[derive(Clone, Debug)]
pub(crate) struct Acknowledged {
    pub(crate) event: Numbered,
    /// Where, if the way it went says so.
    pub(crate) place: Option<Place>,
}

/// One client's evidence: what it followed, and its records in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Witness {
    pub(crate) projects: Vec<Project>,
    pub(crate) records: Vec<Record>,
}

impl Witness {
    /// What it was told about Redis, and what happened to its connection, from `since_ms` on.
    pub(crate) fn told_since(&self, since_ms: u64) -> Vec<String> {
        let records = self.records.iter().filter(|record| record.at_ms >= since_ms);
        let told = records.filter_map(|record| match &record.heard {
            Heard::Degraded => Some("degraded".to_owned()),
            Heard::Recovered { gap } => Some(format!("recovered, gap {gap}")),
            Heard::Closed { code, why } => Some(format!("closed {code} {why}")),
            Heard::Left => Some("left".to_owned()),
            _ => None,
        });
        told.collect()
    }
}
