//! The event types that this protocol defines: their fields as types, from which both the check of an incoming event
//! and the JSON Schema are made.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize, de::IgnoredAny};
use serde_json::{Value, value::RawValue};

use crate::{
    ProjectId, RawObject,
    event::Class,
    invalid::{InvalidField, Object, Shape, read},
};

/// A JSON value that nobody here looks into.
#[derive(Clone, Copy, Debug, Default)]
struct Anything;

impl<'de> Deserialize<'de> for Anything {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self)
    }
}

impl JsonSchema for Anything {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Anything".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        true.into()
    }
}

/// What the rest of the service needs from a known event beyond its text.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    pub(crate) project_id: Option<ProjectId>,
    /// The key under which a newer event replaces this one; `None`: durable.
    pub(crate) latest_key: Option<String>,
    pub(crate) workspace_id: Option<String>,
    /// What `progress.percentage` is filled in with.
    pub(crate) percentage: Option<f64>,
}

/// One row of the table of known types.
pub(crate) struct Known {
    pub(crate) name: &'static str,
    pub(crate) check: fn(&str) -> Result<Facts, InvalidField>,
    pub(crate) schema: fn(&mut SchemaGenerator) -> Schema,
}

trait KnownFields: for<'de> Deserialize<'de> + JsonSchema {
    /// What types alone cannot say, and what others need to know.
    fn facts(self) -> Result<Facts, InvalidField>;
}

const fn known<T: KnownFields>(name: &'static str) -> Known {
    Known { name, check: |text| read::<T>(text)?.facts(), schema: T::json_schema }
}

/// Every known type, in the order of the reference.
pub(crate) static KNOWN: [Known; 14] = [
    known::<ProjectChange>("project.created"),
    known::<ProjectChange>("project.updated"),
    known::<ProjectChange>("project.deleted"),
    known::<FileTransfer>("file.uploaded"),
    known::<FileTransfer>("file.deleted"),
    known::<FileChanged>("file.changed"),
    known::<WorkspaceChanged>("workspace.changed"),
    known::<TaskStarted>("task.started"),
    known::<TaskProgress>("task.progress"),
    known::<TaskCompleted>("task.completed"),
    known::<TaskFailed>("task.failed"),
    known::<ProcessStarted>("process.started"),
    known::<ProcessProgress>("process.progress"),
    known::<ProcessCompleted>("process.completed"),
];

/// The names of the known event types, in the order of the reference.
pub static KNOWN_TYPES: [&str; 14] = {
    let mut names = [""; 14];
    let mut index = 0;
    while index < names.len() {
        names[index] = KNOWN[index].name;
        index += 1;
    }
    names
};

/// The row of a type, if it is known.
pub(crate) fn find(event_type: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|known| known.name == event_type)
}

/// The class of an event whose newest one of `key` stands for all of them.
pub(crate) fn latest_class(event_type: &str, key: &str) -> Class {
    // The type is part of the key: a task and a file may share a name.
    Class::Latest { key: format!("{event_type}:{key}").into() }
}

/// A project was created, changed or deleted.
#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
struct ProjectChange {
    /// The project; absent or null: taken from `data.project_id`, then `data.id`.
    project_id: Option<ProjectId>,
    /// The project as the application describes it.
    #[schemars(with = "Option<Value>")]
    data: Option<Box<RawValue>>,
}

impl KnownFields for ProjectChange {
    fn facts(self) -> Result<Facts, InvalidField> {
        let project_id = match self.project_id {
            Some(project_id) => project_id,
            None => project_from_data(self.data.as_deref())?,
        };
        Ok(Facts { project_id: Some(project_id), ..Facts::default() })
    }
}

fn project_from_data(data: Option<&RawValue>) -> Result<ProjectId, InvalidField> {
    let data = data.and_then(|data| RawObject::parse(data.get()).ok());
    let member = |key: &str| data.as_ref().and_then(|data| data.get(key));
    let (field, value) = match (member("project_id"), member("id")) {
        (Some(value), _) => ("data.project_id", value),
        (None, Some(value)) => ("data.id", value),
        (None, None) => {
            return Err(InvalidField::new("project_id", "is required (or `data.project_id`, or `data.id`)"));
        }
    };
    let Ok(text) = serde_json::from_str::<String>(value) else {
        return Err(InvalidField::new(field, "expected a string, because it stands for `project_id`"));
    };
    ProjectId::try_from(text.as_str()).map_err(|error| InvalidField::new(field, error.0))
}

