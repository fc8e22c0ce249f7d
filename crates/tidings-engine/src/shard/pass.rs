//! Passes: one visit to each connection that something waits for, one write per visit.
//!
//! Everybody with the same cursor is sent the same bytes. What comes during a pass is picked up by those not yet visited, so
//! that many events cost one write when there is much to do. A pass is run in quanta; between two quanta others have
//! their turn.

use std::io;

use bytes::Bytes;
use smallvec::SmallVec;

use super::{
    Closing, Shard, Socket,
    client::Phase,
    tail::{SLICES_MAX, Slices},
};

/// Visits in one quantum: about a millisecond.
const QUANTUM_VISITS: usize = 256;
/// Bytes in one quantum, of large events: about a millisecond as well.
const QUANTUM_BYTES: usize = 2 * 1024 * 1024;
/// Bytes in one visit: what one client may take while others wait.
pub(super) const VISIT_BYTES: usize = 128 * 1024;

/// Pieces that make up no more than this are put together for one write.
const COPIED_BYTES_MAX: usize = 8 * 1024;

/// A round of visits.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// Never used twice in a shard: a stream's place may be another one's before the pass has ended.
    number: u64,
    clients: Vec<usize>,
    next: usize,
    /// Those that take more than one visit.
    again: Vec<usize>,
    streams: Vec<Marked>,
}

/// How far a stream's cohorts were when a pass began: whoever was visited is past it.
#[derive(Debug)]
struct Marked {
    stream: usize,
    cohorts: SmallVec<[(usize, u64, u64); 2]>,
}

/// What a visit came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Visit {
    /// Nothing waits, or the connection is gone.
    Done,
    /// The peer takes no more for now.
    Blocked,
    /// There is more than one visit takes.
    More(usize),
}

type Parts = SmallVec<[(Part, usize); SLICES_MAX]>;

/// Where bytes of a write came from.
#[derive(Clone, Copy, Debug)]
enum Part {
    Outgoing,
    Link(usize),
}

impl<S: Socket> Shard<S> {
    /// Does a quantum of what there is to do; whether there is more.
    pub fn run(&mut self) -> bool {
        self.read_on();
        self.tell_appointments();
        self.begin_pass();
        let Some(mut pass) = self.passes.pop_front() else { return self.has_work() };
        let mut bytes = 0;
        for _ in 0..QUANTUM_VISITS {
            let Some(&index) = pass.clients.get(pass.next) else { break };
            pass.next += 1;
            if let Visit::More(written) = self.visit(index) {
                bytes += written;
                pass.again.push(index);
            }
            if bytes >= QUANTUM_BYTES {
                break;
            }
        }
        if pass.next == pass.clients.len() {
            pass.clients = std::mem::take(&mut pass.again);
            pass.next = 0;
        }
        if pass.clients.is_empty() {
            self.finish_pass(&pass);
        } else {
            self.passes.push_back(pass);
        }
        self.has_work()
    }

    fn has_work(&self) -> bool {
        let quiet = self.dirty.is_empty() && self.ready.is_empty() && self.passes.is_empty();
        !quiet || !self.unread.is_empty() || self.has_appointments_to_tell()
    }

    /// Starts a pass over those that something new waits for. A stream whose last pass still runs waits for its end: its
    /// subscribers get what came meanwhile with the rest.
    fn begin_pass(&mut self) {
        self.passes_begun += 1;
        let clients = std::mem::take(&mut self.ready);
        let mut pass = Pass { number: self.passes_begun, clients, ..Pass::default() };
        for stream in std::mem::take(&mut self.dirty) {
            let Some(followed) = self.followed.get_mut(stream) else { continue };
            if followed.in_pass.is_some() {
                self.dirty.push(stream);
                continue;
            }
            (followed.dirty, followed.in_pass) = (false, Some(self.passes_begun));
            let mut marked = Marked { stream, cohorts: SmallVec::new() };
            for (number, cohort) in followed.cohorts.iter().enumerate() {
                marked.cohorts.push((number, cohort.number, cohort.tail.end()));
                for member in &cohort.members {
                    // Whoever follows several of the streams is visited once.
                    let client = &mut self.clients[member.client];
                    if std::mem::replace(&mut client.pass, pass.number) != pass.number {
                        pass.clients.push(member.client);
                    }
                }
            }
            pass.streams.push(marked);
        }
        if !pass.clients.is_empty() || !pass.streams.is_empty() {
            self.passes.push_back(pass);
        }
    }

