//! What the bridge to Celery counts.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// The metrics of the bridge.
#[derive(Debug, Default)]
pub(crate) struct CeleryCounts {
    messages: Family<WayLabel, Counter>,
    unreadable: Family<UnreadableLabel, Counter>,
    dropped: Counter,
    lost: Counter,
    tasks: Gauge,
    running: Gauge,
    without_project: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WayLabel {
    way: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UnreadableLabel {
    way: &'static str,
    reason: &'static str,
}

impl CeleryCounts {
    pub(super) fn registered(registry: &mut Registry) -> Self {
        let counts = Self::default();
        registry.register("celery_messages", "Messages of Celery that were heard", counts.messages.clone());
        registry.register(
            "celery_unreadable",
            "Messages of Celery that could not be read, or only in part",
            counts.unreadable.clone(),
        );
        registry.register(
            "celery_dropped",
            "Messages of Celery for which there was no room; what they said was read anew",
            counts.dropped.clone(),
        );
        registry.register(
            "celery_events_lost",
            "Events of Celery tasks that could not be appended for too long",
            counts.lost.clone(),
        );
        registry.register("celery_tasks", "Celery tasks that are remembered", counts.tasks.clone());
        registry.register("celery_tasks_open", "Those of them that have not ended", counts.running.clone());
        registry.register(
            "celery_tasks_without_project",
            "Celery tasks since the start that no project was found for",
            counts.without_project.clone(),
        );
        counts
    }

    pub(crate) fn message(&self, way: &'static str) {
        self.messages.get_or_create(&WayLabel { way }).inc();
    }

    pub(crate) fn unreadable(&self, way: &'static str, reason: &'static str) {
        self.unreadable.get_or_create(&UnreadableLabel { way, reason }).inc();
    }

    pub(crate) fn dropped(&self) {
        self.dropped.inc();
    }

    pub(crate) fn lost(&self, events: u64) {
        self.lost.inc_by(events);
    }

    pub(crate) fn tasks(&self, tasks: usize, open: usize, without_project: u64) {
        let gauge = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.tasks.set(gauge(tasks as u64));
        self.running.set(gauge(open as u64));
        self.without_project.set(gauge(without_project));
    }
}
