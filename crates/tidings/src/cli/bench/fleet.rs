//! The sockets of all connections, and the one loop that reads them.

use std::{
    io::{self, Read as _, Write as _},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use mio::{Events, Interest, Poll, Token, Waker, net::TcpStream};

use super::{
    book::Class,
    clock::{Nanos, nanos, open_files_max},
    frames::{CLOSE, PONG, Scanner, WHOLE_BYTES_MAX, put_masked},
    publisher::Publisher,
    session::{Phase, Plan, Session},
    tally::Tally,
    target::Target,
};

const PUBLISHER: Token = Token(usize::MAX - 1);
const WAKER: Token = Token(usize::MAX - 2);
/// One for all connections: it stays in the processor's cache, and an idle connection has none.
const BUFFER_BYTES: usize = 256 * 1024 + WHOLE_BYTES_MAX + 16;
const EVENTS_AT_ONCE: usize = 1024;
/// Connections that are opened at the same time, so that no listener's queue overflows.
const OPENING_MAX: usize = 128;
/// Without any progress for this long opening has failed.
const OPENING_TIMEOUT: Duration = Duration::from_secs(30);
/// For the server's half of a close.
const CLOSE_WAIT: Duration = Duration::from_secs(1);
/// Close code 1000.
const CLOSE_NORMAL: [u8; 2] = 1000u16.to_be_bytes();
/// How often slow connections read.
const SLOW_INTERVAL: Duration = Duration::from_millis(50);
/// How often slow connections say that they live: they see the server's pings late.
const SLOW_PONG_INTERVAL: Duration = Duration::from_secs(5);
/// Files that the process has open beside its connections, and room for a few more.
const OTHER_FILES: usize = 32;

/// A connection and its socket.
#[derive(Debug)]
struct Connection {
    socket: Option<TcpStream>,
    scanner: Scanner,
    /// What came of the answer to the upgrade; `None` once it is complete.
    answer: Option<Vec<u8>>,
    requested: bool,
    session: Session,
}

/// All connections of a run.
#[derive(Debug)]
pub(super) struct Fleet {
    poll: Poll,
    waker: Arc<Waker>,
    events: Events,
    target: Target,
    connections: Vec<Connection>,
    buffer: Box<[u8]>,
    publisher: Option<Publisher>,
    slow: Vec<usize>,
    slow_bytes_per_second: u32,
    slow_read_at: Nanos,
    slow_pong_at: Nanos,
    /// Sockets made so far; each has its turn in the source addresses.
    sockets: usize,
    ready: usize,
}

impl Fleet {
    pub(super) fn new(target: Target, slow_bytes_per_second: u32) -> io::Result<Self> {
        let poll = Poll::new()?;
        Ok(Self {
            waker: Arc::new(Waker::new(poll.registry(), WAKER)?),
            poll,
            events: Events::with_capacity(EVENTS_AT_ONCE),
            target,
            connections: Vec::new(),
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            publisher: None,
            slow: Vec::new(),
            slow_bytes_per_second,
            slow_read_at: 0,
            slow_pong_at: 0,
            sockets: 0,
            ready: 0,
        })
    }

    /// Something that wakes `turn` from another thread.
    pub(super) fn waker(&self) -> Arc<Waker> {
        self.waker.clone()
    }

    pub(super) fn publish_with(&mut self, mut publisher: Publisher) -> io::Result<()> {
        publisher.register(self.poll.registry(), PUBLISHER)?;
        self.publisher = Some(publisher);
        Ok(())
    }

    pub(super) fn publisher(&mut self) -> Option<&mut Publisher> {
        self.publisher.as_mut()
    }

    pub(super) fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.connections.iter().map(|connection| &connection.session)
    }

    /// Opens connections and waits until all their subscriptions are confirmed; prompt ones then join their books.
    pub(super) fn open(&mut self, plans: Vec<Plan>, tally: &mut Tally) -> anyhow::Result<()> {
        let count = self.connections.len() + plans.len();
        if let Some(max) = open_files_max() {
            ensure!(
                count + OTHER_FILES <= max,
                "{count} connections need more open files than the {max} that this process may have; raise the \
                 limit (`ulimit -n`) or use fewer"
            );
        }
        let (mut plans, mut progress_at) = (plans.into_iter(), tally.clock.now());
        let (mut opened, mut ready) = (self.connections.len(), self.ready);
        while ready < count {
            while opened < count
                && opened - ready < OPENING_MAX
                && let Some(plan) = plans.next()
            {
                self.add(plan)?;
                opened += 1;
            }
            self.turn(Some(Duration::from_millis(100)), tally)?;
            if let Some((kind, _, example)) = tally.errors.iter().next() {
                bail!("a connection could not be opened: {kind}: {example}");
            }
            if self.ready > ready {
                (ready, progress_at) = (self.ready, tally.clock.now());
            }
            ensure!(
                tally.clock.now() < progress_at + nanos(OPENING_TIMEOUT),
                "{ready} of {count} connections are open, and then nothing came for {OPENING_TIMEOUT:?}"
            );
        }
        Ok(())
    }

    fn add(&mut self, plan: Plan) -> anyhow::Result<()> {
        let index = self.connections.len();
        if plan.class == Class::Slow {
            self.slow.push(index);
        }
        self.connections.push(Connection {
            socket: None,
            scanner: Scanner::default(),
            answer: None,
            requested: false,
            session: Session::new(plan),
        });
        self.connect(index)
    }

    fn connect(&mut self, index: usize) -> anyhow::Result<()> {
        let connection = &mut self.connections[index];
        let slow = connection.session.plan.class != Class::Prompt;
        let address = self.target.address;
        let mut socket =
            self.target.connect(self.sockets, slow).with_context(|| format!("connecting to {address}"))?;
        self.sockets += 1;
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut socket, Token(index), interest)?;
        connection.socket = Some(socket);
        connection.scanner = Scanner::default();
        connection.answer = Some(Vec::new());
        connection.requested = false;
        Ok(())
    }

    /// Closes all connections as a client that goes away does, and waits for a moment for the server's half.
    pub(super) fn close(&mut self, tally: &mut Tally) -> anyhow::Result<()> {
        for connection in &mut self.connections {
            connection.session.phase = Phase::Closed;
            put_masked(&mut connection.session.out, CLOSE, &CLOSE_NORMAL);
            // One that cannot be told is dropped with the others.
            let _ = connection.write();
        }
        let until = tally.clock.now() + nanos(CLOSE_WAIT);
        while tally.clock.now() < until
            && self.connections.iter().any(|connection| connection.socket.is_some())
        {
            self.turn(Some(Duration::from_millis(20)), tally)?;
        }
        self.cut();
        Ok(())
    }

    /// Cuts all connections without a word.
    pub(super) fn cut(&mut self) {
        for connection in &mut self.connections {
            connection.socket = None;
        }
        self.ready = 0;
    }

    /// Opens all connections anew, all at once; each asks to be resumed.
    pub(super) fn resume(&mut self) -> anyhow::Result<()> {
        (0..self.connections.len()).try_for_each(|index| {
            self.connections[index].session.resume();
            self.connect(index)
        })
    }

    /// Waits until something comes, or for `timeout`, and reads all of it.
    pub(super) fn turn(&mut self, timeout: Option<Duration>, tally: &mut Tally) -> anyhow::Result<()> {
        let timeout = if self.slow.is_empty() {
            timeout
        } else {
            Some(timeout.unwrap_or(SLOW_INTERVAL).min(SLOW_INTERVAL))
        };
        match self.poll.poll(&mut self.events, timeout) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        let mut result = Ok(());
        for event in &events {
            match event.token() {
                WAKER => {}
                PUBLISHER => {
                    if let Some(publisher) = &mut self.publisher {
                        result = result.and(publisher.ready());
                    }
                }
                Token(index) => self.ready(index, tally),
            }
        }
        self.events = events;
        self.read_slow(tally);
        result
    }

    /// Something happened on a socket.
    fn ready(&mut self, index: usize, tally: &mut Tally) {
        let session = &self.connections[index].session;
        if session.phase == Phase::Ready && session.plan.class != Class::Prompt {
            // Never read, or when it is time.
            return;
        }
        let before = session.phase == Phase::Ready;
        let result = self.request(index).and_then(|()| self.read(index, usize::MAX, tally));
        self.settle(index, before, result, tally);
    }

    /// After reading: what is to be written goes out, and what has changed is noted.
    fn settle(&mut self, index: usize, was_ready: bool, result: io::Result<()>, tally: &mut Tally) {
        let connection = &mut self.connections[index];
        let result = result.and_then(|()| connection.write());
        if let Err(error) = result {
            connection.session.closed(&error.to_string(), tally);
        }
        let is_ready = connection.session.phase == Phase::Ready;
        if is_ready && !was_ready {
            self.ready += 1;
            let plan = &connection.session.plan;
            if plan.class == Class::Prompt && !connection.session.has_joined {
                tally.books[plan.book].join(&plan.sequence);
                connection.session.has_joined = true;
            }
        }
        if connection.session.phase == Phase::Closed {
            connection.socket = None;
        }
    }

    /// Sends the upgrade request as soon as the socket is connected.
    fn request(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        let Some(socket) = &mut connection.socket else { return Ok(()) };
        if connection.requested {
            return Ok(());
        }
        if let Some(error) = socket.take_error()? {
            return Err(error);
        }
        if socket.peer_addr().is_err() {
            return Ok(());
        }
        connection.requested = true;
        let request = self.target.upgrade(index, connection.session.plan.deflate);
        // The first bytes on a new socket always fit.
        socket.write_all(request.as_bytes())
    }

    /// Reads until nothing is left, or about `bytes_max`.
    #[inline]
    fn read(&mut self, index: usize, mut bytes_max: usize, tally: &mut Tally) -> io::Result<()> {
        let Connection { socket, scanner, answer, session, .. } = &mut self.connections[index];
        let Some(socket) = socket else { return Ok(()) };
        while bytes_max > 0 && session.phase != Phase::Closed {
            let start = scanner.restore(&mut self.buffer);
            let end = self.buffer.len().min(start.saturating_add(bytes_max));
            let count = match socket.read(&mut self.buffer[start..end]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let now = session.plan.sampled.then(|| tally.clock.now());
            let mut data = &self.buffer[..start + count];
            let frames;
            if let Some(head) = answer {
                head.extend_from_slice(data);
                let Some(length) = upgraded(head, session)? else {
                    continue;
                };
                frames = head.split_off(length);
                data = &frames;
                *answer = None;
            }
            scanner.scan(data, |frame| session.take(frame, now, tally)).map_err(io::Error::other)?;
            // Less than there was room for: nothing is left, and asking again would cost a call for each event.
            if count < end - start {
                return Ok(());
            }
            bytes_max = bytes_max.saturating_sub(count);
        }
        Ok(())
    }

    /// Lets slow connections read their share.
    fn read_slow(&mut self, tally: &mut Tally) {
        let now = tally.clock.now();
        if self.slow.is_empty() || now < self.slow_read_at {
            return;
        }
        let passed = if self.slow_read_at == 0 { 0 } else { now - self.slow_read_at + nanos(SLOW_INTERVAL) };
        self.slow_read_at = now + nanos(SLOW_INTERVAL);
        let share = u64::from(self.slow_bytes_per_second) * passed / nanos(Duration::from_secs(1));
        let pong = now >= self.slow_pong_at;
        if pong {
            self.slow_pong_at = now + nanos(SLOW_PONG_INTERVAL);
        }
        for at in 0..self.slow.len() {
            let index = self.slow[at];
            let session = &mut self.connections[index].session;
            if session.phase != Phase::Ready {
                continue;
            }
            if pong {
                put_masked(&mut session.out, PONG, b"");
            }
            let result = self.read(index, usize::try_from(share).unwrap_or(usize::MAX), tally);
            self.settle(index, true, result, tally);
        }
    }
}

impl Connection {
    fn write(&mut self) -> io::Result<()> {
        let Some(socket) = &mut self.socket else { return Ok(()) };
        while !self.session.out.is_empty() && self.answer.is_none() {
            match socket.write(&self.session.out) {
                Ok(count) => drop(self.session.out.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The length of the answer to the upgrade, if it is complete.
fn upgraded(answer: &[u8], session: &mut Session) -> io::Result<Option<usize>> {
    let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let text = String::from_utf8_lossy(&answer[..end]);
    if !text.starts_with("HTTP/1.1 101") {
        let all = String::from_utf8_lossy(answer);
        return Err(io::Error::other(format!("the upgrade was answered: {all}")));
    }
    session.compressed = text.lines().any(|line| {
        let (name, value) = line.split_once(':').unwrap_or_default();
        name.eq_ignore_ascii_case("sec-websocket-extensions") && value.contains("permessage-deflate")
    });
    Ok(Some(end + 4))
}