    /// Lets go of what no cursor stands before any more.
    fn finish_pass(&mut self, pass: &Pass) {
        for marked in &pass.streams {
            let Some(followed) = self.followed.get_mut(marked.stream) else { continue };
            followed.in_pass.take_if(|number| *number == pass.number);
            for &(number, name, end) in &marked.cohorts {
                if let Some(cohort) = followed.cohorts.get_mut(number).filter(|cohort| cohort.number == name)
                {
                    cohort.low = end;
                }
            }
        }
        self.lower_to_holders();
        for marked in &pass.streams {
            let Some(followed) = self.followed.get_mut(marked.stream) else { continue };
            for &(number, name, _) in &marked.cohorts {
                if let Some(cohort) = followed.cohorts.get_mut(number).filter(|cohort| cohort.number == name)
                {
                    self.tail_bytes -= cohort.tail.trim(cohort.low);
                }
            }
        }
        // Not only when the time has come: a fast publisher is much faster than that.
        self.relieve();
        self.stats.tail_bytes(self.tail_bytes);
    }

    /// Lowers each cohort's mark to the lowest cursor of those that were not visited, and forgets who holds nothing any
    /// more.
    pub(super) fn lower_to_holders(&mut self) {
        let (clients, followed) = (&mut self.clients, &mut self.followed);
        self.holders.retain(|&index| {
            let Some(client) = clients.get_mut(index).filter(|client| client.flags.holds) else {
                return false;
            };
            // Who waits for its socket is looked at until it does not, also while it holds nothing.
            let mut holds = client.waits_for_socket;
            for link in client.links.iter().filter(|link| link.holds()) {
                let cohort = &mut followed[link.stream].cohorts[link.cohort];
                cohort.low = cohort.low.min(link.cursor);
                holds |= link.cursor < cohort.tail.end() || !matches!(link.phase, Phase::Live);
            }
            client.flags.holds = holds;
            holds
        });
    }

    /// Notes that the client's links may hold bytes of tails.
    pub(super) fn hold(&mut self, index: usize) {
        if !std::mem::replace(&mut self.clients[index].flags.holds, true) {
            self.holders.push(index);
        }
    }

