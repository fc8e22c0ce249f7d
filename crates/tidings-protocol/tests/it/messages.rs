//! Messages of clients and of the server.

use proptest::prelude::*;
use serde_json::{Value, json};
use tidings_protocol::{
    CLOSE_CODES, ClientMessage, Degraded, Epoch, ErrorCode, Gap, Position, RefusedMessage, RemovalReason,
    ServerMessage, Source, StateSnapshot, Timestamp,
};

use crate::fixtures;

#[test]
fn golden_client_messages_are_read_and_broken_ones_get_their_code() {
    for fixture in fixtures::load("client") {
        for message in &fixture.valid {
            let read = ClientMessage::parse(&message.to_string());
            assert!(read.is_ok(), "{message}: {read:?}");
        }
        for broken in &fixture.broken {
            let refused =
                ClientMessage::parse(&broken["message"].to_string()).expect_err(&broken.to_string());
            assert_eq!(json!(refused.code), broken["code"], "{broken}: {}", refused.message);
        }
    }
}

#[test]
fn an_answer_carries_the_same_id() {
    for (id, echoed) in [("\"7\"", json!("7")), ("7", json!(7)), ("1.5", json!(1.5))] {
        let (_, id) = ClientMessage::parse(&format!(r#"{{"type":"ping","id":{id}}}"#)).unwrap();
        let pong: Value =
            serde_json::from_str(&ServerMessage::Pong { timestamp: now(), id }.encode()).unwrap();
        assert_eq!(pong["id"], echoed);
    }
    let refused = ClientMessage::parse(r#"{"type":"nonsense","id":"x","project_id":"p"}"#).unwrap_err();
    assert_eq!(json!(refused.id), json!("x"));
}

fn now() -> Timestamp {
    Timestamp::parse("2026-11-23T10:00:00Z").unwrap()
}

/// Every message of the server's, as the first golden one of its type.
fn samples() -> Vec<ServerMessage> {
    let timestamp = now();
    let epoch = |name: &str| Epoch::new(name);
    let (_, id) = ClientMessage::parse(r#"{"type":"ping","id":"7"}"#).unwrap();
    let (_, eight) = ClientMessage::parse(r#"{"type":"ping","id":"8"}"#).unwrap();
    let task = fixtures::load("server")
        .into_iter()
        .find(|fixture| fixture.name == "subscription.confirmed")
        .unwrap();
    let task = serde_json::value::to_raw_value(&task.valid[0]["state"]["tasks"][0]).unwrap();
    vec![
        ServerMessage::ConnectionEstablished {
            timestamp,
            client_id: "0193".into(),
            resume_token: "ab".into(),
            heartbeat_interval: 30,
            protocol: 1,
            node: "web-1".into(),
            announcements: Position { epoch: epoch("k3x9"), offset: 12 },
        },
        ServerMessage::ConnectionResumed {
            timestamp,
            id: None,
            client_id: "0193".into(),
            subscriptions: vec!["p1".into()],
            restarted: false,
        },
        ServerMessage::SubscriptionConfirmed {
            timestamp,
            id,
            project_id: "p1".into(),
            epoch: epoch("a81f"),
            offset: 102,
            recovered: None,
            state: Some(StateSnapshot { tasks: vec![task], ..StateSnapshot::default() }),
        },
        ServerMessage::SubscriptionRemoved {
            timestamp,
            id: None,
            project_id: "p1".into(),
            reason: RemovalReason::Requested,
        },
        ServerMessage::Pong { timestamp, id: None },
        ServerMessage::SystemHeartbeat {
            timestamp,
            positions: [("p1".into(), 119), ("*".into(), 12)].into(),
        },
        ServerMessage::SystemDegraded {
            timestamp,
            degraded: Degraded { source: Source::Redis, since: timestamp },
        },
        ServerMessage::SystemRecovered {
            timestamp,
            degraded: Degraded { source: Source::Celery, since: timestamp },
            gap: Gap::Recovered,
        },
        ServerMessage::ContainerReconnect {
            timestamp,
            message: "this node is stopping".into(),
            retry_after_ms: 4310,
        },
        ServerMessage::refusal(
            RefusedMessage {
                code: ErrorCode::NotAuthorized,
                message: "no right to project p2".into(),
                hint: None,
                id: eight,
                project_id: Some("p2".into()),
            },
            timestamp,
        ),
    ]
}

#[test]
fn server_messages_are_the_golden_ones() {
    let fixtures = fixtures::load("server");
    let samples = samples();
    assert_eq!(samples.len(), fixtures.len());
    for message in samples {
        let message: Value = serde_json::from_str(&message.encode()).unwrap();
        let name = message["type"].as_str().unwrap();
        let fixture = fixtures.iter().find(|fixture| fixture.name == name).expect(name);
        assert_eq!(message, fixture.valid[0]);
    }
}

#[test]
fn close_codes_say_by_their_range_whether_to_come_back() {
    for code in CLOSE_CODES {
        match code.number() {
            4400..=4499 => assert!(!code.retry(), "{code:?}"),
            4500..=4599 => assert!(code.retry(), "{code:?}"),
            _ => {}
        }
        // A close frame has room for 123 bytes of reason (RFC 6455, 5.5).
        assert!(code.reason().len() <= 123);
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in ".{0,200}") {
        let _ = ClientMessage::parse(&text);
    }
}
