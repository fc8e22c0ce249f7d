//! The settings of the Celery bridge: where Celery's Redis is, what is told to browsers, and how the project of a task is found.

use std::{fmt, time::Duration};

use globset::{Glob, GlobMatcher};
use serde_json::{Map, Value};
use tidings_engine::engine::redis::RedisAddress;
use tidings_protocol::ProjectId;

use super::{
    Layers, SettingError, YES_OR_NO,
    tables::{self, Wrong},
};

const RULES: &str = "TIDINGS_CELERY_RULES";
/// Each task is held against each of them once.
const RULES_MAX: usize = 1000;
const FIELDS: [&str; 4] = ["task", "project", "project_argument", "project_index"];
/// Celery's arguments are written by hand: nobody has more.
const INDEX_MAX: u64 = 99;

/// What the bridge is told.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each is a setting, and they go in any combination")]
pub struct CelerySettings {
    /// The Redis that has the results; `None`: results are not listened to.
    pub backend: Option<RedisAddress>,
    /// `global_keyprefix` of the result backend, as it stands in front of keys.
    pub backend_prefix: String,
    /// The Redis that is the broker; `None`: events are not listened to, and workers are not asked.
    pub broker: Option<RedisAddress>,
    /// What stands in front of the names of exchanges that reach everybody, `global_keyprefix` included.
    pub fanout_prefix: String,
    /// `global_keyprefix` of the broker.
    pub broker_prefix: String,
    /// The exchange of events.
    pub event_exchange: String,
    /// Whether workers are asked what they are doing.
    pub asks_workers: bool,
    /// Whether workers are told to send events.
    pub enables_events: bool,
    /// For how long no worker knows a task before it has failed; `None`: for ever.
    pub lost_after: Duration,
    /// Whether results go to browsers.
    pub tells_results: bool,
    /// Whether arguments do.
    pub tells_arguments: bool,
    /// Whether tracebacks do.
    pub tells_tracebacks: bool,
    /// The largest of these that does, in bytes.
    pub value_bytes_max: usize,
    /// Updates of one task per second.
    pub update_rate_max: u32,
    /// Whether the representation of arguments in events may say which project a task is of.
    pub takes_hints: bool,
    /// Whether chains and groups are shown as processes.
    pub shows_processes: bool,
    /// The keyword argument that names the project.
    pub project_argument: String,
    /// Where it is for tasks that have it elsewhere.
    pub rules: Vec<Rule>,
}

/// Where the project of some tasks is.
#[derive(Clone)]
pub struct Rule {
    /// The names of the tasks.
    pub tasks: GlobMatcher,
    /// Where it is.
    pub project: ProjectFrom,
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {:?}", self.tasks.glob(), self.project)
    }
}

/// Where the project of a task is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProjectFrom {
    /// It is always this.
    Fixed(ProjectId),
    /// In a keyword argument.
    Argument(String),
    /// In a positional argument, counted from 0.
    Index(usize),
}

impl CelerySettings {
    pub(super) fn read(layers: &Layers) -> Result<Self, SettingError> {
        let backend = redis(layers, "TIDINGS_CELERY_BACKEND_URL")?;
        let broker = redis(layers, "TIDINGS_CELERY_BROKER_URL")?;
        let broker_prefix = layers.text("TIDINGS_CELERY_BROKER_PREFIX");
        let database = broker.as_ref().map_or(0, |(_, database)| *database);
        let is = |name| layers.choice(name, &YES_OR_NO);
        let settings = Self {
            backend: backend.map(|(address, _)| address),
            backend_prefix: separated(layers.text("TIDINGS_CELERY_BACKEND_PREFIX")),
            fanout_prefix: broker_prefix.clone() + &fanout_prefix(layers, database),
            broker: broker.map(|(address, _)| address),
            broker_prefix,
            event_exchange: layers.text("TIDINGS_CELERY_EVENT_EXCHANGE"),
            asks_workers: is("TIDINGS_CELERY_ASK_WORKERS")?,
            enables_events: is("TIDINGS_CELERY_ENABLE_EVENTS")?,
            lost_after: Duration::from_secs(layers.number("TIDINGS_CELERY_LOST_SECONDS", 1, 24 * 3600)?),
            tells_results: is("TIDINGS_CELERY_RESULTS")?,
            tells_arguments: is("TIDINGS_CELERY_KWARGS")?,
            tells_tracebacks: is("TIDINGS_CELERY_TRACEBACKS")?,
            value_bytes_max: layers.number("TIDINGS_CELERY_VALUE_BYTES_MAX", 64, 256 << 10)?,
            update_rate_max: layers.number("TIDINGS_CELERY_UPDATE_RATE_MAX", 1, 1000)?,
            takes_hints: match layers.optional("TIDINGS_CELERY_REPR_HINTS") {
                None => !has_rights(layers),
                Some(_) => is("TIDINGS_CELERY_REPR_HINTS")?,
            },
            shows_processes: is("TIDINGS_CELERY_PROCESSES")?,
            project_argument: layers.text("TIDINGS_CELERY_PROJECT_ARGUMENT"),
            rules: rules(layers)?,
        };
        settings.check(layers)?;
        Ok(settings)
    }

