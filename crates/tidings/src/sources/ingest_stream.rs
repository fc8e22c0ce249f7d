//! The ingest stream: what is added to it enters its project's stream once and in order, also what was added while no node was
//! up. One node at a time reads it, under a lease; each project's stream remembers the last entry that it had of it, so that
//! whoever reads next may read some again.

use std::{sync::Arc, time::Duration};

use redis::{Value, cmd};
use tidings_engine::{
    engine::{
        NumberedEvent,
        redis::{Call, Fault, Incarnation, Lease, Servers},
    },
    vigil::Vigil,
};
use tidings_protocol::{Gap, Source};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    ingest::Ingest,
    metrics::{EventSource, Metrics},
    redis_stream::{START, StreamReader},
};

/// Where publishers add entries; the field `event` holds the JSON.
const STREAM: &str = "tidings:ingest";
/// Where entries go that hold no valid event, with the reason.
const REJECTED: &str = "tidings:rejected";
/// How many of those are kept, at about.
const REJECTED_MAX: usize = 10_000;
/// The name of the source, for the streams' memory of its numbers.
const SOURCE: &str = "ingest";
/// Entries read at once.
const READ_MAX: usize = 100;
/// How long Redis waits for entries before it says that there are none: well within the time for an answer.
const BLOCK: Duration = Duration::from_millis(500);
/// How often the lease is renewed or asked for.
const LEASE_INTERVAL: Duration = Duration::from_millis(700);
/// Before another attempt.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Nothing was heard for so long: told to clients.
const SILENCE_MAX: Duration = Duration::from_millis(1500);
/// What this is to health and to clients.
pub(crate) const PART: &str = "ingest stream";

/// Reads the stream while it holds the lease.
#[derive(Debug)]
pub(crate) struct IngestStream {
    pub(crate) servers: Arc<Servers>,
    pub(crate) incarnation: Incarnation,
    pub(crate) ingest: Arc<Ingest>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) vigil: Arc<Vigil>,
}

/// One reader's work.
struct Reader<'a> {
    source: &'a IngestStream,
    servers: Arc<Servers>,
    lease: Lease,
    lease_due: Instant,
    /// When Redis last answered.
    heard_at: Instant,
    stream: StreamReader,
}

impl IngestStream {
    /// Reads until `stop`, whatever becomes of Redis meanwhile.
    pub(crate) async fn run(self, stop: CancellationToken) {
        self.metrics.source_up(EventSource::IngestStream, false);
        let now = Instant::now();
        let mut reader = Reader {
            source: &self,
            servers: Arc::clone(&self.servers),
            lease: Lease::new(SOURCE, self.incarnation.clone()),
            lease_due: now,
            heard_at: now,
            stream: StreamReader::new(Arc::clone(&self.servers), STREAM),
        };
        stop.run_until_cancelled(reader.read_for_ever()).await;
        // Who cannot be told waits until its time is over.
        let _ = reader.lease.give_back(&reader.servers).await;
        self.metrics.source_up(EventSource::IngestStream, false);
    }

    fn set_up(&self, up: bool) {
        self.metrics.source_up(EventSource::IngestStream, up);
        if up {
            // What was added meanwhile is in the stream.
            self.vigil.up(Source::Redis, PART, Gap::None);
        } else {
            self.vigil.down(Source::Redis, PART);
        }
    }
}