/// A file was uploaded or deleted.
#[derive(Deserialize, JsonSchema)]
#[schemars(extend("anyOf" = [{"required": ["file"]}, {"required": ["file_path"]}]))]
struct FileTransfer {
    project_id: ProjectId,
    file: Option<Object<File>>,
    /// The file's path, for those that have nothing else to say of it.
    file_path: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
pub(crate) struct File {
    name: String,
    path: String,
    /// Bytes.
    size: Option<u64>,
    /// What the application calls this kind of file, as `image` or `dataset`.
    asset_type: Option<String>,
}

impl Shape for File {
    const SHAPE: &'static str = "an object with name and path";
}

impl KnownFields for FileTransfer {
    fn facts(self) -> Result<Facts, InvalidField> {
        if self.file.is_none() && self.file_path.is_none() {
            return Err(InvalidField::new("file", "expected an object with name and path (or `file_path`)"));
        }
        Ok(Facts { project_id: Some(self.project_id), ..Facts::default() })
    }
}

/// A file changed in place, appeared or went away.
#[derive(Deserialize, JsonSchema)]
struct FileChanged {
    project_id: ProjectId,
    file_path: String,
    change_type: ChangeType,
}

#[derive(Deserialize, JsonSchema, PartialEq)]
#[serde(rename_all = "lowercase")]
enum ChangeType {
    Modified,
    Created,
    Deleted,
}

impl KnownFields for FileChanged {
    fn facts(self) -> Result<Facts, InvalidField> {
        // That a file was modified again says all that the first modification said; that it came or went does not.
        let latest_key = (self.change_type == ChangeType::Modified).then_some(self.file_path);
        Ok(Facts { project_id: Some(self.project_id), latest_key, ..Facts::default() })
    }
}

/// Several files of a workspace changed together.
#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
struct WorkspaceChanged {
    workspace_id: String,
    changes: Object<Changes>,
    project_id: Option<ProjectId>,
    /// The lists were too long to send; `counts` stands in their place.
    truncated: Option<bool>,
    /// Changes per folder, where `truncated`.
    #[schemars(with = "Option<Value>")]
    counts: Option<Anything>,
}

#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
struct Changes {
    added: Option<Vec<String>>,
    modified: Option<Vec<String>>,
    deleted: Option<Vec<String>>,
}

impl Shape for Changes {
    const SHAPE: &'static str = "an object with lists added, modified, deleted";
}

impl KnownFields for WorkspaceChanged {
    fn facts(self) -> Result<Facts, InvalidField> {
        Ok(Facts { project_id: self.project_id, workspace_id: Some(self.workspace_id), ..Facts::default() })
    }
}

/// Implements [`KnownFields`] for types that only say to which project they belong.
macro_rules! durable_in_project {
    ($($name:ident),*) => {$(
        impl KnownFields for $name {
            fn facts(self) -> Result<Facts, InvalidField> {
                Ok(Facts { project_id: Some(self.project_id), ..Facts::default() })
            }
        }
    )*};
}
durable_in_project!(TaskStarted, TaskCompleted, TaskFailed, ProcessStarted, ProcessCompleted);

/// A task began (or began again, with a higher `attempt`).
#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
struct TaskStarted {
    project_id: ProjectId,
    task_id: String,
    task_name: String,
    #[schemars(with = "Option<Value>")]
    metadata: Option<Anything>,
    /// 0 for the first run, 1 for the first retry, and so on.
    attempt: Option<u32>,
}

/// How far a task is.
#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
struct TaskProgress {
    project_id: ProjectId,
    task_id: String,
    progress: Object<Progress>,
    message: Option<String>,
    #[schemars(with = "Option<Value>")]
    metadata: Option<Anything>,
    attempt: Option<u32>,
}

#[derive(Deserialize, JsonSchema)]
pub(crate) struct Progress {
    current: f64,
    total: f64,
    /// 0 to 100; filled in when absent.
    percentage: Option<f64>,
}

impl Shape for Progress {
    const SHAPE: &'static str = "an object with current and total";
}

impl KnownFields for TaskProgress {
    fn facts(self) -> Result<Facts, InvalidField> {
        let Object(Progress { current, total, percentage }) = self.progress;
        let percentage = percentage.is_none().then(|| percent(current, total));
        Ok(Facts {
            project_id: Some(self.project_id),
            latest_key: Some(self.task_id),
            percentage,
            ..Facts::default()
        })
    }
}

/// `current` of `total` as 0 to 100 with at most two decimals; 0 for a `total` of 0.
fn percent(current: f64, total: f64) -> f64 {
    if total <= 0.0 {
        return 0.0;
    }
    (current / total * 10_000.0).round().clamp(0.0, 10_000.0) / 100.0
}

/// A task reached its end.
#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
struct TaskCompleted {
    project_id: ProjectId,
    task_id: String,
    #[schemars(with = "Option<Value>")]
    result: Option<Anything>,
    attempt: Option<u32>,
}

/// A task ended without reaching its end.
#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
struct TaskFailed {
    project_id: ProjectId,
    task_id: String,
    error: String,
    traceback: Option<String>,
    /// `error`, `revoked`, `expired`, `time_limit`, `worker_lost`, `rejected`, `not_run` or `lost`.
    reason: Option<String>,
    attempt: Option<u32>,
}

/// A process began: anything with a progress that is no Celery task.
#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
struct ProcessStarted {
    project_id: ProjectId,
    process_id: String,
    message: Option<String>,
}

/// How far a process is.
#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
struct ProcessProgress {
    project_id: ProjectId,
    process_id: String,
    /// Percent.
    #[schemars(range(min = 0, max = 100))]
    progress: f64,
    message: Option<String>,
}

impl KnownFields for ProcessProgress {
    fn facts(self) -> Result<Facts, InvalidField> {
        if !(0.0..=100.0).contains(&self.progress) {
            return Err(InvalidField::new("progress", "expected a number from 0 to 100"));
        }
        Ok(Facts { project_id: Some(self.project_id), latest_key: Some(self.process_id), ..Facts::default() })
    }
}

/// A process ended.
#[derive(Deserialize, JsonSchema)]
#[allow(dead_code, reason = "fields that only the schema and the type check need")]
struct ProcessCompleted {
    project_id: ProjectId,
    process_id: String,
    message: Option<String>,
    /// `success` where absent.
    outcome: Option<Outcome>,
    error: Option<String>,
}

#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Success,
    Failed,
}
