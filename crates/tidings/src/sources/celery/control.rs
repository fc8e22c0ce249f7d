//! Remote control: workers are asked what they know, and told to send events, as Celery's own `inspect` and `control` do. A
//! question is published to all workers at once; each puts its answer into a list that the asker waits at.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use redis::{Value as Answer, aio::MultiplexedConnection, cmd};
use serde_json::{Value, json};
use tidings_engine::{engine::redis::Servers, random};
use tokio::time::{Instant, timeout};

use super::{
    events::body_of,
    json::text_of,
    project::{Rank, identifier},
    reading::Reading,
    report::{About, TaskId, head, task_id},
};

/// For all workers to answer: one that is busy with a task alone never does.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);
/// Waiting at the list for the next answer.
const WAIT_S: f64 = 0.2;
/// An answer that nobody has fetched is removed by Redis.
const ANSWERS_KEPT_S: u32 = 60;
/// What Celery calls the exchange, and the one of answers.
const EXCHANGE: &str = "celery.pidbox";
const REPLY_EXCHANGE: &str = "reply.celery.pidbox";

/// Asks workers.
pub(super) struct Control {
    pub(super) servers: Arc<Servers>,
    /// `global_keyprefix` of the broker.
    pub(super) key_prefix: String,
    /// What stands before the names of exchanges.
    pub(super) fanout_prefix: String,
    pub(super) reading: Arc<Reading>,
    pub(super) connection: Option<MultiplexedConnection>,
}

/// A task that a worker has.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) id: TaskId,
    pub(super) about: About,
    /// The process that runs it; `None`: it does not run yet.
    pub(super) pid: Option<i64>,
}

/// What workers have answered.
#[derive(Debug, Default)]
pub(super) struct Answers {
    pub(super) found: Vec<Found>,
    /// How many listened, and how many of them answered.
    pub(super) listening: usize,
    pub(super) answered: usize,
}

impl Control {
    /// Tells all workers to send events.
    pub(super) async fn enable_events(&mut self) -> Result<(), String> {
        let publish = self.broadcast("enable_events", &json!({}), None);
        self.query::<usize>(&publish).await.map(drop)
    }

    /// Which of these tasks workers have.
    pub(super) async fn query_tasks(&mut self, ids: &[TaskId]) -> Result<Answers, String> {
        let ids: Vec<_> = ids.iter().map(|id| &**id).collect();
        self.ask("query_task", &json!({"ids": ids})).await
    }

    /// All tasks that run.
    pub(super) async fn active(&mut self) -> Result<Answers, String> {
        self.ask("active", &json!({})).await
    }

    async fn ask(&mut self, method: &str, arguments: &Value) -> Result<Answers, String> {
        let asker = format!("tidings-{}", random::hex::<8>());
        let queue = format!("{}{asker}.{REPLY_EXCHANGE}", self.key_prefix);
        let binding_key = format!("{}_kombu.binding.{REPLY_EXCHANGE}", self.key_prefix);
        let binding = format!("{asker}\u{6}\u{16}\u{6}\u{16}{asker}.{REPLY_EXCHANGE}");
        let mut bind = cmd("SADD");
        bind.arg(&binding_key).arg(&binding);
        self.query::<Answer>(&bind).await?;
        let answers = self.ask_bound(method, arguments, &asker, &queue).await;
        let mut unbind = cmd("SREM");
        unbind.arg(&binding_key).arg(&binding);
        // Its answers, if any come late, are in nobody's way for long.
        let _ = self.query::<Answer>(&unbind).await;
        let mut expire = cmd("EXPIRE");
        let _ = self.query::<Answer>(expire.arg(&queue).arg(ANSWERS_KEPT_S)).await;
        answers
    }

