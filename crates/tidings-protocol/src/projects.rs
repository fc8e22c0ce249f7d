//! To which projects somebody has rights: `projects` of a session, a token, a ticket or a key.

use std::sync::Arc;

use serde_json::Value;

use crate::{Audience, ProjectId};

/// Entries that one list may have.
const ENTRIES_MAX: usize = 10_000;
/// An entry longer than an id can be matches nothing; one much longer is no list of projects.
const ENTRY_BYTES_MAX: usize = 1000;

/// A set of projects: everything, or what a list of ids and patterns names. Clones share the list.
///
/// In a pattern, `*` stands for any text within one segment between slashes: `team-a/*` has `team-a/web`, and neither
/// `team-a` nor `team-a/web/old`. All else is compared byte for byte, as ids are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Projects(Set);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Set {
    Everything,
    Listed(Arc<Listed>),
}

/// Each sorted and without repetition, so that lists that mean the same compare equal.
#[derive(Debug, Default, PartialEq, Eq, Hash)]
struct Listed {
    ids: Box<[Box<str>]>,
    patterns: Box<[Box<str>]>,
}

impl Default for Set {
    fn default() -> Self {
        Self::Listed(Arc::default())
    }
}

impl Projects {
    /// Every project, and what belongs to none.
    pub const fn everything() -> Self {
        Self(Set::Everything)
    }

    /// No project.
    pub fn none() -> Self {
        Self::default()
    }

    /// The projects that ids and patterns name. What cannot be an id of a project matches nothing.
    pub fn listed<S: AsRef<str>>(entries: &[S]) -> Self {
        let sorted = |wanted: &dyn Fn(&str) -> bool| -> Box<[Box<str>]> {
            let entries = entries.iter().map(AsRef::as_ref).filter(|entry| wanted(entry));
            let mut entries: Vec<Box<str>> = entries.map(Box::from).collect();
            entries.sort_unstable();
            entries.dedup();
            entries.into_boxed_slice()
        };
        let (ids, patterns) = (sorted(&|entry| !entry.contains('*')), sorted(&|entry| entry.contains('*')));
        Self(Set::Listed(Arc::new(Listed { ids, patterns })))
    }

    /// Reads `projects` as a session or a token has it: `"*"`, or a list of ids and patterns; absent or null: none. Else
    /// what is wrong with it.
    pub fn read(value: Option<&Value>) -> Result<Self, String> {
        let entries = match value {
            None | Some(Value::Null) => return Ok(Self::none()),
            Some(Value::String(text)) if text == "*" => return Ok(Self::everything()),
            Some(Value::Array(entries)) if entries.len() <= ENTRIES_MAX => entries,
            Some(Value::Array(_)) => return Err(format!("expected at most {ENTRIES_MAX} projects")),
            Some(_) => return Err("expected a list of ids and patterns, or `\"*\"`".to_owned()),
        };
        let entry = |(place, entry): (usize, &Value)| match entry.as_str() {
            Some(text) if text.len() <= ENTRY_BYTES_MAX => Ok(text.to_owned()),
            Some(_) => Err(format!("{place}: expected at most {ENTRY_BYTES_MAX} bytes")),
            None => Err(format!("{place}: expected a string")),
        };
        let entries: Vec<_> = entries.iter().enumerate().map(entry).collect::<Result<_, _>>()?;
        Ok(Self::listed(&entries))
    }

    /// As [`Projects::read`] takes it.
    pub fn to_value(&self) -> Value {
        match &self.0 {
            Set::Everything => Value::from("*"),
            Set::Listed(_) => self.entries().collect(),
        }
    }

    /// Whether it is every project, and what belongs to none.
    pub fn is_everything(&self) -> bool {
        self.0 == Set::Everything
    }

    /// Whether the project is one of them.
    pub fn include(&self, project: &ProjectId) -> bool {
        match &self.0 {
            Set::Everything => true,
            Set::Listed(listed) => {
                let Listed { ids, patterns } = &**listed;
                let id = project.as_str();
                ids.binary_search_by(|known| (**known).cmp(id)).is_ok()
                    || patterns.iter().any(|pattern| matches(pattern, id))
            }
        }
    }

    /// Whether others name no project that is not among these. A pattern has to be here as it is: whether all that it matches is
    /// matched by several others is not asked.
    pub fn include_all(&self, others: &Self) -> bool {
        let includes = |entry: &str| match &self.0 {
            Set::Everything => true,
            Set::Listed(listed) => {
                let Listed { ids, patterns } = &**listed;
                let is_here = |entries: &[Box<str>]| entries.iter().any(|known| **known == *entry);
                is_here(ids)
                    || is_here(patterns)
                    || !entry.contains('*') && patterns.iter().any(|known| matches(known, entry))
            }
        };
        self.is_everything() || (!others.is_everything() && others.entries().all(includes))
    }

    /// Whether an event for this audience is for whoever has these rights.
    pub fn include_audience(&self, audience: &Audience) -> bool {
        match audience {
            Audience::Project(project) | Audience::RightsToProject(project) => self.include(project),
            Audience::RightsToEverything => self.is_everything(),
            Audience::Everyone => true,
        }
    }

    /// The ids and patterns of a list.
    pub fn entries(&self) -> impl Iterator<Item = &str> {
        let (ids, patterns): (&[_], &[_]) = match &self.0 {
            Set::Everything => (&[], &[]),
            Set::Listed(listed) => (&listed.ids, &listed.patterns),
        };
        ids.iter().chain(patterns).map(AsRef::as_ref)
    }
}

