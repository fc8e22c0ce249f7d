//! Hearing what is published: one connection to each primary, on which the streams are subscribed to that are followed here, and
//! a probe that says whether anything can be heard at all. A stopped server still accepts connections: that one stands says
//! nothing.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::join_all;
use parking_lot::Mutex;
use redis::{Pipeline, PushInfo, PushKind, RedisError, Value, aio::MultiplexedConnection, cmd};
use tidings_protocol::{Gap, Source, StreamId};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::engine::Repairs;

use super::{
    Shared, connections, key_of,
    mirror::Mirror,
    servers::{Primary, Servers},
};

/// Messages that wait for this node to take them; beyond them the connection is given up, and what was published is read.
const PUSHES_MAX: usize = 16 * 1024;
/// Subscriptions that are asked for at once.
const SUBSCRIPTIONS_MAX: usize = 512;
/// How often a probe is sent.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// A connection on which no probe came back for this long is deaf: two were missed.
const SILENCE_MAX: Duration = Duration::from_millis(3500);
/// A connection that is lost and back within this is no outage.
const GRACE: Duration = Duration::from_secs(1);
/// The first wait before another attempt; each one doubles it.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_millis(500);

/// What the listener of each primary has to do, by the primary's name.
#[derive(Default)]
pub(super) struct Lines(Mutex<HashMap<String, Arc<Line>>>);

#[derive(Default)]
struct Line {
    changes: Mutex<Vec<Change>>,
    changed: Notify,
}

enum Change {
    Subscribe(StreamId),
    Unsubscribe(StreamId),
}

impl Lines {
    pub(super) fn subscribe(&self, servers: &Servers, stream: StreamId) {
        self.change(servers, Change::Subscribe(stream));
    }

    pub(super) fn unsubscribe(&self, servers: &Servers, stream: StreamId) {
        self.change(servers, Change::Unsubscribe(stream));
    }

    fn change(&self, servers: &Servers, change: Change) {
        let (Change::Subscribe(stream) | Change::Unsubscribe(stream)) = &change;
        let line = self.of(&servers.primary_of(&key_of(stream)));
        line.changes.lock().push(change);
        line.changed.notify_one();
    }

    fn of(&self, primary: &Primary) -> Arc<Line> {
        Arc::clone(self.0.lock().entry(primary.name().to_owned()).or_default())
    }
}

/// Why a connection does not serve any more.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("{0}")]
    Redis(#[from] RedisError),
    #[error("the connection was closed")]
    Closed,
    #[error("what was published came faster than it was taken")]
    Overrun,
    #[error("no probe came back for {} ms", SILENCE_MAX.as_millis())]
    Silent,
    #[error("a slot has moved")]
    Moved,
    #[error("another server is the primary now")]
    Replaced,
}

