//! Where events come from beside HTTP: one file for each source.

pub(crate) mod celery;
pub(crate) mod demo;
pub(crate) mod ingest_stream;
pub(crate) mod redis_channel;
pub(crate) mod watcher;
