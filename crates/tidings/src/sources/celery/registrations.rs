//! Callers that say themselves to which project a task belongs that they send. All nodes have to know, whichever was told.

use std::{sync::Arc, time::Duration};

use redis::{Value, cmd};
use serde::{Deserialize, Serialize};
use tidings_engine::engine::redis::{Call, Servers};
use tidings_protocol::ProjectId;
use tokio::{sync::mpsc, time::sleep};

use crate::redis_stream::StreamReader;

use super::report::TaskId;

/// Where all nodes find them.
const STREAM: &str = "tidings:celery:registrations";
/// About how many are kept there, for nodes that start.
const KEPT_MAX: usize = 100_000;
/// A node that starts reads those of so long. Older ones it gets with what is kept of tasks, when it begins to append.
const READ_FOR: Duration = Duration::from_hours(1);
/// Read at once.
const READ_MAX: usize = 1000;
/// Waiting for the next one at Redis.
const BLOCK: Duration = Duration::from_secs(1);
/// Before another attempt.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// That a task belongs to a project.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Registration {
    pub(crate) task_id: TaskId,
    pub(crate) project_id: ProjectId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) task_name: Option<Box<str>>,
    /// Whoever says so may publish to every project.
    #[serde(default)]
    pub(crate) everywhere: bool,
}

/// Takes registrations.
#[derive(Clone, Debug)]
pub(crate) enum Registrar {
    /// This node is alone.
    Here(mpsc::Sender<Registration>),
    /// All nodes read them.
    Everywhere(Arc<Servers>),
}

impl Registrar {
    /// Says it to all nodes. When this returns, they know, or will in a moment.
    pub(crate) async fn register(&self, registration: Registration) -> Result<(), String> {
        match self {
            Self::Here(sender) => {
                sender.send(registration).await.map_err(|_| "the service is stopping".to_owned())
            }
            Self::Everywhere(servers) => {
                let json = serde_json::to_string(&registration).map_err(|error| error.to_string())?;
                let mut add = cmd("XADD");
                add.arg(STREAM).arg("MAXLEN").arg("~").arg(KEPT_MAX).arg("*").arg("registration").arg(json);
                servers.call(&Call::repeatable(STREAM, add)).await.map_err(|fault| fault.to_string())?;
                Ok(())
            }
        }
    }
}

/// Reads what was said on any node, for ever, from what was said in the last hour on.
pub(super) async fn follow(servers: Arc<Servers>, sender: mpsc::Sender<Registration>) {
    let mut stream = StreamReader::new(servers, STREAM);
    let since = jiff::Timestamp::now().as_millisecond() - i64::try_from(READ_FOR.as_millis()).unwrap_or(0);
    stream.cursor = format!("{}-0", since.max(0));
    loop {
        match stream.read(READ_MAX, Some(BLOCK)).await {
            Ok(entries) => {
                for entry in entries {
                    let registration = match entry.map.get("registration") {
                        Some(Value::BulkString(json)) => serde_json::from_slice(json).ok(),
                        _ => None,
                    };
                    if let Some(registration) = registration
                        && sender.send(registration).await.is_err()
                    {
                        return;
                    }
                    stream.cursor = entry.id;
                }
            }
            Err(error) => {
                tracing::debug!(error, "registrations of tasks cannot be read");
                stream.disconnect();
                sleep(RETRY_PAUSE).await;
            }
        }
    }
}
