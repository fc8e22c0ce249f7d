//! The one thread that appends where there is a journal: it numbers, writes, and then lets show. What comes while it writes is
//! written together, so that many publishers share one write, and one wait for the disk.

use std::{sync::Arc, thread};

use parking_lot::Mutex;
use tidings_protocol::Event;
use tokio::sync::{mpsc, oneshot};

use crate::engine::{
    Appended, EngineError,
    journal::{CheckpointWriter, Entry, JournalError, LogWriter},
    streams::{Staged, StreamSnapshot},
};

use super::{Kept, Shared};

/// Requests that wait for the thread; then publishers wait.
const WAITING_MAX: usize = 1024;
/// Requests that are written together.
const BATCH_MAX: usize = 512;

/// Where the answer to an append goes.
type Reply = oneshot::Sender<Result<Vec<Appended>, EngineError>>;

/// The way to the thread.
#[derive(Debug)]
pub(super) struct Appender {
    requests: mpsc::Sender<Request>,
    /// Why the last write failed.
    failing: Arc<Mutex<Option<String>>>,
}

#[derive(Debug)]
enum Request {
    Append(Vec<Event>, Reply),
    /// Something has changed that no event says.
    Changed,
    Close(oneshot::Sender<()>),
}

impl Appender {
    pub(super) fn start(shared: Arc<Shared>, log: LogWriter) -> Result<Self, JournalError> {
        let (requests, waiting) = mpsc::channel(WAITING_MAX);
        let failing = Arc::new(Mutex::new(None));
        let thread = Thread { shared, log, failing: Arc::clone(&failing) };
        let started = thread::Builder::new().name("journal".into()).spawn(move || thread.run(waiting));
        started.map_err(|source| JournalError::File { path: "the journal's thread".into(), source })?;
        Ok(Self { requests, failing })
    }

