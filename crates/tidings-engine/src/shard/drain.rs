//! Sending everybody away, one after the other: who comes back all at once is too much for whoever takes them.

use tidings_protocol::{CloseCode, ServerMessage};

use super::{ConnectionKey, Shard, Socket};

/// Clients that are told of their appointment in one quantum, which also has the visits to them.
const TOLD_AT_ONCE: usize = 128;

/// A drain that is under way: everybody leaves in the order of `clients`, at even distances.
#[derive(Debug)]
pub(super) struct Drain {
    clients: Vec<ConnectionKey>,
    /// How many of them know their appointment.
    told: usize,
    /// How many appointments have come.
    due: usize,
    begun_ms: u64,
    over_ms: u64,
    /// Shards that drain at the same time, each at moments of its own.
    shards: u16,
}

impl Drain {
    /// When the client at this place leaves: in the middle of its part of the time, which it shares with one client of each
    /// other shard.
    fn at_ms(&self, place: usize, shard: u16) -> u64 {
        let shards = u64::from(self.shards.max(1));
        let parts = (self.clients.len() as u64 * shards).max(1);
        let part = place as u64 * shards + u64::from(shard);
        self.begun_ms + self.over_ms * (2 * part + 1) / (2 * parts)
    }
}

impl<S: Socket> Shard<S> {
    /// Gives every client an appointment within `over_ms`, at which it is closed behind what has been delivered by then.
    /// Until then it is served. `shards` of them drain at once. Who opens a connection later has no appointment.
    pub fn drain(&mut self, over_ms: u64, shards: u16) {
        let open = self.clients.iter().filter(|(_, client)| client.closing.is_none());
        let mut clients: Vec<_> = open.map(|(_, client)| client.key).collect();
        // Not in the order of arrival, which groups those who belong together. Knuth's multiplicative hash spreads neighbours.
        clients.sort_unstable_by_key(|key| key.generation.wrapping_mul(2_654_435_761));
        let begun_ms = self.now.ms;
        self.drain = Some(Drain { clients, told: 0, due: 0, begun_ms, over_ms, shards });
    }

    /// Tells some of those who do not know their appointment yet.
    pub(super) fn tell_appointments(&mut self) {
        for _ in 0..TOLD_AT_ONCE {
            let Some(drain) = &mut self.drain else { return };
            let Some(&key) = drain.clients.get(drain.told) else { return };
            let at_ms = drain.at_ms(drain.told, self.number);
            drain.told += 1;
            self.tell_appointment(key, at_ms.saturating_sub(self.now.ms));
        }
    }

    /// Whether somebody has still to be told.
    pub(super) fn has_appointments_to_tell(&self) -> bool {
        self.drain.as_ref().is_some_and(|drain| drain.told < drain.clients.len())
    }

    fn tell_appointment(&mut self, key: ConnectionKey, retry_after_ms: u64) {
        let is_open = |shard: &Self, index: usize| shard.clients[index].closing.is_none();
        let Some(index) = self.index_of(key).filter(|&index| is_open(self, index)) else { return };
        // What came before goes out before.
        self.visit_now(index);
        let Some(index) = self.index_of(key).filter(|&index| is_open(self, index)) else { return };
        let message = ServerMessage::ContainerReconnect {
            timestamp: self.now.wall,
            message: "this node is stopping".to_owned(),
            retry_after_ms,
        };
        let client = &mut self.clients[index];
        client.push([client.encoding.appointment(&message.encode(), retry_after_ms, &mut self.deflater)]);
        if client.encoding.is_websocket() {
            self.ready.push(index);
        } else {
            // The browser comes back at the appointment by itself, and no sooner than its stream has ended.
            self.close_when_written(index, CloseCode::ServiceRestart);
        }
    }

    /// Closes those whose appointment has come.
    pub(super) fn keep_appointments(&mut self) {
        while let Some(drain) = &mut self.drain {
            if drain.due == drain.clients.len() {
                self.drain = None;
                return;
            }
            if drain.due == drain.told || drain.at_ms(drain.due, self.number) > self.now.ms {
                return;
            }
            let key = drain.clients[drain.due];
            drain.due += 1;
            if let Some(index) = self.index_of(key)
                && self.clients[index].closing.is_none()
            {
                self.close_when_written(index, CloseCode::ServiceRestart);
            }
        }
    }
}
