//! Who somebody is, and what he may see: the ways of `TIDINGS_AUTH`. Knows no connection and no stream.

mod identity;

use std::time::Duration;

use tokio::time::Instant;

pub(crate) use identity::{Identity, Shape};

/// What one of the ways found out.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    /// Who it is.
    pub(crate) identity: Identity,
    /// Up to when it can be relied on without asking again; `None`: to its end.
    pub(crate) valid_until: Option<Instant>,
}

/// Why somebody is not let in.
#[derive(Clone, Debug)]
pub(crate) enum Refusal {
    /// A definite no.
    Denied(Denied),
    /// It cannot be found out at present: neither yes nor no. The words are for logs and developers, and hold no secret.
    NoVerdict(String),
}

/// A definite no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Denied {
    /// Stable, for programs, metrics and production.
    pub(crate) code: &'static str,
    /// For the developer: the rule, and how to mend it. Holds no secret.
    pub(crate) detail: String,
}

impl Denied {
    pub(crate) fn new(code: &'static str, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }
}

impl From<Denied> for Refusal {
    fn from(denied: Denied) -> Self {
        Self::Denied(denied)
    }
}

/// For anybody outside to answer who is asked about a credential.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
