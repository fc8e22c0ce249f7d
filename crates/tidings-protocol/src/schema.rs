//! The JSON Schemas (draft 2020-12) of everything that goes over the wire, made from the types of this crate.

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Value, json};

use crate::{
    EventId, EventType, ProjectId, ServerMessage, Timestamp,
    client::ClientMessageSchema,
    known::{KNOWN, KNOWN_TYPES},
};

/// The schemas by name: `schema/NAME.json` in the repository, `/schema/NAME.json` on a server.
pub fn all() -> [(&'static str, Value); 3] {
    [
        ("events", events()),
        ("client", messages::<ClientMessageSchema>("ClientMessage")),
        ("server", messages::<ServerMessage>("ServerMessage")),
    ]
}

/// Events as a publisher sends them: one entry for each known type, and one for every other type.
pub fn events() -> Value {
    let mut generator = SchemaGenerator::default();
    let common = common_properties(&mut generator);
    let mut entries: Vec<Value> =
        KNOWN.iter().map(|known| entry(known.name, (known.schema)(&mut generator), &common)).collect();
    let mut properties = common;
    properties["type"] = json!({
        "allOf": [generator.subschema_for::<EventType>()],
        "not": {"anyOf": [{"enum": KNOWN_TYPES}, {"pattern": "^(connection|subscription|system|container)\\."}]},
    });
    properties["project_id"] = nullable(&generator.subschema_for::<ProjectId>().into());
    entries.push(json!({
        "title": "CustomEvent",
        "description": "Any other type: free, durable. Without a project it goes to every connection.",
        "type": "object",
        "properties": properties,
        "required": ["type"],
    }));
    document("Event", json!({"oneOf": entries}), generator)
}

/// The members that every event may have. `offset` is ours and there in what subscribers get.
fn common_properties(generator: &mut SchemaGenerator) -> Value {
    json!({
        "timestamp": nullable(&generator.subschema_for::<Timestamp>().into()),
        "id": nullable(&generator.subschema_for::<EventId>().into()),
        "offset": {"type": "integer", "minimum": 1, "description": "The event's place in its stream; set by the service."},
        "folded": {"type": "integer", "minimum": 1, "description": "How many left-out `latest` events precede this one; set by the service."},
        "stream": {"const": "*", "description": "Set by the service on announcements."},
    })
}

fn nullable(schema: &Value) -> Value {
    json!({"anyOf": [schema, {"type": "null"}]})
}

fn entry(name: &str, schema: schemars::Schema, common: &Value) -> Value {
    let mut entry: Value = schema.into();
    entry["title"] = title(name).into();
    let mut properties = json!({"type": {"const": name}});
    for source in [&entry["properties"], common] {
        for (key, value) in source.as_object().into_iter().flatten() {
            properties[key] = value.clone();
        }
    }
    entry["properties"] = properties;
    let mut required = vec![json!("type")];
    required.extend(entry["required"].as_array().into_iter().flatten().cloned());
    entry["required"] = required.into();
    entry
}

/// `task.progress` as `TaskProgress`: the name of the generated type in every language.
fn title(name: &str) -> String {
    name.split('.').map(|word| word[..1].to_uppercase() + &word[1..]).collect()
}

fn messages<T: JsonSchema>(name: &str) -> Value {
    let mut generator = SchemaGenerator::default();
    let schema: Value = T::json_schema(&mut generator).into();
    document(name, schema, generator)
}

fn document(name: &str, mut schema: Value, mut generator: SchemaGenerator) -> Value {
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
    schema["title"] = name.into();
    let definitions = generator.take_definitions(true);
    if !definitions.is_empty() {
        schema["$defs"] = Value::Object(definitions);
    }
    schema
}
