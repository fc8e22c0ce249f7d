//! What time brings: heartbeats, peers that fell silent, sockets that take nothing, tails that hold too much.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use tidings_protocol::{CloseCode, ServerMessage};

use crate::wire::{Frame, PING_FRAME};

use super::{Closing, ConnectionKey, Encoding, Shard, Socket, client::Phase};

/// A ping goes out at least this often.
const PING_INTERVAL_MAX_S: u64 = 30;
/// A peer that sends nothing for this long after a ping is gone.
const PONG_TIMEOUT_MS: u64 = 10_000;
/// A socket that takes nothing for this long while something waits belongs to a client that is too slow.
const STALL_TIMEOUT_MS: u64 = 30_000;

impl<S: Socket> Shard<S> {
    /// When [`Shard::tick`] wants to be called next, in milliseconds.
    pub fn next_tick_ms(&self) -> u64 {
        self.wheel.next_ms()
    }

    /// Does what is due.
    pub fn tick(&mut self) {
        let due = self.wheel.due(self.now.ms);
        if !due.is_empty() {
            let quiet = self.quiet_heartbeat();
            for key in due {
                if let Some(index) = self.index_of(key) {
                    self.look_at(index, &quiet);
                }
            }
        }
        self.keep_appointments();
        self.end_sessions();
        self.look_at_withheld();
        for index in self.holders.clone() {
            self.look_at_holder(index);
        }
        self.relieve();
        self.stats.tail_bytes(self.tail_bytes);
        if self.tail_bytes == 0 {
            // What comes next finds room again; until then a quiet shard holds nothing.
            for (_, followed) in &mut self.followed {
                followed.cohorts.iter_mut().for_each(|cohort| cohort.tail.shrink());
            }
        }
    }

    /// The first ping of a connection comes early by up to half an interval, so that those that came together do not beat
    /// together.
    pub(super) fn first_beat(&self, key: ConnectionKey) -> u64 {
        let interval_ms = self.beat_interval_ms();
        // Knuth's multiplicative hash spreads neighbours.
        let spread = u64::from(key.generation.wrapping_mul(2_654_435_761)) % (interval_ms / 2).max(1);
        self.now.ms + interval_ms - spread
    }

    fn beat_interval_ms(&self) -> u64 {
        self.options.heartbeat_interval_s.min(PING_INTERVAL_MAX_S) * 1000
    }

    /// A ping and a heartbeat that tells nothing new: the same bytes for everybody, made once.
    fn quiet_heartbeat(&self) -> Bytes {
        let json = self.heartbeat(BTreeMap::new());
        let mut frames = BytesMut::from(&PING_FRAME[..]);
        frames.extend_from_slice(&Frame::Text.encode(json.as_bytes()));
        frames.freeze()
    }

    fn heartbeat(&self, positions: BTreeMap<String, u64>) -> String {
        ServerMessage::SystemHeartbeat { timestamp: self.now.wall, positions }.encode()
    }

    fn look_at(&mut self, index: usize, quiet: &Bytes) {
        let now_ms = self.now.ms;
        let client = &mut self.clients[index];
        if let Some(Closing::Said { until_ms, .. } | Closing::Answering { until_ms, .. }) = client.closing {
            if now_ms >= until_ms {
                // A peer that does not answer, or cannot be reached, is left alone.
                let code = match client.closing {
                    Some(Closing::Said { code, .. }) => Some(code.number()),
                    _ => None,
                };
                self.remove(index, code);
            }
            return;
        }
        if let Some(pinged_ms) = client.pinged_ms {
            // Nothing is read of a client that asked for too much: its silence says nothing.
            if client.heard_ms >= pinged_ms || client.flags.unread {
                client.pinged_ms = None;
            } else if now_ms >= pinged_ms + PONG_TIMEOUT_MS {
                return self.remove(index, None);
            }
        }
        if now_ms >= client.beat_ms {
            self.beat(index, quiet);
        }
        let Some(client) = self.clients.get(index) else { return };
        let next_ms =
            client.pinged_ms.map_or(client.beat_ms, |pinged| client.beat_ms.min(pinged + PONG_TIMEOUT_MS));
        self.wheel.schedule(next_ms, client.key);
    }

