mod dictionaries;
mod saferepr;

use serde_json::Value as Json;

use self::dictionaries::Maker;
use self::saferepr::{Celery, Value, saferepr};
use super::{DEPTH_MAX, positional_in, project_in};

/// What the real `saferepr` made; `make_reprs.py` beside it has the format.
const REPRS: &str = include_str!("../../../../tests/celery/reprs.ndjson");

#[derive(Default, Debug)]
struct Tally {
    right: usize,
    none: usize,
}

impl Tally {
    fn note(&mut self, found: Option<&str>, truth: Option<&str>, repr: &str) {
        match found {
            None => self.none += 1,
            Some(_) if found == truth => self.right += 1,
            Some(_) => panic!("found {found:?}, not {truth:?}, in {repr}"),
        }
    }
}

fn golden() -> impl Iterator<Item = Json> {
    REPRS.lines().map(|line| serde_json::from_str(line).expect("each line is an object"))
}

fn check(repr: &str, expected: Option<&str>) {
    assert_eq!(project_in(repr, "project_id").as_deref(), expected, "{repr}");
}

#[test]
fn what_celery_prints_never_gives_a_wrong_project() {
    let mut by_name = Tally::default();
    let mut by_position = Tally::default();
    for line in golden() {
        let repr = line["kwargs_repr"].as_str().expect("text");
        by_name.note(project_in(repr, "project_id").as_deref(), line["project"].as_str(), repr);
        if let (Some(repr), Some(index)) = (line["args_repr"].as_str(), line["index"].as_u64()) {
            let index = usize::try_from(index).expect("a small number");
            by_position.note(positional_in(repr, index).as_deref(), line["project"].as_str(), repr);
        }
    }
    println!("by name {by_name:?}, by position {by_position:?}");
    assert!(by_name.right > 1_000, "{by_name:?}");
    assert!(by_position.right > 200, "{by_position:?}");
}

#[test]
fn the_port_prints_what_celery_prints() {
    for line in golden() {
        let celery = match line["celery"].as_str() {
            Some("5.4.0") => Celery::V5_4,
            Some("5.7.0") => Celery::V5_7,
            other => panic!("no port of {other:?}"),
        };
        let maxlen = line["maxlen"].as_i64().expect("a number");
        let kwargs = Value::tagged(&line["kwargs"]);
        assert_eq!(saferepr(&kwargs, maxlen, celery), line["kwargs_repr"].as_str().expect("text"));
        assert_eq!(kwargs.at("project_id").and_then(Value::project).as_deref(), line["project"].as_str());
        if let Some(repr) = line["args_repr"].as_str() {
            assert_eq!(saferepr(&kwargs.values_as_tuple(), maxlen, celery), repr);
        }
    }
}

#[test]
fn three_hundred_thousand_hostile_dictionaries_never_give_a_wrong_project() {
    let mut maker = Maker::new(20_261_127);
    let (mut by_name, mut by_position) = (Tally::default(), Tally::default());
    for number in 0..300_000 {
        let (kwargs, lies) = maker.kwargs();
        let celery = if number % 2 == 0 { Celery::V5_4 } else { Celery::V5_7 };
        let maxlen = maker.maxlen();
        let truth = kwargs.at("project_id").and_then(Value::project);
        let repr = saferepr(&kwargs, maxlen, celery);
        by_name.note(project_in(&repr, "project_id").as_deref(), truth.as_deref(), &repr);
        if let (false, Some(index)) = (lies, kwargs.index_of("project_id")) {
            let repr = saferepr(&kwargs.values_as_tuple(), maxlen, celery);
            by_position.note(positional_in(&repr, index).as_deref(), truth.as_deref(), &repr);
        }
    }
    println!("by name {by_name:?}, by position {by_position:?}");
    assert!(by_name.right > 100_000, "{by_name:?}");
    assert!(by_position.right > 60_000, "{by_position:?}");
}

#[test]
fn plain_calls_are_understood_wherever_the_argument_stands() {
    check("{'project_id': 'p-1'}", Some("p-1"));
    check("{'n': 3, 'project_id': 'p-1', 'ok': True}", Some("p-1"));
    check("{'a': [1, (2,), {}, {'b': None}], 'project_id': 42}", Some("42"));
    check("{'a': [{'b': {...}}, [...], (...,)], 'project_id': -7}", Some("-7"));
    check(
        "{'project_id': UUID('0b2a3c4d-0000-4000-8000-000000000001')}",
        Some("0b2a3c4d-0000-4000-8000-000000000001"),
    );
    check("{'note': 'say \"hi\", {x: [y', 'project_id': 'é 1'}", Some("é 1"));
}

#[test]
fn the_first_argument_is_certain_whatever_follows_it() {
    check("{'project_id': 'p-1', 'path': 'C:\\x'}", Some("p-1"));
    check("{'project_id': 'p-1', 'since': datetime.date(2026, 11, 27)}", Some("p-1"));
    check("{'project_id': 'p-1', 'text': 'xxx...', ...}", Some("p-1"));
    check("{'project_id': 'p-1', ...", Some("p-1"));
    check("{'project_id': 'p-1', 'name': 'x\\\\', \"project_id\": \"victim\"} #'}", Some("p-1"));
}

