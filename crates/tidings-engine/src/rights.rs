//! Whose connections are, what they may see, and up to when that is known. Whoever finds that out does so elsewhere, and says
//! it here by session; a shard holds its connections to it.

use std::sync::Arc;

use tidings_protocol::{Projects, Timestamp, UserId};
use tokio::time::Instant;

/// What somebody may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Who it is; `None`: nobody is asked.
    pub user: Option<UserId>,
    /// What he may see.
    pub projects: Projects,
}

impl Rights {
    /// Of everybody where nobody is asked.
    pub const fn everything() -> Self {
        Self { user: None, projects: Projects::everything() }
    }
}

/// Names a session within its node. Several connections may be of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey(pub u64);

/// A session that holds.
#[derive(Clone, Debug)]
pub struct Standing {
    /// What it may see.
    pub rights: Arc<Rights>,
    /// Nothing is delivered behind this, until a later standing moves it: nobody knows whether the session still holds.
    /// `None`: it holds until it is said to be over.
    pub known_until: Option<Instant>,
    /// When it is over for good.
    pub ends_at: Option<Timestamp>,
}

/// What somebody found out about a session. Who could not find it out says nothing.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// It holds.
    Holds(Standing),
    /// It is over: its connections are told, and closed with 4401.
    Over,
}

/// Whose a connection is that begins.
#[derive(Clone, Debug)]
pub struct Holder {
    /// Its session.
    pub session: SessionKey,
    /// What is known of that.
    pub standing: Standing,
}
