//! What the server sends beside events.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::{
    Epoch, ErrorCode, MessageId, Offset, Position, RefusedMessage, Timestamp, client::MessageIdSchema,
};

/// A message of the service's own. Events are not among them: they go out as the bytes that the engine keeps.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(tag = "type")]
pub enum ServerMessage {
    /// The first message of a connection.
    #[serde(rename = "connection.established")]
    #[schemars(title = "ConnectionEstablished")]
    ConnectionEstablished {
        /// When it was sent.
        timestamp: Timestamp,
        /// Names the connection; survives a resume.
        client_id: String,
        /// Good once, to take this connection over after a cut.
        resume_token: String,
        /// Seconds between heartbeats.
        heartbeat_interval: u64,
        /// The version of the protocol.
        protocol: u32,
        /// The node that serves this connection.
        node: String,
        /// Where the stream `*`, which every connection follows, stands now.
        announcements: Position,
    },
    /// A former connection was taken over.
    #[serde(rename = "connection.resumed")]
    #[schemars(title = "ConnectionResumed")]
    ConnectionResumed {
        /// When it was sent.
        timestamp: Timestamp,
        /// The `id` of the client's message that this answers.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(with = "Option<MessageIdSchema>")]
        id: Option<MessageId>,
        /// The former connection's.
        client_id: String,
        /// The projects that the former connection followed.
        subscriptions: Vec<String>,
        /// Whether the node started after a container restart.
        restarted: bool,
    },
    /// A subscription stands; what `since` missed follows, then live events.
    #[serde(rename = "subscription.confirmed")]
    #[schemars(title = "SubscriptionConfirmed")]
    SubscriptionConfirmed {
        /// When it was sent.
        timestamp: Timestamp,
        /// The `id` of the client's message that this answers.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(with = "Option<MessageIdSchema>")]
        id: Option<MessageId>,
        /// The project.
        project_id: String,
        /// The stream's life that `offset` counts in.
        epoch: Epoch,
        /// With `recovered: true` the offset of `since`, else where live events continue from.
        offset: Offset,
        /// `true`: everything since `since` follows. `false`: it could not be. `null`: `since` was not given.
        recovered: Option<bool>,
        /// The fold of the stream up to `offset`, unless `recovered` is `true`.
        #[serde(skip_serializing_if = "Option::is_none")]
        state: Option<StateSnapshot>,
    },
    /// A subscription ended.
    #[serde(rename = "subscription.removed")]
    #[schemars(title = "SubscriptionRemoved")]
    SubscriptionRemoved {
        /// When it was sent.
        timestamp: Timestamp,
        /// The `id` of the client's message that this answers.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(with = "Option<MessageIdSchema>")]
        id: Option<MessageId>,
        /// The project.
        project_id: String,
        /// Why.
        reason: RemovalReason,
    },
    /// The answer to `ping`.
    #[serde(rename = "pong")]
    #[schemars(title = "Pong")]
    Pong {
        /// When it was sent.
        timestamp: Timestamp,
        /// The `id` of the client's message that this answers.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(with = "Option<MessageIdSchema>")]
        id: Option<MessageId>,
    },
    /// The connection lives.
    #[serde(rename = "system.heartbeat")]
    #[schemars(title = "SystemHeartbeat")]
    SystemHeartbeat {
        /// When it was sent.
        timestamp: Timestamp,
        /// For streams that moved since the last heartbeat: everything up to it was sent here or was not for here.
        positions: BTreeMap<String, Offset>,
    },
    /// A source cannot be heard; what it says now may come late or be lost.
    #[serde(rename = "system.degraded")]
    #[schemars(title = "SystemDegraded")]
    SystemDegraded {
        /// When it was sent.
        timestamp: Timestamp,
        /// Which source, since when.
        #[serde(flatten)]
        degraded: Degraded,
    },
    /// A source is heard again.
    #[serde(rename = "system.recovered")]
    #[schemars(title = "SystemRecovered")]
    SystemRecovered {
        /// When it was sent.
        timestamp: Timestamp,
        /// Which source, since when.
        #[serde(flatten)]
        degraded: Degraded,
        /// What became of the events in between.
        gap: Gap,
    },
    /// An appointment: until then this client is served, then the server closes with 1012.
    #[serde(rename = "container.reconnect")]
    #[schemars(title = "ContainerReconnect")]
    ContainerReconnect {
        /// When it was sent.
        timestamp: Timestamp,
        /// In words, for a log.
        message: String,
        /// Milliseconds from this message.
        retry_after_ms: u64,
    },
    /// A message was refused; the connection lives on.
    #[serde(rename = "error")]
    #[schemars(title = "Error")]
    Error {
        /// When it was sent.
        timestamp: Timestamp,
        /// The `id` of the client's message that this answers.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(with = "Option<MessageIdSchema>")]
        id: Option<MessageId>,
        /// What kind of mistake it was.
        code: ErrorCode,
        /// What is wrong, and in which field.
        message: String,
        /// How to mend it.
        #[serde(skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
        /// The project that the message named.
        #[serde(skip_serializing_if = "Option::is_none")]
        project_id: Option<String>,
    },
}

/// The fold of a stream: what a page needs to draw itself without a second request.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct StateSnapshot {
    /// The newest event of each task that runs or ended within the last 5 minutes, newest first.
    #[schemars(with = "Vec<serde_json::Value>")]
    pub tasks: Vec<Box<RawValue>>,
    /// The same for processes.
    #[schemars(with = "Vec<serde_json::Value>")]
    pub processes: Vec<Box<RawValue>>,
    /// There were more than 1,000 entries or 1 MiB; the oldest are left out.
    #[serde(skip_serializing_if = "is_false")]
    #[schemars(with = "Option<bool>")]
    pub truncated: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// Why a subscription ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RemovalReason {
    /// The client asked for it.
    Requested,
    /// The right to the project ended.
    Rights,
    /// The session ended.
    Expired,
}

/// Where events come from, where that can fail on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The Redis that carries events.
    Redis,
    /// The Redis that Celery reports to.
    Celery,
    /// The file watcher.
    Watcher,
}

/// Which source cannot be heard, and since when.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct Degraded {
    /// The source.
    pub source: Source,
    /// Since when.
    pub since: Timestamp,
}

/// What became of events while a source was not heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Gap {
    /// There were none.
    None,
    /// They were read again and delivered.
    Recovered,
    /// Some may be lost.
    Lost,
}

impl ServerMessage {
    /// The message as JSON.
    pub fn encode(&self) -> String {
        // Maps with string keys, numbers and raw JSON: nothing in it can fail to serialise.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The answer to a message that was refused.
    pub fn refusal(refused: RefusedMessage, timestamp: Timestamp) -> Self {
        let RefusedMessage { code, message, hint, id, project_id } = refused;
        Self::Error { timestamp, id, code, message, hint, project_id }
    }
}
