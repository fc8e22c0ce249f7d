//! What clients send: read off the socket, put together, answered.

use std::{collections::HashSet, io};

use tidings_protocol::{CloseCode, RemovalReason, StreamId};

use crate::{
    saved::ResumeToken,
    session::{self, Action, Sender},
    wire::{Binary, Frame, Incoming, Rules, pong_frame},
};

use super::{
    Closing, ConnectionKey, Encoding, Shard, Socket,
    allowance::{Sent, Verdict},
    client::{Resuming, Subscribing},
    subscribing::ANSWER_ROOM_BYTES,
};

/// Read off one socket at once, into a buffer that all share.
pub(super) const READ_BYTES: usize = 16 * 1024;
/// Reads of one socket before others have their turn.
const READS_MAX: usize = 8;
/// Subscriptions that may wait for their turn before their client is not read any more.
const WAITING_MAX: usize = 64;

impl<S: Socket> Shard<S> {
    /// Something arrived at the client's socket, or it has ended.
    pub fn readable(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        // What was read before comes first.
        client.flags.unread = true;
        if let Some(reading) = &mut client.reading {
            let stash = std::mem::take(&mut reading.stash);
            if self.may_read(index) {
                self.process(index, &stash);
            } else if let Some(reading) = &mut self.clients[index].reading {
                reading.stash = stash;
            }
        }
        if self.may_read(index) {
            let mut buffer = std::mem::take(&mut self.read_buffer);
            self.read(index, &mut buffer);
            self.read_buffer = buffer;
        }
    }

    /// The peer writes no more. Nothing else is told of its socket, and a look at what it wrote ends at its last bytes.
    pub fn read_closed(&mut self, index: usize) {
        // Who said goodbye before is answered first.
        if self.clients.get(index).is_some_and(|client| client.closing.is_none()) {
            self.readable(index);
        }
    }

    /// Bytes that came with the handshake.
    pub fn received(&mut self, key: ConnectionKey, bytes: &[u8]) {
        if let Some(index) = self.index_of(key).filter(|_| !bytes.is_empty()) {
            self.process(index, bytes);
        }
    }

    /// Goes on with sockets that had more than one turn reads.
    pub(super) fn read_on(&mut self) {
        for index in std::mem::take(&mut self.unread) {
            self.readable(index);
        }
    }