    pub(super) async fn append(&self, events: Vec<Event>) -> Result<Vec<Appended>, EngineError> {
        let gone = || {
            // It is asked to stop, or has failed in a way that nobody foresaw; health must say so.
            let reason = "the journal's thread has ended";
            *self.failing.lock() = Some(reason.to_owned());
            EngineError::Journal(reason.to_owned())
        };
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Append(events, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Lets the thread look for changes. Where its queue is full it looks anyway.
    pub(super) fn wake(&self) {
        let _ = self.requests.try_send(Request::Changed);
    }

    pub(super) fn failing(&self) -> Option<String> {
        self.failing.lock().clone()
    }

    pub(super) async fn close(&self) {
        let (reply, answer) = oneshot::channel();
        if self.requests.send(Request::Close(reply)).await.is_ok() {
            // It ends also if it cannot say so.
            let _ = answer.await;
        }
    }
}

struct Thread {
    shared: Arc<Shared>,
    log: LogWriter,
    failing: Arc<Mutex<Option<String>>>,
}

/// What is written together.
#[derive(Default)]
struct Batch {
    events: Vec<Event>,
    /// Who waits, each for so many of the events.
    replies: Vec<(usize, Reply)>,
    close: Option<oneshot::Sender<()>>,
}

impl Batch {
    fn take(&mut self, request: Request) {
        match request {
            Request::Append(events, reply) => {
                self.replies.push((events.len(), reply));
                self.events.extend(events);
            }
            Request::Changed => {}
            Request::Close(reply) => self.close = Some(reply),
        }
    }
}

impl Thread {
    fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut buffer = Vec::new();
        while let Some(first) = requests.blocking_recv() {
            let mut batch = Batch::default();
            batch.take(first);
            while batch.replies.len() < BATCH_MAX && batch.close.is_none() {
                let Ok(next) = requests.try_recv() else { break };
                batch.take(next);
            }
            buffer.clear();
            let appended = self.append(&batch.events, &mut buffer);
            reply(batch.replies, appended);
            if let Some(closed) = batch.close {
                requests.close();
                self.end();
                // Nobody may wait any more.
                let _ = closed.send(());
                return;
            }
            if self.log.wants_checkpoint() {
                self.checkpoint();
            }
        }
        self.end();
    }

    /// Numbers, writes, lets show; or takes everything back.
    fn append(&mut self, events: &[Event], buffer: &mut Vec<u8>) -> Result<Vec<Appended>, EngineError> {
        let now = (self.shared.clock)();
        let mut staged = Staged::default();
        let (streams, connections) = {
            let mut kept = self.shared.kept.lock();
            for event in events {
                kept.streams.stage(event, now, &mut staged);
            }
            // The streams that the events belong to come before them.
            let streams = kept.streams.encode_changes(buffer);
            let connections = kept.connections.take_changes(buffer);
            kept.streams.encode_staged(&staged, buffer);
            (streams, connections)
        };
        let written = if buffer.is_empty() { Ok(()) } else { self.log.write(buffer) };
        let mut kept = self.shared.kept.lock();
        match written {
            Ok(()) => {
                kept.streams.changes_written(streams);
                self.shared.apply(&mut kept, &staged);
                drop(kept);
                if self.failing.lock().take().is_some() {
                    tracing::warn!("the journal can be written again");
                }
                Ok(staged.appended)
            }
            Err(error) => {
                kept.streams.discard(&staged);
                kept.connections.put_changes_back(connections);
                drop(kept);
                let reason = error.to_string();
                if self.failing.lock().replace(reason.clone()).is_none() {
                    tracing::error!(
                        error = reason,
                        "the journal cannot be written; nothing is accepted until it can"
                    );
                }
                Err(EngineError::Journal(reason))
            }
        }
    }

    /// Lets what is kept now be written beside the log that goes on.
    fn checkpoint(&mut self) {
        let writer = match self.log.begin_checkpoint() {
            Ok(writer) => writer,
            Err(error) => {
                return tracing::error!(%error, "the journal's logs cannot be replaced and go on growing");
            }
        };
        let kept = Snapshot::of(&self.shared.kept.lock());
        let write = move || {
            if let Err(error) = kept.write(writer) {
                tracing::error!(%error, "the journal's logs could not be replaced and stay as they are");
            }
        };
        if let Err(error) = thread::Builder::new().name("checkpoint".into()).spawn(write) {
            tracing::error!(%error, "the journal's logs could not be replaced and stay as they are");
        }
    }

    fn end(self) {
        if let Err(error) = self.log.end() {
            tracing::error!(%error, "the journal's end could not be written");
        }
    }
}

/// Gives everybody his part of the answer.
fn reply(replies: Vec<(usize, Reply)>, appended: Result<Vec<Appended>, EngineError>) {
    // Who does not wait any more needs no answer.
    match appended {
        Ok(appended) => {
            let mut appended = appended.into_iter();
            for (events, reply) in replies {
                let _ = reply.send(Ok(appended.by_ref().take(events).collect()));
            }
        }
        Err(error) => {
            let reason = error.to_string();
            for (_, reply) in replies {
                let _ = reply.send(Err(EngineError::Unavailable(reason.clone())));
            }
        }
    }
}

/// What is kept at one moment; records are shared, the rest is copied.
struct Snapshot {
    streams: Vec<StreamSnapshot>,
    connections: Vec<Entry<'static>>,
}

impl Snapshot {
    fn of(kept: &Kept) -> Self {
        Self {
            streams: kept.streams.iter().map(|(id, stream)| StreamSnapshot::of(id, stream)).collect(),
            connections: kept.connections.entries().collect(),
        }
    }

    fn write(&self, writer: CheckpointWriter) -> Result<(), JournalError> {
        writer.write(|put| {
            self.streams.iter().try_for_each(|stream| stream.entries().try_for_each(|entry| put(&entry)))?;
            self.connections.iter().try_for_each(put)
        })
    }
}
