//! Runs a shard on real sockets: one task that waits for all of them at once, so that an idle socket costs no task, no
//! timer and no buffer.
//!
//! The sockets are registered with a poller of the shard's own, which the runtime watches as a whole (`epoll` and `kqueue`
//! can both be watched by another of their kind).

use std::{
    any::Any,
    io::{self, IoSlice, Read as _, Write as _},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use mio::{Events, Interest, Poll, Token};
use tidings_protocol::{CloseCode, Position, StreamId, TypeFilter};
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, sleep_until},
};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::{
    engine::Engine,
    event_stream::{EventStream, PipeSocket, pipe},
    hub::{Hub, Letter},
    rights::{Holder, SessionKey, Standing, Verdict},
    shard::{Answer, Effect, Encoding, Known, Moment, Opening, Question, Shard, ShardOptions, Socket},
    tls_socket::TlsSocket,
};

pub use crate::tls_socket::Transport;

/// Sockets that are looked at between two quanta of writing.
const EVENTS_MAX: usize = 256;

/// Comes with a connection and is dropped when that has ended, however it does.
pub type Guard = Box<dyn Any + Send>;

/// A connection that somebody hands to a shard.
#[derive(Debug)]
pub(crate) struct Arrival {
    socket: GuardedSocket,
    encoding: Encoding,
    /// Bytes that came behind the handshake.
    leftover: Bytes,
    subscription: Option<(StreamId, TypeFilter, Option<Position>)>,
    holder: Option<Holder>,
}

#[derive(Debug)]
struct GuardedSocket {
    /// Dropped before the socket: whoever sees that end may come back at once.
    _guard: Guard,
    socket: AnySocket,
}

#[derive(Debug)]
enum AnySocket {
    Tcp(mio::net::TcpStream),
    /// Apart, so that the others are no larger for it.
    Tls(Box<TlsSocket>),
    Pipe(PipeSocket),
}

impl Socket for GuardedSocket {
    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match (&self.socket, slices) {
            (AnySocket::Tcp(socket), [slice]) => (&*socket).write(slice),
            (AnySocket::Tcp(socket), slices) => (&*socket).write_vectored(slices),
            (AnySocket::Tls(tls), slices) => tls.write(slices),
            (AnySocket::Pipe(pipe), slices) => pipe.write(slices),
        }
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.socket {
            AnySocket::Tcp(socket) => (&*socket).read(buffer),
            AnySocket::Tls(tls) => tls.read(buffer),
            AnySocket::Pipe(pipe) => pipe.read(buffer),
        }
    }

    fn flush(&self) -> io::Result<()> {
        match &self.socket {
            AnySocket::Tls(tls) => tls.flush(),
            AnySocket::Tcp(_) | AnySocket::Pipe(_) => Ok(()),
        }
    }
}

/// Hands connections to one shard.
#[derive(Clone, Debug)]
pub struct ShardHandle {
    hub: Arc<Hub>,
    shard: u16,
}

impl ShardHandle {
    pub(crate) fn new(hub: Arc<Hub>, shard: u16) -> Self {
        Self { hub, shard }
    }

    /// Takes over a WebSocket after its handshake; `leftover` are bytes that came behind it. Without a `holder` it may see
    /// everything.
    pub fn open_websocket(
        &self,
        transport: Transport,
        leftover: Bytes,
        deflate: bool,
        guard: Guard,
        holder: Option<Holder>,
    ) {
        let socket = match transport {
            Transport::Plain(socket) => AnySocket::Tcp(mio::net::TcpStream::from_std(socket)),
            Transport::Tls(socket, tls) => AnySocket::Tls(Box::new(TlsSocket::new(socket, tls))),
        };
        let arrival = Arrival {
            socket: GuardedSocket { _guard: guard, socket },
            encoding: if deflate { Encoding::Deflate } else { Encoding::Plain },
            leftover,
            subscription: None,
            holder,
        };
        self.hub.mailbox(self.shard).put(Letter::Arrival(Box::new(arrival)));
    }

    /// Opens a connection that is read as Server-Sent Events and follows one stream. Without a `holder` it may see everything.
    pub fn open_event_stream(
        &self,
        stream: StreamId,
        types: TypeFilter,
        since: Option<Position>,
        guard: Guard,
        holder: Option<Holder>,
    ) -> EventStream {
        let mailbox = self.hub.mailbox(self.shard);
        let (socket, events) = pipe(Arc::clone(mailbox));
        let arrival = Arrival {
            socket: GuardedSocket { _guard: guard, socket: AnySocket::Pipe(socket) },
            encoding: Encoding::EventStream,
            leftover: Bytes::new(),
            subscription: Some((stream, types, since)),
            holder,
        };
        mailbox.put(Letter::Arrival(Box::new(arrival)));
        events
    }

    /// Tells the shard what was found out about sessions, behind the connections that it was given before.
    pub fn judge(&self, verdicts: Vec<(SessionKey, Verdict)>) {
        self.hub.mailbox(self.shard).put(Letter::Judged(verdicts));
    }