    async fn ask_bound(
        &mut self,
        method: &str,
        arguments: &Value,
        asker: &str,
        queue: &str,
    ) -> Result<Answers, String> {
        let publish = self.broadcast(method, arguments, Some(asker));
        let listening: usize = self.query(&publish).await?;
        let mut answers = Answers { listening, ..Answers::default() };
        let deadline = Instant::now() + ANSWERS_WITHIN;
        while answers.answered < listening && Instant::now() < deadline {
            let mut pop = cmd("BRPOP");
            pop.arg(queue).arg(WAIT_S);
            let popped: Option<(String, Vec<u8>)> = self.query(&pop).await?;
            if let Some((_, envelope)) = popped {
                answers.answered += 1;
                self.take(&envelope, &mut answers.found);
            }
        }
        Ok(answers)
    }

    /// Takes a worker's answer: `{"WORKER": {"ID": ["active", {…}]}}`, or `{"WORKER": [{…}]}`.
    fn take(&self, envelope: &[u8], found: &mut Vec<Found>) {
        let Some(Value::Object(workers)) =
            body_of(envelope).ok().and_then(|body| serde_json::from_str(&text_of(&body)?).ok())
        else {
            return;
        };
        for (worker, answer) in &workers {
            match answer {
                Value::Object(tasks) => {
                    let tasks = tasks.iter().filter_map(|(id, state)| {
                        let is_active = state.get(0)?.as_str()? == "active";
                        self.found(worker, id, state.get(1)?, is_active)
                    });
                    found.extend(tasks);
                }
                Value::Array(tasks) => {
                    let tasks = tasks.iter();
                    found.extend(
                        tasks.filter_map(|task| self.found(worker, task["id"].as_str()?, task, true)),
                    );
                }
                _ => {}
            }
        }
    }

    fn found(&self, worker: &str, id: &str, task: &Value, is_active: bool) -> Option<Found> {
        let name = task["name"].as_str();
        let text = |field: &str| task.get(field).map(Value::to_string);
        let (args, kwargs) = (text("args"), text("kwargs"));
        let projects = &self.reading.projects;
        let project = projects.in_arguments(name, args.as_deref(), kwargs.as_deref());
        let stamped = task.get("stamps").and_then(|stamps| stamps.get("project_id")).and_then(identifier);
        let about = About {
            name: name.map(|name| head(name, 255).into()),
            worker: Some(head(worker, 255).into()),
            project: stamped.or(project).map(|project| (Rank::Asked, project)),
            has_arguments: task["kwargs"].is_object(),
            arguments: self.reading.arguments(kwargs.as_deref()),
            ..About::default()
        };
        let pid = is_active.then(|| task["worker_pid"].as_i64()).flatten();
        Some(Found { id: task_id(id)?, about, pid })
    }

    fn broadcast(&self, method: &str, arguments: &Value, asker: Option<&str>) -> redis::Cmd {
        let mut body = json!({"method": method, "arguments": arguments, "destination": null, "pattern": null, "matcher": null});
        if let Some(asker) = asker {
            body["ticket"] = json!(asker);
            body["reply_to"] = json!({"exchange": REPLY_EXCHANGE, "routing_key": asker});
        }
        let envelope = json!({
            "body": STANDARD.encode(body.to_string()),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"clock": 1, "expires": null},
            "properties": {
                "delivery_mode": 1,
                "delivery_info": {"exchange": EXCHANGE, "routing_key": ""},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": random::hex::<16>(),
            },
        });
        let mut publish = cmd("PUBLISH");
        publish.arg(format!("{}{EXCHANGE}", self.fanout_prefix)).arg(envelope.to_string());
        publish
    }

    /// A connection of its own: others must not wait while it waits for answers.
    async fn query<T: redis::FromRedisValue>(&mut self, command: &redis::Cmd) -> Result<T, String> {
        if self.connection.is_none() {
            let connection = self.servers.anchor().connect(|_| Ok::<_, ()>(())).await;
            self.connection = Some(connection.map_err(|error| error.to_string())?);
        }
        let Some(connection) = &mut self.connection else { return Err("not connected".to_owned()) };
        let answer = timeout(2 * ANSWERS_WITHIN, command.query_async(connection)).await;
        let answer = answer
            .map_err(|late| late.to_string())
            .and_then(|answer| answer.map_err(|error| error.to_string()));
        answer.inspect_err(|_| self.connection = None)
    }
}
