//! How much load there is, and for how long: by the environment, with defaults that a small machine carries.

use std::{fmt::Display, str::FromStr, time::Duration};

#[allow(
    clippy::disallowed_methods,
    reason = "the rule is about the service; these are the tests' own settings"
)]
fn variable<T: FromStr<Err: Display>>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{name}: `{text}`: {error}")),
        Err(_) => default,
    }
}

/// Clients of a fleet (`TIDINGS_FAULT_CLIENTS`).
pub(crate) fn clients() -> usize {
    variable("TIDINGS_FAULT_CLIENTS", 300)
}

/// Projects that they follow (`TIDINGS_FAULT_PROJECTS`).
pub(crate) fn projects() -> u16 {
    variable("TIDINGS_FAULT_PROJECTS", 20)
}

/// Events per second over HTTP (`TIDINGS_FAULT_RATE`).
pub(crate) fn events_per_second() -> u64 {
    variable("TIDINGS_FAULT_RATE", 80)
}

/// Entries that the test of the ingest stream adds (`TIDINGS_FAULT_ENTRIES`).
pub(crate) fn entries() -> u32 {
    variable("TIDINGS_FAULT_ENTRIES", 5000)
}

/// How long the soak goes on (`TIDINGS_SOAK_SECONDS`).
pub(crate) fn soak() -> Option<Duration> {
    Some(variable("TIDINGS_SOAK_SECONDS", 0)).filter(|&seconds| seconds > 0).map(Duration::from_secs)
}

/// What chance begins with (`TIDINGS_SOAK_SEED`); the same one gives the same faults.
pub(crate) fn seed() -> u64 {
    variable("TIDINGS_SOAK_SEED", 1)
}

/// What the nodes log (`TIDINGS_FAULT_LOG`).
pub(crate) fn log_filter() -> String {
    variable("TIDINGS_FAULT_LOG", "info".to_owned())
}
