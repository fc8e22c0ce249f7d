//! What one client may do next: pure. A message and the time go in, an action comes out; no socket, no await.

use std::collections::HashSet;

use tidings_protocol::{
    ClientMessage, ErrorCode, MessageId, Position, RefusedMessage, ServerMessage, StreamId, Timestamp,
    TypeFilter,
};

/// The rules of one connection: what it follows and how much it may.
#[derive(Debug)]
pub(crate) struct Session {
    subscriptions_max: usize,
    subscriptions: HashSet<StreamId>,
    /// Whether a message came already: `resume` must be the first.
    started: bool,
}

/// What a message leads to.
#[derive(Debug, PartialEq)]
pub(crate) enum Action {
    /// Nothing is owed.
    None,
    /// Send this.
    Reply(Box<Reply>),
    /// Follow a stream, then confirm.
    Subscribe { stream: StreamId, types: TypeFilter, since: Option<Position>, id: Option<MessageId> },
    /// Stop following a project, then say so.
    Unsubscribe { stream: StreamId, id: Option<MessageId> },
}

/// A message that answers at once.
#[derive(Debug, PartialEq)]
pub(crate) enum Reply {
    Pong(Option<MessageId>),
    Refused(RefusedMessage),
}

impl Reply {
    pub(crate) fn into_message(self, timestamp: Timestamp) -> ServerMessage {
        match self {
            Self::Pong(id) => ServerMessage::Pong { timestamp, id },
            Self::Refused(refused) => ServerMessage::refusal(refused, timestamp),
        }
    }
}

impl Session {
    pub(crate) fn new(subscriptions_max: usize) -> Self {
        Self { subscriptions_max, subscriptions: HashSet::new(), started: false }
    }

    /// Decides what a client's message leads to.
    pub(crate) fn receive(&mut self, text: &str) -> Action {
        let first = !std::mem::replace(&mut self.started, true);
        match ClientMessage::parse(text) {
            Err(refused) => Action::Reply(Box::new(Reply::Refused(*refused))),
            Ok((message, id)) => self.decide(message, id, first),
        }
    }

    fn decide(&mut self, message: ClientMessage, id: Option<MessageId>, first: bool) -> Action {
        match message {
            ClientMessage::Ping => Action::Reply(Box::new(Reply::Pong(id))),
            ClientMessage::Visibility { .. } => Action::None,
            ClientMessage::Subscribe { stream, types, since } => self.subscribe(stream, types, since, id),
            ClientMessage::Unsubscribe { stream } => {
                if self.subscriptions.remove(&stream) {
                    return Action::Unsubscribe { stream, id };
                }
                refuse(
                    ErrorCode::NotSubscribed,
                    format!("no subscription to project {stream}"),
                    None,
                    id,
                    Some(&stream),
                )
            }
            ClientMessage::Resume { .. } if !first => refuse(
                ErrorCode::InvalidMessage,
                "`resume` is possible as the first message only".to_owned(),
                Some("connect again and send it first, or subscribe with `since`"),
                id,
                None,
            ),
            // Connections are not saved by this version, so every token is one that is not good any more.
            ClientMessage::Resume { .. } => refuse(
                ErrorCode::ResumeExpired,
                "the former connection cannot be resumed".to_owned(),
                Some("subscribe with `since` on this connection; nothing is lost"),
                id,
                None,
            ),
        }
    }

    fn subscribe(
        &mut self,
        stream: StreamId,
        types: TypeFilter,
        since: Option<Position>,
        id: Option<MessageId>,
    ) -> Action {
        // The announcements are followed by every connection and do not count.
        let counts = stream != StreamId::Announcements;
        if counts
            && self.subscriptions.len() >= self.subscriptions_max
            && !self.subscriptions.contains(&stream)
        {
            let message = format!(
                "this connection has {} subscriptions, and no more are allowed",
                self.subscriptions_max
            );
            let hint = "unsubscribe from projects that no longer show, or open another connection";
            return refuse(ErrorCode::TooManySubscriptions, message, Some(hint), id, Some(&stream));
        }
        if counts {
            self.subscriptions.insert(stream.clone());
        }
        Action::Subscribe { stream, types, since, id }
    }
}