    fn read(&mut self, index: usize, buffer: &mut [u8]) {
        for _ in 0..READS_MAX {
            let Some(client) = self.clients.get_mut(index) else { return };
            match client.socket.read(buffer) {
                Ok(0) => return self.end_of_input(index),
                Ok(length) => {
                    client.heard_ms = self.now.ms;
                    self.process(index, &buffer[..length]);
                    // Less than there was room for: the socket is empty, and says so when it is not any more.
                    if length < buffer.len() && self.may_read(index) {
                        if let Some(client) = self.clients.get_mut(index) {
                            client.flags.unread = false;
                        }
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    client.flags.unread = false;
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.remove(index, None),
            }
            if !self.may_read(index) {
                return;
            }
        }
        self.unread.push(index);
    }

    /// The peer writes no more. After a close that is how it should be; before one, it is lost.
    fn end_of_input(&mut self, index: usize) {
        let code = match self.clients[index].closing {
            Some(Closing::Said { code, .. }) => Some(code.number()),
            Some(Closing::Answering { code, .. }) => Some(code.unwrap_or(1005)),
            Some(Closing::WhenWritten(_)) | None => None,
        };
        self.remove(index, code);
    }

    /// Whether there is room for what the client may ask next.
    fn may_read(&self, index: usize) -> bool {
        let Some(client) = self.clients.get(index) else { return false };
        let asked = client.reading.as_ref().map_or(0, |reading| reading.waiting.len());
        let said = matches!(client.closing, Some(Closing::Said { .. } | Closing::Answering { .. }));
        said || (client.outgoing_bytes() < ANSWER_ROOM_BYTES && asked < WAITING_MAX && !client.flags.resuming)
    }

    /// Lets a client be read again that had asked for too much, if it was one and there is room now.
    pub(super) fn read_again(&mut self, index: usize) {
        if self.clients[index].flags.unread && self.may_read(index) {
            // The peer could not be heard while it was not listened to.
            self.clients[index].heard_ms = self.now.ms;
            self.unread.push(index);
        }
    }

    /// Puts messages together from what was read, and answers them.
    fn process(&mut self, index: usize, mut input: &[u8]) {
        let client = &mut self.clients[index];
        if !client.encoding.is_websocket() {
            return;
        }
        let rules = Rules {
            message_bytes_max: tidings_protocol::CLIENT_MESSAGE_BYTES_MAX,
            deflate: client.encoding == Encoding::Deflate,
            binary: Binary::Refused,
        };
        let mut reader = match &mut client.reading {
            Some(reading) => std::mem::take(&mut reading.reader),
            None => std::mem::take(&mut self.spare_reader),
        };
        loop {
            let read = reader.read(&mut input, &rules, &mut self.inflater);
            let fragments = reader.take_fragments();
            if fragments > 0 && !self.allows(index, Sent::Frames(fragments)) && !self.clients.contains(index)
            {
                return;
            }
            match read {
                Ok(Some(incoming)) => self.take(index, incoming),
                Ok(None) => break,
                Err(violation) => {
                    self.say_close(index, violation.close_code());
                    break;
                }
            }
            if !self.clients.contains(index) {
                return;
            }
            if !self.may_read(index) && !input.is_empty() {
                let client = &mut self.clients[index];
                client.reading.get_or_insert_default().stash.extend_from_slice(input);
                // Also if these bytes came with the handshake, and the socket itself has nothing to read.
                client.flags.unread = true;
                break;
            }
        }
        let client = &mut self.clients[index];
        if !reader.is_idle() {
            client.reading.get_or_insert_default().reader = reader;
        } else if client.reading.as_ref().is_none_or(|reading| reading.is_idle()) {
            client.reading = None;
            self.spare_reader = reader;
        }
    }

    fn take(&mut self, index: usize, incoming: Incoming) {
        if let Some(closing) = self.clients[index].closing {
            match (closing, incoming) {
                // Our close is answered.
                (Closing::Said { code, .. }, Incoming::Close(_)) => self.remove(index, Some(code.number())),
                (Closing::WhenWritten(_), Incoming::Close(code)) => self.answer_close(index, code),
                _ => {}
            }
            return;
        }
        let sent = match incoming {
            Incoming::Text(_) | Incoming::Ping(_) => Some(Sent::Message),
            Incoming::Pong => Some(Sent::Frames(1)),
            Incoming::Close(_) | Incoming::Binary(_) => None,
        };
        if sent.is_some_and(|sent| !self.allows(index, sent)) {
            return;
        }
        match incoming {
            Incoming::Text(text) => self.receive(index, &text),
            Incoming::Ping(payload) => {
                self.clients[index].push([pong_frame(&payload)]);
                self.visit_now(index);
            }
            Incoming::Close(code) => self.answer_close(index, code),
            Incoming::Pong | Incoming::Binary(_) => {}
        }
    }

    /// Whether the client may send this now. If not, it is told, and closed if it was told and goes on.
    fn allows(&mut self, index: usize, sent: Sent) -> bool {
        let client = &mut self.clients[index];
        if client.closing.is_some() {
            return false;
        }
        match client.allowance.take(sent, self.now.ms, &self.allowed) {
            Verdict::Allowed => return true,
            Verdict::Refused { told: false } => {}
            Verdict::Refused { told: true } => {
                let message = session::rate_limited().into_message(self.now.wall);
                self.send(index, &message);
                self.visit_now(index);
            }
            Verdict::Ended => {
                self.say_close(index, CloseCode::TooMany);
                // Before what else is read: a close of its own may be in it, and would end the connection first.
                self.visit_now(index);
            }
        }
        false
    }

    /// The peer closes. It is answered with the next pass, so that what its close means is done before it reads the answer.
    fn answer_close(&mut self, index: usize, code: Option<u16>) {
        if code == Some(CloseCode::Normal.number()) {
            self.forget(index);
        } else {
            self.save(index);
        }
        let payload = code.map(u16::to_be_bytes);
        let answer = Frame::Close.encode(payload.as_ref().map_or(&[], |code| &code[..]));
        self.write_last(index, Some(answer), |until_ms| Closing::Answering { code, until_ms });
    }

    /// Takes a message of the client. A bad one gets an `error` and harms nothing.
    fn receive(&mut self, index: usize, text: &str) {
        self.stats.client_message();
        // What came before the message goes out before its answer.
        self.visit_now(index);
        let Some(client) = self.clients.get_mut(index) else { return };
        let is_first = !std::mem::replace(&mut client.flags.started, true);
        let client = &self.clients[index];
        let linked = client.links.iter().filter(|link| link.stream != self.announcements).count();
        let sender = Sender {
            is_first,
            subscriptions: linked + self.newly_asked_for(index),
            subscriptions_max: self.options.subscriptions_max,
            follows: &|stream| self.follows(index, stream),
            projects: &self.sessions.of(client.seat).rights.projects,
            explains_rights: self.options.explains_rights,
        };
        match session::decide(text, &sender) {
            Action::Subscribe { .. } | Action::Resume { .. }
                if !self.sessions.is_known(client.seat, self.now) =>
            {
                // Neither yes nor no can be said.
                return self.close_when_written(index, CloseCode::TryAgainLater);
            }
            Action::None => {}
            Action::Reply(reply) => {
                let message = reply.into_message(self.now.wall);
                self.send(index, &message);
            }
            Action::Unsubscribe { stream, id } => {
                self.unsubscribe(index, &stream);
                self.removed(index, &stream, RemovalReason::Requested, id);
                // Written in the next pass: by then it is saved, and whoever resumes elsewhere at once does not get it back.
                self.ready.push(index);
                return;
            }
            Action::Subscribe { stream, types, since, id } => {
                let types = self.intern(types);
                let subscribing = Subscribing { stream, types, since, id };
                self.clients[index].reading.get_or_insert_default().waiting.push_back(subscribing);
                self.start_waiting(index);
            }
            Action::Resume { token, positions, id } => self.resume(index, &token, positions, id),
        }
        self.visit_now(index);
    }

    /// Projects that the client asked for beside those that it follows.
    fn newly_asked_for(&self, index: usize) -> usize {
        let waiting = self.clients[index].reading.iter().flat_map(|reading| &reading.waiting);
        let new = waiting
            .map(|waiting| &waiting.stream)
            .filter(|stream| **stream != StreamId::Announcements && self.link_to(index, stream).is_none());
        new.collect::<HashSet<_>>().len()
    }

    fn resume(
        &mut self,
        index: usize,
        token: &str,
        positions: Vec<(StreamId, tidings_protocol::Position)>,
        id: Option<tidings_protocol::MessageId>,
    ) {
        if let Some(token) = ResumeToken::parse(token) {
            self.clients[index].reading.get_or_insert_default().resuming = Some(Resuming { id, positions });
            self.ask_take_over(index, token);
        } else {
            let expired = session::resume_expired(id).into_message(self.now.wall);
            self.send(index, &expired);
        }
    }
}
