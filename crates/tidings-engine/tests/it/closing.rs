//! What a close means is done before its answer can be read: whoever has the answer may come back at once, elsewhere.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use tidings_engine::{
    hub::ShardStats,
    shard::{Effect, Encoding, Moment, Opening, Shard},
};
use tidings_protocol::{CloseCode, Epoch, Position};

use crate::simulation::{Client, ServerEnd, VirtualSocket, Wire, options};

/// Sends a close with this code; what the shard wants done before it writes anything.
fn effects_of_closing(code: u16) -> Vec<Effect> {
    let now = Moment { ms: 0, wall: jiff::Timestamp::UNIX_EPOCH.into() };
    let announcements = Position { epoch: Epoch::new("a"), offset: 0 };
    let mut shard = Shard::new(0, options(), announcements, now, Arc::new(ShardStats::default()));
    let wire = Rc::new(RefCell::new(Wire::open()));
    let socket = ServerEnd(VirtualSocket(Rc::clone(&wire)));
    let key = shard.open(Opening { socket, encoding: Encoding::Plain, subscription: None, holder: None });
    let mut client = Client::new(key, wire);
    while shard.run() {}
    assert!(client.next_frame().is_some(), "the greeting");
    let [high, low] = code.to_be_bytes();
    client.send(&[0x88, 0x82, 0, 0, 0, 0, high, low]);
    shard.take_effects();
    shard.readable(key.index());
    let effects = shard.take_effects();
    assert_eq!(client.next_frame(), None, "no answer before that");
    while shard.run() {}
    assert_eq!(client.next_frame(), Some((0x88, vec![high, low])));
    assert_eq!(shard.connections(), 0);
    effects
}

#[test]
fn a_clean_close_is_forgotten_before_it_is_answered() {
    let effects = effects_of_closing(1000);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Forget(..))), "{effects:?}");
}

#[test]
fn a_page_that_goes_away_can_be_resumed() {
    let effects = effects_of_closing(1001);
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Forget(..))), "{effects:?}");
}

#[test]
fn who_was_greeted_in_the_same_breath_in_which_all_are_closed_can_be_resumed() {
    let now = Moment { ms: 0, wall: jiff::Timestamp::UNIX_EPOCH.into() };
    let announcements = Position { epoch: Epoch::new("a"), offset: 0 };
    let mut shard = Shard::new(0, options(), announcements, now, Arc::new(ShardStats::default()));
    let wire = Rc::new(RefCell::new(Wire::open()));
    let socket = ServerEnd(VirtualSocket(Rc::clone(&wire)));
    shard.open(Opening { socket, encoding: Encoding::Plain, subscription: None, holder: None });
    shard.close_all(CloseCode::ServiceRestart);
    let effects = shard.take_effects();
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Save(_))), "{effects:?}");
}