    /// Whether there is anything to listen to.
    pub fn is_on(&self) -> bool {
        self.backend.is_some() || self.broker.is_some()
    }

    fn check(&self, layers: &Layers) -> Result<(), SettingError> {
        if has_rights(layers) && self.takes_hints {
            let message =
                "would let a user's own text decide who sees a task; it goes with TIDINGS_AUTH=none only";
            return Err(layers.error("TIDINGS_CELERY_REPR_HINTS", message));
        }
        if self.enables_events && self.broker.is_none() {
            let message = "needs TIDINGS_CELERY_BROKER_URL, where workers listen";
            return Err(layers.error("TIDINGS_CELERY_ENABLE_EVENTS", message));
        }
        Ok(())
    }
}

/// Whether not everybody may see every project.
fn has_rights(layers: &Layers) -> bool {
    layers.optional("TIDINGS_AUTH").is_some_and(|ways| ways != "none")
}

/// A Redis as Celery's settings name it, and the number of the database.
fn redis(layers: &Layers, name: &'static str) -> Result<Option<(RedisAddress, u32)>, SettingError> {
    let Some(url) = layers.optional(name) else { return Ok(None) };
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    let hint = match scheme {
        "amqp" | "amqps" | "pyamqp" => {
            "RabbitMQ is not listened to: leave it unset, and set TIDINGS_CELERY_BACKEND_URL if results are in Redis"
        }
        "sentinel" => "write `redis+sentinel://host:port,host:port/master-name/database`",
        "redis+cluster" | "rediss+cluster" => "Celery has no Redis Cluster; name the server that it uses",
        "rpc" | "db+sqlite" | "db+postgresql" | "django-db" | "cache+memcached" => {
            "only results in Redis can be listened to: leave it unset, and set TIDINGS_CELERY_BROKER_URL for events"
        }
        _ => "",
    };
    if !hint.is_empty() {
        return Err(layers.error(name, hint));
    }
    // What stands behind the `?` is for Celery's own client.
    let url = url.split('?').next().unwrap_or(url);
    let address = RedisAddress::parse(url).map_err(|error| layers.error(name, error.to_string()))?;
    let database = address.database();
    Ok(Some((address, database)))
}

/// As the result backend has it: an underscore follows, unless a separator stands there already.
fn separated(prefix: String) -> String {
    let ends = prefix.is_empty() || prefix.ends_with([':', '_', '-', '.']);
    if ends { prefix } else { prefix + "_" }
}

/// As kombu has it: `/{db}.` unless it was changed; `none`: there is none.
fn fanout_prefix(layers: &Layers, database: u32) -> String {
    match layers.text("TIDINGS_CELERY_FANOUT_PREFIX") {
        none if none == "none" => String::new(),
        prefix => prefix.replace("{db}", &database.to_string()),
    }
}

fn rules(layers: &Layers) -> Result<Vec<Rule>, SettingError> {
    let Some(text) = layers.optional(RULES) else { return Ok(Vec::new()) };
    read_rules(text).map_err(|wrong| wrong.in_setting(layers, RULES))
}

fn read_rules(text: &str) -> Result<Vec<Rule>, Wrong> {
    let entries = tables::entries(text, RULES_MAX, "rules")?;
    entries.iter().enumerate().map(|(index, entry)| rule(&format!("celery.rules[{index}]"), entry)).collect()
}

fn rule(place: &str, entry: &Value) -> Result<Rule, Wrong> {
    let entry = tables::fields(place, entry, &FIELDS)?;
    let at = |field: &str| format!("{place}.{field}");
    let pattern = entry.get("task").and_then(Value::as_str).filter(|pattern| !pattern.is_empty());
    let expected = "expected the name of a task, or a pattern with `*`";
    let pattern = pattern.ok_or_else(|| Wrong::at(at("task"), expected))?;
    let tasks = Glob::new(pattern).map_err(|error| Wrong::at(at("task"), error.kind().to_string()))?;
    Ok(Rule { tasks: tasks.compile_matcher(), project: project_from(place, entry)? })
}

