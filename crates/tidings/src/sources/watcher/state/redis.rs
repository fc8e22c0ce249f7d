//! The state in Redis, for tables that any node may watch: a hash with a field for each file, so that little is written when
//! little has changed.

use std::sync::Arc;

use redis::{Value, cmd};
use tidings_engine::engine::redis::{Call, Servers};
use tokio::runtime::Handle;

use super::{StateError, Store, name_of};
use crate::sources::watcher::{
    announce::Progress,
    difference::Changes,
    index::{Entry, Index},
    path::RelPath,
};

/// Fields that are written or asked for at once: well within the time for an answer.
const FIELDS_MAX: usize = 2000;
/// How far announcing has come. Files' fields begin with `f`.
const PROGRESS: &[u8] = b"progress.1";

/// A name and a value.
type Field = (Vec<u8>, Vec<u8>);

/// See the module.
#[derive(Debug)]
pub(crate) struct RedisStore {
    servers: Arc<Servers>,
    /// Calls are made from a thread of the watcher's own.
    runtime: Handle,
    key: String,
}

impl RedisStore {
    pub(crate) fn new(servers: Arc<Servers>, runtime: Handle, table: &str) -> Self {
        Self { servers, runtime, key: format!("tidings:{{watch:{}}}", name_of(table)) }
    }

    fn call(&self, command: redis::Cmd) -> Result<Value, StateError> {
        let call = Call::repeatable(&self.key, command);
        self.runtime.block_on(self.servers.call(&call)).map_err(|fault| StateError::Redis(fault.to_string()))
    }

    fn put(&self, key: &str, files: &[(RelPath, Option<Entry>)]) -> Result<(), StateError> {
        let (mut set, mut delete) = (cmd("HSET"), cmd("HDEL"));
        let (mut sets, mut deletes) = (false, false);
        set.arg(key);
        delete.arg(key);
        for (path, entry) in files {
            if let Some(entry) = entry {
                set.arg(field_of(path)).arg(&entry.pack()[..]);
                sets = true;
            } else {
                delete.arg(field_of(path));
                deletes = true;
            }
        }
        if sets {
            self.call(set)?;
        }
        if deletes {
            self.call(delete)?;
        }
        Ok(())
    }

    fn put_progress(&self, key: &str, progress: Progress) -> Result<(), StateError> {
        let mut set = cmd("HSET");
        let text = format!("{} {} {}", progress.term, progress.batches, progress.device);
        set.arg(key).arg(PROGRESS).arg(text);
        self.call(set).map(|_| ())
    }
}

impl Store for RedisStore {
    fn load(&mut self) -> Result<Option<(Index, Progress)>, StateError> {
        let (mut index, mut progress, mut cursor) = (Index::default(), None, "0".to_owned());
        loop {
            let mut scan = cmd("HSCAN");
            scan.arg(&self.key).arg(&cursor).arg("COUNT").arg(FIELDS_MAX);
            let answer = self.call(scan)?;
            let (next, fields): (String, Vec<Field>) =
                redis::from_redis_value(answer).map_err(|error| StateError::Redis(error.to_string()))?;
            for (field, value) in fields {
                let damaged = || StateError::Damaged(self.key.clone());
                if field == PROGRESS {
                    progress = Some(progress_of(&value).ok_or_else(damaged)?);
                } else if let Some(path) = field.strip_prefix(b"f") {
                    index.put(&RelPath::stored(path), Entry::unpack(&value).ok_or_else(damaged)?);
                }
            }
            cursor = next;
            if cursor == "0" {
                return Ok(progress.map(|progress| (index, progress)));
            }
        }
    }

    fn replace(&mut self, index: &Index, progress: Progress) -> Result<(), StateError> {
        // In the same slot of a Cluster.
        let draft = format!("{}:draft", self.key);
        let mut delete = cmd("UNLINK");
        delete.arg(&draft);
        self.call(delete)?;
        let mut files = Vec::with_capacity(FIELDS_MAX);
        for (path, entry) in index.iter() {
            files.push((path, Some(entry)));
            if files.len() == FIELDS_MAX {
                self.put(&draft, &files)?;
                files.clear();
            }
        }
        self.put(&draft, &files)?;
        self.put_progress(&draft, progress)?;
        let mut rename = cmd("RENAME");
        rename.arg(&draft).arg(&self.key);
        self.call(rename).map(|_| ())
    }

    fn add(&mut self, _: &Index, changes: &Changes, progress: Progress) -> Result<(), StateError> {
        let files: Vec<_> = changes.iter().map(|(path, change)| (path.clone(), change.after)).collect();
        files.chunks(FIELDS_MAX).try_for_each(|files| self.put(&self.key, files))?;
        self.put_progress(&self.key, progress)
    }
}

fn field_of(path: &RelPath) -> Vec<u8> {
    [b"f", path.as_bytes()].concat()
}

fn progress_of(text: &[u8]) -> Option<Progress> {
    let mut numbers = std::str::from_utf8(text).ok()?.split(' ').map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(Progress { term: next()?, batches: next()?, device: next()? })
}
