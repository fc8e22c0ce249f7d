//! The sessions of a shard's connections: what each may see, and up to when that is known.
//!
//! A session that nobody could ask about for too long is *unknown*: its connections stay and are written nothing that belongs to
//! a stream. What waits for them stays where it was, and goes out when the session is known again. A session that is over ends
//! them.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    sync::Arc,
};

use crate::rights::{Rights, SessionKey};
use slab::Slab;
use tidings_protocol::{CloseCode, Projects, RemovalReason, StreamId, Timestamp};

use super::{Moment, Shard, Socket, client::Phase};

/// What of a shard's sessions it is asked about with each visit.
#[derive(Debug)]
pub(super) struct Sessions {
    slots: Slab<Session>,
    by_key: HashMap<SessionKey, usize>,
    /// When which session ends. One whose end has moved is here more than once.
    ends: BinaryHeap<Reverse<(Timestamp, SessionKey)>>,
}

/// A session of some of the shard's connections.
#[derive(Debug)]
pub(super) struct Session {
    /// `None`: everybody's, where nobody is asked.
    key: Option<SessionKey>,
    pub(super) rights: Arc<Rights>,
    /// What of the announcements it gets; `None`: all.
    pub(super) announced: Option<Projects>,
    /// In the shard's milliseconds.
    known_until_ms: u64,
    ends_at: Option<Timestamp>,
    clients: Vec<usize>,
}

/// A connection's place in its session.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seat {
    /// The session's place in the shard; the first is everybody's.
    session: u32,
    place: u32,
}

/// What is known of a session, in the shard's time.
#[derive(Clone, Debug)]
pub struct Known {
    /// What it may see.
    pub rights: Arc<Rights>,
    /// Up to when that is known, in the shard's milliseconds; `None`: until it is said to be over.
    pub until_ms: Option<u64>,
    /// When it is over for good.
    pub ends_at: Option<Timestamp>,
}

/// A list of ends below this is not worth tidying.
const ENDS_MIN: usize = 1024;

/// Everybody's session, where nobody is asked.
const EVERYBODY: usize = 0;

impl Sessions {
    pub(super) fn new() -> Self {
        let everybody = Session {
            key: None,
            rights: Arc::new(Rights::everything()),
            announced: None,
            known_until_ms: u64::MAX,
            ends_at: None,
            clients: Vec::new(),
        };
        let mut slots = Slab::new();
        let place = slots.insert(everybody);
        debug_assert_eq!(place, EVERYBODY);
        Self { slots, by_key: HashMap::new(), ends: BinaryHeap::new() }
    }

    /// Gives a connection its place. What is known of the session already stays, if there is such.
    pub(super) fn enter(&mut self, index: usize, holder: Option<(SessionKey, Known)>, now: Moment) -> Seat {
        let Some((key, known)) = holder else { return Seat::default() };
        let place = self.by_key.get(&key).copied().unwrap_or_else(|| {
            let session = Session {
                key: Some(key),
                announced: announced(&known.rights),
                rights: Arc::clone(&known.rights),
                known_until_ms: 0,
                ends_at: None,
                clients: Vec::new(),
            };
            let place = self.slots.insert(session);
            self.by_key.insert(key, place);
            self.renew(place, &known, now);
            place
        });
        let clients = &mut self.slots[place].clients;
        clients.push(index);
        Seat { session: narrow(place), place: narrow(clients.len() - 1) }
    }

    /// Takes a connection's place back. Whoever sat last in the session sits there now.
    fn leave(&mut self, seat: Seat) -> Option<(usize, Seat)> {
        let session = &mut self.slots[seat.session as usize];
        let key = session.key?;
        session.clients.swap_remove(seat.place as usize);
        let moved = session.clients.get(seat.place as usize).map(|&moved| (moved, seat));
        if session.clients.is_empty() {
            self.slots.remove(seat.session as usize);
            self.by_key.remove(&key);
        }
        if self.by_key.is_empty() {
            // What a rush needed is given back when it has left.
            *self = Self::new();
        }
        moved
    }

    pub(super) fn of(&self, seat: Seat) -> &Session {
        &self.slots[seat.session as usize]
    }

