//! Reading streams: what a mirror begins with, and what it missed.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use redis::Value;
use tidings_protocol::{Epoch, Position, StreamId};
use tokio::time::{Duration, sleep};

use crate::{
    engine::{EngineError, streams::StreamSnapshot},
    random,
};

use super::{
    Shared, key_of,
    mirror::{Learnt, Reading, assemble},
    servers::{Call, Fault},
    stored::encode_snapshot,
};

/// Streams that are read at the same time.
pub(super) const READS_MAX: usize = 64;
/// Before a stream is read again that could not be read.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// What `read.lua` answers.
type Answer = (String, u64, String, u64, Vec<u8>, u64, Option<Vec<u8>>);

impl Shared {
    /// Reads a stream behind a position, or whole; `None`: there is none, and it was not to be made.
    pub(super) async fn read(
        &self,
        stream: &StreamId,
        behind: Option<&Position>,
        make: bool,
    ) -> Result<Option<Reading>, Fault> {
        let key = key_of(stream);
        let (epoch, offset) = behind.map_or(("", 0), |behind| (behind.epoch.as_str(), behind.offset));
        let arguments = [
            random::hex::<10>(),
            (self.now().as_millisecond() / 1000).to_string(),
            epoch.to_owned(),
            offset.to_string(),
            u8::from(make).to_string(),
        ];
        // What it may change, it changes once.
        let call = Call::script(&key, &self.scripts.read, &arguments, true);
        let answer = self.servers.call(&call).await?;
        if matches!(answer, Value::Nil) {
            return Ok(None);
        }
        let (epoch, offset, former, from, events, aged, snapshot) =
            redis::from_redis_value::<Answer>(answer)?;
        let former = former.lines().filter_map(|line| {
            let (epoch, offset) = line.rsplit_once(' ')?;
            Some(Position { epoch: Epoch::new(epoch), offset: offset.parse().ok()? })
        });
        let position = Position { epoch: Epoch::new(epoch), offset };
        Ok(Some(Reading { position, former: former.collect(), from, events, aged, snapshot }))
    }

    /// Has a mirror read, now or when the reading that is under way is done.
    pub(super) fn want_read(self: &Arc<Self>, stream: &StreamId) {
        let mut mirrors = self.mirrors.lock();
        let Some(mirror) = mirrors.get_mut(stream) else { return };
        if std::mem::replace(&mut mirror.reading, true) {
            mirror.read_again = true;
            return;
        }
        drop(mirrors);
        self.spawn(Arc::clone(self).read_mirror(stream.clone()));
    }

    async fn read_mirror(self: Arc<Self>, stream: StreamId) {
        loop {
            let Ok(_turn) = self.reading.acquire().await else { return };
            let behind = {
                let mut mirrors = self.mirrors.lock();
                let Some(mirror) = mirrors.get_mut(&stream) else { return };
                mirror.read_again = false;
                mirror.reads_begun += 1;
                mirror.position()
            };
            let caught_up = match self.read(&stream, behind.as_ref(), true).await {
                Ok(Some(reading)) => self.take(&stream, reading),
                Ok(None) => true,
                Err(fault) => {
                    tracing::debug!(%fault, stream = ?stream.as_str(), "a stream cannot be read");
                    false
                }
            };
            if caught_up {
                return;
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    /// Takes what was read; whether nothing more has to be.
    fn take(&self, stream: &StreamId, reading: Reading) -> bool {
        let mut mirrors = self.mirrors.lock();
        let Some(mirror) = mirrors.get_mut(stream) else { return true };
        let learnt = mirror.take(stream, reading, &self.options.history, self.now());
        let deliver = self.deliver.upgrade();
        match learnt {
            Learnt::Nothing => {}
            Learnt::Next(position, records) => {
                self.repaired.fetch_add(records.len(), Relaxed);
                if let Some(deliver) = deliver {
                    deliver.deliver(stream, &position, &records);
                }
            }
            Learnt::Elsewhere { position, lost } => {
                self.repaired.fetch_add(1, Relaxed);
                self.lost.fetch_add(usize::from(lost), Relaxed);
                tracing::warn!(stream = ?stream.as_str(), lost, "the stream goes on elsewhere than it was; its subscribers are confirmed again");
                if let Some(deliver) = deliver {
                    deliver.rejoin(stream, &position);
                }
            }
            Learnt::Missing => {
                // It is no continuation of what is here; the next reading begins anew.
                mirror.stream = None;
                return false;
            }
        }
        mirror.reads_done = mirror.reads_begun;
        mirror.tell_waiting();
        mirror.reading = mirror.read_again || mirror.is_behind();
        !mirror.reading
    }

    /// Takes what was published.
    pub(super) fn hear(self: &Arc<Self>, stream: &StreamId, message: &[u8]) {
        let mut mirrors = self.mirrors.lock();
        let Some(mirror) = mirrors.get_mut(stream) else { return };
        let learnt = read_message(message).map(|(epoch, first, events)| mirror.hear(epoch, first, events));
        match learnt {
            Some(Learnt::Next(position, records)) => {
                if let Some(deliver) = self.deliver.upgrade() {
                    deliver.deliver(stream, &position, &records);
                }
            }
            Some(Learnt::Missing) if !mirror.reading => {
                drop(mirrors);
                self.want_read(stream);
            }
            // While it is read, it is known that there is more.
            _ => {}
        }
    }

    /// Lets a snapshot stand for the log of a stream.
    pub(super) async fn make_snapshot(self: Arc<Self>, stream: StreamId) {
        if let Err(error) = self.try_make_snapshot(&stream).await {
            // Whoever appends next asks for it again.
            tracing::warn!(%error, stream = ?stream.as_str(), "a stream's log in Redis could not be replaced by a snapshot");
        }
    }

    async fn try_make_snapshot(&self, id: &StreamId) -> Result<(), EngineError> {
        let of = |stream: &crate::engine::streams::Stream| {
            let ids: Vec<_> = stream.history.ids().cloned().collect();
            (StreamSnapshot::of(id, stream), stream.position_at(stream.offset), ids)
        };
        let here = self.mirrors.lock().get(id).and_then(|mirror| mirror.stream.as_ref().map(of));
        let (snapshot, position, ids) = if let Some(here) = here {
            here
        } else {
            let Some(reading) = self.read(id, None, false).await? else { return Ok(()) };
            let stream = assemble(id, reading, &self.options.history, self.now());
            of(&stream.ok_or_else(|| super::unreadable(id))?)
        };
        let encoded = tokio::task::spawn_blocking(move || encode_snapshot(&snapshot)).await;
        let (snapshot, bytes) = encoded.map_err(|error| EngineError::Unavailable(error.to_string()))?;
        let mut arguments = vec![
            position.epoch.as_str().as_bytes().to_vec(),
            position.offset.to_string().into_bytes(),
            snapshot,
            bytes.to_string().into_bytes(),
        ];
        arguments.extend(ids.into_iter().map(|id| id.as_str().as_bytes().to_vec()));
        let key = key_of(id);
        self.servers.call(&Call::script(&key, &self.scripts.snapshot, &arguments, true)).await?;
        Ok(())
    }
}

/// Reads `EPOCH`, `OFFSET` of the first event, and the events, as `append.lua` publishes them.
fn read_message(message: &[u8]) -> Option<(&str, u64, &[u8])> {
    let mut parts = message.splitn(3, |&byte| byte == b'\n');
    let epoch = std::str::from_utf8(parts.next()?).ok()?;
    let first = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
    Some((epoch, first, parts.next()?))
}
