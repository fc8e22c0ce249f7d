//! A stream that goes on in another life while it is followed: everybody is confirmed again. And what everybody is told.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use serde_json::{Value, json};
use tidings_engine::{
    engine::{CatchUp, Joined, Record},
    hub::ShardStats,
    shard::{Answer, Effect, Encoding, Moment, Opening, Question, Shard},
    vigil::Notice,
};
use tidings_protocol::{Degraded, Epoch, Gap, Position, Source, StateSnapshot};

use crate::{
    event,
    simulation::{Client, ServerEnd, VirtualSocket, Wire, options},
    stream,
};

fn position(epoch: &str, offset: u64) -> Position {
    Position { epoch: Epoch::new(epoch), offset }
}

fn record(offset: u64) -> Arc<Record> {
    let event = event(&json!({"type": "a.b", "project_id": "p", "number": offset}));
    Arc::new(Record::new(&event, offset, jiff::Timestamp::UNIX_EPOCH.into()))
}

/// The question that the shard has for the engine; there is one.
fn asked(shard: &mut Shard<ServerEnd>) -> Question {
    let questions = shard.take_effects().into_iter().filter_map(|effect| match effect {
        Effect::Ask(question) => Some(question),
        _ => None,
    });
    let mut questions: Vec<_> = questions.collect();
    assert_eq!(questions.len(), 1, "{questions:?}");
    questions.remove(0)
}

/// A shard with one client that follows `p` and has seen up to the fourth event of its old life.
struct Followed {
    shard: Shard<ServerEnd>,
    client: Client,
}

impl Followed {
    fn new() -> Self {
        let mut shard = shard();
        let client = connect(&mut shard);
        client.say(&json!({"type": "subscribe", "project_id": "p"}));
        shard.readable(client.key().index());
        let Question::Join { asker, since: None, .. } = asked(&mut shard) else { panic!("no first join") };
        let nothing = CatchUp::State(StateSnapshot::default());
        shard.answer(Answer::Joined(asker, Ok(Joined { position: position("old", 2), catch_up: nothing })));
        shard.deliver(&stream("p"), &position("old", 4), &[record(3), record(4)]);
        while shard.run() {}
        Self { shard, client }
    }

    /// Answers the question of the subscriber who was at the fourth event of the old life.
    fn answer(&mut self, at: Position, catch_up: CatchUp) {
        let Question::Join { asker, since, .. } = asked(&mut self.shard) else { panic!("no join anew") };
        assert_eq!(since, Some(position("old", 4)));
        self.shard.answer(Answer::Joined(asker, Ok(Joined { position: at, catch_up })));
    }

    /// What the client was told behind the two events of the old life.
    fn told(&mut self) -> Value {
        while self.shard.run() {}
        let told = messages(&mut self.client).split_off(4);
        let of = |message: Value| {
            json!([message["type"], message["epoch"], message["offset"], message["recovered"]])
        };
        told.into_iter().map(of).collect()
    }
}

fn shard() -> Shard<ServerEnd> {
    let now = Moment { ms: 0, wall: jiff::Timestamp::UNIX_EPOCH.into() };
    Shard::new(0, options(), position("announcements", 0), now, Arc::new(ShardStats::default()))
}

fn connect(shard: &mut Shard<ServerEnd>) -> Client {
    let wire = Rc::new(RefCell::new(Wire::open()));
    let socket = ServerEnd(VirtualSocket(Rc::clone(&wire)));
    let key = shard.open(Opening { socket, encoding: Encoding::Plain, subscription: None, holder: None });
    Client::new(key, wire)
}

fn messages(client: &mut Client) -> Vec<Value> {
    std::iter::from_fn(|| client.next_frame())
        .map(|(_, payload)| serde_json::from_slice(&payload).unwrap())
        .collect()
}

#[test]
fn a_new_epoch_confirms_everybody_again_from_where_they_were_in_the_old_one() {
    let mut followed = Followed::new();
    // 4 was lost by the store, and another event has its place in the new life.
    followed.shard.deliver(&stream("p"), &position("new", 4), &[record(4)]);
    followed.answer(position("new", 4), CatchUp::State(StateSnapshot::default()));
    followed.shard.deliver(&stream("p"), &position("new", 5), &[record(5)]);
    let expected = json!([["subscription.confirmed", "new", 4, false], ["a.b", null, 5, null]]);
    assert_eq!(followed.told(), expected);
}

#[test]
fn a_stream_that_branched_without_a_new_event_confirms_everybody_and_goes_on() {
    let mut followed = Followed::new();
    followed.shard.rejoin(&stream("p"), &position("new", 4));
    followed.answer(position("new", 4), CatchUp::Recovered(Vec::new()));
    followed.shard.deliver(&stream("p"), &position("new", 5), &[record(5)]);
    let expected = json!([["subscription.confirmed", "new", 4, true], ["a.b", null, 5, null]]);
    assert_eq!(followed.told(), expected);
}

/// The log went on without this node for so long that only its snapshot tells what came between.
#[test]
fn a_hole_in_one_life_is_bridged_from_the_history() {
    let mut followed = Followed::new();
    followed.shard.rejoin(&stream("p"), &position("old", 900));
    followed.answer(position("old", 900), CatchUp::Recovered(vec![record(700), record(900)]));
    followed.shard.deliver(&stream("p"), &position("old", 901), &[record(901)]);
    let expected = json!([
        ["subscription.confirmed", "old", 4, true],
        ["a.b", null, 700, null],
        ["a.b", null, 900, null],
        ["a.b", null, 901, null],
    ]);
    assert_eq!(followed.told(), expected);
}

#[test]
fn an_outage_is_told_to_everybody_and_to_those_who_come_while_it_lasts() {
    let mut shard = shard();
    let degraded = Degraded { source: Source::Redis, since: jiff::Timestamp::UNIX_EPOCH.into() };
    let mut clients = vec![connect(&mut shard)];
    shard.notice(Notice::Degraded(degraded));
    clients.push(connect(&mut shard));
    shard.notice(Notice::Recovered(degraded, Gap::Recovered));
    clients.push(connect(&mut shard));
    while shard.run() {}
    let told = |client: &mut Client| -> Vec<String> {
        messages(client).iter().map(|message| message["type"].as_str().unwrap().to_owned()).collect()
    };
    let all = ["connection.established", "system.degraded", "system.recovered"];
    assert_eq!(told(&mut clients[0]), all);
    assert_eq!(told(&mut clients[1]), all);
    assert_eq!(told(&mut clients[2]), all[..1]);
}
