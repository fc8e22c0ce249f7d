//! The generated schemas agree with what the code accepts.

use jsonschema::Validator;
use serde_json::Value;
use tidings_protocol::schema;

use crate::fixtures;

fn validator(name: &str) -> Validator {
    let (_, schema) = schema::all().into_iter().find(|(known, _)| *known == name).unwrap();
    jsonschema::validator_for(&schema).unwrap()
}

#[track_caller]
fn check(kind: &str, broken_member: &str) {
    let validator = validator(kind);
    for fixture in fixtures::load(kind) {
        for valid in &fixture.valid {
            let errors: Vec<_> = validator.iter_errors(valid).map(|error| error.to_string()).collect();
            assert!(errors.is_empty(), "{valid}: {errors:?}");
        }
        for broken in &fixture.broken {
            // What a schema cannot say is marked, so that nobody takes the schema for the whole check.
            let accepted = broken["schema"] == "accepts";
            assert_eq!(validator.is_valid(&broken[broken_member]), accepted, "{broken}");
        }
    }
}

#[test]
fn the_schema_of_events_accepts_and_refuses_the_golden_ones() {
    check("events", "event");
}

#[test]
fn the_schema_of_client_messages_accepts_and_refuses_the_golden_ones() {
    check("client", "message");
}

#[test]
fn the_schema_of_server_messages_accepts_and_refuses_the_golden_ones() {
    check("server", "message");
}

#[test]
fn the_files_in_the_repository_are_the_generated_ones() {
    for (name, schema) in schema::all() {
        let path = fixtures::repository().join(format!("schema/{name}.json"));
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let file: Value = serde_json::from_str(&text).unwrap_or_default();
        assert_eq!(file, schema, "{name}.json is old: run `cargo xtask generate`");
    }
}