fn project_from(place: &str, entry: &Map<String, Value>) -> Result<ProjectFrom, Wrong> {
    let at = |field: &str| format!("{place}.{field}");
    let fields = ["project", "project_argument", "project_index"].map(|field| entry.get(field));
    match fields {
        [Some(project), None, None] => {
            let wrong = |message: String| Wrong::at(at("project"), message);
            let id = project.as_str().ok_or_else(|| wrong("expected the id of a project".to_owned()))?;
            ProjectId::try_from(id).map(ProjectFrom::Fixed).map_err(|error| wrong(error.to_string()))
        }
        [None, Some(argument), None] => {
            let name = argument.as_str().filter(|name| !name.is_empty());
            let name =
                name.ok_or_else(|| Wrong::at(at("project_argument"), "expected an argument's name"))?;
            Ok(ProjectFrom::Argument(name.to_owned()))
        }
        [None, None, Some(index)] => {
            let index = index.as_u64().filter(|index| *index <= INDEX_MAX);
            let index = index.and_then(|index| usize::try_from(index).ok());
            let expected = format!("expected a whole number from 0 to {INDEX_MAX}, an argument's place");
            index.map(ProjectFrom::Index).ok_or_else(|| Wrong::at(at("project_index"), expected))
        }
        _ => Err(Wrong::at(place, "expected one of `project`, `project_argument` and `project_index`")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::config::Flags;

    fn read(variables: &[(&str, &str)]) -> Result<CelerySettings, String> {
        let variables: BTreeMap<_, _> =
            variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let layers = Layers::load(&Flags::default(), &variables, None).map_err(|error| error.to_string())?;
        CelerySettings::read(&layers).map_err(|error| error.to_string())
    }

    #[test]
    fn channels_are_where_celery_has_them() {
        let broker = ("TIDINGS_CELERY_BROKER_URL", "redis://h:1/5?ssl_cert_reqs=required");
        assert_eq!(read(&[broker]).unwrap().fanout_prefix, "/5.");
        let prefixed = [broker, ("TIDINGS_CELERY_BROKER_PREFIX", "pfx:")];
        assert_eq!(read(&prefixed).unwrap().fanout_prefix, "pfx:/5.");
        for (fanout, expected) in [("none", ""), ("/my{db}.", "/my5.")] {
            let settings = read(&[broker, ("TIDINGS_CELERY_FANOUT_PREFIX", fanout)]).unwrap();
            assert_eq!(settings.fanout_prefix, expected);
        }
        for (prefix, expected) in [("app1", "app1_"), ("app1:", "app1:"), ("a-", "a-")] {
            assert_eq!(read(&[("TIDINGS_CELERY_BACKEND_PREFIX", prefix)]).unwrap().backend_prefix, expected);
        }
        assert!(!read(&[]).unwrap().is_on());
    }

    #[test]
    fn what_cannot_be_listened_to_is_told_with_what_to_do() {
        for (name, value, words) in [
            ("TIDINGS_CELERY_BROKER_URL", "amqp://guest@h//", "TIDINGS_CELERY_BACKEND_URL"),
            ("TIDINGS_CELERY_BROKER_URL", "sentinel://h:26379", "redis+sentinel://"),
            ("TIDINGS_CELERY_BACKEND_URL", "rpc://", "TIDINGS_CELERY_BROKER_URL"),
            ("TIDINGS_CELERY_BACKEND_URL", "redis+cluster://h", "no Redis Cluster"),
            ("TIDINGS_CELERY_BACKEND_URL", "h:6379", "redis://host:port"),
            ("TIDINGS_CELERY_ENABLE_EVENTS", "true", "needs TIDINGS_CELERY_BROKER_URL"),
            ("TIDINGS_CELERY_LOST_SECONDS", "0", "a whole number from 1"),
            ("TIDINGS_CELERY_VALUE_BYTES_MAX", "1", "a whole number from 64"),
        ] {
            let error = read(&[(name, value)]).unwrap_err();
            assert!(error.starts_with(name) && error.contains(words), "{error}");
        }
        let rights = [("TIDINGS_AUTH", "ticket"), ("TIDINGS_CELERY_REPR_HINTS", "true")];
        assert!(read(&rights).unwrap_err().contains("TIDINGS_AUTH=none"));
        assert!(read(&[]).unwrap().takes_hints && !read(&rights[..1]).unwrap().takes_hints);
    }

    #[test]
    fn a_rule_says_where_the_project_is_in_one_way() {
        let read =
            |rules: Value| read_rules(&rules.to_string()).map_err(|wrong| (wrong.place, wrong.message));
        let rules = read(json!([
            {"task": "app.video.*", "project_index": 1},
            {"task": "app.nightly", "project": "ops"},
            {"task": "*", "project_argument": "pid"},
        ]))
        .unwrap();
        assert!(rules[0].tasks.is_match("app.video.encode") && !rules[0].tasks.is_match("app.audio"));
        assert_eq!(rules[0].project, ProjectFrom::Index(1));
        assert_eq!(rules[2].project, ProjectFrom::Argument("pid".to_owned()));
        for (rule, place, words) in [
            (json!({"project": "p"}), "celery.rules[0].task", "the name of a task"),
            (json!({"task": "a[", "project": "p"}), "celery.rules[0].task", "unclosed"),
            (json!({"task": "a"}), "celery.rules[0]", "one of `project`"),
            (json!({"task": "a", "project": "p", "project_index": 0}), "celery.rules[0]", "one of `project`"),
            (json!({"task": "a", "project": "../x"}), "celery.rules[0].project", "segment"),
            (json!({"task": "a", "project_index": -1}), "celery.rules[0].project_index", "from 0 to 99"),
            (
                json!({"task": "a", "project_idx": 0}),
                "celery.rules[0].project_idx",
                "did you mean `project_index`?",
            ),
        ] {
            let (found, message) = read(json!([rule])).unwrap_err();
            assert!(found == place && message.contains(words), "{found}: {message}");
        }
    }
}