    /// The shard's number.
    pub fn number(&self) -> u16 {
        self.shard
    }
}

/// Runs one shard.
#[derive(Debug)]
pub struct Driver {
    number: u16,
    hub: Arc<Hub>,
    engine: Arc<dyn Engine>,
    options: ShardOptions,
    announcements: Position,
}

impl Driver {
    pub(crate) fn new(
        number: u16,
        hub: Arc<Hub>,
        engine: Arc<dyn Engine>,
        options: ShardOptions,
        announcements: Position,
    ) -> Self {
        Self { number, hub, engine, options, announcements }
    }

    /// Runs until the hub closes all connections and the last of them has left. Wants a runtime of one thread to itself,
    /// or at least not to be moved between several.
    pub async fn run(self) -> io::Result<()> {
        let clock = Clock { started: Instant::now() };
        let stats = Arc::clone(self.hub.stats_of(self.number));
        let shard = Shard::new(self.number, self.options, self.announcements, clock.now(), stats);
        let running = Running {
            shard,
            clock,
            number: self.number,
            hub: self.hub,
            engine: self.engine,
            poll: watched(Poll::new()?)?,
            events: Events::with_capacity(EVENTS_MAX),
            answers: FuturesUnordered::new(),
            draining: false,
            leaving: None,
            ending: None,
        };
        running.run().await
    }
}

/// Lets the runtime watch the poller.
#[allow(
    deprecated,
    reason = "a `Poll` keeps its descriptor open as long as it lives, which is all that its unsafe successor asks for"
)]
fn watched(poll: Poll) -> io::Result<AsyncFd<Poll>> {
    AsyncFd::new(poll)
}

struct Clock {
    started: Instant,
}

impl Clock {
    fn now(&self) -> Moment {
        let ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        Moment { ms, wall: jiff::Timestamp::now().into() }
    }

    /// The millisecond in which a moment lies, or the one before it.
    fn ms_of(&self, moment: Instant) -> u64 {
        u64::try_from(moment.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }

    fn known(&self, standing: Standing) -> Known {
        let until_ms = standing.known_until.map(|until| self.ms_of(until));
        Known { rights: standing.rights, until_ms, ends_at: standing.ends_at }
    }

    fn at(&self, ms: u64) -> Instant {
        self.started + Duration::from_millis(ms)
    }
}

struct Running {
    shard: Shard<GuardedSocket>,
    clock: Clock,
    number: u16,
    hub: Arc<Hub>,
    engine: Arc<dyn Engine>,
    poll: AsyncFd<Poll>,
    events: Events,
    /// Answers that did not come at once.
    answers: FuturesUnordered<BoxFuture<'static, Option<Answer>>>,
    /// Nobody is taken in any more.
    draining: bool,
    /// Kept until the last of those who are sent away has left.
    leaving: Option<TaskTrackerToken>,
    /// Connections that come in are closed with this, and when there is none left, the shard ends.
    ending: Option<CloseCode>,
}

impl Running {
    async fn run(mut self) -> io::Result<()> {
        let mailbox = Arc::clone(self.hub.mailbox(self.number));
        let mut tick = pin!(sleep_until(self.clock.at(self.shard.next_tick_ms())));
        let (mut more, mut more_sockets) = (true, false);
        loop {
            if more || more_sockets {
                // The runtime's other tasks and the sockets have their turn between two quanta.
                tokio::task::yield_now().await;
                more_sockets = self.poll_sockets()?;
            } else {
                tokio::select! {
                    () = mailbox.arrived() => {}
                    ready = self.poll.readable() => {
                        // Cleared before the look, so that what comes during the look shows again.
                        ready?.clear_ready();
                        more_sockets = self.poll_sockets()?;
                    }
                    Some(answer) = self.answers.next() => {
                        self.shard.set_now(self.clock.now());
                        self.take_answer(answer);
                    }
                    () = &mut tick => {}
                }
            }
            self.shard.set_now(self.clock.now());
            for letter in mailbox.take() {
                self.open(letter)?;
            }
            if self.clock.at(self.shard.next_tick_ms()) <= Instant::now() {
                self.shard.tick();
                tick.as_mut().reset(self.clock.at(self.shard.next_tick_ms()));
            }
            // Before anything is written, so that what a client reads is saved: it may resume elsewhere at once.
            more = self.do_effects();
            more |= self.shard.run();
            more |= self.do_effects();
            if self.shard.connections() == 0 {
                self.leaving = None;
            }
            if self.ending.is_some() && self.shard.connections() == 0 && !more {
                return Ok(());
            }
        }
    }

