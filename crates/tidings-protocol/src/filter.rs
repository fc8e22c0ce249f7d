//! Which event types a subscription wants.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::EventType;

/// The most patterns that one subscription may carry.
const PATTERNS_MAX: usize = 100;

/// The `types` of a subscription: each an exact type, `word.*` or `*`. Without any, everything passes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TypeFilter {
    /// Sorted and without repetition, so that filters that mean the same compare equal; empty: everything passes.
    patterns: Vec<Pattern>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Pattern {
    Word(Box<str>),
    Exact(EventType),
}

/// A pattern that matches nothing because it is not well formed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPattern {
    /// `types` was there and had nothing in it: a subscription to nothing is a mistake.
    #[error("expected at least one pattern; leave `types` out for everything")]
    Empty,
    /// More than 100 patterns.
    #[error("expected at most {PATTERNS_MAX} patterns")]
    TooMany,
    /// Neither a type nor `word.*` nor `*`.
    #[error("`{0}` is neither an event type, nor `word.*`, nor `*`")]
    Malformed(String),
}

/// What `types` looks like in a client's message, for the schema.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Patterns(#[schemars(length(min = 1, max = 100))] pub(crate) Vec<String>);

impl TypeFilter {
    /// The filter that lets everything pass.
    pub fn everything() -> Self {
        Self::default()
    }

    /// Reads patterns as a client sends them.
    pub fn parse<S: AsRef<str>>(patterns: &[S]) -> Result<Self, InvalidPattern> {
        if patterns.is_empty() {
            return Err(InvalidPattern::Empty);
        }
        if patterns.len() > PATTERNS_MAX {
            return Err(InvalidPattern::TooMany);
        }
        let mut parsed = Vec::with_capacity(patterns.len());
        let mut everything = false;
        for pattern in patterns.iter().map(AsRef::as_ref) {
            match parse_pattern(pattern) {
                Some(pattern) => parsed.push(pattern),
                None if pattern == "*" => everything = true,
                None => return Err(InvalidPattern::Malformed(pattern.chars().take(120).collect())),
            }
        }
        if everything {
            return Ok(Self::everything());
        }
        parsed.sort_unstable();
        parsed.dedup();
        Ok(Self { patterns: parsed })
    }

    /// The patterns as a client sends them; none: everything passes.
    pub fn patterns(&self) -> impl Iterator<Item = String> {
        self.patterns.iter().map(|pattern| match pattern {
            Pattern::Word(word) => format!("{word}.*"),
            Pattern::Exact(exact) => exact.to_string(),
        })
    }

    /// Whether an event of this type passes.
    pub fn matches(&self, event_type: &EventType) -> bool {
        self.patterns.is_empty()
            || self.patterns.iter().any(|pattern| match pattern {
                Pattern::Word(word) => event_type.first_word() == &**word,
                Pattern::Exact(exact) => exact == event_type,
            })
    }
}

fn parse_pattern(text: &str) -> Option<Pattern> {
    if let Some(word) = text.strip_suffix(".*") {
        // A word is well formed where `word.x` is a type.
        let well_formed = !word.contains('.') && EventType::try_from(format!("{word}.x").as_str()).is_ok();
        return well_formed.then(|| Pattern::Word(word.into()));
    }
    EventType::try_from(text).ok().map(Pattern::Exact)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(patterns: &[&str], event_type: &str, passes: bool) {
        let filter = TypeFilter::parse(patterns).unwrap();
        assert_eq!(
            filter.matches(&EventType::try_from(event_type).unwrap()),
            passes,
            "{patterns:?} {event_type}"
        );
    }

    #[test]
    fn patterns_match_exactly_by_word_or_everything() {
        check(&["task.progress"], "task.progress", true);
        check(&["task.progress"], "task.started", false);
        check(&["task.*"], "task.started", true);
        check(&["task.*"], "task.sub.step", true);
        check(&["task.*"], "tasks.started", false);
        check(&["file.*", "task.failed"], "task.failed", true);
        check(&["file.*", "*"], "custom.thing", true);
    }

    #[test]
    fn malformed_patterns_are_named() {
        assert_eq!(TypeFilter::parse::<&str>(&[]), Err(InvalidPattern::Empty));
        for bad in ["", "task", "task*", "*.started", "Task.*", "a.b.*", ".*"] {
            assert_eq!(TypeFilter::parse(&[bad]), Err(InvalidPattern::Malformed(bad.into())));
        }
    }
}