    /// Whether what the session may see is known now.
    pub(super) fn is_known(&self, seat: Seat, now: Moment) -> bool {
        self.of(seat).known_until_ms >= now.ms
    }

    fn renew(&mut self, place: usize, known: &Known, now: Moment) {
        let session = &mut self.slots[place];
        let until_end_ms = |ends_at: Timestamp| {
            now.ms.saturating_add_signed(ends_at.as_millisecond().saturating_sub(now.wall.as_millisecond()))
        };
        // Also where the end comes between two ticks.
        let ends_ms = known.ends_at.map_or(u64::MAX, until_end_ms);
        session.known_until_ms = known.until_ms.unwrap_or(u64::MAX).min(ends_ms);
        if session.ends_at != known.ends_at {
            session.ends_at = known.ends_at;
            if let (Some(ends_at), Some(key)) = (known.ends_at, session.key) {
                self.ends.push(Reverse((ends_at, key)));
            }
            if self.ends.len() > ENDS_MIN.max(2 * self.slots.len()) {
                // Ends that move on and on leave theirs behind.
                let ends = self.slots.iter().filter_map(|(_, session)| session.ends_at.zip(session.key));
                self.ends = ends.map(Reverse).collect();
            }
        }
    }

    /// The next session whose end has come.
    fn next_ended(&mut self, now: Timestamp) -> Option<SessionKey> {
        while let Some(Reverse((ends_at, key))) = self.ends.peek().copied() {
            if ends_at > now {
                return None;
            }
            self.ends.pop();
            let place = self.by_key.get(&key);
            if place.is_some_and(|&place| self.slots[place].ends_at == Some(ends_at)) {
                return Some(key);
            }
        }
        None
    }
}

/// What of the announcements somebody with these rights gets; `None`: all.
fn announced(rights: &Rights) -> Option<Projects> {
    (!rights.projects.is_everything()).then(|| rights.projects.clone())
}

fn narrow(place: usize) -> u32 {
    u32::try_from(place).expect("fewer than 2^32 connections")
}

impl<S: Socket> Shard<S> {
    /// Somebody found out about a session. One that has no connection here is not kept.
    pub fn judge(&mut self, session: SessionKey, verdict: Option<Known>) {
        let Some(&place) = self.sessions.by_key.get(&session) else { return };
        let Some(known) = verdict else { return self.end_session(session) };
        self.sessions.renew(place, &known, self.now);
        let session = &mut self.sessions.slots[place];
        let changes = !Arc::ptr_eq(&session.rights, &known.rights) && session.rights != known.rights;
        session.rights = known.rights;
        if changes {
            session.announced = announced(&session.rights);
            for index in session.clients.clone() {
                self.hold_to_rights(index);
            }
        }
    }

    /// Ends sessions whose time is over.
    pub(super) fn end_sessions(&mut self) {
        while let Some(session) = self.sessions.next_ended(self.now.wall) {
            self.end_session(session);
        }
    }

    fn end_session(&mut self, session: SessionKey) {
        let Some(place) = self.sessions.by_key.get(&session) else { return };
        for index in self.sessions.slots[*place].clients.clone() {
            self.end_for_session(index);
        }
    }

    pub(super) fn leave_session(&mut self, seat: Seat) {
        if let Some((moved, seat)) = self.sessions.leave(seat) {
            self.clients[moved].seat = seat;
        }
    }

    /// Whether the connection may see the stream. The announcements are everybody's; what of them is another question.
    pub(super) fn may_see(&self, index: usize, stream: &StreamId) -> bool {
        let rights = &self.sessions.of(self.clients[index].seat).rights;
        stream.project_id().is_none_or(|project| rights.projects.include(project))
    }

