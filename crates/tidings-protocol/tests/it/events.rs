//! Events: what is refused and why, and that everything else keeps its bytes.

use proptest::prelude::*;
use serde_json::{Value, json};
use tidings_protocol::{
    Audience, Class, EVENT_BYTES_MAX, Event, EventId, InvalidEvent, KNOWN_TYPES, ProjectId, Reason, Timestamp,
};

use crate::fixtures;

fn now() -> Timestamp {
    Timestamp::parse("2026-11-23T12:00:00Z").unwrap()
}

fn parse(json: &str) -> Result<Event, InvalidEvent> {
    Event::parse(json.as_bytes(), EVENT_BYTES_MAX, now())
}

#[test]
fn every_known_type_has_golden_events() {
    let names: Vec<_> = fixtures::load("events").into_iter().map(|fixture| fixture.name).collect();
    for known in KNOWN_TYPES {
        assert!(names.iter().any(|name| name == known), "{known} has no file");
    }
}

#[test]
fn valid_golden_events_are_accepted_and_broken_ones_name_the_field() {
    for fixture in fixtures::load("events") {
        for event in &fixture.valid {
            assert!(
                parse(&event.to_string()).is_ok(),
                "{}: {event}: {:?}",
                fixture.name,
                parse(&event.to_string())
            );
        }
        for broken in &fixture.broken {
            let invalid = parse(&broken["event"].to_string()).expect_err(&broken.to_string());
            let (field, message) = (json!(invalid.field), json!(invalid.message));
            assert_eq!(
                (&field, &message),
                (&broken["field"], &broken["message"]),
                "{}: {broken}",
                fixture.name
            );
        }
    }
}

/// What a subscriber gets for `json` as the third event of its stream.
#[track_caller]
fn check(json: &str, expected: &str) {
    assert_eq!(parse(json).unwrap().encode(3), expected);
}

#[test]
fn what_is_not_ours_keeps_its_bytes() {
    check(
        r#"{"type":"deploy.done", "project_id":"p", "big": 123456789012345678901234567890, "e": 1.50E+3, "s":"\u00e9\ud800\/", "k\u00e9y":1, "o":{ "b":1,"a" : [ ] },"timestamp":"2026-11-23T10:00:00Z"}"#,
        r#"{"type":"deploy.done","project_id":"p","big":123456789012345678901234567890,"e":1.50E+3,"s":"\u00e9\ud800\/","k\u00e9y":1,"o":{ "b":1,"a" : [ ] },"timestamp":"2026-11-23T10:00:00.000000Z","offset":3}"#,
    );
}

#[test]
fn ours_is_removed_and_what_is_missing_filled_in() {
    check(
        r#"{"type":"a.b","project_id":"p","offset":9,"epoch":"x","folded":1,"stream":"*","id":null}"#,
        r#"{"type":"a.b","project_id":"p","timestamp":"2026-11-23T12:00:00.000000Z","offset":3}"#,
    );
    check(
        r#"{"type":"project.created","project_id":null,"data":{"id":"p7"}}"#,
        r#"{"type":"project.created","data":{"id":"p7"},"project_id":"p7","timestamp":"2026-11-23T12:00:00.000000Z","stream":"*","offset":3}"#,
    );
}

