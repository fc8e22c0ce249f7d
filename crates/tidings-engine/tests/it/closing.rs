//! What a close means is done before its answer can be read: whoever has the answer may come back at once, elsewhere.

use std::{
    cell::{Cell, RefCell},
    io::{self, IoSlice},
    rc::Rc,
    sync::Arc,
};

use tidings_engine::{
    hub::ShardStats,
    shard::{Effect, Encoding, Moment, Opening, Shard, Socket},
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

/// A socket that takes what it cannot pass on yet, as TLS does with the end of a record.
struct Holding {
    socket: ServerEnd,
    held: RefCell<Vec<u8>>,
    blocked: Rc<Cell<bool>>,
}

impl Socket for Holding {
    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.flush()?;
        for slice in slices {
            self.held.borrow_mut().extend_from_slice(slice);
        }
        let _ = self.flush();
        Ok(slices.iter().map(|slice| slice.len()).sum())
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.read(buffer)
    }

    fn flush(&self) -> io::Result<()> {
        let mut held = self.held.borrow_mut();
        if self.blocked.get() && !held.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.socket.write(&[IoSlice::new(&held)])?;
        held.clear();
        Ok(())
    }
}

#[test]
fn what_a_socket_holds_goes_out_when_it_is_writable_and_before_its_client_is_let_go() {
    let now = Moment { ms: 0, wall: jiff::Timestamp::UNIX_EPOCH.into() };
    let announcements = Position { epoch: Epoch::new("a"), offset: 0 };
    let mut shard = Shard::new(0, options(), announcements, now, Arc::new(ShardStats::default()));
    let (wire, blocked) = (Rc::new(RefCell::new(Wire::open())), Rc::new(Cell::new(true)));
    let socket = ServerEnd(VirtualSocket(Rc::clone(&wire)));
    let socket = Holding { socket, held: RefCell::default(), blocked: Rc::clone(&blocked) };
    let key = shard.open(Opening { socket, encoding: Encoding::Plain, subscription: None, holder: None });
    let mut client = Client::new(key, wire);
    while shard.run() {}
    assert_eq!(client.next_frame(), None, "all of it is held");
    blocked.set(false);
    // There is nothing more to write.
    shard.writable(key.index());
    assert!(client.next_frame().is_some(), "the greeting");
    blocked.set(true);
    client.send(&[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xE8]);
    shard.readable(key.index());
    while shard.run() {}
    assert_eq!((client.next_frame(), shard.connections()), (None, 1), "the answer is held");
    blocked.set(false);
    shard.writable(key.index());
    while shard.run() {}
    assert_eq!((client.next_frame(), shard.connections()), (Some((0x88, vec![0x03, 0xE8])), 0));
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