/// Whether an id has the form of a pattern, segment by segment.
fn matches(pattern: &str, id: &str) -> bool {
    let mut segments = id.split('/');
    let all = pattern.split('/').all(|pattern| {
        segments.next().is_some_and(|segment| segment_matches(pattern.as_bytes(), segment.as_bytes()))
    });
    all && segments.next().is_none()
}

/// Whether a segment has the form of a pattern in which `*` stands for any text. Never more than the product of both lengths
/// of work: it is enough to go back to the last `*`.
fn segment_matches(pattern: &[u8], segment: &[u8]) -> bool {
    let (mut at, mut position) = (0, 0);
    let mut star = None;
    while position < segment.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, position));
                at += 1;
            }
            Some(byte) if *byte == segment[position] => {
                at += 1;
                position += 1;
            }
            _ => {
                let Some((star_at, taken)) = star else { return false };
                star = Some((star_at, taken + 1));
                (at, position) = (star_at + 1, taken + 1);
            }
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(entries: &[&str], included: &[&str], excluded: &[&str]) {
        let projects = Projects::listed(entries);
        let has = |id: &&str| projects.include(&ProjectId::try_from(*id).unwrap());
        for id in included {
            assert!(has(id), "{entries:?} should include {id}");
        }
        for id in excluded {
            assert!(!has(id), "{entries:?} should not include {id}");
        }
    }

    #[test]
    fn an_id_is_itself_and_nothing_that_looks_like_it() {
        check(
            &["p1", "team-a/web"],
            &["p1", "team-a/web"],
            &["p", "p10", "P1", "p1/", "team-a", "team-a/we"],
        );
        // A Cyrillic letter, a composed and a decomposed one, a full-width one.
        check(&["alpha", "caf\u{e9}", "p1"], &["alpha"], &["\u{430}lpha", "cafe\u{301}", "\u{ff50}1"]);
    }

    #[test]
    fn a_star_stays_within_its_segment() {
        check(
            &["team-a/*"],
            &["team-a/web", "team-a/"],
            &["team-a", "team-b/web", "team-a/web/old", "x/team-a/web"],
        );
        check(&["*"], &["p1"], &["a/b"]);
        check(&["*/*"], &["a/b"], &["a", "a/b/c"]);
        check(&["a*c*e/x"], &["ace/x", "abcde/x", "abcecde/x"], &["ac/x", "abce", "a/ce/x"]);
        check(&["ab*ba"], &["abba", "abxba"], &["aba"]);
        check(&["**"], &["p1"], &["a/b"]);
        check(&["team-a*"], &["team-a", "team-ab"], &["team-a/web"]);
        check(&["?", "[ab]", "p{1,2}", "p."], &["?", "[ab]"], &["a", "p1", "px"]);
        check(&[], &[], &["p1"]);
    }

    #[test]
    fn others_are_included_if_each_of_their_entries_is() {
        let (few, everything) = (Projects::listed(&["p1", "team-a/*"]), Projects::everything());
        for entries in [&[][..], &["p1"], &["team-a/web"], &["team-a/*", "p1"]] {
            assert!(few.include_all(&Projects::listed(entries)), "{entries:?}");
        }
        for entries in
            [&["p2"][..], &["p1", "team-b/web"], &["*"], &["team-*/*"], &["team-a/w*"], &["team-a/*/*"]]
        {
            assert!(!few.include_all(&Projects::listed(entries)), "{entries:?}");
        }
        assert!(
            !few.include_all(&everything)
                && everything.include_all(&everything)
                && everything.include_all(&few)
        );
    }

    #[test]
    fn what_a_session_says_is_read_or_explained() {
        assert_eq!(Projects::read(None), Ok(Projects::none()));
        assert_eq!(Projects::read(Some(&Value::Null)), Ok(Projects::none()));
        assert_eq!(Projects::read(Some(&json!("*"))), Ok(Projects::everything()));
        let listed = Projects::read(Some(&json!(["b", "a", "b", "c/*"]))).unwrap();
        assert_eq!(listed, Projects::listed(&["c/*", "a", "b"]));
        assert_eq!(Projects::read(Some(&listed.to_value())), Ok(listed));
        // In a list it is a pattern like any other.
        assert!(!Projects::read(Some(&json!(["*"]))).unwrap().is_everything());
        for (value, words) in [
            (json!("p1"), "a list of ids and patterns"),
            (json!({"p1": true}), "a list of ids and patterns"),
            (json!(["p1", 7]), "1: expected a string"),
            (json!(["x".repeat(1001)]), "0: expected at most 1000 bytes"),
            (json!(vec!["p"; 10_001]), "at most 10000 projects"),
        ] {
            assert!(Projects::read(Some(&value)).unwrap_err().contains(words), "{value}");
        }
    }

    #[test]
    fn what_belongs_to_no_project_is_for_everybody_or_for_those_with_rights_to_everything() {
        let project = |id: &str| Audience::RightsToProject(ProjectId::try_from(id).unwrap());
        let some = Projects::listed(&["a"]);
        assert!(some.include_audience(&project("a")) && some.include_audience(&Audience::Everyone));
        assert!(
            !some.include_audience(&project("b")) && !some.include_audience(&Audience::RightsToEverything)
        );
        assert!(Projects::everything().include_audience(&Audience::RightsToEverything));
    }
}
