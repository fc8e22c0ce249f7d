//! What the service counts. No label is ever a project, a user or anything else that a client chooses.

mod celery_counts;
mod node_counts;

use std::sync::Arc;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};
use tidings_engine::Node;
use tidings_protocol::{EventType, KNOWN_TYPES, Reason};

pub(crate) use celery_counts::CeleryCounts;
use node_counts::NodeCounts;

/// The metrics of one node.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    refused: Family<ReasonLabel, Counter>,
    requests_refused: Family<RequestLabel, Counter>,
    received: Family<SourceLabel, Counter>,
    rejected: Family<RejectionLabel, Counter>,
    appended: Family<AppendLabel, Counter>,
    source_up: Family<SourceLabel, Gauge>,
    source_losses: Family<SourceLabel, Counter>,
    celery: Arc<CeleryCounts>,
}

/// Where an event came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EventSource {
    /// `POST /api/events`.
    Http,
    /// The plain Redis channel.
    RedisChannel,
    /// The ingest stream.
    IngestStream,
    /// What Celery's tasks do.
    Celery,
    /// The file watcher.
    Watcher,
    /// The demonstration of `tidings dev`.
    Demo,
}

impl EventSource {
    /// The source as a metric's label and in logs.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::RedisChannel => "redis_channel",
            Self::IngestStream => "ingest_stream",
            Self::Celery => "celery",
            Self::Watcher => "watcher",
            Self::Demo => "demo",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabel {
    reason: &'static str,
    /// The operator's name for the key; empty: it was none of ours.
    key: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabel {
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RejectionLabel {
    source: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AppendLabel {
    source: &'static str,
    r#type: &'static str,
}

impl Metrics {
    /// The metrics of `node`.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        let mut registry = Registry::with_prefix("tidings");
        registry.register(
            "build",
            "The running version",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        registry.register_collector(Box::new(NodeCounts(node)));
        let celery = Arc::new(CeleryCounts::registered(&mut registry));
        macro_rules! register {
            ($name:literal, $help:literal) => {{
                let metric = Family::default();
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        Self {
            refused: register!("connections_refused", "New connections refused, by reason"),
            requests_refused: register!("requests_refused", "Requests over HTTP refused, by reason and key"),
            received: register!("events_received", "Events that came in, valid or not"),
            rejected: register!("events_rejected", "Events refused, by reason"),
            appended: register!("events_appended", "Events handed to the engine, repeated ones included"),
            source_up: register!("source_up", "1: events of this source can be heard"),
            source_losses: register!("source_losses", "How often a source stopped being heard"),
            celery,
            registry,
        }
    }

    /// What the bridge to Celery counts.
    pub(crate) fn celery(&self) -> &Arc<CeleryCounts> {
        &self.celery
    }

    pub(crate) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// `key`: the name of the key that was shown, if it is one of ours.
    pub(crate) fn request_refused(&self, reason: &'static str, key: &str) {
        self.requests_refused.get_or_create(&RequestLabel { reason, key: key.to_owned() }).inc();
    }

    pub(crate) fn received(&self, source: EventSource, events: usize) {
        self.received.get_or_create(&SourceLabel { source: source.as_str() }).inc_by(events as u64);
    }

    pub(crate) fn rejected(&self, source: EventSource, reason: Reason) {
        let label = RejectionLabel { source: source.as_str(), reason: reason.as_str() };
        self.rejected.get_or_create(&label).inc();
    }

    pub(crate) fn appended<'a>(&self, source: EventSource, types: impl Iterator<Item = &'a EventType>) {
        for event_type in types {
            let known = KNOWN_TYPES.iter().find(|known| **known == event_type.as_str());
            let label = AppendLabel { source: source.as_str(), r#type: known.copied().unwrap_or("custom") };
            self.appended.get_or_create(&label).inc();
        }
    }

    pub(crate) fn source_up(&self, source: EventSource, up: bool) {
        let label = SourceLabel { source: source.as_str() };
        if self.source_up.get_or_create(&label).set(up.into()) == 1 && !up {
            self.source_losses.get_or_create(&label).inc();
        }
    }

    /// The metrics in the text format that Prometheus reads.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string cannot fail");
        text
    }
}
