//! What the service counts. No label is ever a project, a user or anything else that a client chooses.

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};
use tidings_engine::Node;
use tidings_protocol::{Event, KNOWN_TYPES, Reason};

/// The metrics of one node.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    connections: Gauge,
    subscriptions: Gauge,
    streams: Gauge,
    waiting_bytes: Gauge,
    opened: Counter,
    closed: Family<CodeLabel, Counter>,
    refused: Family<ReasonLabel, Counter>,
    received: Family<SourceLabel, Counter>,
    rejected: Family<RejectionLabel, Counter>,
    appended: Family<AppendLabel, Counter>,
    source_up: Family<SourceLabel, Gauge>,
    source_losses: Family<SourceLabel, Counter>,
    sent: Counter,
    sent_bytes: Counter,
    client_messages: Counter,
}

/// Where an event came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EventSource {
    /// `POST /api/events`.
    Http,
    /// The plain Redis channel.
    RedisChannel,
    /// The demonstration of `tidings dev`.
    Demo,
}

impl EventSource {
    /// The source as a metric's label and in logs.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::RedisChannel => "redis_channel",
            Self::Demo => "demo",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
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

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("tidings");
        registry.register(
            "build",
            "The running version",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        macro_rules! register {
            ($metric:ty, $name:literal, $help:literal $(, $unit:expr)?) => {{
                let metric = <$metric>::default();
                register!(@ registry, $name, $help, metric $(, $unit)?);
                metric
            }};
            (@ $registry:ident, $name:literal, $help:literal, $metric:ident) => {
                $registry.register($name, $help, $metric.clone())
            };
            (@ $registry:ident, $name:literal, $help:literal, $metric:ident, $unit:expr) => {
                $registry.register_with_unit($name, $help, $unit, $metric.clone())
            };
        }
        Self {
            connections: register!(Gauge, "connections", "Open connections"),
            subscriptions: register!(
                Gauge,
                "subscriptions",
                "Subscriptions to projects, over all connections"
            ),
            streams: register!(Gauge, "streams", "Streams that this node's engine keeps"),
            waiting_bytes: register!(
                Gauge,
                "outbox_waiting",
                "Live messages that wait for clients",
                Unit::Bytes
            ),
            opened: register!(Counter, "connections_opened", "Connections opened"),
            closed: register!(Family<_, _>, "connections_closed", "Connections ended, by close code (1006: without one)"),
            refused: register!(Family<_, _>, "connections_refused", "Upgrades refused, by reason"),
            received: register!(Family<_, _>, "events_received", "Events that came in, valid or not"),
            rejected: register!(Family<_, _>, "events_rejected", "Events refused, by reason"),
            appended: register!(Family<_, _>, "events_appended", "Events handed to the engine, repeated ones included"),
            source_up: register!(Family<_, _>, "source_up", "1: events of this source can be heard"),
            source_losses: register!(Family<_, _>, "source_losses", "How often a source stopped being heard"),
            sent: register!(Counter, "messages_sent", "Messages written to clients"),
            sent_bytes: register!(Counter, "messages_sent_size", "JSON written to clients", Unit::Bytes),
            client_messages: register!(Counter, "client_messages_received", "Messages from clients"),
            registry,
        }
    }
}

impl Metrics {
    pub(crate) fn opened(&self) {
        self.opened.inc();
    }

    /// A connection ended; `None`: without a close code.
    pub(crate) fn closed(&self, code: Option<u16>) {
        // What a peer invents beyond the registered ranges is one label, not thousands.
        let known = |code: &u16| {
            matches!(code, 1000..=1015) || tidings_protocol::CLOSE_CODES.iter().any(|c| c.number() == *code)
        };
        self.closed.get_or_create(&CodeLabel { code: code.filter(known).unwrap_or(1006) }).inc();
    }

    pub(crate) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(crate) fn received(&self, source: EventSource, events: usize) {
        self.received.get_or_create(&SourceLabel { source: source.as_str() }).inc_by(events as u64);
    }

    pub(crate) fn rejected(&self, source: EventSource, reason: Reason) {
        let label = RejectionLabel { source: source.as_str(), reason: reason.as_str() };
        self.rejected.get_or_create(&label).inc();
    }

    pub(crate) fn appended(&self, source: EventSource, events: &[Event]) {
        for event in events {
            let known = KNOWN_TYPES.iter().find(|known| **known == event.event_type().as_str());
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

    pub(crate) fn sent(&self, messages: usize, bytes: usize) {
        self.sent.inc_by(messages as u64);
        self.sent_bytes.inc_by(bytes as u64);
    }

    pub(crate) fn client_message(&self) {
        self.client_messages.inc();
    }

    /// The metrics in the text format that Prometheus reads.
    pub(crate) fn render(&self, node: &Node) -> String {
        let counts = node.counts();
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.connections.set(gauge(counts.connections));
        self.subscriptions.set(gauge(counts.subscriptions));
        self.waiting_bytes.set(gauge(node.waiting_bytes()));
        self.streams.set(gauge(node.engine().stream_count()));
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string cannot fail");
        text
    }
}