/// Listens at every primary there is.
pub(super) async fn listen_at_all(shared: Arc<Shared>) {
    let mut changed = shared.servers.watch();
    let mut listening: HashMap<String, CancellationToken> = HashMap::new();
    loop {
        let primaries = shared.servers.primaries();
        listening.retain(|name, stop| {
            let stays = primaries.iter().any(|primary| primary.name() == name);
            if !stays {
                stop.cancel();
                shared.vigil.forget(Source::Redis, &part_name(name));
            }
            stays
        });
        for primary in primaries {
            if !listening.contains_key(primary.name()) {
                let stop = shared.stop.child_token();
                listening.insert(primary.name().to_owned(), stop.clone());
                let (shared, line) = (Arc::clone(&shared), shared.lines.of(&primary));
                let tasks = shared.tasks.clone();
                let listening = Box::pin(listen(shared, primary, line));
                let listening = async move { stop.run_until_cancelled(listening).await };
                tasks.spawn(listening);
            }
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}

fn part_name(primary: &str) -> String {
    format!("streams at {primary}")
}

async fn listen(shared: Arc<Shared>, primary: Arc<Primary>, line: Arc<Line>) {
    let part = part_name(primary.name());
    shared.vigil.expect(Source::Redis, &part);
    loop {
        let before = shared.repairs();
        let healthy = AtomicBool::new(false);
        let listener = Listener {
            shared: &shared,
            primary: &primary,
            line: &line,
            part: &part,
            before,
            healthy: &healthy,
        };
        // A connection that was cut is back within a moment, and nobody needs to know; what was missed is read anyway.
        let announce = async {
            sleep(GRACE).await;
            if !healthy.load(Relaxed) {
                shared.vigil.down(Source::Redis, &part);
            }
            std::future::pending().await
        };
        let lost = tokio::select! {
            lost = listener.until_lost() => lost,
            lost = announce => lost,
        };
        tracing::warn!(error = %lost, primary = primary.name(), "Redis cannot be heard; trying again until it can");
        if matches!(lost, Lost::Silent) {
            shared.vigil.down(Source::Redis, &part);
        }
    }
}

/// What it takes to listen to one primary.
struct Listener<'a> {
    shared: &'a Arc<Shared>,
    primary: &'a Arc<Primary>,
    line: &'a Line,
    part: &'a str,
    /// What had been mended when nothing was heard any more.
    before: Repairs,
    /// Everything is heard, and was read as far as it had been missed.
    healthy: &'a AtomicBool,
}

impl Listener<'_> {
    /// Tries until everything is heard, and then listens until it is not any more; why.
    async fn until_lost(&self) -> Lost {
        let mut retry = RETRY_MIN;
        loop {
            let mut session = Session {
                listener: self,
                shared: self.shared,
                primary: self.primary,
                channels: HashMap::new(),
                probe: format!("tidings:probe:{}:{}", self.shared.options.incarnation, self.primary.name()),
                heard_at: Instant::now(),
                has_probe: false,
            };
            let Err(lost) = session.run().await;
            if self.healthy.load(Relaxed) {
                return lost;
            }
            tracing::debug!(error = %lost, primary = self.primary.name(), "Redis cannot be heard");
            sleep(retry).await;
            retry = (retry * 2).min(RETRY_MAX);
            // It may have moved meanwhile; what cannot be found out now is found out next time.
            let _ = self.shared.servers.refresh().await;
        }
    }
}

/// What became of events since so much had been mended.
fn gap_since(before: Repairs, now: Repairs) -> Gap {
    if now.lost > before.lost {
        Gap::Lost
    } else if now.events > before.events {
        Gap::Recovered
    } else {
        Gap::None
    }
}

/// One connection to one primary.
struct Session<'a> {
    listener: &'a Listener<'a>,
    shared: &'a Arc<Shared>,
    primary: &'a Arc<Primary>,
    /// The streams that are subscribed to, by their channels.
    channels: HashMap<String, StreamId>,
    probe: String,
    heard_at: Instant,
    /// A probe came back.
    has_probe: bool,
}