impl Reader<'_> {
    async fn read_for_ever(&mut self) {
        loop {
            let done = match self.hold().await {
                Ok(true) => self.read().await,
                Ok(false) => {
                    // Whoever has it next begins with what there is.
                    START.clone_into(&mut self.stream.cursor);
                    self.stream.disconnect();
                    self.heard();
                    sleep(LEASE_INTERVAL).await;
                    continue;
                }
                Err(fault) => Err(fault.to_string()),
            };
            match done {
                Ok(()) => self.heard(),
                Err(error) => {
                    tracing::debug!(error, "the ingest stream cannot be read");
                    self.stream.disconnect();
                    if self.heard_at.elapsed() > SILENCE_MAX {
                        self.source.set_up(false);
                    }
                    sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    fn heard(&mut self) {
        self.heard_at = Instant::now();
        self.source.set_up(true);
    }

    async fn hold(&mut self) -> Result<bool, Fault> {
        if Instant::now() < self.lease_due {
            return Ok(self.lease.is_held());
        }
        let held_before = self.lease.is_held();
        let held = self.lease.hold(&self.servers).await?;
        self.lease_due = Instant::now() + LEASE_INTERVAL;
        if held && !held_before {
            tracing::info!("this node reads the ingest stream");
            START.clone_into(&mut self.stream.cursor);
        }
        Ok(held)
    }

    /// Reads some entries, appends them, and removes them.
    async fn read(&mut self) -> Result<(), String> {
        let entries = self.stream.read(READ_MAX, Some(BLOCK)).await?;
        let Some(last) = entries.last().map(|entry| entry.id.clone()) else { return Ok(()) };
        let (mut events, mut rejected) = (Vec::new(), Vec::new());
        for entry in entries {
            let bytes = match entry.map.get("event") {
                Some(Value::BulkString(bytes)) => Ok(bytes),
                _ => Err("expected a field `event` that holds the JSON".to_owned()),
            };
            let number = number_of(&entry.id).ok_or_else(|| "unreadable entry id".to_owned())?;
            match bytes.and_then(|bytes| {
                self.source
                    .ingest
                    .read(EventSource::IngestStream, bytes)
                    .map_err(|invalid| invalid.to_string())
            }) {
                Ok(event) => events.push(NumberedEvent { number, event }),
                Err(reason) => rejected.push((entry, reason)),
            }
        }
        while let Err(error) =
            self.source.ingest.append_numbered(EventSource::IngestStream, SOURCE, events.clone()).await
        {
            tracing::warn!(%error, "events from the ingest stream cannot be appended; trying again");
            sleep(RETRY_PAUSE).await;
            if !self.hold().await.map_err(|fault| fault.to_string())? {
                // Whoever holds it now reads them again.
                return Ok(());
            }
        }
        for (entry, reason) in rejected {
            self.reject(&entry, &reason).await.map_err(|fault| fault.to_string())?;
        }
        self.remove_up_to(&last).await.map_err(|fault| fault.to_string())?;
        self.stream.cursor = last;
        Ok(())
    }

    async fn reject(&self, entry: &redis::streams::StreamId, reason: &str) -> Result<(), Fault> {
        let mut add = cmd("XADD");
        add.arg(REJECTED).arg("MAXLEN").arg("~").arg(REJECTED_MAX).arg("*");
        add.arg("reason").arg(reason).arg("entry").arg(&entry.id);
        for (field, value) in &entry.map {
            if let Value::BulkString(value) = value {
                add.arg(field).arg(value);
            }
        }
        self.servers.call(&Call::repeatable(REJECTED, add)).await.map(|_| ())
    }

    /// Trimming frees what deleting entry by entry would keep.
    async fn remove_up_to(&self, last: &str) -> Result<(), Fault> {
        let mut trim = cmd("XTRIM");
        trim.arg(STREAM).arg("MINID").arg(next_id(last));
        self.servers.call(&Call::repeatable(STREAM, trim)).await.map(|_| ())
    }
}

/// An entry's id (`MILLISECONDS-SEQUENCE`) in one width, so that numbers compare as strings.
fn number_of(id: &str) -> Option<String> {
    let (ms, sequence) = parts_of(id)?;
    Some(format!("{ms:020}-{sequence:020}"))
}

/// The first id behind this one.
fn next_id(id: &str) -> String {
    match parts_of(id) {
        Some((ms, u64::MAX)) => format!("{}-0", ms.saturating_add(1)),
        Some((ms, sequence)) => format!("{ms}-{}", sequence + 1),
        None => id.to_owned(),
    }
}

fn parts_of(id: &str) -> Option<(u64, u64)> {
    let (ms, sequence) = id.split_once('-')?;
    Some((ms.parse().ok()?, sequence.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_compare_as_the_ids_do() {
        let ids = [
            "0-1",
            "9-0",
            "10-0",
            "1763856000000-0",
            "1763856000000-9",
            "1763856000000-10",
            "18446744073709551615-1",
        ];
        let numbers: Vec<_> = ids.iter().filter_map(|id| number_of(id)).collect();
        assert_eq!(numbers.len(), ids.len());
        assert!(numbers.is_sorted_by(|one, other| one < other), "{numbers:?}");
        assert_eq!(next_id("5-9"), "5-10");
        assert_eq!(next_id("5-18446744073709551615"), "6-0");
    }
}
