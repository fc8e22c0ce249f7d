//! What is kept of a connection so that it can be resumed elsewhere and later.

use std::{fmt, sync::Arc};

use tidings_protocol::{StreamId, Timestamp, TypeFilter, UserId};

use crate::{random, shard::ConnectionKey};

/// Names a client over all of its connections; a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientId(u128);

impl ClientId {
    /// A name that nobody else has.
    pub fn random() -> Self {
        Self(uuid::Uuid::now_v7().as_u128())
    }

    /// Reads a name as it is written.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        uuid::Uuid::parse_str(text).ok().map(|uuid| Self(uuid.as_u128()))
    }

    /// When the name was given, which a UUID of version 7 says in its first 48 bits (RFC 9562, section 5.7).
    pub(crate) fn named_at(self) -> Timestamp {
        let ms = i64::try_from(self.0 >> 80).unwrap_or(0);
        Timestamp::from_microsecond(ms * 1000).unwrap_or_else(|| jiff::Timestamp::UNIX_EPOCH.into())
    }

    pub(crate) fn as_u128(self) -> u128 {
        self.0
    }

    pub(crate) fn from_u128(id: u128) -> Self {
        Self(id)
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from_u128(self.0).fmt(f)
    }
}

/// Good once, to take a connection over: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ResumeToken([u8; 16]);

impl ResumeToken {
    /// A token that cannot be guessed.
    pub fn random() -> Self {
        Self(random::bytes())
    }

    pub(crate) fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    pub(crate) fn from_bytes(token: [u8; 16]) -> Self {
        Self(token)
    }

    /// Reads a token as a client sends it; `None`: it cannot be one of ours.
    pub fn parse(text: &str) -> Option<Self> {
        let is_hexadecimal = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hexadecimal
            .then(|| u128::from_str_radix(text, 16).ok())
            .flatten()
            .map(|token| Self(token.to_be_bytes()))
    }
}

impl fmt::Display for ResumeToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for ResumeToken {
    /// Says nothing: whoever reads a log must not be able to take a connection over.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResumeToken(…)")
    }
}

/// A connection as it is kept for being resumed.
#[derive(Clone, Debug)]
pub struct SavedConnection {
    /// Whose it is.
    pub client: ClientId,
    /// What the client shows to get it back.
    pub token: ResumeToken,
    /// The connection that lives under this name; `None`: it was lost.
    pub owner: Option<ConnectionKey>,
    /// Whose it was: for everybody else the token is worth nothing.
    pub user: Option<UserId>,
    /// What it follows, each with its filter.
    pub subscriptions: Vec<(StreamId, Arc<TypeFilter>)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_as_it_was_written_and_nothing_else_does() {
        let token = ResumeToken::random();
        assert_eq!(ResumeToken::parse(&token.to_string()), Some(token));
        for other in ["", "x", &"+".repeat(32), &format!("{token}0"), "é5678901234567890123456789012345"] {
            assert_eq!(ResumeToken::parse(other), None, "{other}");
        }
        assert!(!format!("{token:?}").contains(&token.to_string()));
    }
}
