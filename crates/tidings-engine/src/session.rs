//! What one client may do next: pure. A message and what is known of its sender go in, an action comes out; no socket, no
//! await, no memory.

use tidings_protocol::{
    ClientMessage, ErrorCode, MessageId, Position, Projects, RefusedMessage, ServerMessage, StreamId,
    Timestamp, TypeFilter,
};

/// What is known of the connection that a message came from.
pub(crate) struct Sender<'a> {
    /// Whether this is its first message: only that may be `resume`.
    pub(crate) is_first: bool,
    /// Subscriptions that it has or asked for.
    pub(crate) subscriptions: usize,
    /// How many it may have.
    pub(crate) subscriptions_max: usize,
    /// Whether it has, or asked for, a subscription to this stream.
    pub(crate) follows: &'a dyn Fn(&StreamId) -> bool,
    /// What its session may see.
    pub(crate) projects: &'a Projects,
    /// Whether it is told that when it asks for something else.
    pub(crate) explains_rights: bool,
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
    /// Take over the connection that the token stands for, if it is one.
    Resume { token: String, positions: Vec<(StreamId, Position)>, id: Option<MessageId> },
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

/// Decides what a client's message leads to.
pub(crate) fn decide(text: &str, sender: &Sender<'_>) -> Action {
    let (message, id) = match ClientMessage::parse(text) {
        Ok(read) => read,
        Err(refused) => return Action::Reply(Box::new(Reply::Refused(*refused))),
    };
    match message {
        ClientMessage::Ping => Action::Reply(Box::new(Reply::Pong(id))),
        ClientMessage::Visibility { .. } => Action::None,
        ClientMessage::Subscribe { stream, types, since } => subscribe(stream, types, since, id, sender),
        ClientMessage::Unsubscribe { stream } => {
            if stream != StreamId::Announcements && (sender.follows)(&stream) {
                return Action::Unsubscribe { stream, id };
            }
            let message = format!("no subscription to project {stream}");
            refuse(ErrorCode::NotSubscribed, message, None, id, Some(&stream))
        }
        ClientMessage::Resume { .. } if !sender.is_first => refuse(
            ErrorCode::InvalidMessage,
            "`resume` is possible as the first message only".to_owned(),
            Some("connect again and send it first, or subscribe with `since`"),
            id,
            None,
        ),
        ClientMessage::Resume { token, positions } => Action::Resume { token, positions, id },
    }
}

/// The answer to a token that is not good, or not any more.
pub(crate) fn resume_expired(id: Option<MessageId>) -> Reply {
    Reply::Refused(RefusedMessage {
        code: ErrorCode::ResumeExpired,
        message: "the former connection cannot be resumed".to_owned(),
        hint: Some("subscribe with `since` on this connection; nothing is lost".to_owned()),
        id,
        project_id: None,
    })
}

/// The answer to messages that come too fast.
pub(crate) fn rate_limited() -> Reply {
    Reply::Refused(RefusedMessage {
        code: ErrorCode::RateLimited,
        message: "too many messages in too short a time; what comes now is not looked at".to_owned(),
        hint: Some("wait a second and send again; who goes on is closed with 4529".to_owned()),
        id: None,
        project_id: None,
    })
}

fn subscribe(
    stream: StreamId,
    types: TypeFilter,
    since: Option<Position>,
    id: Option<MessageId>,
    sender: &Sender<'_>,
) -> Action {
    if let Some(project) = stream.project_id()
        && !sender.projects.include(project)
    {
        // The same whether there is such a project or not.
        let hint = sender.explains_rights.then(|| rights_in_words(sender.projects));
        let message = format!("no right to project {project}");
        return refuse(ErrorCode::NotAuthorized, message, hint.as_deref(), id, Some(&stream));
    }
    // The announcements are followed by every connection and do not count.
    let counts = stream != StreamId::Announcements;
    if counts && sender.subscriptions >= sender.subscriptions_max && !(sender.follows)(&stream) {
        let message = format!(
            "this connection has {} subscriptions, and no more are allowed",
            sender.subscriptions_max
        );
        let hint = "unsubscribe from projects that no longer show, or open another connection";
        return refuse(ErrorCode::TooManySubscriptions, message, Some(hint), id, Some(&stream));
    }
    Action::Subscribe { stream, types, since, id }
}

/// For whoever integrates it: which rule it was.
fn rights_in_words(projects: &Projects) -> String {
    const SHOWN_MAX: usize = 5;
    let entries: Vec<_> = projects.entries().collect();
    if entries.is_empty() {
        return "this session has no `projects`: add this one, or a pattern, to the list".to_owned();
    }
    let shown = entries[..entries.len().min(SHOWN_MAX)].join(", ");
    let more = entries.len().saturating_sub(SHOWN_MAX);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("the session's `projects` are {shown}{more}; in a pattern, `*` stays within one segment")
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

    /// A connection that sent something before and follows `a` and `b`, which is all it may.
    fn decided(text: &str) -> Action {
        let follows = |stream: &StreamId| matches!(stream.as_str(), "a" | "b");
        let projects = Projects::listed(&["a", "b", "c", "p", "team/*"]);
        let sender = Sender {
            is_first: false,
            subscriptions: 2,
            subscriptions_max: 2,
            follows: &follows,
            projects: &projects,
            explains_rights: true,
        };
        decide(text, &sender)
    }

    #[track_caller]
    fn check_refused(text: &str, code: ErrorCode, words: &str) {
        let Action::Reply(reply) = decided(text) else { panic!("{text} was not answered") };
        let Reply::Refused(refused) = *reply else { panic!("{text} was not refused") };
        assert_eq!(refused.code, code, "{text}");
        assert!(refused.message.contains(words), "{text}: {}", refused.message);
    }

    #[test]
    fn bad_messages_are_answered_with_what_is_wrong() {
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
            check_refused(text, code, words);
        }
    }

    #[test]
    fn what_a_session_may_not_see_is_refused_before_anything_else_is_said() {
        for project in ["x", "A", "a/b", "team", "team/a/b", "\u{430}", "a "] {
            let text = serde_json::json!({"type": "subscribe", "project_id": project}).to_string();
            let code =
                if project.ends_with(' ') { ErrorCode::InvalidMessage } else { ErrorCode::NotAuthorized };
            check_refused(
                &text,
                code,
                if project.ends_with(' ') { "white space" } else { "no right to project" },
            );
        }
        check_refused(
            r#"{"type":"subscribe","project_id":"team/web"}"#,
            ErrorCode::TooManySubscriptions,
            "2",
        );
        assert!(rights_in_words(&Projects::none()).contains("has no `projects`"));
        let many = Projects::listed(&["a", "b", "c", "d", "e", "f", "g/*"]);
        assert!(rights_in_words(&many).contains("a, b, c, d, e and 2 more"));
    }

    #[test]
    fn subscriptions_are_limited_and_a_repeated_one_does_not_count() {
        for project in ["a", "b"] {
            let text = format!(r#"{{"type":"subscribe","project_id":"{project}"}}"#);
            assert!(matches!(decided(&text), Action::Subscribe { .. }), "{project}");
        }
        let third = r#"{"type":"subscribe","project_id":"c"}"#;
        check_refused(third, ErrorCode::TooManySubscriptions, "2");
        assert!(matches!(decided(r#"{"type":"unsubscribe","project_id":"a"}"#), Action::Unsubscribe { .. }));
    }
}
