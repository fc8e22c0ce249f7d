//! A shard that sends everybody away, in virtual time.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use serde_json::{Value, json};
use tidings_engine::{
    engine::Record,
    hub::ShardStats,
    shard::{Encoding, Moment, Opening, Shard},
};
use tidings_protocol::{Epoch, Position, StreamId};

use crate::{
    event,
    simulation::{Client, ServerEnd, VirtualSocket, Wire, options},
};

struct Virtual {
    shard: Shard<ServerEnd>,
    clients: Vec<Client>,
}

impl Virtual {
    fn with(number: u16, clients: usize) -> Self {
        let shard = Shard::new(number, options(), at(0), moment(0), Arc::new(ShardStats::default()));
        let mut shard = Self { shard, clients: Vec::new() };
        for _ in 0..clients {
            let wire = Rc::new(RefCell::new(Wire::open()));
            let socket = ServerEnd(VirtualSocket(Rc::clone(&wire)));
            let opening = Opening { socket, encoding: Encoding::Plain, subscription: None, holder: None };
            let key = shard.shard.open(opening);
            shard.clients.push(Client::new(key, wire));
        }
        while shard.shard.run() {}
        for client in &mut shard.clients {
            assert_eq!(message(client)["type"], "connection.established");
        }
        shard
    }

    /// Does all that there is to do at this time.
    fn turn(&mut self, ms: u64) {
        self.shard.set_now(moment(ms));
        while self.shard.next_tick_ms() <= ms {
            self.shard.tick();
        }
        while self.shard.run() {}
    }

    fn announce(&mut self, offset: u64) {
        let event = event(&json!({"type": "a.b", "number": offset}));
        let record = Record::new(&event, offset, jiff::Timestamp::UNIX_EPOCH.into());
        self.shard.deliver(&StreamId::Announcements, &at(offset), &[Arc::new(record)]);
    }

    fn leave(&mut self, number: usize) {
        let client = &mut self.clients[number];
        let [high, low] = 1000_u16.to_be_bytes();
        client.send(&[0x88, 0x82, 0, 0, 0, 0, high, low]);
        self.shard.readable(client.key().index());
    }

    /// Every client's appointment, in the order in which they came.
    fn appointments(&mut self) -> Vec<u64> {
        let told = self.clients.iter_mut().map(|client| {
            let told = message(client);
            assert_eq!(told["type"], "container.reconnect");
            told["retry_after_ms"].as_u64().unwrap()
        });
        told.collect()
    }
}

fn moment(ms: u64) -> Moment {
    Moment { ms, wall: jiff::Timestamp::UNIX_EPOCH.into() }
}

fn at(offset: u64) -> Position {
    Position { epoch: Epoch::new("a"), offset }
}

fn message(client: &mut Client) -> Value {
    let (first, payload) = client.next_frame().expect("a message");
    assert_eq!(first, 0x81);
    serde_json::from_slice(&payload).unwrap()
}

/// The most that leave within a second of the drain.
fn most_in_a_second(appointments: &[u64]) -> usize {
    let mut seconds = std::collections::HashMap::<_, usize>::new();
    for at_ms in appointments {
        *seconds.entry(at_ms / 1000).or_default() += 1;
    }
    seconds.into_values().max().unwrap_or(0)
}

#[test]
fn appointments_are_spread_over_the_time_whatever_the_order_of_arrival() {
    for (over_ms, each) in [(8000, [1000, 1, 300]), (3_600_000, [600, 600, 600]), (1000, [5, 0, 700])] {
        let mut all = Vec::new();
        for (number, clients) in (0..).zip(each) {
            let mut shard = Virtual::with(number, clients);
            shard.shard.drain(over_ms, 3);
            shard.turn(0);
            let appointments = shard.appointments();
            assert!(appointments.iter().all(|at_ms| *at_ms < over_ms), "{appointments:?}");
            let early = appointments[..clients / 2].iter().filter(|at_ms| **at_ms < over_ms / 2).count();
            assert!(clients < 100 || (clients / 8..clients * 3 / 8).contains(&early), "{early} of {clients}");
            all.extend(appointments);
        }
        let fair = (all.len() as u64).div_ceil(over_ms / 1000);
        let most = most_in_a_second(&all) as u64;
        assert!(most * 2 <= fair * 3, "{most} leave in one second, {fair} would be even");
    }
}

#[test]
fn few_clients_of_many_shards_do_not_leave_together() {
    let mut all = Vec::new();
    for number in 0..8 {
        let mut shard = Virtual::with(number, 1);
        shard.shard.drain(8000, 8);
        shard.turn(0);
        all.extend(shard.appointments());
    }
    assert_eq!(most_in_a_second(&all), 1, "{all:?}");
}

#[test]
fn until_its_appointment_a_client_is_served_and_then_closed_behind_what_was_delivered() {
    let mut shard = Virtual::with(0, 2);
    shard.shard.drain(4000, 1);
    shard.turn(0);
    let appointments = shard.appointments();
    let first = usize::from(appointments[1] < appointments[0]);
    assert_eq!((appointments[first], appointments[1 - first]), (1000, 3000));
    shard.turn(900);
    shard.announce(1);
    shard.turn(900);
    for client in &mut shard.clients {
        assert_eq!(message(client)["offset"], 1);
    }
    shard.announce(2);
    shard.turn(1000);
    let client = &mut shard.clients[first];
    assert_eq!(message(client)["offset"], 2);
    let (first_byte, payload) = client.next_frame().unwrap();
    assert_eq!((first_byte, &payload[..2]), (0x88, &1012_u16.to_be_bytes()[..]));
    let other = &mut shard.clients[1 - first];
    assert_eq!(message(other)["offset"], 2);
    assert_eq!(other.next_frame(), None);
    other.say(&json!({"type": "ping", "id": 1}));
    let key = other.key();
    shard.shard.readable(key.index());
    assert_eq!(message(&mut shard.clients[1 - first])["type"], "pong");
    shard.turn(3000);
    let (first, payload) = shard.clients[1 - first].next_frame().unwrap();
    assert_eq!((first, &payload[..2]), (0x88, &1012_u16.to_be_bytes()[..]));
}

#[test]
fn who_leaves_by_itself_disturbs_nobody() {
    let mut shard = Virtual::with(0, 300);
    shard.shard.drain(3000, 1);
    // One goes before it was told, one after that.
    shard.leave(7);
    shard.turn(0);
    assert_eq!(message(&mut shard.clients[8])["type"], "container.reconnect");
    shard.leave(8);
    shard.turn(0);
    shard.turn(3000);
    for (number, client) in (0..).zip(&mut shard.clients) {
        if number != 7 && number != 8 {
            assert_eq!(message(client)["type"], "container.reconnect");
        }
        let code = if number == 7 || number == 8 { 1000_u16 } else { 1012 };
        let (first, payload) = client.next_frame().unwrap();
        assert_eq!((first, &payload[..2]), (0x88, &code.to_be_bytes()[..]), "client {number}");
    }
    assert_eq!(shard.shard.connections(), 298, "nobody has answered the close");
    shard.turn(6000);
    assert_eq!(shard.shard.connections(), 0);
}
