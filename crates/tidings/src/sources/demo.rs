//! Believable events on project `demo`, so that there is something to see before anything is connected.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{ingest::Ingest, metrics::EventSource};

/// The project that the demonstration happens in.
pub(crate) const PROJECT: &str = "demo";

/// Between two steps: a few events per second in all.
const STEP: Duration = Duration::from_millis(400);

/// The tasks of the story, each with the number of its steps and the file that it makes.
const TASKS: [(&str, &str, u32, &str); 3] = [
    ("process_video", "Encoding frame", 40, "renders/intro.mp4"),
    ("import_dataset", "Reading row", 25, "data/customers.parquet"),
    ("train_model", "Epoch", 60, "models/churn.onnx"),
];

/// Every how many runs a task fails: a page has to show that, too.
const FAILS_EVERY: u64 = 4;

/// Publishes the demonstration until `stop`.
pub(crate) async fn run(ingest: Arc<Ingest>, stop: CancellationToken) {
    let mut past_steps = 0;
    while stop.run_until_cancelled(tokio::time::sleep(STEP)).await.is_some() {
        let texts: Vec<_> = events(past_steps).iter().map(Value::to_string).collect();
        let events: Result<Vec<_>, _> =
            texts.iter().map(|text| ingest.read(EventSource::Demo, text.as_bytes())).collect();
        let events = events.expect("the demonstration follows the contract");
        if let Err(error) = ingest.append(EventSource::Demo, events).await {
            tracing::warn!(%error, "the demonstration pauses");
        }
        past_steps += 1;
    }
}

/// What happens in one step of the story: it depends on the step alone.
fn events(step: u64) -> Vec<Value> {
    let mut events = Vec::new();
    for (task, (name, verb, steps, file)) in (0_u64..).zip(TASKS) {
        // Each task starts a little later than the one before, and rests between two runs.
        let length = u64::from(steps) + 6;
        let Some(since_start) = step.checked_sub(task * 3) else { continue };
        let (run, at) = (since_start / length, since_start % length);
        let task_id = format!("{name}-{run}");
        let about = json!({"project_id": PROJECT, "task_id": task_id});
        let fails = (run + task) % FAILS_EVERY == FAILS_EVERY - 1;
        match at {
            0 => events.push(with(
                &about,
                &json!({"type": "task.started", "task_name": name, "metadata": {"output": file}}),
            )),
            at if fails && at == u64::from(steps) / 2 => {
                let error = "OSError: no space left on device";
                events.push(with(&about, &json!({"type": "task.failed", "error": error, "reason": "error"})));
            }
            at if at <= u64::from(steps) && !(fails && at > u64::from(steps) / 2) => {
                let progress = json!({"current": at, "total": steps});
                let message = format!("{verb} {at} of {steps}");
                events.push(with(
                    &about,
                    &json!({"type": "task.progress", "progress": progress, "message": message}),
                ));
            }
            at if at == u64::from(steps) + 1 && !fails => {
                events.push(with(&about, &json!({"type": "task.completed", "result": {"file": file}})));
                let file = json!({"name": file.rsplit('/').next(), "path": file, "size": 4_096 * (run + 1)});
                events.push(json!({"type": "file.uploaded", "project_id": PROJECT, "file": file}));
            }
            _ => {}
        }
    }
    if step.is_multiple_of(9) {
        let path =
            ["src/main.py", "README.md", "config/settings.toml"][usize::try_from(step / 9 % 3).unwrap_or(0)];
        events.push(json!({"type": "file.changed", "project_id": PROJECT, "file_path": path, "change_type": "modified"}));
    }
    events
}

fn with(about: &Value, more: &Value) -> Value {
    let mut event = more.clone();
    for (key, value) in about.as_object().into_iter().flatten() {
        event[key] = value.clone();
    }
    event
}

#[cfg(test)]
mod tests {
    use tidings_protocol::{EVENT_BYTES_MAX, Event};

    use super::*;

    #[test]
    fn the_story_follows_the_contract_and_ends_what_it_starts() {
        let (mut started, mut ended) = (0, 0);
        for step in 0..500 {
            for event in events(step) {
                let now = jiff::Timestamp::UNIX_EPOCH.into();
                let event = Event::parse(event.to_string().as_bytes(), EVENT_BYTES_MAX, now).unwrap();
                match event.event_type().as_str() {
                    "task.started" => started += 1,
                    "task.completed" | "task.failed" => ended += 1,
                    _ => {}
                }
            }
        }
        assert!(started > 20 && started - ended <= 3, "{started} started, {ended} ended");
    }
}
