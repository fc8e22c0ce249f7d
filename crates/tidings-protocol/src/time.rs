//! Timestamps as the wire has them: RFC 3339, UTC, `Z`, microseconds.

use std::{borrow::Cow, fmt};

use jiff::{civil::DateTime, tz::TimeZone};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Serialize, Serializer};

/// A moment, written as `2026-11-23T10:00:00.000000Z` (RFC 3339; nine digits only where a publisher gave nanoseconds).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(jiff::Timestamp);

impl Timestamp {
    /// Reads a publisher's timestamp: RFC 3339 with any offset, or without a zone, which then means UTC (what Python's
    /// `datetime.utcnow().isoformat()` writes).
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(moment) = text.parse::<jiff::Timestamp>() {
            return Some(Self(moment));
        }
        let civil: DateTime = text.parse().ok()?;
        TimeZone::UTC.to_timestamp(civil).ok().map(Self)
    }

    /// Whole seconds from `earlier` to this moment; negative if `earlier` is later.
    pub fn seconds_since(self, earlier: Self) -> i64 {
        self.0.as_second() - earlier.0.as_second()
    }

    /// Microseconds since 1970-01-01T00:00:00Z.
    pub fn as_microsecond(self) -> i64 {
        self.0.as_microsecond()
    }

    /// The moment so many microseconds after 1970-01-01T00:00:00Z; `None`: beyond any calendar.
    pub fn from_microsecond(microseconds: i64) -> Option<Self> {
        jiff::Timestamp::from_microsecond(microseconds).ok().map(Self)
    }

    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub fn as_millisecond(self) -> i64 {
        self.0.as_millisecond()
    }
}

impl From<jiff::Timestamp> for Timestamp {
    /// To the microsecond: what a clock says beyond that is noise, and longer on the wire.
    fn from(moment: jiff::Timestamp) -> Self {
        Self(jiff::Timestamp::from_microsecond(moment.as_microsecond()).unwrap_or(moment))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = if self.0.subsec_nanosecond() % 1000 == 0 { 6 } else { 9 };
        write!(f, "{:.digits$}", self.0)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for Timestamp {
    fn schema_name() -> Cow<'static, str> {
        "Timestamp".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "date-time"})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<&str>) {
        assert_eq!(Timestamp::parse(text).map(|moment| moment.to_string()).as_deref(), expected);
    }

    #[test]
    fn a_timestamp_is_normalised_to_utc_with_microseconds() {
        check("2026-11-23T01:56:28.960767", Some("2026-11-23T01:56:28.960767Z"));
        check("2026-11-23 01:56:28", Some("2026-11-23T01:56:28.000000Z"));
        check("2026-11-23T01:56:28.5+02:00", Some("2026-11-22T23:56:28.500000Z"));
        check("2026-11-23T10:00:00Z", Some("2026-11-23T10:00:00.000000Z"));
        check("2026-11-23T10:00:00.123456789Z", Some("2026-11-23T10:00:00.123456789Z"));
    }

    #[test]
    fn what_is_no_moment_is_no_timestamp() {
        for text in ["", "yesterday", "1795394141", "2026-13-01T00:00:00", "2026-11-23T25:00:00Z"] {
            check(text, None);
        }
    }
}
