//! A stream that goes on in another life while it is followed: everybody is confirmed again.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use serde_json::{Value, json};
use tidings_engine::{
    engine::{CatchUp, Joined, Record},
    hub::ShardStats,
    shard::{Answer, Effect, Encoding, Moment, Opening, Question, Shard},
};
use tidings_protocol::{Epoch, Position, StateSnapshot};

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

#[test]
fn a_new_epoch_confirms_everybody_again_from_where_they_were_in_the_old_one() {
    let now = Moment { ms: 0, wall: jiff::Timestamp::UNIX_EPOCH.into() };
    let stats = Arc::new(ShardStats::default());
    let mut shard = Shard::new(0, options(), position("announcements", 0), now, stats);
    let wire = Rc::new(RefCell::new(Wire::open()));
    let socket = ServerEnd(VirtualSocket(Rc::clone(&wire)));
    let key = shard.open(Opening { socket, encoding: Encoding::Plain, subscription: None });
    let mut client = Client::new(key, wire);
    client.say(&json!({"type": "subscribe", "project_id": "p"}));
    shard.readable(key.index());
    let Question::Join { asker, since: None, .. } = asked(&mut shard) else { panic!("no first join") };
    let nothing = CatchUp::State(StateSnapshot::default());
    shard.answer(Answer::Joined(asker, Ok(Joined { position: position("old", 2), catch_up: nothing })));
    shard.deliver(&stream("p"), &position("old", 4), &[record(3), record(4)]);
    while shard.run() {}
    // 4 was lost by the store, and another event has its place in the new life.
    shard.deliver(&stream("p"), &position("new", 4), &[record(4)]);
    let Question::Join { asker, since, .. } = asked(&mut shard) else { panic!("no join of the new life") };
    assert_eq!(since, Some(position("old", 4)));
    let lost = CatchUp::State(StateSnapshot::default());
    shard.answer(Answer::Joined(asker, Ok(Joined { position: position("new", 4), catch_up: lost })));
    shard.deliver(&stream("p"), &position("new", 5), &[record(5)]);
    while shard.run() {}
    let told: Vec<_> = std::iter::from_fn(|| client.next_frame())
        .map(|(_, payload)| serde_json::from_slice::<Value>(&payload).unwrap())
        .map(|message| json!([message["type"], message["epoch"], message["offset"], message["recovered"]]))
        .collect();
    let expected = json!([
        ["connection.established", null, null, null],
        ["subscription.confirmed", "old", 2, null],
        ["a.b", null, 3, null],
        ["a.b", null, 4, null],
        ["subscription.confirmed", "new", 4, false],
        ["a.b", null, 5, null],
    ]);
    assert_eq!(json!(told), expected);
}
