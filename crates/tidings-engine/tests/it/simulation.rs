//! A shard under a seed: virtual sockets that take any number of bytes, virtual time, an engine whose answers come late and
//! in any order, clients that stall, leave and come back. Each client checks what it sees against everything that was ever
//! appended, and against what its session may see at that moment.
//!
//! A failure prints its seed; `TIDINGS_SIMULATION_SEED=7 cargo test -p tidings-engine simulation` runs that one alone.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    io::{self, IoSlice},
    rc::Rc,
    sync::{
        Arc, Weak,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tidings_engine::{
    engine::{
        Deliver, Engine, HistoryLimits, Record,
        embedded::{EmbeddedEngine, EmbeddedOptions},
    },
    hub::ShardStats,
    rights::{Rights, SessionKey},
    shard::{
        Answer, ConnectionKey, Effect, Encoding, Known, Moment, Opening, Question, Shard, ShardOptions,
        Socket,
    },
};
use tidings_protocol::{Position, Projects, StreamId, UserId};

const PROJECTS: [&str; 3] = ["p", "q", "r"];
const CLIENTS: usize = 6;
/// Of each, two clients are connected.
const SESSIONS: usize = 3;
const STEPS: usize = 600;

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// The two ends of a connection.
#[derive(Debug, Default)]
pub(crate) struct Wire {
    /// Bytes that the peer still takes.
    room: usize,
    to_client: Vec<u8>,
    to_server: VecDeque<u8>,
    client_gone: bool,
    server_gone: bool,
    /// The server found it full or empty and waits to be told.
    waits_for_room: bool,
}

impl Wire {
    /// One whose client takes everything.
    pub(crate) fn open() -> Self {
        Self { room: usize::MAX, ..Self::default() }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct VirtualSocket(pub(crate) Rc<RefCell<Wire>>);

impl Socket for VirtualSocket {
    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut wire = self.0.borrow_mut();
        if wire.client_gone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if wire.room == 0 {
            wire.waits_for_room = true;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut written = 0;
        for slice in slices {
            let taken = slice.len().min(wire.room);
            wire.to_client.extend_from_slice(&slice[..taken]);
            wire.room -= taken;
            written += taken;
        }
        Ok(written)
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut wire = self.0.borrow_mut();
        if wire.to_server.is_empty() {
            return if wire.client_gone { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let length = buffer.len().min(wire.to_server.len());
        for (place, byte) in buffer.iter_mut().zip(wire.to_server.drain(..length)) {
            *place = byte;
        }
        Ok(length)
    }
}

pub(crate) struct ServerEnd(pub(crate) VirtualSocket);

impl Socket for ServerEnd {
    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write(slices)
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Drop for ServerEnd {
    fn drop(&mut self) {
        self.0.0.borrow_mut().server_gone = true;
    }
}

/// Records on their way to the shard.
#[derive(Debug, Default)]
struct OnTheWay(Mutex<VecDeque<Delivery>>);

type Delivery = (StreamId, Position, Vec<Arc<Record>>);

impl Deliver for OnTheWay {
    fn deliver(&self, stream: &StreamId, position: &Position, records: &[Arc<Record>]) {
        self.0.lock().push_back((stream.clone(), position.clone(), records.to_vec()));
    }
}

/// An event as it was appended.
#[derive(Clone, Debug)]
struct Truth {
    event_type: String,
    /// The key under which a newer one stands for it.
    key: Option<String>,
}

/// A session as the world knows it, and as the shard was told.
#[derive(Clone, Debug)]
struct Session {
    key: SessionKey,
    /// Each with how many announcements there were when it was given.
    projects: BTreeMap<&'static str, usize>,
    known_until_ms: u64,
    ends_at_ms: Option<i64>,
    is_over: bool,
}

/// What a client believes of a project that it follows.
#[derive(Clone, Debug)]
struct Followed {
    filter: Option<&'static str>,
    /// The confirmation that it waits for: the `id` that it will carry, and the `since` that was asked for.
    awaits: Option<(Value, Option<Position>)>,
    at: Option<Position>,
}

pub(crate) struct Client {
    key: ConnectionKey,
    wire: Rc<RefCell<Wire>>,
    read: usize,
    token: String,
    followed: BTreeMap<&'static str, Followed>,
    announcements: Option<Position>,
    session: SessionKey,
    /// Bytes that had gone out when its session was lost sight of. Of streams only a frame that had begun may follow.
    unknown_from: Option<usize>,
    /// The same when it lost a project.
    lost_from: HashMap<&'static str, usize>,
    /// Its socket was full at some time since it came.
    was_full: bool,
    closed: Option<u16>,
    resuming: bool,
    asked: u64,
}

struct World {
    seed: u64,
    random: Random,
    shard: Shard<ServerEnd>,
    engine: EmbeddedEngine,
    wall: Arc<AtomicI64>,
    now_ms: u64,
    on_the_way: Arc<OnTheWay>,
    follows: HashSet<StreamId>,
    answers: Vec<Answer>,
    truth: HashMap<String, Vec<Truth>>,
    /// The project that each announcement speaks of.
    announced: Vec<Option<&'static str>>,
    sessions: Vec<Session>,
    sessions_begun: u64,
    clients: Vec<Option<Client>>,
    /// Positions and tokens of those that were cut off, by their place.
    left: Vec<Option<(String, BTreeMap<&'static str, Followed>)>>,
    events: usize,
    seen: Seen,
}

/// What happened over all runs: a simulation in which nothing happens proves nothing.
#[derive(Debug, Default)]
struct Seen {
    events: usize,
    folded: usize,
    too_slow: usize,
    sent_away: usize,
    recovered: usize,
    not_recovered: usize,
    resumed: usize,
    expired: usize,
    announcements: usize,
    not_authorized: usize,
    taken_away: usize,
    sessions_ended: usize,
    no_verdict: usize,
    withheld: usize,
    confirmed_again: usize,
}

struct SaysSeed(u64);

#[allow(clippy::print_stderr, reason = "a failure has to say how it is repeated")]
impl Drop for SaysSeed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with TIDINGS_SIMULATION_SEED={}", self.0);
        }
    }
}

pub(crate) fn options() -> ShardOptions {
    ShardOptions {
        node: "n".into(),
        restarted: false,
        heartbeat_interval_s: 30,
        subscriptions_max: 2,
        message_rate_max: 1000,
        behind_age_ms: 500,
        behind_bytes: 4000,
        slow_bytes_max: 30_000,
        explains_rights: true,
        retained_bytes_max: 20_000,
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let on_the_way = Arc::new(OnTheWay::default());
        let deliver: Weak<dyn Deliver> = Arc::downgrade(&(Arc::clone(&on_the_way) as Arc<dyn Deliver>));
        let wall = Arc::new(AtomicI64::new(1_800_000_000_000));
        let told = Arc::clone(&wall);
        let clock =
            Arc::new(move || jiff::Timestamp::from_millisecond(told.load(Ordering::Relaxed)).unwrap().into());
        let kept = EmbeddedOptions {
            history: HistoryLimits { events: 15, age: Duration::from_mins(10), bytes: 1 << 20 },
            connection_timeout: Duration::from_mins(1),
            journal: None,
        };
        let engine = EmbeddedEngine::open(kept, clock, deliver).unwrap();
        let announcements = engine.position(&StreamId::Announcements).now_or_never().unwrap().unwrap();
        let now = Moment { ms: 0, wall: jiff::Timestamp::UNIX_EPOCH.into() };
        let stats = Arc::new(ShardStats::default());
        let shard = Shard::new(0, options(), announcements, now, stats);
        let mut world = Self {
            seed,
            random: Random(seed),
            shard,
            engine,
            wall,
            now_ms: 0,
            on_the_way,
            follows: HashSet::from([StreamId::Announcements]),
            answers: Vec::new(),
            truth: HashMap::new(),
            announced: Vec::new(),
            sessions: Vec::new(),
            sessions_begun: 0,
            clients: (0..CLIENTS).map(|_| None).collect(),
            left: vec![None; CLIENTS],
            events: 0,
            seen: Seen::default(),
        };
        for _ in 0..SESSIONS {
            let session = world.new_session();
            world.sessions.push(session);
        }
        world
    }

    /// One that may see most of what there is.
    fn new_session(&mut self) -> Session {
        self.sessions_begun += 1;
        let announced = self.announced.len();
        let projects =
            PROJECTS.into_iter().filter(|_| self.random.chance(80)).map(|project| (project, announced));
        Session {
            projects: projects.collect(),
            key: SessionKey(self.sessions_begun),
            known_until_ms: self.now_ms + 5000,
            ends_at_ms: None,
            is_over: false,
        }
    }

    fn known(session: &Session, user: usize) -> Known {
        let projects: Vec<_> = session.projects.keys().collect();
        let user = Some(UserId::try_from(format!("u{user}").as_str()).unwrap());
        Known {
            rights: Arc::new(Rights { user, projects: Projects::listed(&projects) }),
            until_ms: Some(session.known_until_ms),
            ends_at: session.ends_at_ms.map(|ms| jiff::Timestamp::from_millisecond(ms).unwrap().into()),
        }
    }

    /// Somebody asks about a session: it holds, perhaps with other rights, or it is over.
    fn check_session(&mut self, number: usize) {
        let (over, change) = (self.random.chance(4), self.random.chance(25));
        let ends = self.random.chance(5);
        let project = *self.random.pick(&PROJECTS);
        let (announced, now_ms) = (self.announced.len(), self.now_ms);
        let wall_ms = self.wall.load(Ordering::Relaxed);
        let session = &mut self.sessions[number];
        if session.is_over {
            return;
        }
        self.shard.set_now(Self::moment(now_ms, wall_ms));
        if over {
            session.is_over = true;
            let key = session.key;
            return self.shard.judge(key, None);
        }
        session.known_until_ms = now_ms + 5000;
        if ends {
            session.ends_at_ms = Some(wall_ms + 4000);
        }
        let mut lost = None;
        if change && session.projects.remove(project).is_some() {
            lost = Some(project);
        } else if change {
            session.projects.insert(project, announced);
        }
        let (key, known) = (session.key, Self::known(session, number));
        for client in self.clients.iter_mut().flatten().filter(|client| client.session == key) {
            client.unknown_from = None;
            if let Some(project) = lost {
                client.lost_from.insert(project, client.wire.borrow().to_client.len());
            }
        }
        self.shard.judge(key, Some(known));
    }

    fn moment(now_ms: u64, wall_ms: i64) -> Moment {
        Moment { ms: now_ms, wall: jiff::Timestamp::from_millisecond(wall_ms).unwrap().into() }
    }

    fn step(&mut self) {
        let number = self.random.below(CLIENTS);
        match self.random.below(100) {
            0..30 => self.publish(),
            30..40 if self.clients[number].is_none() => self.connect(number),
            40..50 => self.subscribe(number),
            50..53 => self.unsubscribe(number),
            53..65 => self.change_room(number),
            65..70 => self.cut(number),
            70..85 => self.answer_one(),
            85..92 => {
                let ms = *self.random.pick(&[1, 50, 120, 600, 3000, 3000, 600, 50, 90_000]);
                self.pass_time(ms);
            }
            92..93 => self.drain(),
            93..98 => self.check_session(number % SESSIONS),
            _ => {}
        }
        let quanta = self.random.below(4);
        self.turn(quanta);
    }

    /// One look of the driver at everything, with some quanta of work.
    fn turn(&mut self, quanta: usize) {
        for _ in 0..quanta {
            self.shard.set_now(Self::moment(self.now_ms, self.wall.load(Ordering::Relaxed)));
            self.deliver_some();
            for number in 0..CLIENTS {
                self.stir(number);
            }
            if self.shard.next_tick_ms() <= self.now_ms {
                self.shard.tick();
            }
            self.shard.run();
            self.do_effects();
            for number in 0..CLIENTS {
                self.read(number);
            }
        }
    }

    fn deliver_some(&mut self) {
        let some = self.random.below(6);
        for _ in 0..some {
            let Some((stream, position, records)) = self.on_the_way.0.lock().pop_front() else { break };
            if self.follows.contains(&stream) {
                self.shard.deliver(&stream, &position, &records);
            }
        }
    }

    fn stir(&mut self, number: usize) {
        let Some(client) = &self.clients[number] else { return };
        let (room, readable) = {
            let mut wire = client.wire.borrow_mut();
            let room = wire.room > 0 && std::mem::take(&mut wire.waits_for_room);
            (room, !wire.to_server.is_empty() || wire.client_gone)
        };
        if room {
            self.shard.writable(client.key.index());
        }
        if readable {
            self.shard.readable(client.key.index());
        }
    }

    fn do_effects(&mut self) {
        for effect in self.shard.take_effects() {
            match effect {
                Effect::Follow(stream) => {
                    self.follows.insert(stream);
                }
                Effect::Unfollow(stream) => {
                    self.follows.remove(&stream);
                }
                Effect::Ask(question) => {
                    let answer = match question {
                        Question::Join { asker, since, types } => {
                            let joined = self.engine.join(&asker.stream, since.as_ref(), &types);
                            let joined = joined.now_or_never().unwrap();
                            Answer::Joined(asker, joined)
                        }
                        Question::Read { asker, since, limit } => {
                            let page = self.engine.history(&asker.stream, Some(&since), limit);
                            let page = page.now_or_never().unwrap();
                            Answer::Read(asker, page)
                        }
                        Question::TakeOver { key, token, successor } => {
                            let former = self.engine.take_over(&token, successor).now_or_never().unwrap();
                            Answer::TakenOver(key, former)
                        }
                    };
                    self.answers.push(answer);
                }
                Effect::Save(connection) => self.engine.save(connection).now_or_never().unwrap().unwrap(),
                Effect::Release(client, key) => {
                    self.engine.release(client, key).now_or_never().unwrap().unwrap();
                }
                Effect::Forget(client, key) => {
                    self.engine.forget(client, key).now_or_never().unwrap().unwrap();
                }
            }
        }
    }

    /// One of the engine's answers arrives, in any order.
    fn answer_one(&mut self) {
        if !self.answers.is_empty() {
            let which = self.random.below(self.answers.len());
            let answer = self.answers.swap_remove(which);
            self.shard.answer(answer);
        }
    }

    /// Everybody is sent away, and comes back.
    fn drain(&mut self) {
        let over_ms = *self.random.pick(&[0, 1000, 8000]);
        self.shard.drain(over_ms, 2);
    }

    fn pass_time(&mut self, ms: u64) {
        self.now_ms += ms;
        self.wall.fetch_add(i64::try_from(ms).unwrap(), Ordering::Relaxed);
        let wall_ms = self.wall.load(Ordering::Relaxed);
        for session in &mut self.sessions {
            session.is_over |= session.ends_at_ms.is_some_and(|ends_at| ends_at <= wall_ms);
            if session.known_until_ms < self.now_ms || session.is_over {
                for client in self.clients.iter_mut().flatten().filter(|client| client.session == session.key)
                {
                    client.unknown_from.get_or_insert(client.wire.borrow().to_client.len());
                }
            }
        }
    }

    fn announce(&mut self) {
        let project = self.random.chance(80).then(|| *self.random.pick(&PROJECTS));
        self.announced.push(project);
        let event = match project {
            Some(project) => json!({"type": "project.updated", "project_id": project}),
            None => json!({"type": "news.published"}),
        };
        self.engine.append(vec![crate::event(&event)]).now_or_never().unwrap().unwrap();
    }

    fn publish(&mut self) {
        if self.random.chance(15) {
            return self.announce();
        }
        let count = *self.random.pick(&[1, 1, 2, 5, 30]);
        let mut events = Vec::new();
        for _ in 0..count {
            let project = *self.random.pick(&PROJECTS);
            let task = format!("t{}", self.random.below(3));
            let padding = "x".repeat(*self.random.pick(&[0, 0, 0, 300, 3000, 20_000]));
            self.events += 1;
            let (event, key) = match self.random.below(10) {
                0..6 => (
                    json!({"type": "task.progress", "project_id": project, "task_id": task,
                        "progress": {"current": self.events, "total": 1_000_000}, "message": padding}),
                    Some(format!("task.progress:{task}")),
                ),
                6..8 => (
                    json!({"type": "task.completed", "project_id": project, "task_id": task, "result": padding}),
                    None,
                ),
                _ => (json!({"type": "a.b", "project_id": project, "n": self.events}), None),
            };
            let event_type = event["type"].as_str().unwrap().to_owned();
            self.truth.entry(project.to_owned()).or_default().push(Truth { event_type, key });
            events.push(crate::event(&event));
        }
        self.engine.append(events).now_or_never().unwrap().unwrap();
    }

    fn connect(&mut self, number: usize) {
        let full = self.random.chance(20);
        let wire = Rc::new(RefCell::new(Wire {
            room: if full { self.random.below(2000) } else { usize::MAX },
            ..Wire::default()
        }));
        let socket = ServerEnd(VirtualSocket(Rc::clone(&wire)));
        let session = number % SESSIONS;
        if !self.sessions[session].is_over
            && self.sessions[session].known_until_ms < self.now_ms
            && self.random.chance(80)
        {
            // Nobody can say who it is.
            return;
        }
        if self.sessions[session].is_over || self.sessions[session].known_until_ms < self.now_ms {
            // Whoever logs in, or is asked about with success.
            let again = self.sessions[session].clone();
            let fresh = self.new_session();
            self.sessions[session] =
                if again.is_over { fresh } else { Session { known_until_ms: fresh.known_until_ms, ..again } };
            let (key, known) = (self.sessions[session].key, Self::known(&self.sessions[session], session));
            self.shard.set_now(Self::moment(self.now_ms, self.wall.load(Ordering::Relaxed)));
            self.shard.judge(key, Some(known));
            for client in self.clients.iter_mut().flatten().filter(|client| client.session == key) {
                client.unknown_from = None;
            }
        }
        let key = self.sessions[session].key;
        let holder = Some((key, Self::known(&self.sessions[session], session)));
        let opened =
            self.shard.open(Opening { socket, encoding: Encoding::Plain, subscription: None, holder });
        let mut client = Client { was_full: full, session: key, ..Client::new(opened, wire) };
        if let Some((token, followed)) = self.left[number].take() {
            let positions: serde_json::Map<_, _> = followed
                .iter()
                .filter_map(|(project, followed)| {
                    let at = followed.at.as_ref()?;
                    Some(((*project).to_owned(), serde_json::to_value(at).unwrap()))
                })
                .collect();
            client.followed = followed;
            if self.random.chance(70) && !token.is_empty() {
                client.resuming = true;
                client.say(&json!({"type": "resume", "token": token, "positions": positions}));
            } else {
                client.subscribe_again();
            }
        }
        self.clients[number] = Some(client);
    }

    fn subscribe(&mut self, number: usize) {
        let project = *self.random.pick(&PROJECTS);
        let filter = *self.random.pick(&[None, None, Some("task.*"), Some("a.b"), Some("task.completed")]);
        let with_since = self.random.chance(50);
        let patient = self.random.chance(90);
        let Some(client) = self.clients[number].as_mut().filter(|client| !client.resuming) else { return };
        if patient && client.unknown_from.is_some() {
            return;
        }
        let known = client.followed.get(project);
        if known.is_none() && client.followed.len() == options().subscriptions_max {
            return;
        }
        if known.is_some_and(|known| known.awaits.is_some()) {
            return;
        }
        // A `since` is good for the filter that it was reached with.
        let since =
            known.filter(|known| with_since && known.filter == filter).and_then(|known| known.at.clone());
        client.ask(project, filter, since);
    }

    fn unsubscribe(&mut self, number: usize) {
        let project = *self.random.pick(&PROJECTS);
        let Some(client) = self.clients[number].as_mut().filter(|client| !client.resuming) else { return };
        if client.followed.get(project).is_some_and(|followed| followed.awaits.is_none()) {
            client.followed.remove(project);
            client.say(&json!({"type": "unsubscribe", "project_id": project}));
        }
    }

    fn change_room(&mut self, number: usize) {
        let room = match self.random.below(5) {
            0 => 0,
            1 => self.random.below(50),
            2 => self.random.below(5000),
            _ => usize::MAX,
        };
        if let Some(client) = &mut self.clients[number] {
            client.wire.borrow_mut().room = room;
            client.was_full |= room < usize::MAX;
        }
    }

    fn cut(&mut self, number: usize) {
        if let Some(client) = self.clients[number].take() {
            self.leave(number, &client);
            client.wire.borrow_mut().client_gone = true;
            self.shard.readable(client.key.index());
            if self.random.chance(50) {
                // The old socket still looks alive while the client comes back.
                client.wire.borrow_mut().client_gone = false;
            }
        }
    }

    /// What a client knows when its connection ends.
    fn leave(&mut self, number: usize, client: &Client) {
        let mut followed = client.followed.clone();
        for followed in followed.values_mut() {
            followed.awaits = None;
        }
        let token = if client.resuming { String::new() } else { client.token.clone() };
        self.left[number] = Some((token, followed));
    }

    /// Reads and checks what has arrived at a client.
    fn read(&mut self, number: usize) {
        loop {
            let Some(client) = &mut self.clients[number] else { return };
            let start = client.read;
            let frame = client.next_frame();
            match frame {
                None => break,
                Some((0x81, payload)) => {
                    let message: Value = serde_json::from_slice(&payload).unwrap();
                    self.check_rights(number, start, &message);
                    self.check(number, &message);
                }
                Some((0x89, _)) => client.wire.borrow_mut().to_server.extend([0x8A, 0x80, 0, 0, 0, 0]),
                Some((0x88, payload)) => {
                    client.closed = Some(u16::from_be_bytes([payload[0], payload[1]]));
                }
                Some((first, _)) => panic!("a frame that begins with {first:#x}"),
            }
        }
        let Some(client) = &self.clients[number] else { return };
        let ended = client.wire.borrow().server_gone || client.closed.is_some();
        if ended {
            self.seen.too_slow += usize::from(client.closed == Some(4508));
            self.seen.sent_away += usize::from(client.closed == Some(1012));
            self.seen.sessions_ended += usize::from(client.closed == Some(4401));
            self.seen.no_verdict += usize::from(client.closed == Some(1013));
            let session = self.sessions.iter().find(|session| session.key == client.session);
            assert!(
                client.closed != Some(4401) || session.is_none_or(|session| session.is_over),
                "a session that holds was ended"
            );
            assert!(
                client.was_full || client.closed != Some(4508),
                "a client that reads everything was called too slow"
            );
            let client = self.clients[number].take().unwrap();
            client.wire.borrow_mut().client_gone = true;
            self.shard.readable(client.key.index());
            self.leave(number, &client);
        }
    }

    /// Nothing that began to be written after its right was lost, or after it was lost sight of.
    fn check_rights(&mut self, number: usize, start: usize, message: &Value) {
        let client = self.clients[number].as_ref().unwrap();
        let kind = message["type"].as_str().unwrap();
        let is_of_stream = message.get("offset").is_some() && message["project_id"] != "*";
        if !is_of_stream {
            return;
        }
        if let Some(unknown_from) = client.unknown_from {
            self.seen.withheld += 1;
            assert!(start < unknown_from, "client {number} was written {kind} while nobody knew its session");
        }
        let Some(project) = message["project_id"].as_str() else { return };
        let session = self.sessions.iter().find(|session| session.key == client.session);
        let may_see = session.is_none_or(|session| session.projects.contains_key(project));
        let began_before = client.lost_from.get(project).is_some_and(|lost_from| start < *lost_from);
        assert!(
            may_see || began_before,
            "client {number} was written {kind} of {project} without a right to it"
        );
    }

    fn check(&mut self, number: usize, message: &Value) {
        let client = self.clients[number].as_mut().unwrap();
        let kind = message["type"].as_str().unwrap();
        match kind {
            "connection.established" => {
                message["resume_token"].as_str().unwrap().clone_into(&mut client.token);
                client.announcements = serde_json::from_value(message["announcements"].clone()).unwrap();
            }
            "connection.resumed" => {
                self.seen.resumed += 1;
                client.resuming = false;
                let known: Vec<_> = message["subscriptions"].as_array().unwrap().clone();
                let mut confirmed = BTreeMap::new();
                for (project, followed) in std::mem::take(&mut client.followed) {
                    // What was not confirmed before the cut, or had not even reached the server, is given up: the server may
                    // know it with another filter, or not at all.
                    if known.contains(&json!(project)) && followed.at.is_some() {
                        let since = followed.at.clone();
                        confirmed
                            .insert(project, Followed { awaits: Some((Value::Null, since)), ..followed });
                    }
                }
                for project in PROJECTS {
                    if known.contains(&json!(project)) && !confirmed.contains_key(project) {
                        // The server knows of one that the client had given up; it ends it when it hears of it.
                        client.say(&json!({"type": "unsubscribe", "project_id": project}));
                    }
                }
                client.followed = confirmed;
            }
            "error" => {
                assert!(
                    matches!(
                        message["code"].as_str(),
                        Some("resume_expired" | "not_subscribed" | "not_authorized")
                    ),
                    "{message}"
                );
                if message["code"] == "not_authorized" {
                    self.seen.not_authorized += 1;
                    let project = message["project_id"].as_str().unwrap();
                    client.followed.remove(project);
                }
                if message["code"] == "resume_expired" {
                    self.seen.expired += 1;
                    client.resuming = false;
                    client.subscribe_again();
                }
            }
            "subscription.confirmed" => self.check_confirmed(number, message),
            "subscription.removed" => {
                if message["reason"] != "requested" {
                    self.seen.taken_away += 1;
                    client.followed.remove(message["project_id"].as_str().unwrap());
                }
            }
            "system.heartbeat" | "pong" => {}
            "container.reconnect" => assert!(message["retry_after_ms"].as_u64().unwrap() <= 8000),
            _ if message["stream"] == "*" => self.check_announcement(number, message),
            _ => self.check_event(number, message),
        }
    }

    /// Every announcement that the session may see comes, once and in order.
    fn check_announcement(&mut self, number: usize, message: &Value) {
        self.seen.announcements += 1;
        let client = self.clients[number].as_mut().unwrap();
        let at = client.announcements.as_mut().unwrap();
        let offset = message["offset"].as_u64().unwrap();
        assert!(offset > at.offset, "client {number}: announcement {offset} after {}", at.offset);
        let session = self.sessions.iter().find(|session| session.key == client.session);
        for skipped in at.offset + 1..offset {
            let place = usize::try_from(skipped).unwrap() - 1;
            let was_for = session.filter(|session| !session.is_over).is_some_and(|session| {
                match self.announced[place] {
                    Some(project) => session.projects.get(project).is_some_and(|given_at| *given_at <= place),
                    None => true,
                }
            });
            assert!(!was_for, "client {number}: announcement {skipped} is missing before {offset}");
        }
        at.offset = offset;
    }

    fn check_confirmed(&mut self, number: usize, message: &Value) {
        let client = self.clients[number].as_mut().unwrap();
        let project = message["project_id"].as_str().unwrap();
        let Some(followed) = client.followed.get_mut(project) else { return };
        let offset = message["offset"].as_u64().unwrap();
        let epoch = message["epoch"].as_str().unwrap();
        if let (None, Some(at), Value::Null) = (&followed.awaits, &mut followed.at, &message["id"]) {
            // It was made to wait, and what it waited for has left the history.
            self.seen.confirmed_again += 1;
            assert!(message["recovered"] == false || offset == at.offset, "{message}");
            at.offset = offset;
            return;
        }
        let Some((_, since)) = followed.awaits.take_if(|(id, _)| *id == message["id"]) else { return };
        match (&message["recovered"], &since) {
            (Value::Bool(true), Some(since)) => {
                self.seen.recovered += 1;
                assert_eq!((offset, epoch), (since.offset, since.epoch.as_str()));
                assert!(message.get("state").is_none());
            }
            (Value::Bool(false), Some(_)) => {
                self.seen.not_recovered += 1;
                assert!(message["state"].is_object());
            }
            (Value::Null, None) => assert!(message["state"].is_object()),
            other => panic!("{other:?}"),
        }
        followed.at = Some(serde_json::from_value(json!({"epoch": epoch, "offset": offset})).unwrap());
    }

    fn check_event(&mut self, number: usize, message: &Value) {
        let client = self.clients[number].as_mut().unwrap();
        let project = message["project_id"].as_str().unwrap();
        let Some(followed) = client.followed.get_mut(project) else { return };
        if followed.awaits.is_some() || followed.at.is_none() {
            // It belongs to a subscription that the client has replaced or given up.
            return;
        }
        self.seen.events += 1;
        let at = followed.at.as_mut().unwrap();
        let offset = message["offset"].as_u64().unwrap();
        let truth = &self.truth[project];
        let of = |offset: u64| &truth[usize::try_from(offset).unwrap() - 1];
        assert_eq!(message["type"], of(offset).event_type.as_str());
        assert!(offset > at.offset, "client {number}: {offset} after {}: twice or out of order", at.offset);
        let folded = message["folded"].as_u64().unwrap_or(0);
        if followed.filter.is_none() {
            assert_eq!(offset, at.offset + 1 + folded, "client {number}, {project}: {message}");
        }
        self.seen.folded += usize::from(folded > 0);
        let matches = |event_type: &str| match followed.filter {
            None => true,
            Some("task.*") => event_type.starts_with("task."),
            Some(exact) => event_type == exact,
        };
        for skipped in at.offset + 1..offset {
            let truth_of_skipped = of(skipped);
            if !matches(&truth_of_skipped.event_type) {
                continue;
            }
            let newer = (skipped + 1..=truth.len() as u64).any(|newer| of(newer).key == truth_of_skipped.key);
            assert!(
                truth_of_skipped.key.is_some() && newer,
                "client {number}, {project}: {skipped} is missing before {offset}: {truth_of_skipped:?}"
            );
        }
        at.offset = offset;
    }

    /// Everything goes through at last: every client that is there has the newest of everything.
    fn settle(&mut self) {
        for number in 0..SESSIONS {
            let session = &mut self.sessions[number];
            (session.known_until_ms, session.ends_at_ms) = (u64::MAX, None);
            if !session.is_over {
                let (key, known) = (session.key, Self::known(session, number));
                self.shard.judge(key, Some(known));
                for client in self.clients.iter_mut().flatten().filter(|client| client.session == key) {
                    client.unknown_from = None;
                }
            }
        }
        for number in 0..CLIENTS {
            if let Some(client) = &self.clients[number] {
                client.wire.borrow_mut().room = usize::MAX;
            }
        }
        // What is withheld goes on with a tick.
        self.pass_time(200);
        for _ in 0..2000 {
            while !self.answers.is_empty() {
                self.answer_one();
            }
            self.turn(1);
        }
        for number in 0..CLIENTS {
            let Some(client) = &self.clients[number] else { continue };
            for (project, followed) in &client.followed {
                assert!(followed.awaits.is_none(), "client {number}: {project} was never confirmed");
                let truth = self.truth.get(*project).map_or(&[][..], Vec::as_slice);
                let last = truth.iter().rposition(|truth| match followed.filter {
                    None => true,
                    Some("task.*") => truth.event_type.starts_with("task."),
                    Some(exact) => truth.event_type == exact,
                });
                let last = last.map_or(0, |last| last as u64 + 1);
                let at = followed.at.as_ref().unwrap().offset;
                assert!(at >= last, "client {number}: at {at} of {project}, whose last for it is {last}");
            }
        }
        let open = self.clients.iter().flatten().count();
        self.pass_time(60_000);
        for _ in 0..50 {
            self.pass_time(1000);
            self.turn(1);
        }
        assert!(self.shard.connections() >= open.min(self.clients.iter().flatten().count()));
    }
}

impl Client {
    pub(crate) fn new(key: ConnectionKey, wire: Rc<RefCell<Wire>>) -> Self {
        Self {
            key,
            wire,
            read: 0,
            token: String::new(),
            followed: BTreeMap::new(),
            announcements: None,
            session: SessionKey(0),
            unknown_from: None,
            lost_from: HashMap::new(),
            was_full: false,
            closed: None,
            resuming: false,
            asked: 0,
        }
    }

    pub(crate) fn key(&self) -> ConnectionKey {
        self.key
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&self, bytes: &[u8]) {
        self.wire.borrow_mut().to_server.extend(bytes);
    }

    pub(crate) fn say(&self, message: &Value) {
        let payload = message.to_string();
        let mut wire = self.wire.borrow_mut();
        wire.to_server.push_back(0x81);
        let length = payload.len();
        match u8::try_from(length) {
            Ok(short) if short < 126 => wire.to_server.push_back(0x80 | short),
            _ => {
                wire.to_server.push_back(0xFE);
                wire.to_server.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
        }
        wire.to_server.extend([0; 4]);
        wire.to_server.extend(payload.bytes());
    }

    fn ask(&mut self, project: &'static str, filter: Option<&'static str>, since: Option<Position>) {
        self.asked += 1;
        let mut message = json!({"type": "subscribe", "project_id": project, "id": self.asked});
        if let Some(filter) = filter {
            message["types"] = json!([filter]);
        }
        if let Some(since) = &since {
            message["since"] = serde_json::to_value(since).unwrap();
        }
        self.say(&message);
        self.followed
            .insert(project, Followed { filter, awaits: Some((json!(self.asked), since)), at: None });
    }

    fn subscribe_again(&mut self) {
        for (project, followed) in std::mem::take(&mut self.followed) {
            self.ask(project, followed.filter, followed.at);
        }
    }

    /// The next whole frame: its first byte and its payload.
    pub(crate) fn next_frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let wire = self.wire.borrow();
        let bytes = &wire.to_client[self.read..];
        let (&first, rest) = bytes.split_first()?;
        let (length, header) = match *rest.first()? {
            126 => (usize::from(u16::from_be_bytes(rest.get(1..3)?.try_into().unwrap())), 4),
            127 => (usize::try_from(u64::from_be_bytes(rest.get(1..9)?.try_into().unwrap())).unwrap(), 10),
            short => (usize::from(short), 2),
        };
        let payload = bytes.get(header..header + length)?.to_vec();
        self.read += header + length;
        Some((first, payload))
    }
}

fn run(seed: u64, all: &mut Seen) {
    let _says_seed = SaysSeed(seed);
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
    }
    world.settle();
    assert_eq!(world.seed, seed);
    all.events += world.seen.events;
    all.folded += world.seen.folded;
    all.too_slow += world.seen.too_slow;
    all.sent_away += world.seen.sent_away;
    all.recovered += world.seen.recovered;
    all.not_recovered += world.seen.not_recovered;
    all.resumed += world.seen.resumed;
    all.expired += world.seen.expired;
    all.announcements += world.seen.announcements;
    all.not_authorized += world.seen.not_authorized;
    all.taken_away += world.seen.taken_away;
    all.sessions_ended += world.seen.sessions_ended;
    all.no_verdict += world.seen.no_verdict;
    all.withheld += world.seen.withheld;
    all.confirmed_again += world.seen.confirmed_again;
}

#[test]
#[allow(clippy::disallowed_methods, reason = "a test may be told its seed")]
fn whatever_sockets_time_and_clients_do_everybody_gets_everything_once_and_in_order() {
    if let Ok(seed) = std::env::var("TIDINGS_SIMULATION_SEED") {
        return run(seed.parse().unwrap(), &mut Seen::default());
    }
    let seeds = std::env::var("TIDINGS_SIMULATION_SEEDS").map_or(120, |seeds| seeds.parse().unwrap());
    let mut seen = Seen::default();
    for seed in 0..seeds {
        run(seed, &mut seen);
    }
    println!("{seen:?}");
    let Seen { events, folded, too_slow, sent_away, recovered, not_recovered, resumed, expired, .. } = seen;
    for (what, times) in [
        ("events", events),
        ("folded", folded),
        ("too slow", too_slow),
        ("sent away", sent_away),
        ("recovered", recovered),
        ("not recovered", not_recovered),
        ("resumed", resumed),
        ("expired", expired),
        ("announcements", seen.announcements),
        ("not authorized", seen.not_authorized),
        ("taken away", seen.taken_away),
        ("sessions ended", seen.sessions_ended),
        ("no verdict", seen.no_verdict),
        ("withheld", seen.withheld),
        ("confirmed again", seen.confirmed_again),
    ] {
        assert!(times > 10, "{what} only {times} times: the simulation has lost its point");
    }
}
