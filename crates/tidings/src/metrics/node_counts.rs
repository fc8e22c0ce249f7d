//! What the shards count, read when somebody asks: they count without a lock and know no registry.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use tidings_engine::Node;

/// The counts of a node's connections and streams.
#[derive(Debug)]
pub(super) struct NodeCounts(pub(super) Arc<Node>);

impl Collector for NodeCounts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counts = self.0.counts();
        let gauge = |count: usize| ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
        let out = &mut encoder;
        let bytes = Some(&Unit::Bytes);
        put(out, "connections", "Open connections", None, &gauge(counts.connections))?;
        put(
            out,
            "subscriptions",
            "Subscriptions to projects, over all connections",
            None,
            &gauge(counts.subscriptions),
        )?;
        put(
            out,
            "streams",
            "Streams that this node's engine keeps",
            None,
            &gauge(self.0.engine().stream_count()),
        )?;
        let help = "Connections to which nothing is delivered while nobody knows whether their sessions hold";
        put(out, "connections_withheld", help, None, &gauge(counts.withheld))?;
        let repairs = self.0.engine().repairs();
        let count = |count: usize| ConstCounter::new(count as u64);
        let help = "Events that were read from Redis because they were not heard";
        put(out, "events_repaired", help, None, &count(repairs.events))?;
        let help = "Streams that Redis went on with without something that clients here had";
        put(out, "streams_lost", help, None, &count(repairs.lost))?;
        let help = "Framed events kept for clients that have not taken them yet";
        put(out, "retained", help, bytes, &gauge(counts.tail_bytes))?;
        let counter = ConstCounter::new;
        put(out, "connections_opened", "Connections opened", None, &counter(counts.opened))?;
        put(
            out,
            "connections_resumed",
            "Connections that took a former one over",
            None,
            &counter(counts.resumed),
        )?;
        let help = "How often a subscription fell behind and got its events folded";
        put(out, "subscriptions_behind", help, None, &counter(counts.fell_behind))?;
        put(out, "messages_sent", "Messages written to clients", None, &counter(counts.messages))?;
        let help = "Bytes written to clients, before TLS";
        put(out, "messages_sent_size", help, bytes, &counter(counts.bytes))?;
        let help = "Writes to sockets; many messages share one";
        put(out, "socket_writes", help, None, &counter(counts.writes))?;
        put(
            out,
            "client_messages_received",
            "Messages from clients",
            None,
            &counter(counts.client_messages),
        )?;
        let closed = ConstCounter::new(0_u64);
        let help = "Connections ended, by close code (1006: without one)";
        let mut family = encoder.encode_descriptor("connections_closed", help, None, closed.metric_type())?;
        for (code, ended) in counts.closed {
            let ended = ConstCounter::new(ended);
            ended.encode(family.encode_family(&[("code", code.to_string())])?)?;
        }
        Ok(())
    }
}

fn put(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    metric: &impl EncodeMetric,
) -> Result<(), fmt::Error> {
    metric.encode(encoder.encode_descriptor(name, help, unit, metric.metric_type())?)
}