    /// Sends a ping and, when it is time, a heartbeat, in one write with what else waits.
    fn beat(&mut self, index: usize, quiet: &Bytes) {
        let (beat_ms, heartbeat_ms) = (self.beat_interval_ms(), self.options.heartbeat_interval_s * 1000);
        let client = &mut self.clients[index];
        let next_heartbeat_ms = client.heartbeat_ms + heartbeat_ms;
        // Where every ping comes with a heartbeat, the first comes early; see `first_beat`.
        let heartbeat_due = beat_ms == heartbeat_ms || self.now.ms >= next_heartbeat_ms;
        client.beat_ms = self.now.ms + beat_ms;
        if !heartbeat_due {
            client.beat_ms = client.beat_ms.min(next_heartbeat_ms);
        }
        if client.waits_for_socket {
            // It would only wait behind the rest; that the socket takes nothing is watched elsewhere.
            return;
        }
        let is_websocket = client.encoding.is_websocket();
        if is_websocket && client.pinged_ms.is_none() {
            client.pinged_ms = Some(self.now.ms);
        }
        if !heartbeat_due {
            if is_websocket {
                client.push([Bytes::from_static(&PING_FRAME)]);
                self.visit_now(index);
            }
            return;
        }
        client.heartbeat_ms = self.now.ms;
        let moved = self.moved_positions(index);
        if moved.is_empty() && is_websocket {
            if self.write_alone(index, quiet) {
                return;
            }
            self.clients[index].push([quiet.clone()]);
        } else {
            let json = self.heartbeat(moved);
            let client = &mut self.clients[index];
            let plain = if is_websocket { Encoding::Plain } else { Encoding::EventStream };
            let frame = plain.message(&json, None, &mut self.deflater);
            client.push(is_websocket.then(|| Bytes::from_static(&PING_FRAME)).into_iter().chain([frame]));
        }
        self.visit_now(index);
    }

    /// Up to where each stream that moved since the last heartbeat was sent on this connection or was not for it.
    fn moved_positions(&mut self, index: usize) -> BTreeMap<String, u64> {
        let mut moved = BTreeMap::new();
        if self.clients[index].flags.withheld {
            // What is frozen was passed over and has not been sent.
            return moved;
        }
        for link in &mut self.clients[index].links {
            let followed = &self.followed[link.stream];
            let at = match &link.phase {
                Phase::Live => followed.cohorts[link.cohort].offset_at(link.cursor, followed.head),
                Phase::Behind(behind) => behind.at,
                Phase::Joining(_) => continue,
            };
            if at > link.told {
                link.told = at;
                moved.insert(followed.id.to_string(), at);
            }
        }
        moved
    }

    fn look_at_holder(&mut self, index: usize) {
        let Some(client) = self.clients.get(index) else { return };
        let stalled = client.stalled_since.is_some_and(|since| self.now.ms >= since + STALL_TIMEOUT_MS);
        if stalled && client.closing.is_none_or(|closing| matches!(closing, Closing::WhenWritten(_))) {
            return self.say_close(index, CloseCode::TooSlow);
        }
        if client.waits_for_socket {
            self.fall_behind(index);
        }
    }

    /// Holds to the limit of what tails keep for blocked clients: those that hold most let go first, and read on from the
    /// history as soon as they read at all.
    pub(super) fn relieve(&mut self) {
        while self.tail_bytes > self.options.retained_bytes_max {
            let mut held: Vec<_> =
                self.holders.iter().map(|&index| (self.held_bytes(index), index)).collect();
            held.retain(|(bytes, _)| *bytes > 0);
            held.sort_unstable_by(|one, other| other.cmp(one));
            let some = held.len().div_ceil(8);
            if some == 0 {
                return;
            }
            for (_, index) in held.into_iter().take(some) {
                self.let_go(index, |_, _| true);
            }
            self.trim_all();
        }
    }

    /// The most that one of a blocked client's links holds of a tail.
    fn held_bytes(&self, index: usize) -> u64 {
        let Some(client) = self.clients.get(index).filter(|client| client.waits_for_socket) else { return 0 };
        let can_let_go = client.links.iter().filter(|link| match &link.phase {
            Phase::Live => true,
            Phase::Behind(behind) => behind.reaches_tail && behind.ticket.is_none(),
            Phase::Joining(_) => false,
        });
        let held =
            can_let_go.map(|link| self.followed[link.stream].cohorts[link.cohort].tail.end() - link.cursor);
        held.max().unwrap_or(0)
    }

    fn trim_all(&mut self) {
        // A stream that a pass runs over, or that waits for one, has readers whose cursors nobody has looked at.
        let quiet = |followed: &super::Followed| !followed.dirty && followed.in_pass.is_none();
        for (_, followed) in &mut self.followed {
            if quiet(followed) {
                followed.cohorts.iter_mut().for_each(|cohort| cohort.low = cohort.tail.end());
            }
        }
        self.lower_to_holders();
        for (_, followed) in &mut self.followed {
            if quiet(followed) {
                for cohort in &mut followed.cohorts {
                    self.tail_bytes -= cohort.tail.trim(cohort.low);
                }
            }
        }
    }
}
