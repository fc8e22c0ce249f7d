//! `tidings publish`: an event from the command line.

use std::io::{self, Read as _, Write as _};

use anyhow::Context as _;
use clap::Args;
use serde_json::{Map, Value};
use tidings_protocol::Event;

use super::http;
use crate::config::{Scope, Settings};

/// Where events are published.
pub(super) const PATH: &str = "/api/events";

/// tidings publish task.progress -p demo `task_id=t1` progress.current=3 progress.total=10
#[derive(Args)]
pub(super) struct Arguments {
    /// The event's type, or `-` for events as NDJSON from the standard input
    #[arg(value_name = "TYPE")]
    event_type: String,
    /// Fields as `name=value`; dots go into objects; a value that is JSON counts as such, everything else is text
    #[arg(value_name = "NAME=VALUE")]
    fields: Vec<String>,
    /// The project
    #[arg(short, long, value_name = "ID")]
    project: Option<String>,
    /// The service's address; without it the one of the settings
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The key to publish with; without it the first of the settings that may publish
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
}

pub(super) fn run(settings: &Settings, arguments: Arguments) -> anyhow::Result<()> {
    let from_input = arguments.event_type == "-";
    let body = if from_input {
        let mut body = Vec::new();
        io::stdin().lock().read_to_end(&mut body).context("the standard input cannot be read")?;
        body
    } else {
        let event = build(&arguments)?.to_string().into_bytes();
        // Checked here, too: an answer without a round trip, and the same words.
        Event::parse(&event, settings.event_bytes_max, jiff::Timestamp::now().into())?;
        event
    };
    let service = http::Service::of(settings, arguments.url, true)?;
    let key = arguments.key.as_deref().or_else(|| key_of(settings));
    let content_type = if from_input { "application/x-ndjson" } else { "application/json" };
    let (status, text) = service.post(PATH, key, content_type, &body)?;
    if status != 202 {
        anyhow::bail!("{status} from {}\n{text}", service.url(PATH));
    }
    writeln!(io::stdout(), "{text}")?;
    Ok(())
}

/// The first key of the settings that may publish.
pub(super) fn key_of(settings: &Settings) -> Option<&str> {
    let scoped = || settings.keys.iter().find(|key| key.scopes.contains(&Scope::Publish)).map(|key| &key.key);
    settings.publish_keys.first().or_else(scoped).map(String::as_str)
}

fn build(arguments: &Arguments) -> anyhow::Result<Value> {
    let mut event = Map::new();
    event.insert("type".to_owned(), arguments.event_type.clone().into());
    if let Some(project) = &arguments.project {
        event.insert("project_id".to_owned(), project.clone().into());
    }
    let mut event = Value::Object(event);
    for field in &arguments.fields {
        let (path, text) =
            field.split_once('=').with_context(|| format!("`{field}`: expected NAME=VALUE"))?;
        let value = serde_json::from_str(text).unwrap_or_else(|_| text.into());
        put(&mut event, path, value)
            .with_context(|| format!("`{field}`: the name goes through a value that is no object"))?;
    }
    Ok(event)
}

fn put(object: &mut Value, path: &str, value: Value) -> Option<()> {
    let Some((first, rest)) = path.split_once('.') else {
        object.as_object_mut()?.insert(path.to_owned(), value);
        return Some(());
    };
    let inner = object.as_object_mut()?.entry(first).or_insert_with(|| Value::Object(Map::new()));
    put(inner, rest, value)
}
