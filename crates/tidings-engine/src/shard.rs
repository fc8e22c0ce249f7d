//! A shard: the connections of one core, the streams that they follow, and the way of bytes to their sockets.
//!
//! Pure: sockets, time and the engine's answers are passed in, effects are taken out. It waits for nothing and knows no
//! thread. [`driver`](crate::driver) runs it on real sockets, a simulation in `tests/` on virtual ones.

mod allowance;
mod client;
mod drain;
mod encoding;
mod followed;
mod inbound;
mod pass;
mod sessions;
mod subscribing;
mod tail;
mod upkeep;
mod wheel;

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    io::{self, IoSlice},
    num::ParseIntError,
    str::FromStr,
    sync::Arc,
};

use bytes::Bytes;
use slab::Slab;
use smallvec::SmallVec;
use tidings_protocol::{
    CloseCode, Degraded, PROTOCOL_VERSION, Position, RemovalReason, ServerMessage, StreamId, Timestamp,
    TypeFilter,
};

use crate::{
    engine::{EngineError, HistoryPage, Joined, PageLimit, Record},
    hub::ShardStats,
    rights::SessionKey,
    saved::{ClientId, ResumeToken, SavedConnection},
    vigil::Notice,
    wire::{Deflater, Inflater, Reader, close_frame},
};

use allowance::Allowance;
use client::{Client, Closing, Flags, Subscribing};
use drain::Drain;
use followed::{Followed, Member, Selection};
use pass::Pass;
use sessions::Sessions;
use wheel::Wheel;

pub use encoding::Encoding;
pub use sessions::Known;

/// For the peer's half of a close.
const CLOSE_TIMEOUT_MS: u64 = 2000;

/// Names a connection within its node; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionKey {
    /// The shard that has it.
    pub shard: u16,
    index: u32,
    generation: u32,
}

impl ConnectionKey {
    /// The connection's place in its shard, which another one may have later.
    pub fn index(self) -> usize {
        self.index as usize
    }
}

impl fmt::Display for ConnectionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.shard, self.index, self.generation)
    }
}

impl FromStr for ConnectionKey {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        let mut parts = text.splitn(3, '.');
        let mut next = || parts.next().unwrap_or_default();
        Ok(Self { shard: next().parse()?, index: next().parse()?, generation: next().parse()? })
    }
}

/// Where bytes go and come from. Neither call ever waits.
pub trait Socket {
    /// Writes as much of the slices as the peer takes.
    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize>;
    /// Reads what has arrived; 0: the peer writes no more.
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Passes on what the socket itself still holds of what it took; `WouldBlock`: the peer does not take all of it now.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What connections are told and allowed.
#[derive(Clone, Debug)]
pub struct ShardOptions {
    /// The node's name.
    pub node: Arc<str>,
    /// Whether this start follows a container restart; told to whoever resumes.
    pub restarted: bool,
    /// Between two heartbeats, in seconds.
    pub heartbeat_interval_s: u64,
    /// Subscriptions that one connection may have.
    pub subscriptions_max: usize,
    /// Messages per second that a WebSocket may send; more of them at once.
    pub message_rate_max: u32,
    /// What waits for a blocked socket longer than this makes its client *behind*.
    pub behind_age_ms: u64,
    /// More waiting bytes than this make a blocked client *behind*.
    pub behind_bytes: usize,
    /// More waiting durable bytes than this make a client too slow.
    pub slow_bytes_max: u64,
    /// Bytes that all tails of the shard may hold for blocked clients; above, the furthest behind let go first.
    pub retained_bytes_max: usize,
    /// Whether who may not see a project is told what he may.
    pub explains_rights: bool,
}

/// A moment on both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Monotonic, from any beginning.
    pub ms: u64,
    /// For the messages.
    pub wall: Timestamp,
}

/// A connection that begins.
#[derive(Debug)]
pub struct Opening<S> {
    /// Its socket, after the handshake.
    pub socket: S,
    /// The form of its messages.
    pub encoding: Encoding,
    /// What it follows from its beginning; a WebSocket asks by itself.
    pub subscription: Option<(StreamId, TypeFilter, Option<Position>)>,
    /// Whose it is; `None`: nobody is asked, and everybody may see everything.
    pub holder: Option<(SessionKey, Known)>,
}