    /// Writes what waits for a client, as much as one visit allows, in one write.
    fn visit(&mut self, index: usize) -> Visit {
        match self.clients.get(index) {
            None => return Visit::Done,
            Some(client) if client.waits_for_socket => return Visit::Blocked,
            Some(client) if !self.sessions.is_known(client.seat, self.now) => self.withhold(index),
            Some(client) => {
                if client.flags.withheld {
                    self.release(index);
                }
                if self.clients[index].behind > 0 {
                    self.refill(index);
                }
            }
        }
        let mut buffer = std::mem::take(&mut self.write_buffer);
        let write = self.write(index, &mut buffer);
        self.write_buffer = buffer;
        let Some((parts, wanted, written)) = write else {
            self.written_all(index);
            return Visit::Done;
        };
        match written {
            Ok(0) => {
                self.remove(index, None);
                Visit::Done
            }
            Ok(written) => {
                self.advance(index, &parts, written);
                if written == wanted && !self.anything_waits(index) {
                    self.written_all(index);
                    return Visit::Done;
                }
                Visit::More(written)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let client = &mut self.clients[index];
                client.waits_for_socket = true;
                client.stalled_since.get_or_insert(self.now.ms);
                self.hold(index);
                self.fall_behind(index);
                Visit::Blocked
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Visit::More(0),
            Err(_) => {
                self.remove(index, None);
                Visit::Done
            }
        }
    }

    /// One write of what waits: where its bytes come from, how many they are, and how many were taken. `None`: nothing waits.
    fn write(&self, index: usize, buffer: &mut Vec<u8>) -> Option<(Parts, usize, io::Result<usize>)> {
        let client = self.clients.get(index)?;
        let mut slices = Slices::new();
        let mut parts = Parts::new();
        let mut wanted = 0;
        if let Some(outgoing) = &client.outgoing {
            wanted = outgoing.gather(VISIT_BYTES, &mut slices);
            parts.push((Part::Outgoing, wanted));
        }
        // Nothing of a tail goes before the end of what must go first.
        let links = if wanted == client.outgoing_bytes() { client.links.len() } else { 0 };
        for step in 0..links {
            let number = (client.first_link + step) % links;
            let link = &client.links[number];
            if !matches!(link.phase, Phase::Live) {
                continue;
            }
            let tail = &self.followed[link.stream].cohorts[link.cohort].tail;
            if link.cursor == tail.end() {
                continue;
            }
            if wanted >= VISIT_BYTES || slices.len() == SLICES_MAX {
                break;
            }
            let bytes = tail.gather(link.cursor, VISIT_BYTES - wanted, &mut slices);
            parts.push((Part::Link(number), bytes));
            wanted += bytes;
        }
        if wanted == 0 {
            return None;
        }
        let written = if slices.len() > 1 && wanted <= COPIED_BYTES_MAX {
            // Copying small pieces is cheaper than letting the system collect them.
            buffer.clear();
            slices.iter().for_each(|slice| buffer.extend_from_slice(slice));
            client.socket.write(&[io::IoSlice::new(buffer)])
        } else {
            client.socket.write(&slices)
        };
        Some((parts, wanted, written))
    }

    /// Writes a frame to a client for which nothing waits, without holding it; `false`: it has to be queued after all.
    pub(super) fn write_alone(&mut self, index: usize, frame: &Bytes) -> bool {
        if self.anything_waits(index) {
            return false;
        }
        let client = &mut self.clients[index];
        match client.socket.write(&[io::IoSlice::new(frame)]) {
            Ok(written) if written == frame.len() => {
                self.stats.written(1, written);
                true
            }
            Ok(written) if written > 0 => {
                client.outgoing.get_or_insert_default().push_rest(frame.slice(written..));
                self.ready.push(index);
                true
            }
            // Whatever it is shows again with the queued frame.
            Ok(_) | Err(_) => false,
        }
    }

    /// Visits a client out of turn, so that what came before its message is written before the answer.
    pub(super) fn visit_now(&mut self, index: usize) {
        if let Visit::More(_) = self.visit(index) {
            self.ready.push(index);
        }
    }

    /// Moves the cursors past what was written.
    fn advance(&mut self, index: usize, parts: &[(Part, usize)], mut written: usize) {
        let client = &mut self.clients[index];
        client.stalled_since = None;
        let (bytes, mut frames) = (written, 0);
        for &(part, length) in parts {
            let taken = written.min(length);
            written -= taken;
            match part {
                Part::Outgoing => {
                    let Some(outgoing) = &mut client.outgoing else { continue };
                    frames += outgoing.advance(taken);
                    if outgoing.is_empty() {
                        client.outgoing = None;
                    }
                }
                Part::Link(number) if taken > 0 => {
                    let link = &mut client.links[number];
                    let tail = &self.followed[link.stream].cohorts[link.cohort].tail;
                    let reached = link.cursor + taken as u64;
                    frames += tail.frames_between(link.cursor, reached);
                    link.cursor = reached;
                    if reached != tail.end()
                        && let Some((rest, end)) = tail.rest_of_frame(reached)
                    {
                        link.cursor = end;
                        client.outgoing.get_or_insert_default().push_rest(rest);
                    }
                    client.first_link = number + 1;
                }
                Part::Link(_) => {}
            }
        }
        self.stats.written(frames, bytes);
    }

    fn anything_waits(&self, index: usize) -> bool {
        let Some(client) = self.clients.get(index) else { return false };
        // To one that is withheld nothing else is written.
        let others = !client.flags.withheld;
        client.outgoing.is_some()
            || others
                && client.links.iter().any(|link| match &link.phase {
                    Phase::Live => link.cursor < self.followed[link.stream].cohorts[link.cohort].tail.end(),
                    Phase::Behind(behind) => !behind.page.is_empty() || behind.reaches_tail,
                    Phase::Joining(_) => false,
                })
    }

    /// Everything that waited for the client is written: a close that waited for that goes on, and so does reading.
    fn written_all(&mut self, index: usize) {
        let Some(client) = self.clients.get(index) else { return };
        match client.closing {
            Some(Closing::WhenWritten(code)) if client.behind == 0 || client.flags.withheld => {
                self.say_close(index, code);
            }
            Some(Closing::Said { code, .. }) if !client.encoding.is_websocket() => {
                self.remove(index, Some(code.number()));
            }
            Some(Closing::Answering { code, .. }) => {
                let flushed = client.socket.flush();
                if flushed.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                    // Its last bytes are on their way, and the end of the socket would take them back.
                    self.clients[index].waits_for_socket = true;
                    return;
                }
                // 1005 is the registry's number for a close without one.
                self.remove(index, Some(code.unwrap_or(1005)));
            }
            Some(_) => {}
            None => self.pump(index),
        }
    }
}
