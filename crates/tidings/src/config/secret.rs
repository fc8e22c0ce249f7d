//! Secrets that sign something.

use std::fmt;

use super::{Layers, SettingError};

/// What is shorter can be guessed from one thing that it signed.
const BYTES_MIN: usize = 16;

/// What no log may show.
#[derive(Clone)]
pub(crate) struct Secret(String);

impl Secret {
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("********")
    }
}

/// Several at once, comma separated, while one replaces another.
pub(super) fn secrets(layers: &Layers, name: &'static str) -> Result<Vec<Secret>, SettingError> {
    let secrets = layers.list(name);
    let is_short = |secret: &String| secret.len() < BYTES_MIN;
    if secrets.iter().any(is_short) || (layers.is_set(name) && secrets.is_empty()) {
        let message = format!(
            "expected at least {BYTES_MIN} bytes, of each of several with commas between them; `openssl rand -hex 32` makes one"
        );
        return Err(layers.error(name, message));
    }
    Ok(secrets.into_iter().map(Secret).collect())
}