/// What a shard wants done, in this order.
#[derive(Debug)]
pub enum Effect {
    /// Let records of the stream come here from now on.
    Follow(StreamId),
    /// No connection follows the stream any more.
    Unfollow(StreamId),
    /// Ask the engine, and pass on what it answers.
    Ask(Question),
    /// Save a connection, or what has changed of it.
    Save(SavedConnection),
    /// A connection was lost, and can be resumed for a while.
    Release(ClientId, ConnectionKey),
    /// A connection ended for good.
    Forget(ClientId, ConnectionKey),
}

/// A question to the engine.
#[derive(Debug)]
pub enum Question {
    /// What a new subscriber has to be told.
    Join {
        /// Who asks.
        asker: Asker,
        /// Where the subscriber stood.
        since: Option<Position>,
        /// What of the state it wants.
        types: Arc<TypeFilter>,
    },
    /// What comes next for a subscriber that is behind.
    Read {
        /// Who asks.
        asker: Asker,
        /// Where the subscriber stands.
        since: Position,
        /// How much it takes at once.
        limit: PageLimit,
    },
    /// The connection that a token stands for.
    TakeOver {
        /// The connection that asks.
        key: ConnectionKey,
        /// What it showed.
        token: ResumeToken,
        /// As what the former connection goes on.
        successor: SavedConnection,
    },
}

/// A subscription that a question is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Its connection.
    pub key: ConnectionKey,
    /// Its stream.
    pub stream: StreamId,
    /// Tells the answer to this question from that to an earlier one.
    ticket: u64,
}

/// The engine's answer.
#[derive(Debug)]
pub enum Answer {
    /// To [`Question::Join`].
    Joined(Asker, Result<Joined, EngineError>),
    /// To [`Question::Read`].
    Read(Asker, Result<HistoryPage, EngineError>),
    /// To [`Question::TakeOver`].
    TakenOver(ConnectionKey, Result<Option<SavedConnection>, EngineError>),
}

/// The connections of one core.
#[derive(Debug)]
pub struct Shard<S> {
    number: u16,
    options: ShardOptions,
    allowed: allowance::Limits,
    now: Moment,
    clients: Slab<Client<S>>,
    generation: u32,
    followed: Slab<Followed>,
    by_stream: HashMap<StreamId, usize>,
    /// The filter that lets everything pass, shared by all who have none.
    everything: Arc<TypeFilter>,
    announcements: usize,
    sessions: Sessions,
    /// Sources that cannot be heard.
    degraded: Vec<Degraded>,
    cohorts_made: u64,
    tickets: u64,
    /// Streams with something new that no pass has begun to write.
    dirty: Vec<usize>,
    /// Clients with something to write of their own.
    ready: Vec<usize>,
    passes: VecDeque<Pass>,
    passes_begun: u64,
    /// Clients whose links hold bytes of tails.
    holders: Vec<usize>,
    /// Clients whose sockets may hold more than was read in one turn.
    unread: Vec<usize>,
    /// Clients to which nothing of a stream is written, because nobody knows whether they may see it.
    withheld: Vec<usize>,
    /// Clients whose subscriptions have changed.
    unsaved: Vec<usize>,
    wheel: Wheel<ConnectionKey>,
    drain: Option<Drain>,
    effects: Vec<Effect>,
    deflater: Deflater,
    inflater: Inflater,
    spare_reader: Reader,
    read_buffer: Vec<u8>,
    /// Small pieces for one socket are put together here.
    write_buffer: Vec<u8>,
    /// Bytes that all tails hold.
    tail_bytes: usize,
    stats: Arc<ShardStats>,
}

impl<S: Socket> Shard<S> {
    /// A shard without connections. It follows the announcements, which stand at `announcements`, for ever.
    pub fn new(
        number: u16,
        options: ShardOptions,
        announcements: Position,
        now: Moment,
        stats: Arc<ShardStats>,
    ) -> Self {
        let mut shard = Self {
            number,
            allowed: allowance::Limits::new(options.message_rate_max, options.subscriptions_max),
            options,
            now,
            clients: Slab::new(),
            generation: 0,
            followed: Slab::new(),
            by_stream: HashMap::new(),
            everything: Arc::default(),
            announcements: 0,
            sessions: Sessions::new(),
            degraded: Vec::new(),
            cohorts_made: 0,
            tickets: 0,
            dirty: Vec::new(),
            ready: Vec::new(),
            passes: VecDeque::new(),
            passes_begun: 0,
            holders: Vec::new(),
            unread: Vec::new(),
            withheld: Vec::new(),
            unsaved: Vec::new(),
            wheel: Wheel::new(now.ms),
            drain: None,
            effects: Vec::new(),
            deflater: Deflater::default(),
            inflater: Inflater::default(),
            spare_reader: Reader::default(),
            read_buffer: vec![0; inbound::READ_BYTES],
            write_buffer: Vec::new(),
            tail_bytes: 0,
            stats,
        };
        shard.announcements = shard.follow(&StreamId::Announcements);
        let followed = &mut shard.followed[shard.announcements];
        followed.begin(announcements.epoch, announcements.offset);
        followed.permanent = true;
        shard
    }

