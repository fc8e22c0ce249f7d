//! Error and close codes: one table each, with what a client should do about them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `code` of an `error` message. The connection lives on after each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The message was not JSON.
    InvalidJson,
    /// The message was JSON, but not of the shape of its type.
    InvalidMessage,
    /// No message of this type is known.
    UnknownType,
    /// No right to this project, or no such project: the answer is the same.
    NotAuthorized,
    /// The connection has no subscription to this project.
    NotSubscribed,
    /// The connection has as many subscriptions as it may have.
    TooManySubscriptions,
    /// Too many messages in too short a time; wait and send again.
    RateLimited,
    /// The token is not good any more: subscribe with `since` on the same connection, and nothing is lost.
    ResumeExpired,
}

/// Why the server closes a WebSocket: the standard codes of RFC 6455 and its registry, and our own, whose range says
/// whether to come back (4400 to 4499: do not retry; 4500 to 4599: retry with backoff).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum CloseCode {
    /// The purpose is fulfilled.
    Normal = 1000,
    /// The server goes away for good.
    GoingAway = 1001,
    /// A frame broke the WebSocket protocol.
    ProtocolError = 1002,
    /// A binary frame: only text is understood.
    UnsupportedData = 1003,
    /// A text frame was not UTF-8.
    InvalidUtf8 = 1007,
    /// A message larger than [`CLIENT_MESSAGE_BYTES_MAX`](crate::CLIENT_MESSAGE_BYTES_MAX).
    MessageTooBig = 1009,
    /// Something failed here; the log says what.
    InternalError = 1011,
    /// The node restarts: reconnect at once.
    ServiceRestart = 1012,
    /// Too much to do: retry with backoff.
    TryAgainLater = 1013,
    /// No valid session, or it ended.
    NoSession = 4401,
    /// The session has no right to be here.
    Forbidden = 4403,
    /// The client read too slowly for what waits for it.
    TooSlow = 4508,
    /// The connection was resumed elsewhere: retry without the token.
    ResumedElsewhere = 4510,
    /// Too many messages or connections.
    TooMany = 4529,
}

/// Every close code, in the order of its number.
pub const CLOSE_CODES: [CloseCode; 14] = [
    CloseCode::Normal,
    CloseCode::GoingAway,
    CloseCode::ProtocolError,
    CloseCode::UnsupportedData,
    CloseCode::InvalidUtf8,
    CloseCode::MessageTooBig,
    CloseCode::InternalError,
    CloseCode::ServiceRestart,
    CloseCode::TryAgainLater,
    CloseCode::NoSession,
    CloseCode::Forbidden,
    CloseCode::TooSlow,
    CloseCode::ResumedElsewhere,
    CloseCode::TooMany,
];

impl CloseCode {
    /// The number on the wire.
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// The reason in the close frame: short, for a person who reads a log.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Normal => "done",
            Self::GoingAway => "going away",
            Self::ProtocolError => "protocol error",
            Self::UnsupportedData => "only text frames are understood",
            Self::InvalidUtf8 => "a text frame was not UTF-8",
            Self::MessageTooBig => "messages may have at most 64 KiB",
            Self::InternalError => "internal error",
            Self::ServiceRestart => "this node restarts",
            Self::TryAgainLater => "overloaded",
            Self::NoSession => "no valid session",
            Self::Forbidden => "no right",
            Self::TooSlow => "too slow",
            Self::ResumedElsewhere => "resumed elsewhere",
            Self::TooMany => "too many messages or connections",
        }
    }

    /// Whether a client should connect again.
    pub const fn retry(self) -> bool {
        !matches!(
            self,
            Self::Normal
                | Self::ProtocolError
                | Self::UnsupportedData
                | Self::InvalidUtf8
                | Self::MessageTooBig
                | Self::NoSession
                | Self::Forbidden
        )
    }
}
