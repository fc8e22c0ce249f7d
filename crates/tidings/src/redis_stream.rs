//! Reading a stream in Redis from where one was, over a connection of its own: it waits there for what comes.

use std::{sync::Arc, time::Duration};

use redis::{
    Value,
    aio::MultiplexedConnection,
    cmd,
    streams::{StreamId, StreamReadReply},
};
use tidings_engine::engine::redis::Servers;
use tokio::sync::watch;

/// Before the first entry.
pub(crate) const START: &str = "0-0";

/// Reads one stream.
pub(crate) struct StreamReader {
    servers: Arc<Servers>,
    stream: &'static str,
    /// With what tells that its server is the primary no more: a replica can be read, too, and may be cut off.
    connection: Option<(MultiplexedConnection, watch::Receiver<String>)>,
    /// The last entry that was done with.
    pub(crate) cursor: String,
}

impl StreamReader {
    /// Reads `stream` from its beginning.
    pub(crate) fn new(servers: Arc<Servers>, stream: &'static str) -> Self {
        Self { servers, stream, connection: None, cursor: START.to_owned() }
    }

    /// Connects where the stream is, unless it is connected there. Whether the connection is another one than before.
    pub(crate) async fn connect(&mut self) -> Result<bool, String> {
        let is_there = |place: &watch::Receiver<String>| !place.has_changed().unwrap_or(true);
        if self.connection.as_ref().is_some_and(|(_, place)| is_there(place)) {
            return Ok(false);
        }
        let primary = self.servers.primary_of(self.stream);
        let connection = primary.connect(|_| Ok::<_, ()>(())).await.map_err(|error| error.to_string())?;
        self.connection = Some((connection, primary.watch()));
        Ok(true)
    }

    /// The next entries behind the cursor, at most `count`; if there are none, waits for some up to `block`, which has to be less
    /// than what an answer may take. The cursor stays.
    pub(crate) async fn read(
        &mut self,
        count: usize,
        block: Option<Duration>,
    ) -> Result<Vec<StreamId>, String> {
        self.connect().await?;
        let Some((connection, _)) = &mut self.connection else { return Ok(Vec::new()) };
        let mut read = cmd("XREAD");
        read.arg("COUNT").arg(count);
        if let Some(block) = block {
            read.arg("BLOCK").arg(u64::try_from(block.as_millis()).unwrap_or(0));
        }
        read.arg("STREAMS").arg(self.stream).arg(&self.cursor);
        let answer: Value = match read.query_async(connection).await {
            Ok(answer) => answer,
            Err(error) => {
                // It may have moved to another primary.
                let _ = self.servers.refresh().await;
                return Err(error.to_string());
            }
        };
        let reply =
            redis::from_redis_value::<Option<StreamReadReply>>(answer).map_err(|error| error.to_string())?;
        Ok(reply.into_iter().flat_map(|reply| reply.keys).flat_map(|key| key.ids).collect())
    }

    /// Lets the next read connect anew.
    pub(crate) fn disconnect(&mut self) {
        self.connection = None;
    }
}