    /// Takes from a connection what its session may not see any more, also what was about to be written.
    fn hold_to_rights(&mut self, index: usize) {
        if self.clients[index].is_leaving() {
            return;
        }
        let client = &self.clients[index];
        let linked = client.links.iter().map(|link| &self.followed[link.stream].id);
        let waiting =
            client.reading.iter().flat_map(|reading| &reading.waiting).map(|waiting| &waiting.stream);
        let mut lost: Vec<StreamId> =
            linked.chain(waiting).filter(|stream| !self.may_see(index, stream)).cloned().collect();
        lost.sort_unstable();
        lost.dedup();
        for stream in lost {
            self.unsubscribe(index, &stream);
            self.removed(index, &stream, RemovalReason::Rights, None);
        }
        // Also what waits of a stream that its client has left by itself.
        let client = &mut self.clients[index];
        let links = std::mem::take(&mut client.links);
        client.drop_unwritten(|stream| links.iter().all(|link| link.stream != stream));
        client.links = links;
        self.select_announcements(index);
        self.mark_unsaved(index);
        // An event stream follows one project, and without that it is nothing.
        let client = &self.clients[index];
        if !client.encoding.is_websocket() && client.links.is_empty() {
            self.close_when_written(index, CloseCode::Forbidden);
        }
        self.ready.push(index);
    }

    /// The session of a connection is over. What of its streams has not been written is not written.
    fn end_for_session(&mut self, index: usize) {
        if self.clients[index].is_leaving() {
            return;
        }
        // Whoever logs in again as the same user may resume what there was.
        self.close_when_written(index, CloseCode::NoSession);
        let client = &mut self.clients[index];
        client.frozen = None;
        client.drop_unwritten(|_| true);
        if let Some(reading) = &mut client.reading {
            reading.waiting.clear();
        }
        let links = self.clients[index].links.iter();
        let projects =
            links.map(|link| &self.followed[link.stream].id).filter(|id| id.project_id().is_some());
        for project in projects.cloned().collect::<Vec<_>>() {
            self.removed(index, &project, RemovalReason::Expired, None);
        }
        self.unlink_all(index);
        self.ready.push(index);
    }

    /// Lets a connection get of the announcements what its session may see now, from where it is.
    fn select_announcements(&mut self, index: usize) {
        let Some(former) = self.link_to(index, &StreamId::Announcements) else { return };
        let stream = self.announcements;
        let unwritten = self.clients[index].drop_unwritten(|of| of == stream);
        let link = &self.clients[index].links[former];
        let (told, former_cohort) = (link.told, link.cohort);
        let types = Arc::clone(&self.followed[stream].cohorts[former_cohort].selection.types);
        let selection = self.selection(index, &StreamId::Announcements, &types);
        if self.followed[stream].cohorts[former_cohort].selection == selection && unwritten.is_none() {
            return;
        }
        self.turn_to_history(index, former, unwritten.map(|offset| offset - 1));
        let phase = std::mem::replace(&mut self.clients[index].links[former].phase, Phase::Live);
        let moved = self.link(index, stream, &selection, told);
        self.clients[index].links[moved].phase = phase;
        // Which takes the former one's place, and counts its phase once.
        self.unlink(index, former);
        self.ready.push(index);
    }

    /// Stops writing what belongs to streams: nobody knows whether the session still holds.
    pub(super) fn withhold(&mut self, index: usize) {
        let client = &mut self.clients[index];
        // One without links is on its way out, and what it is still told belongs to no stream.
        if client.links.is_empty() || std::mem::replace(&mut client.flags.withheld, true) {
            return;
        }
        if let Some(outgoing) = &mut client.outgoing {
            let frozen = outgoing.split_behind_begun_frame();
            client.frozen = (!frozen.is_empty()).then(|| Box::new(frozen));
            client.outgoing.take_if(|outgoing| outgoing.is_empty());
        }
        for number in 0..client.links.len() {
            self.turn_to_history(index, number, None);
        }
        self.withheld.push(index);
    }

    /// Visits those whose sessions are known again.
    pub(super) fn look_at_withheld(&mut self) {
        let (clients, sessions, now) = (&self.clients, &self.sessions, self.now);
        let ready = &mut self.ready;
        self.withheld.retain(|&index| {
            let Some(client) = clients.get(index).filter(|client| client.flags.withheld) else {
                return false;
            };
            if sessions.is_known(client.seat, now) {
                ready.push(index);
            }
            // The visit may come when it is unknown again.
            true
        });
        self.stats.withheld(self.withheld.len());
    }

    /// Goes on where it was stopped.
    pub(super) fn release(&mut self, index: usize) {
        let client = &mut self.clients[index];
        client.flags.withheld = false;
        if let Some(frozen) = client.frozen.take() {
            client.outgoing.get_or_insert_default().append(*frozen);
        }
    }
}