fn refuse(
    code: ErrorCode,
    message: String,
    hint: Option<&str>,
    id: Option<MessageId>,
    stream: Option<&StreamId>,
) -> Action {
    let project_id = stream.map(ToString::to_string);
    let refused = RefusedMessage { code, message, hint: hint.map(str::to_owned), id, project_id };
    Action::Reply(Box::new(Reply::Refused(refused)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_refused(session: &mut Session, text: &str, code: ErrorCode, words: &str) {
        let Action::Reply(reply) = session.receive(text) else { panic!("{text} was not answered") };
        let Reply::Refused(refused) = *reply else { panic!("{text} was not refused") };
        assert_eq!(refused.code, code, "{text}");
        assert!(refused.message.contains(words), "{text}: {}", refused.message);
    }

    #[test]
    fn bad_messages_are_answered_with_what_is_wrong() {
        let session = &mut Session::new(2);
        for (text, code, words) in [
            ("hello", ErrorCode::InvalidJson, "expected value"),
            ("[]", ErrorCode::InvalidMessage, "object"),
            ("{}", ErrorCode::InvalidMessage, "type"),
            (r#"{"type":7}"#, ErrorCode::InvalidMessage, "type"),
            (r#"{"type":"system.heartbeat"}"#, ErrorCode::UnknownType, "system.heartbeat"),
            (r#"{"type":"connection.established"}"#, ErrorCode::UnknownType, "connection.established"),
            (r#"{"type":"subscribe"}"#, ErrorCode::InvalidMessage, "project_id: is required"),
            (r#"{"type":"subscribe","project_id":7}"#, ErrorCode::InvalidMessage, "project_id"),
            (r#"{"type":"subscribe","project_id":"a/../b"}"#, ErrorCode::InvalidMessage, "project_id"),
            (r#"{"type":"subscribe","project_id":"*"}"#, ErrorCode::InvalidMessage, "since"),
            (r#"{"type":"subscribe","project_id":"p","types":[]}"#, ErrorCode::InvalidMessage, "types"),
            (r#"{"type":"subscribe","project_id":"p","types":["x"]}"#, ErrorCode::InvalidMessage, "`x`"),
            (
                r#"{"type":"subscribe","project_id":"p","since":5}"#,
                ErrorCode::InvalidMessage,
                "since: expected an object",
            ),
            (r#"{"type":"ping","type":"ping"}"#, ErrorCode::InvalidMessage, "duplicate key `type`"),
            (r#"{"type":"ping","id":{}}"#, ErrorCode::InvalidMessage, "id"),
            (r#"{"type":"unsubscribe","project_id":"p"}"#, ErrorCode::NotSubscribed, "project p"),
            (r#"{"type":"resume","token":"x"}"#, ErrorCode::InvalidMessage, "first message"),
        ] {
            check_refused(session, text, code, words);
        }
    }

    #[test]
    fn a_token_that_is_not_good_any_more_is_answered_as_the_first_message() {
        let session = &mut Session::new(2);
        check_refused(
            session,
            r#"{"type":"resume","token":"x"}"#,
            ErrorCode::ResumeExpired,
            "cannot be resumed",
        );
    }

    #[test]
    fn subscriptions_are_limited_and_a_repeated_one_does_not_count() {
        let session = &mut Session::new(2);
        for project in ["a", "b", "a", "b"] {
            let text = format!(r#"{{"type":"subscribe","project_id":"{project}"}}"#);
            assert!(matches!(session.receive(&text), Action::Subscribe { .. }), "{project}");
        }
        check_refused(
            session,
            r#"{"type":"subscribe","project_id":"c"}"#,
            ErrorCode::TooManySubscriptions,
            "2",
        );
        session.receive(r#"{"type":"unsubscribe","project_id":"a"}"#);
        assert!(matches!(
            session.receive(r#"{"type":"subscribe","project_id":"c"}"#),
            Action::Subscribe { .. }
        ));
    }
}
