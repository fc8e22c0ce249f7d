//! The one gate that every source goes through: read, check, count, give to a project, append.

use std::sync::Arc;

use tidings_engine::{
    Node,
    engine::{Appended, EngineError, NumberedEvent},
};
use tidings_protocol::{Event, InvalidEvent, Reason};

use crate::{
    burst::Bursts,
    config::Settings,
    metrics::{EventSource, Metrics},
};

/// Takes events in.
#[derive(Debug)]
pub(crate) struct Ingest {
    node: Arc<Node>,
    metrics: Arc<Metrics>,
    settings: Arc<Settings>,
    rejections: Bursts<EventSource>,
}

impl Ingest {
    pub(crate) fn new(node: Arc<Node>, metrics: Arc<Metrics>, settings: Arc<Settings>) -> Self {
        Self { node, metrics, settings, rejections: Bursts::default() }
    }

    /// Reads and checks one event. What is refused is counted, and said once per burst with its reason.
    pub(crate) fn read(&self, source: EventSource, json: &[u8]) -> Result<Event, InvalidEvent> {
        self.metrics.received(source, 1);
        let now = jiff::Timestamp::now().into();
        let mut event = Event::parse(json, self.settings.event_bytes_max, now).inspect_err(|invalid| {
            self.metrics.rejected(source, invalid.reason);
            // Existing code sends heartbeats of its own now and then: counted, and nothing that needs mending.
            if source == EventSource::RedisChannel && invalid.reason == Reason::ReservedType {
                return;
            }
            if let Some(unsaid) = self.rejections.occur(source) {
                // Debug formatting escapes what a publisher could use to forge lines of the log.
                let reason = invalid.to_string();
                tracing::warn!(source = source.as_str(), ?reason, more_since_last = unsaid, "event refused");
            }
        })?;
        let project =
            event.workspace_without_project().and_then(|workspace| self.settings.workspaces.get(workspace));
        if let Some(project) = project {
            event.assign_project(project.clone());
        }
        Ok(event)
    }

    /// Appends events that their source has numbered, and leaves out those that are there; see
    /// [`Engine::append_numbered`](tidings_engine::engine::Engine::append_numbered).
    pub(crate) async fn append_numbered(
        &self,
        source: EventSource,
        name: &'static str,
        events: Vec<NumberedEvent>,
    ) -> Result<(), EngineError> {
        if events.is_empty() {
            return Ok(());
        }
        let types: Vec<_> = events.iter().map(|numbered| numbered.event.event_type().clone()).collect();
        self.node.engine().append_numbered(name, events).await?;
        // Not before: its source says again what did not succeed.
        self.metrics.appended(source, types.iter());
        Ok(())
    }

    /// Appends events, from where they reach every subscriber.
    pub(crate) async fn append(
        &self,
        source: EventSource,
        events: Vec<Event>,
    ) -> Result<Vec<Appended>, EngineError> {
        self.metrics.appended(source, events.iter().map(Event::event_type));
        self.node.publish(events).await
    }
}
