//! One client's connection, without its socket: messages go in by [`Connection::receive`], what is to be written comes
//! out of its [`Outbox`].

use std::sync::Arc;

use bytes::Bytes;
use tidings_protocol::{
    CloseCode, MessageId, Offset, Position, RemovalReason, ServerMessage, StreamId, Timestamp, TypeFilter,
};

use crate::{
    engine::{CatchUp, Engine, EngineError, Joined, Record},
    hub::{ConnectionKey, Hub},
    outbox::Outbox,
    random,
    session::{Action, Session},
};

/// What a connection is told at its start, beside its own ids.
#[derive(Clone, Debug)]
pub struct Greeting {
    /// The node's name.
    pub node: String,
    /// Seconds between heartbeats.
    pub heartbeat_interval: u64,
    /// Subscriptions that one connection may have.
    pub subscriptions_max: usize,
    /// Bytes of live messages that may wait for one client.
    pub outbox_bytes_max: usize,
}

/// A client's connection. Dropping it ends its subscriptions.
#[derive(Debug)]
pub struct Connection {
    key: ConnectionKey,
    session: Session,
    outbox: Arc<Outbox>,
    hub: Arc<Hub>,
    engine: Arc<dyn Engine>,
}

impl Connection {
    /// Opens a connection: its first message is `connection.established`, and it follows the announcements from the
    /// position that is told there.
    pub(crate) async fn open(
        hub: Arc<Hub>,
        engine: Arc<dyn Engine>,
        greeting: &Greeting,
        now: Timestamp,
    ) -> Result<Self, EngineError> {
        let outbox = Arc::new(Outbox::new(greeting.outbox_bytes_max));
        let key = hub.connect(&outbox);
        let connection = Self { key, session: Session::new(greeting.subscriptions_max), outbox, hub, engine };
        connection.hub.join(key, &StreamId::Announcements, TypeFilter::everything());
        let announcements = connection.engine.position(&StreamId::Announcements).await?;
        let established = ServerMessage::ConnectionEstablished {
            timestamp: now,
            client_id: uuid::Uuid::now_v7().to_string(),
            // 128 bits: a token cannot be guessed.
            resume_token: random::hex::<16>(),
            heartbeat_interval: greeting.heartbeat_interval,
            protocol: tidings_protocol::PROTOCOL_VERSION,
            node: greeting.node.clone(),
            announcements: announcements.clone(),
        };
        let opening = std::iter::once(encoded(&established));
        connection.hub.confirm(key, &StreamId::Announcements, announcements.offset, &announcements, opening);
        Ok(connection)
    }

    /// What is to be written to the client's socket.
    pub fn outbox(&self) -> Arc<Outbox> {
        Arc::clone(&self.outbox)
    }

    /// A handle that sends heartbeats while the connection waits for messages.
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat { key: self.key, hub: Arc::clone(&self.hub) }
    }

    /// Takes a message of the client. Answers go to the outbox; a bad message gets an `error` and harms nothing.
    pub async fn receive(&mut self, text: &str) {
        let now = jiff::Timestamp::now().into();
        match self.session.receive(text) {
            Action::None => {}
            Action::Reply(reply) => self.send(&reply.into_message(now)),
            Action::Unsubscribe { stream, id } => {
                self.hub.leave(self.key, &stream);
                let (project_id, reason) = (stream.to_string(), RemovalReason::Requested);
                self.send(&ServerMessage::SubscriptionRemoved { timestamp: now, id, project_id, reason });
            }
            Action::Subscribe { stream, types, since, id } => {
                self.subscribe(stream, types, since, id, now).await;
            }
        }
    }

    async fn subscribe(
        &mut self,
        stream: StreamId,
        types: TypeFilter,
        since: Option<Position>,
        id: Option<MessageId>,
        timestamp: Timestamp,
    ) {
        self.hub.join(self.key, &stream, types.clone());
        let Ok(Joined { position, catch_up }) = self.engine.join(&stream, since.as_ref(), &types).await
        else {
            // Without the engine there is nothing to confirm, and a client that comes back finds it or another node.
            return self.outbox.close(CloseCode::TryAgainLater);
        };
        let project_id = stream.to_string();
        let (offset, recovered, state, missed) = match (catch_up, since) {
            (CatchUp::Recovered(records), Some(since)) => (since.offset, Some(true), None, records),
            (CatchUp::Recovered(_), None) => unreachable!("without `since` there is nothing to recover"),
            (CatchUp::State(state), since) => {
                (position.offset, since.map(|_| false), Some(state), Vec::new())
            }
        };
        let epoch = position.epoch.clone();
        let confirmed = ServerMessage::SubscriptionConfirmed {
            timestamp,
            id,
            project_id,
            epoch,
            offset,
            recovered,
            state,
        };
        let opening = std::iter::once(encoded(&confirmed)).chain(replay(&missed, offset, &types));
        self.hub.confirm(self.key, &stream, offset, &position, opening);
    }

    fn send(&self, message: &ServerMessage) {
        self.outbox.push(encoded(message));
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.hub.disconnect(self.key);
    }
}

/// Sends the heartbeats of one connection.
#[derive(Debug)]
pub struct Heartbeat {
    key: ConnectionKey,
    hub: Arc<Hub>,
}

impl Heartbeat {
    /// Puts a `system.heartbeat` with the positions that moved into the outbox.
    pub fn send(&self) {
        self.hub.heartbeat(self.key, jiff::Timestamp::now().into());
    }
}

fn encoded(message: &ServerMessage) -> Bytes {
    message.encode().into()
}

/// What was missed since `offset` and passes the filter. The history may have left out `latest` events that newer ones
/// replaced: the next event that is sent carries their number as `folded`.
fn replay(missed: &[Arc<Record>], offset: Offset, types: &TypeFilter) -> impl Iterator<Item = Bytes> {
    let (mut last, mut folded) = (offset, 0);
    missed.iter().filter_map(move |record| {
        folded += record.offset - last - 1;
        last = record.offset;
        types.matches(&record.event_type).then(|| match std::mem::take(&mut folded) {
            0 => record.json.clone(),
            folded => with_folded(&record.json, folded),
        })
    })
}

fn with_folded(json: &Bytes, folded: u64) -> Bytes {
    let open = json.strip_suffix(b"}").unwrap_or(json);
    [open, format!(",\"folded\":{folded}}}").as_bytes()].concat().into()
}