#[test]
fn a_percentage_is_filled_in_when_it_is_absent() {
    for (progress, expected) in [
        (r#"{"current":57,"total":100}"#, r#"{"current":57,"total":100,"percentage":57}"#),
        (r#"{"current":1,"total":3}"#, r#"{"current":1,"total":3,"percentage":33.33}"#),
        (r#"{"current":5,"total":0}"#, r#"{"current":5,"total":0,"percentage":0}"#),
        (r#"{"current":7,"total":5,"percentage":null}"#, r#"{"current":7,"total":5,"percentage":100}"#),
        (r#"{"current":-1,"total":5}"#, r#"{"current":-1,"total":5,"percentage":0}"#),
        (r#"{"current":1, "total":2,"percentage":49.9}"#, r#"{"current":1, "total":2,"percentage":49.9}"#),
    ] {
        let json =
            format!(r#"{{"type":"task.progress","project_id":"p","task_id":"t","progress":{progress}}}"#);
        let encoded = parse(&json).unwrap().encode(1);
        assert!(encoded.contains(&format!(r#""progress":{expected},"#)), "{progress}: {encoded}");
    }
}

#[test]
fn what_existing_code_publishes_works() {
    for json in [
        r#"{"type":"task.progress","timestamp":"2026-11-23T01:56:28.960767","task_id":"t","project_id":"p","progress":{"current":1,"total":2,"percentage":50.0},"message":null,"metadata":null}"#,
        r#"{"type":"task.failed","timestamp":"2026-11-23T01:56:28.960767","task_id":"t","project_id":"p","error":"boom","traceback":null}"#,
        r#"{"type":"project.created","timestamp":"2026-11-23T01:56:28.960767","project_id":null,"data":{"project_id":"p"}}"#,
    ] {
        let encoded: Value = serde_json::from_str(&parse(json).unwrap().encode(1)).unwrap();
        assert_eq!(encoded["timestamp"], "2026-11-23T01:56:28.960767Z");
    }
    let heartbeat =
        parse(r#"{"type":"system.heartbeat","timestamp":"2026-11-23T01:56:28.960767"}"#).unwrap_err();
    assert_eq!(heartbeat.reason, Reason::ReservedType);
}

#[test]
fn each_event_goes_to_its_audience() {
    let project = ProjectId::try_from("p").unwrap();
    for (json, expected) in [
        (
            r#"{"type":"file.changed","project_id":"p","file_path":"a","change_type":"created"}"#,
            Audience::Project(project.clone()),
        ),
        (r#"{"type":"project.updated","project_id":"p"}"#, Audience::RightsToProject(project.clone())),
        (
            r#"{"type":"workspace.changed","workspace_id":"w","changes":{},"project_id":"p"}"#,
            Audience::Project(project.clone()),
        ),
        (r#"{"type":"workspace.changed","workspace_id":"w","changes":{}}"#, Audience::RightsToEverything),
        (r#"{"type":"notice.posted"}"#, Audience::Everyone),
        (r#"{"type":"notice.posted","project_id":"p"}"#, Audience::Project(project.clone())),
    ] {
        assert_eq!(*parse(json).unwrap().audience(), expected, "{json}");
    }
}

#[test]
fn a_workspace_is_given_to_the_project_that_the_settings_name() {
    let mut event =
        parse(r#"{"type":"workspace.changed","workspace_id":"w","project_id":null,"changes":{}}"#).unwrap();
    assert_eq!(event.workspace_without_project(), Some("w"));
    event.assign_project(ProjectId::try_from("p").unwrap());
    let encoded: Value = serde_json::from_str(&event.encode(1)).unwrap();
    assert_eq!((event.stream().to_string(), &encoded["project_id"]), ("p".to_owned(), &json!("p")));
}

#[test]
fn classes_and_keys_are_those_of_the_contract() {
    let key = |json: &str| match parse(json).unwrap().class() {
        Class::Durable => None,
        Class::Latest { key } => Some(key.to_string()),
    };
    let progress =
        r#"{"type":"task.progress","project_id":"p","task_id":"t","progress":{"current":1,"total":2}}"#;
    assert_eq!(key(progress).as_deref(), Some("task.progress:t"));
    let file = |change: &str| {
        format!(r#"{{"type":"file.changed","project_id":"p","file_path":"f","change_type":"{change}"}}"#)
    };
    assert_eq!(key(&file("modified")).as_deref(), Some("file.changed:f"));
    assert_eq!(key(&file("created")), None);
    assert_eq!(
        key(r#"{"type":"process.progress","project_id":"p","process_id":"r","progress":1}"#).as_deref(),
        Some("process.progress:r")
    );
    assert_eq!(key(r#"{"type":"task.completed","project_id":"p","task_id":"t"}"#), None);
}

#[test]
fn an_id_is_added_only_where_there_is_none() {
    let mut with = parse(r#"{"type":"a.b","id":"mine"}"#).unwrap();
    let mut without = parse(r#"{"type":"a.b"}"#).unwrap();
    for event in [&mut with, &mut without] {
        event.assign_id(EventId::try_from("key:0").unwrap());
    }
    assert_eq!(with.id().unwrap().as_str(), "mine");
    let encoded: Value = serde_json::from_str(&without.encode(1)).unwrap();
    assert_eq!(encoded["id"], "key:0");
}

#[test]
fn what_is_no_event_is_refused_with_its_reason() {
    for (json, reason, words) in [
        ("", Reason::InvalidJson, "not JSON"),
        ("{\"type\":\"a.b\"", Reason::InvalidJson, "line 1"),
        ("{\"type\":\"a.b\",\"x\":NaN}", Reason::InvalidJson, "not JSON"),
        ("7", Reason::InvalidEvent, "expected a JSON object"),
        (r#"{"type":"a.b","x":1,"x":2}"#, Reason::InvalidEvent, "duplicate key `x`"),
        (r#"{"type":"a.b"} {"type":"a.b"}"#, Reason::InvalidJson, "trailing"),
    ] {
        let invalid = parse(json).unwrap_err();
        assert_eq!(invalid.reason, reason, "{json}: {invalid}");
        assert!(invalid.message.contains(words), "{json}: {invalid}");
    }
    let invalid = Event::parse(b"{\"type\":\"\xff\"}", EVENT_BYTES_MAX, now()).unwrap_err();
    assert_eq!(invalid.reason, Reason::InvalidJson);
    let large = format!(r#"{{"type":"a.b","x":"{}"}}"#, "x".repeat(EVENT_BYTES_MAX));
    assert_eq!(parse(&large).unwrap_err().reason, Reason::TooLarge);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_filter("JSON has no NaN", |number| number.is_finite()).prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 20, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,10}", inner, 0..5)
                .prop_map(|map| map.into_iter().collect()),
        ]
    })
}

proptest! {
    #[test]
    fn any_custom_event_comes_out_as_it_went_in(members in prop::collection::btree_map("x_.{0,10}", any_json(), 0..8), offset in 1_u64..1 << 53) {
        let mut event: Value = members.into_iter().collect::<serde_json::Map<_, _>>().into();
        event["type"] = "my.event".into();
        event["project_id"] = "p".into();
        event["timestamp"] = "2026-11-23T10:00:00.000000Z".into();
        let encoded: Value = serde_json::from_str(&parse(&event.to_string()).unwrap().encode(offset)).unwrap();
        event["offset"] = offset.into();
        prop_assert_eq!(encoded, event);
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Event::parse(&bytes, EVENT_BYTES_MAX, now());
    }

    #[test]
    fn no_json_makes_the_reader_panic(json in any_json(), name in prop::sample::select(&KNOWN_TYPES[..])) {
        let mut event = json;
        if let Some(members) = event.as_object_mut() {
            members.insert("type".into(), name.into());
        }
        let _ = parse(&event.to_string());
    }
}
