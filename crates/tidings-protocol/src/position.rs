//! Where something stands in a stream.

use std::{fmt, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::invalid::Shape;

/// The number of an event in its stream: 1, 2, 3 …; 0 is the position before the first.
///
/// Stays below 2^53, because a JavaScript number is what most clients keep it in.
pub type Offset = u64;

/// One life of a stream: an opaque string of at most 64 characters. Offsets compare within one epoch only.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Epoch(#[schemars(length(max = 64))] Arc<str>);

impl Epoch {
    /// Takes any string as an epoch; one that no stream ever had simply matches none.
    pub fn new(epoch: impl Into<Arc<str>>) -> Self {
        Self(epoch.into())
    }

    /// The epoch as it is written on the wire.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A place in a stream: everything up to and including `offset` in this `epoch`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Position {
    /// The life of the stream that `offset` counts in.
    pub epoch: Epoch,
    /// The last event that the position includes.
    pub offset: Offset,
}

impl Shape for Position {
    const SHAPE: &'static str = "an object with epoch and offset";
}
