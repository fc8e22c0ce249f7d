//! The files in `schema/fixtures`.

use std::{fs, path::PathBuf};

use serde_json::Value;

/// One file of golden messages: `valid`, and `broken` with what is wrong.
pub(crate) struct Fixture {
    pub(crate) name: String,
    pub(crate) valid: Vec<Value>,
    pub(crate) broken: Vec<Value>,
}

pub(crate) fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The fixtures of one kind, in the order of their names.
pub(crate) fn load(kind: &str) -> Vec<Fixture> {
    let folder = repository().join("schema/fixtures").join(kind);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |path: &PathBuf| {
        let file: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        let list = |key: &str| file[key].as_array().unwrap().clone();
        Fixture {
            name: path.file_stem().unwrap().to_str().unwrap().to_owned(),
            valid: list("valid"),
            broken: list("broken"),
        }
    };
    files.iter().map(read).collect()
}