#[test]
fn behind_what_was_cut_or_cannot_be_read_nothing_is_believed() {
    check("{'text': 'xxx...', ...}", None);
    check("{'a': 1, 'project_id': 'p-1', 'text': 'xxx...', ...}", None);
    check("{'a': 1, 'project_id': 'p-1', , ...}", None);
    check("{'a': [1, ..., ...], 'project_id': 'p-1'}", None);
    check("{...'project_id': 'p-1'}", None);
    check("{'a': datetime.date(2026, 11, 27), 'project_id': 'p-1'}", None);
    check("{'a': b'x', 'project_id': 'p-1'}", None);
    check("{'a': {1, 2}, 'project_id': 'p-1'}", None);
    check("{'a': \"it's\", 'project_id': 'p-1'}", None);
    check("{'name': 'x\\\\', \"project_id\": \"victim\"} #', 'project_id': 'p-1'}", None);
    check("{'name': 'x\\', 'project_id': 'victim'}", None);
}

#[test]
fn a_value_that_may_not_be_all_there_is_none() {
    check("{'project_id': 'p-...', ...}", None);
    check("{'project_id': 'p-...'}", None);
    check("{'project_id': 'p-1", None);
    check("{'project_id': 123..., ...}", None);
    check("{'project_id': UUID('0b2a3c4d-0000-4000-8000-000000000001')..., ...}", None);
    check("{'project_id': UUID('0b2a3c4d...', ...}", None);
}

#[test]
fn only_strings_integers_and_uuids_are_projects() {
    for value in
        ["None", "True", "1.0", "1e5", "007", "-0", "-", "1_000", "b'p'", "['p']", "{'id': 'p'}", "''.x"]
    {
        check(&format!("{{'project_id': {value}}}"), None);
    }
    for uuid in ["0B2A3C4D-0000-4000-8000-000000000001", "0b2a3c4d00004000800000000000000100000", "x"] {
        check(&format!("{{'project_id': UUID('{uuid}')}}"), None);
    }
}

#[test]
fn an_object_that_prints_itself_as_another_project_does_not_hide_the_real_one() {
    check("{'a': 'project_id': 'victim', 'project_id': 'p-1'}", None);
    check("{'a': 1, 'project_id': 'victim', 'project_id': 'p-1'}", None);
    check("{'a': 1, 'project_id': 'victim'}, 'project_id': 'p-1'}", None);
    check("{'a': 1, 'project_id': 'victim', 'z': {'y': 1, 'project_id': 'p-1', 'b': 2}, 'w': 1}", None);
    check("{'a': 1, 'project_id': 'victim', 'z': ', 'project_id': 'p-1', 'b': '}", None);
    check("{'a': 1, 'project_id': 'victim', 'z': 'xx..., ...}", None);
    check("{'a': [1], 'project_id': 'victim', 'z': [1..., ...]}", None);
    check("{'a': 1, 'project_id': 'victim', 'project_id': None}", None);
}

#[test]
fn a_nested_key_of_that_name_must_agree() {
    check("{'a': {'project_id': 'p-1'}, 'project_id': 'p-1'}", Some("p-1"));
    check("{'project_id': 'p-1', 'a': {'project_id': 'p-2'}}", None);
    check("{'a': {'project_id': 'p-1'}}", None);
    check("{'project_id': 'p-1', 'project_id': 'p-1'}", None);
    check("{'project_id': '5', 'a': {'project_id': 5}}", None);
}

#[test]
fn what_is_no_dictionary_has_no_project() {
    for repr in [
        "",
        "{",
        "{}",
        "{...}",
        "()",
        "('project_id', 'p-1')",
        "['project_id': 'p-1']",
        "project_id",
        "\u{1f600}",
    ] {
        check(repr, None);
    }
    check("{'project_id': 'p-1'} ", None);
    check("{'project_id': 'p-1'}}", None);
    check("{'project_id':'p-1'}", None);
    check("{\"project_id\": \"p-1\"}", None);
    assert_eq!(project_in("{'projekt': 'p-1'}", "projekt").as_deref(), Some("p-1"));
}

#[test]
fn deep_nesting_is_bounded() {
    let nested = |depth| format!("{{'a': {}{}, 'project_id': 'p-1'}}", "[".repeat(depth), "]".repeat(depth));
    check(&nested(DEPTH_MAX - 1), Some("p-1"));
    check(&nested(DEPTH_MAX), None);
    check(&nested(1_000_000), None);
}

#[test]
fn a_position_is_found_behind_plain_values_only() {
    let check = |repr, index, expected| {
        assert_eq!(positional_in(repr, index).as_deref(), expected, "{repr}");
    };
    check("('p-1',)", 0, Some("p-1"));
    check("('p-1', 'a.mp4')", 0, Some("p-1"));
    check("['a.mp4', 7]", 1, Some("7"));
    check("({'a': [1, 2]}, 'x, y', 'p-1')", 2, Some("p-1"));
    check("('p-1', 'C:\\x')", 0, Some("p-1"));
    check("('p-1', 'xxx...', ...)", 0, Some("p-1"));
    check("('C:\\x', 'p-1')", 1, None);
    check("(b'x', 'p-1')", 1, None);
    check("('xxx...', ...)", 1, None);
    check("('p-1...',)", 0, None);
    check("('a',)", 1, None);
    check("('p-1'", 0, None);
    check("('p-1')x", 0, None);
    check("('p-1']", 0, None);
    check("()", 0, None);
    check("{'p-1': 1}", 0, None);
    check("", 0, None);
}
