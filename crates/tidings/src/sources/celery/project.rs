//! Which project a task belongs to: what says so, and how much that is worth.

use serde_json::Value;
use tidings_protocol::{ProjectId, RawObject};

use crate::config::{ProjectFrom, Rule};

use super::json::value_of;

/// How a project was found, the least reliable first. What was found is replaced only by something more reliable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// A task that it came from belongs there.
    Inherited,
    /// It stands in the text that Python makes of arguments.
    Hint,
    /// A worker said so when it was asked.
    Asked,
    /// The task's own code said so in an update.
    Update,
    /// It is an argument, or a rule of the settings says so.
    Arguments,
    /// It is stamped on the task.
    Stamp,
    /// Whoever sent the task has registered it.
    Registered,
}

impl Rank {
    /// As it stands in what is kept, and in what `tidings doctor` shows.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Inherited => "inherited",
            Self::Hint => "hint",
            Self::Asked => "asked",
            Self::Update => "update",
            Self::Arguments => "arguments",
            Self::Stamp => "stamp",
            Self::Registered => "registered",
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        use Rank::{Arguments, Asked, Hint, Inherited, Registered, Stamp, Update};
        let all = [Inherited, Hint, Asked, Update, Arguments, Stamp, Registered];
        all.into_iter().find(|rank| rank.as_str() == text)
    }
}

/// Where the projects of tasks are.
#[derive(Clone, Debug)]
pub(super) struct Finder {
    pub(super) argument: String,
    pub(super) rules: Vec<Rule>,
    /// Whether Python's text of arguments is looked at.
    pub(super) takes_hints: bool,
}

impl Finder {
    /// By the arguments, as JSON; `None`: they do not say.
    pub(super) fn in_arguments(
        &self,
        name: Option<&str>,
        args: Option<&str>,
        kwargs: Option<&str>,
    ) -> Option<ProjectId> {
        match self.place(name) {
            Place::Fixed(project) => Some(project.clone()),
            Place::Argument(argument) => {
                let kwargs = RawObject::parse(kwargs?).ok()?;
                kwargs.get(argument).and_then(value_of).and_then(|value| identifier(&value))
            }
            Place::Index(index) => {
                let args = value_of(args?)?;
                args.get(index).and_then(identifier)
            }
        }
    }

    /// By the text that Python makes of the arguments.
    pub(super) fn in_representation(
        &self,
        name: Option<&str>,
        args: Option<&str>,
        kwargs: Option<&str>,
    ) -> Option<(Rank, ProjectId)> {
        let place = self.place(name);
        if let Place::Fixed(project) = place {
            return Some((Rank::Arguments, project.clone()));
        }
        if !self.takes_hints {
            return None;
        }
        let text = match place {
            Place::Argument(argument) => super::repr::project_in(kwargs?, argument),
            Place::Index(index) => super::repr::positional_in(args?, index),
            Place::Fixed(_) => None,
        };
        ProjectId::try_from(text?.as_str()).ok().map(|project| (Rank::Hint, project))
    }

    fn place(&self, name: Option<&str>) -> Place<'_> {
        let rule = name.and_then(|name| self.rules.iter().find(|rule| rule.tasks.is_match(name)));
        match rule.map(|rule| &rule.project) {
            None => Place::Argument(&self.argument),
            Some(ProjectFrom::Argument(argument)) => Place::Argument(argument),
            Some(ProjectFrom::Fixed(project)) => Place::Fixed(project),
            Some(ProjectFrom::Index(index)) => Place::Index(*index),
        }
    }
}

enum Place<'a> {
    Fixed(&'a ProjectId),
    Argument(&'a str),
    Index(usize),
}

/// A project's id as Python code has it: text, a whole number, or a UUID, which Celery's JSON writes as an object of its own.
pub(super) fn identifier(value: &Value) -> Option<ProjectId> {
    match value {
        Value::String(text) => ProjectId::try_from(text.as_str()).ok(),
        Value::Number(number) if number.is_i64() || number.is_u64() => {
            ProjectId::try_from(number.to_string().as_str()).ok()
        }
        Value::Object(tagged) if tagged.get("__type__")? == "uuid" => {
            let hex = tagged.get("__value__")?.get("hex")?.as_str()?;
            let uuid = uuid::Uuid::try_parse(hex).ok()?;
            ProjectId::try_from(uuid.hyphenated().to_string().as_str()).ok()
        }
        // A stamp may be a list.
        Value::Array(values) => match values.as_slice() {
            [Value::Array(_)] => None,
            [value] => identifier(value),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use globset::Glob;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_identifier_is_text_a_whole_number_or_a_uuid() {
        let uuid = json!({"__type__": "uuid", "__value__": {"hex": "123e4567e89b12d3a456426614174000"}});
        for (value, expected) in [
            (json!("p-1"), Some("p-1")),
            (json!(42), Some("42")),
            (json!(["p-1"]), Some("p-1")),
            (uuid, Some("123e4567-e89b-12d3-a456-426614174000")),
            (json!(1.5), None),
            (json!(true), None),
            (json!(null), None),
            (json!(""), None),
            (json!("*"), None),
            (json!(["a", "b"]), None),
            (json!([["a"]]), None),
            (json!({"__type__": "date", "__value__": "p"}), None),
        ] {
            assert_eq!(identifier(&value).as_ref().map(ProjectId::as_str), expected, "{value}");
        }
    }

    #[test]
    fn a_rule_says_where_the_project_of_its_tasks_is_and_nothing_else_counts_then() {
        let rule = |task: &str, project| Rule {
            tasks: Glob::new(task).expect("a pattern").compile_matcher(),
            project,
        };
        let finder = Finder {
            argument: "project_id".to_owned(),
            rules: vec![
                rule("app.fixed", ProjectFrom::Fixed(ProjectId::try_from("ops").expect("an id"))),
                rule("app.second.*", ProjectFrom::Index(1)),
            ],
            takes_hints: false,
        };
        let (args, kwargs) = (Some(r#"["a", "b"]"#), Some(r#"{"project_id": "p-1"}"#));
        for (name, args, kwargs, expected) in [
            (Some("app.other"), args, kwargs, Some("p-1")),
            (None, args, kwargs, Some("p-1")),
            (Some("app.fixed"), args, kwargs, Some("ops")),
            (Some("app.second.x"), args, kwargs, Some("b")),
            (Some("app.second.x"), Some("[]"), kwargs, None),
            (Some("app.other"), args, Some(r#"{"project_id": NaN, "x": 1}"#), None),
            (Some("app.other"), args, None, None),
        ] {
            let found = finder.in_arguments(name, args, kwargs);
            assert_eq!(found.as_ref().map(ProjectId::as_str), expected, "{name:?} {args:?} {kwargs:?}");
        }
        let hint = finder.in_representation(Some("app.other"), None, Some("{'project_id': 'p-1'}"));
        assert_eq!(hint, None, "hints are switched off");
    }
}