    /// Tells the shard the time; everything that follows happens now.
    pub fn set_now(&mut self, now: Moment) {
        self.now = now;
    }

    /// What the shard wants done since this was last asked.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        // First what has changed of connections, so that whoever takes one over in the same breath gets all of it.
        let others = std::mem::take(&mut self.effects);
        for index in std::mem::take(&mut self.unsaved) {
            self.save(index);
        }
        self.effects.extend(others);
        std::mem::take(&mut self.effects)
    }

    /// The name that the next connection will have.
    pub fn next_key(&self) -> ConnectionKey {
        ConnectionKey {
            shard: self.number,
            index: u32::try_from(self.clients.vacant_key()).expect("fewer than 2^32 connections"),
            generation: self.generation.wrapping_add(1),
        }
    }

    /// Takes a connection in. A WebSocket is greeted and follows the announcements.
    pub fn open(&mut self, opening: Opening<S>) -> ConnectionKey {
        let key = self.next_key();
        self.generation = key.generation;
        let now_ms = self.now.ms;
        let seat = self.sessions.enter(self.clients.vacant_key(), opening.holder, self.now);
        let client = Client {
            socket: opening.socket,
            key,
            seat,
            id: ClientId::random(),
            token: ResumeToken::random(),
            encoding: opening.encoding,
            links: SmallVec::new(),
            first_link: 0,
            outgoing: None,
            frozen: None,
            reading: None,
            closing: None,
            pass: 0,
            waits_for_socket: false,
            joining: 0,
            behind: 0,
            stalled_since: None,
            heard_ms: now_ms,
            beat_ms: self.first_beat(key),
            heartbeat_ms: now_ms,
            pinged_ms: None,
            allowance: Allowance::default(),
            flags: Flags::default(),
        };
        self.wheel.schedule(client.beat_ms, key);
        let index = self.clients.insert(client);
        self.stats.opened();
        if opening.encoding.is_websocket() {
            self.greet(index);
            self.mark_unsaved(index);
        }
        for degraded in self.degraded.clone() {
            let message = self.message_of(Notice::Degraded(degraded));
            self.send(index, &message);
        }
        if let Some((stream, types, since)) = opening.subscription {
            let types = self.intern(types);
            if self.may_see(index, &stream) {
                self.join(index, Subscribing { stream, types, since, id: None });
            } else {
                // The rights have changed since it was let in.
                self.removed(index, &stream, RemovalReason::Rights, None);
                self.close_when_written(index, CloseCode::Forbidden);
            }
        }
        self.ready.push(index);
        key
    }

    fn greet(&mut self, index: usize) {
        let stream = self.announcements;
        let followed = &self.followed[stream];
        let epoch = followed.epoch.clone().expect("the announcements are known from the beginning");
        let announcements = Position { epoch, offset: followed.head };
        let client = &self.clients[index];
        let established = ServerMessage::ConnectionEstablished {
            timestamp: self.now.wall,
            client_id: client.id.to_string(),
            resume_token: client.token.to_string(),
            heartbeat_interval: self.options.heartbeat_interval_s,
            protocol: PROTOCOL_VERSION,
            node: self.options.node.to_string(),
            announcements: announcements.clone(),
        };
        self.send(index, &established);
        let selection = self.selection(index, &StreamId::Announcements, &Arc::clone(&self.everything));
        self.link(index, stream, &selection, announcements.offset);
    }

    /// Takes records of a stream, ascending; what came before is skipped.
    pub fn deliver(&mut self, stream: &StreamId, position: &Position, records: &[Arc<Record>]) {
        let (Some(&number), Some(first)) = (self.by_stream.get(stream), records.first()) else { return };
        let before = Position { epoch: position.epoch.clone(), offset: first.offset - 1 };
        match &self.followed[number].epoch {
            Some(epoch) if *epoch == position.epoch => {}
            Some(_) => self.rejoin_at(number, &before),
            None => self.followed[number].begin(before.epoch, before.offset),
        }
        let followed = &mut self.followed[number];
        for record in records.iter().filter(|record| record.offset > followed.head).collect::<Vec<_>>() {
            self.tail_bytes += followed.push(record, self.now.ms, &mut self.deflater);
        }
        if !std::mem::replace(&mut followed.dirty, true) {
            self.dirty.push(number);
        }
    }

    /// The stream goes on behind `position`, and not behind what came of it: its subscribers are brought there from where they
    /// were, and confirmed again.
    pub fn rejoin(&mut self, stream: &StreamId, position: &Position) {
        let Some(&number) = self.by_stream.get(stream) else { return };
        match &self.followed[number].epoch {
            Some(_) => self.rejoin_at(number, position),
            None => self.followed[number].begin(position.epoch.clone(), position.offset),
        }
    }

    /// Tells every client, and those who come while it holds.
    pub fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Degraded(degraded) => self.degraded.push(degraded),
            Notice::Recovered(degraded, _) => self.degraded.retain(|other| other.source != degraded.source),
        }
        // Written once for each form, because there may be very many.
        let message = self.message_of(notice).encode();
        let forms = [Encoding::Plain, Encoding::Deflate, Encoding::EventStream];
        let frames = forms.map(|form| (form, form.message(&message, None, &mut self.deflater)));
        for (index, client) in &mut self.clients {
            if client.closing.is_none()
                && let Some((_, frame)) = frames.iter().find(|(form, _)| *form == client.encoding)
            {
                client.push([frame.clone()]);
                self.ready.push(index);
            }
        }
    }

    fn message_of(&self, notice: Notice) -> ServerMessage {
        let timestamp = self.now.wall;
        match notice {
            Notice::Degraded(degraded) => ServerMessage::SystemDegraded { timestamp, degraded },
            Notice::Recovered(degraded, gap) => ServerMessage::SystemRecovered { timestamp, degraded, gap },
        }
    }

    /// The client's socket takes bytes again.
    pub fn writable(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        // An error shows again when the socket is read.
        let _ = client.socket.flush();
        if std::mem::take(&mut client.waits_for_socket) {
            self.ready.push(index);
        }
    }

    /// Closes a connection at once, before what waits for it.
    pub fn close(&mut self, key: ConnectionKey, code: CloseCode) {
        if let Some(index) = self.index_of(key) {
            self.say_close(index, code);
        }
    }

    /// Closes every connection, each after what waits for it.
    pub fn close_all(&mut self, code: CloseCode) {
        let open = self.clients.iter().filter(|(_, client)| client.closing.is_none());
        for index in open.map(|(index, _)| index).collect::<Vec<_>>() {
            self.close_when_written(index, code);
        }
    }

    /// Drops every connection where it stands.
    pub fn drop_all(&mut self) {
        for index in self.clients.iter().map(|(index, _)| index).collect::<Vec<_>>() {
            self.remove(index, None);
        }
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.clients.len()
    }

    /// The socket of a connection, to register it.
    pub fn socket_mut(&mut self, key: ConnectionKey) -> Option<&mut S> {
        let index = self.index_of(key)?;
        self.clients.get_mut(index).map(|client| &mut client.socket)
    }

    fn index_of(&self, key: ConnectionKey) -> Option<usize> {
        self.clients.get(key.index()).filter(|client| client.key == key).map(|_| key.index())
    }

    /// Queues a message.
    fn send(&mut self, index: usize, message: &ServerMessage) {
        let client = &mut self.clients[index];
        let frame = client.encoding.message(&message.encode(), None, &mut self.deflater);
        client.push([frame]);
    }

    /// Queues a message that stands at a position of a link's stream.
    fn send_at(&mut self, index: usize, number: usize, message: &ServerMessage, position: &Position) {
        let client = &mut self.clients[index];
        let at = Some((&position.epoch, position.offset));
        let frame = client.encoding.message(&message.encode(), at, &mut self.deflater);
        // Of the announcements it holds nothing that anybody might not see.
        let stream = Some(client.links[number].stream).filter(|&stream| stream != self.announcements);
        client.push_of(stream.map(|stream| (stream, position.offset)), [frame]);
    }

    /// One `TypeFilter` for all that say the same would cost a lookup; the usual one, which says nothing, is shared.
    fn intern(&self, types: TypeFilter) -> Arc<TypeFilter> {
        if types == *self.everything { Arc::clone(&self.everything) } else { Arc::new(types) }
    }

    fn close_when_written(&mut self, index: usize, code: CloseCode) {
        // A connection on its way out is not saved any more, and what it was told in the same breath counts.
        self.save(index);
        self.clients[index].closing = Some(Closing::WhenWritten(code));
        self.ready.push(index);
    }

    /// Says goodbye as the last thing: what waits is dropped, but for the rest of a frame that has begun.
    fn say_close(&mut self, index: usize, code: CloseCode) {
        if matches!(self.clients[index].closing, Some(Closing::Said { .. } | Closing::Answering { .. })) {
            return;
        }
        self.save(index);
        let close = self.clients[index].encoding.is_websocket().then(|| close_frame(code));
        self.write_last(index, close, |until_ms| Closing::Said { code, until_ms });
    }

    /// Lets a frame be the last that is written to a connection. What waits is dropped, but for the rest of a frame that has
    /// begun; `closing` is told when the peer's time is up.
    fn write_last(&mut self, index: usize, frame: Option<Bytes>, closing: impl FnOnce(u64) -> Closing) {
        self.unlink_all(index);
        let client = &mut self.clients[index];
        if let Some(outgoing) = &mut client.outgoing {
            outgoing.keep_begun_frame();
        }
        if let Some(frame) = frame {
            client.push([frame]);
        }
        let until_ms = self.now.ms + CLOSE_TIMEOUT_MS;
        client.closing = Some(closing(until_ms));
        self.wheel.schedule(until_ms, client.key);
        self.ready.push(index);
    }

    /// Ends a connection; `code`: with which it closed.
    fn remove(&mut self, index: usize, code: Option<u16>) {
        if !self.clients.contains(index) {
            return;
        }
        // What its client was told is kept, also if the end came in the same breath.
        self.save(index);
        self.unlink_all(index);
        let client = self.clients.remove(index);
        self.leave_session(client.seat);
        if self.clients.is_empty() {
            // What a rush needed is given back when it has left.
            (self.clients, self.wheel) = (Slab::new(), Wheel::new(self.now.ms));
        }
        self.stats.closed(code);
        if client.encoding.is_websocket() {
            // Of one that closed cleanly nothing is kept any more.
            self.effects.push(Effect::Release(client.id, client.key));
        }
    }

    /// A connection closes cleanly: its token dies.
    fn forget(&mut self, index: usize) {
        let client = &mut self.clients[index];
        client.flags.unsaved = false;
        self.effects.push(Effect::Forget(client.id, client.key));
    }

    fn mark_unsaved(&mut self, index: usize) {
        let client = &mut self.clients[index];
        if client.encoding.is_websocket() && !std::mem::replace(&mut client.flags.unsaved, true) {
            self.unsaved.push(index);
        }
    }

    fn save(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        if std::mem::take(&mut client.flags.unsaved) && client.closing.is_none() {
            let saved = self.saved(index);
            self.effects.push(Effect::Save(saved));
        }
    }

    /// The connection as it is kept for being resumed.
    fn saved(&self, index: usize) -> SavedConnection {
        let client = &self.clients[index];
        let linked = client.links.iter().filter(|link| link.stream != self.announcements).map(|link| {
            let followed = &self.followed[link.stream];
            (followed.id.clone(), Arc::clone(&followed.cohorts[link.cohort].selection.types))
        });
        let mut subscriptions: Vec<_> = linked.collect();
        // What is asked for later replaces what is there.
        for next in client.reading.iter().flat_map(|reading| &reading.waiting) {
            if next.stream == StreamId::Announcements {
                continue;
            }
            subscriptions.retain(|(stream, _)| *stream != next.stream);
            subscriptions.push((next.stream.clone(), Arc::clone(&next.types)));
        }
        let user = self.sessions.of(client.seat).rights.user.clone();
        SavedConnection {
            client: client.id,
            token: client.token,
            owner: Some(client.key),
            user,
            subscriptions,
        }
    }
}