impl Session<'_> {
    async fn run(&mut self) -> Result<std::convert::Infallible, Lost> {
        let (push, mut pushes) = mpsc::channel(PUSHES_MAX);
        let overrun = Arc::new(Notify::new());
        let tell = Arc::clone(&overrun);
        let mut connection = self
            .primary
            .connect(move |info: PushInfo| push.try_send(info).inspect_err(|_| tell.notify_one()))
            .await?;
        let mut topology = self.shared.servers.watch();
        let mut place = self.primary.watch();
        self.listen_for_itself(&mut connection, &mut pushes).await?;
        // What is asked for from here on comes as a change.
        self.listener.line.changes.lock().clear();
        let streams = self.streams();
        self.subscribe(&mut connection, &mut pushes, streams).await?;
        let mut caught_up = pin!(self.caught_up());
        let mut is_caught_up = false;
        let mut probes = interval(PROBE_INTERVAL);
        probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                push = pushes.recv() => self.take(&push.ok_or(Lost::Closed)?)?,
                () = overrun.notified() => return Err(Lost::Overrun),
                () = self.listener.line.changed.notified() => self.change(&mut connection, &mut pushes).await?,
                () = &mut caught_up, if !is_caught_up => is_caught_up = true,
                _ = place.changed() => return Err(Lost::Replaced),
                _ = topology.changed() => self.follow_slots(&mut connection, &mut pushes).await?,
                _ = probes.tick() => {
                    if self.heard_at.elapsed() > SILENCE_MAX {
                        return Err(Lost::Silent);
                    }
                    self.send_probe();
                }
            }
            if is_caught_up && self.has_probe && !self.listener.healthy.swap(true, Relaxed) {
                let Listener { part, before, .. } = self.listener;
                self.shared.vigil.up(Source::Redis, part, gap_since(*before, self.shared.repairs()));
                tracing::info!(
                    primary = self.primary.name(),
                    streams = self.channels.len(),
                    "Redis is heard"
                );
            }
        }
    }

    /// Subscribes to what is for this node alone.
    async fn listen_for_itself(
        &mut self,
        connection: &mut MultiplexedConnection,
        pushes: &mut mpsc::Receiver<PushInfo>,
    ) -> Result<(), Lost> {
        let mut pipeline = redis::pipe();
        pipeline.add_command(named("SUBSCRIBE", &self.probe));
        pipeline.add_command(named("SUBSCRIBE", &self.shared.options.incarnation.channel()));
        self.ask(connection, pushes, pipeline).await
    }

    /// The streams that are followed here and whose primary this is.
    fn streams(&self) -> Vec<StreamId> {
        let mirrors = self.shared.mirrors.lock();
        mirrors.keys().filter(|stream| self.is_here(stream)).cloned().collect()
    }

    fn is_here(&self, stream: &StreamId) -> bool {
        self.shared.servers.primary_of(&key_of(stream)).name() == self.primary.name()
    }

    /// Subscribes to streams, and has each read from where it stands: what was published before is only there.
    async fn subscribe(
        &mut self,
        connection: &mut MultiplexedConnection,
        pushes: &mut mpsc::Receiver<PushInfo>,
        streams: Vec<StreamId>,
    ) -> Result<(), Lost> {
        let command = if self.shared.publish == "SPUBLISH" { "SSUBSCRIBE" } else { "SUBSCRIBE" };
        for streams in streams.chunks(SUBSCRIPTIONS_MAX) {
            let mut pipeline = redis::pipe();
            for stream in streams {
                let channel = key_of(stream);
                pipeline.add_command(named(command, &channel));
                self.channels.insert(channel, stream.clone());
            }
            self.ask(connection, pushes, pipeline).await?;
            for stream in streams {
                self.shared.want_read(stream);
            }
        }
        Ok(())
    }

    async fn unsubscribe(
        &mut self,
        connection: &mut MultiplexedConnection,
        pushes: &mut mpsc::Receiver<PushInfo>,
        streams: &[StreamId],
    ) -> Result<(), Lost> {
        let command = if self.shared.publish == "SPUBLISH" { "SUNSUBSCRIBE" } else { "UNSUBSCRIBE" };
        let mut pipeline = redis::pipe();
        for stream in streams {
            let channel = key_of(stream);
            if self.channels.remove(&channel).is_some() {
                pipeline.add_command(named(command, &channel));
            }
        }
        if pipeline.is_empty() { Ok(()) } else { self.ask(connection, pushes, pipeline).await }
    }

    /// Asks, and takes meanwhile what comes.
    async fn ask(
        &mut self,
        connection: &mut MultiplexedConnection,
        pushes: &mut mpsc::Receiver<PushInfo>,
        pipeline: Pipeline,
    ) -> Result<(), Lost> {
        let count = pipeline.len();
        let mut asking = pin!(connection.send_packed_commands(&pipeline, 0, count));
        let answers = loop {
            tokio::select! {
                answers = &mut asking => break answers?,
                push = pushes.recv() => self.take(&push.ok_or(Lost::Closed)?)?,
            }
        };
        for answer in answers {
            if let Value::ServerError(error) = answer {
                // Another primary has the slot by now.
                return Err(if error.code() == "MOVED" { Lost::Moved } else { Lost::Redis(error.into()) });
            }
        }
        Ok(())
    }

    /// Does what was asked for meanwhile. What was asked for both ways comes out as the last one says.
    async fn change(
        &mut self,
        connection: &mut MultiplexedConnection,
        pushes: &mut mpsc::Receiver<PushInfo>,
    ) -> Result<(), Lost> {
        let changes = std::mem::take(&mut *self.listener.line.changes.lock());
        let mut wanted: HashMap<StreamId, bool> = HashMap::new();
        for change in changes {
            match change {
                Change::Subscribe(stream) => wanted.insert(stream, true),
                Change::Unsubscribe(stream) => wanted.insert(stream, false),
            };
        }
        let (new, old): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|(_, wanted)| *wanted);
        let streams = |changes: Vec<(StreamId, bool)>| changes.into_iter().map(|(stream, _)| stream);
        self.unsubscribe(connection, pushes, &streams(old).collect::<Vec<_>>()).await?;
        // One that was left and followed again is read anew, too.
        self.subscribe(connection, pushes, streams(new).collect()).await
    }

    /// Slots have moved: some streams are elsewhere now, others are here.
    async fn follow_slots(
        &mut self,
        connection: &mut MultiplexedConnection,
        pushes: &mut mpsc::Receiver<PushInfo>,
    ) -> Result<(), Lost> {
        let gone: Vec<_> = self.channels.values().filter(|stream| !self.is_here(stream)).cloned().collect();
        self.unsubscribe(connection, pushes, &gone).await?;
        let new = self.streams().into_iter().filter(|stream| !self.channels.contains_key(&key_of(stream)));
        let new = new.collect();
        self.subscribe(connection, pushes, new).await
    }

    /// Takes what came on the connection.
    fn take(&mut self, push: &PushInfo) -> Result<(), Lost> {
        match push.kind {
            PushKind::Message | PushKind::SMessage => {}
            PushKind::Disconnection => return Err(Lost::Closed),
            // Nobody asked for it: the slot has gone. The library takes it for an answer to something else, so that nothing on
            // this connection can be trusted any more.
            PushKind::SUnsubscribe => {
                let channel = push.data.first().and_then(bytes_of).unwrap_or_default();
                let ours =
                    std::str::from_utf8(channel).is_ok_and(|channel| self.channels.contains_key(channel));
                return if ours { Err(Lost::Moved) } else { Ok(()) };
            }
            _ => return Ok(()),
        }
        let [channel, message] = &push.data[..] else { return Ok(()) };
        let (Some(channel), Some(message)) = (bytes_of(channel), bytes_of(message)) else { return Ok(()) };
        let Ok(channel) = std::str::from_utf8(channel) else { return Ok(()) };
        if let Some(stream) = self.channels.get(channel) {
            self.shared.hear(stream, message);
        } else if channel == self.probe {
            self.heard_at = Instant::now();
            self.has_probe = true;
        } else if channel == self.shared.options.incarnation.channel() {
            connections::hear(self.shared, message);
        }
        Ok(())
    }

    /// Sends a probe on the connection for commands. What becomes of it is seen by its coming back.
    fn send_probe(&self) {
        let (primary, probe) = (Arc::clone(self.primary), self.probe.clone());
        self.shared.spawn(async move {
            let _ = primary.probe(&probe, 0).await;
        });
    }

    /// Ends when every stream that is subscribed to was read.
    fn caught_up(&self) -> impl Future<Output = ()> + use<> {
        let mut mirrors = self.shared.mirrors.lock();
        let told = self.channels.values().filter_map(|stream| {
            // One that is not being read was read just now.
            mirrors.get_mut(stream).filter(|mirror| mirror.reading).map(Mirror::wait)
        });
        let told: Vec<_> = told.collect();
        async {
            join_all(told).await;
        }
    }
}

fn named(command: &str, channel: &str) -> redis::Cmd {
    let mut command = cmd(command);
    command.arg(channel);
    command
}

fn bytes_of(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}