    fn open(&mut self, letter: Letter) -> io::Result<()> {
        match letter {
            Letter::Records { stream, position, records } => self.shard.deliver(&stream, &position, &records),
            Letter::Rejoin { stream, position } => self.shard.rejoin(&stream, &position),
            Letter::Notice(notice) => self.shard.notice(notice),
            Letter::Arrival(arrival) => self.arrive(*arrival)?,
            Letter::Stirred(key) => {
                self.shard.writable(key.index());
                self.shard.readable(key.index());
            }
            Letter::Close(key, code) => self.shard.close(key, code),
            Letter::Judged(verdicts) => {
                for (session, verdict) in verdicts {
                    let known = match verdict {
                        Verdict::Holds(standing) => Some(self.clock.known(standing)),
                        Verdict::Over => None,
                    };
                    self.shard.judge(session, known);
                }
            }
            Letter::Drain { over_ms, leaving } => {
                (self.draining, self.leaving) = (true, Some(leaving));
                self.shard.drain(over_ms, self.hub.shards());
            }
            Letter::CloseAll(code) => {
                self.ending = Some(code);
                self.shard.close_all(code);
            }
            Letter::DropAll => {
                self.ending = Some(CloseCode::GoingAway);
                self.shard.drop_all();
            }
        }
        Ok(())
    }

    fn arrive(&mut self, arrival: Arrival) -> io::Result<()> {
        let Arrival { mut socket, encoding, leftover, subscription, holder } = arrival;
        let key = self.shard.next_key();
        let source = match &mut socket.socket {
            AnySocket::Tcp(socket) => Some(socket),
            AnySocket::Tls(tls) => Some(tls.source()),
            AnySocket::Pipe(pipe) => {
                pipe.set_key(key);
                None
            }
        };
        if let Some(source) = source {
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.get_ref().registry().register(source, Token(key.index()), interest)?;
        }
        let holder = holder.map(|holder| (holder.session, self.clock.known(holder.standing)));
        self.shard.open(Opening { socket, encoding, subscription, holder });
        self.shard.received(key, &leftover);
        // It came in beside the stop, which did not see it.
        if let Some(code) = self.ending {
            self.shard.close_all(code);
        } else if self.draining {
            self.shard.close(key, CloseCode::ServiceRestart);
        }
        Ok(())
    }

    /// Looks at the sockets that something has happened to, at most so many as others can wait for; whether there may be more.
    fn poll_sockets(&mut self) -> io::Result<bool> {
        match self.poll.get_mut().poll(&mut self.events, Some(Duration::ZERO)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            polled => polled?,
        }
        self.shard.set_now(self.clock.now());
        let mut seen = 0;
        for event in &self.events {
            seen += 1;
            let index = event.token().0;
            if event.is_writable() {
                self.shard.writable(index);
            }
            if event.is_readable() || event.is_read_closed() || event.is_error() {
                self.shard.readable(index);
            }
            if event.is_read_closed() {
                self.shard.read_closed(index);
            }
        }
        Ok(seen == EVENTS_MAX)
    }

    /// Does what the shard wants done; whether that gave it more to do.
    fn do_effects(&mut self) -> bool {
        let mut any = false;
        loop {
            let effects = self.shard.take_effects();
            if effects.is_empty() {
                return any;
            }
            any = true;
            for effect in effects {
                match effect {
                    Effect::Follow(stream) => {
                        self.engine.follow(&stream);
                        self.hub.follow(self.number, stream);
                    }
                    Effect::Unfollow(stream) => {
                        self.hub.unfollow(self.number, &stream);
                        self.engine.unfollow(&stream);
                    }
                    other => self.ask(other),
                }
            }
        }
    }

    /// Asks the engine. An engine in this process answers at once.
    fn ask(&mut self, effect: Effect) {
        let mut asking = ask(Arc::clone(&self.engine), effect).boxed();
        match (&mut asking).now_or_never() {
            Some(answer) => self.take_answer(answer),
            None => self.answers.push(asking),
        }
    }

    fn take_answer(&mut self, answer: Option<Answer>) {
        let Some(answer) = answer else { return };
        if let Answer::TakenOver(key, Ok(Some(former))) = &answer
            && let Some(owner) = former.owner.filter(|owner| owner != key)
        {
            // It still looked alive.
            self.hub.close(owner, CloseCode::ResumedElsewhere);
        }
        self.shard.answer(answer);
    }
}

async fn ask(engine: Arc<dyn Engine>, effect: Effect) -> Option<Answer> {
    match effect {
        Effect::Follow(_) | Effect::Unfollow(_) => None,
        Effect::Ask(Question::Join { asker, since, types }) => {
            let joined = engine.join(&asker.stream, since.as_ref(), &types).await;
            Some(Answer::Joined(asker, joined))
        }
        Effect::Ask(Question::Read { asker, since, limit }) => {
            let page = engine.history(&asker.stream, Some(&since), limit).await;
            Some(Answer::Read(asker, page))
        }
        Effect::Ask(Question::TakeOver { key, token, successor }) => {
            Some(Answer::TakenOver(key, engine.take_over(&token, successor).await))
        }
        // A connection that could not be saved is no worse for its client, who subscribes with `since`.
        Effect::Save(connection) => engine.save(connection).await.err().and(None),
        Effect::Release(client, key) => engine.release(client, key).await.err().and(None),
        Effect::Forget(client, key) => engine.forget(client, key).await.err().and(None),
    }
}
