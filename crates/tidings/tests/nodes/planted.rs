//! The checker on made-up histories: it has to find every kind of fault, or it proves nothing.

use crate::{
    checker::{Kept, Verdict, check},
    record::{Acknowledged, Heard, Number, Numbered, Place, Project, Record, Witness},
};

fn number(n: u32) -> Number {
    Number { publisher: 1, n }
}

fn numbered(project: Project, n: u32) -> Numbered {
    Numbered { project, number: number(n), copies: 1 }
}

fn place(epoch: &str, offset: u64) -> Place {
    Place { epoch: epoch.into(), offset }
}

fn confirmed(epoch: &str, offset: u64, recovered: Option<bool>) -> Heard {
    let has_state = recovered != Some(true);
    Heard::Confirmed { project: 0, place: place(epoch, offset), recovered, has_state, rewinds: false }
}

fn connected() -> Heard {
    Heard::Connected { node: "a".into() }
}

fn event(n: u32, offset: u64) -> Heard {
    Heard::Event { event: numbered(0, n), offset, folded: 0 }
}

fn events(numbers: std::ops::RangeInclusive<u32>) -> Vec<Heard> {
    numbers.map(|n| event(n, n.into())).collect()
}

/// A client that follows project 0, from its start on.
fn client(heard: impl IntoIterator<Item = Heard>) -> Witness {
    let start = [connected(), confirmed("e", 0, None)];
    let records = start.into_iter().chain(heard).map(|heard| Record { at_ms: 0, heard });
    Witness { projects: vec![0], records: records.collect() }
}

/// Events 1 to `count` of project 0, at the offsets of their numbers in epoch `e`.
fn acknowledged(count: u32) -> Vec<Acknowledged> {
    let one = |n: u32| Acknowledged { event: numbered(0, n), place: Some(place("e", n.into())) };
    (1..=count).map(one).collect()
}

/// The same over a way that does not tell places.
fn without_places(count: u32) -> Vec<Acknowledged> {
    acknowledged(count).into_iter().map(|one| Acknowledged { place: None, ..one }).collect()
}

fn judged(clients: &[Witness], count: u32) -> Verdict {
    check(clients, &acknowledged(count), None)
}

/// Holds when this count, and no other, is what was expected.
fn only(verdict: &Verdict, kind: fn(&Verdict) -> usize, expected: usize) {
    let Verdict { lost, duplicated, out_of_order, conflicting, foreign, contradictory, untold, .. } = verdict;
    let all = lost + duplicated + out_of_order + conflicting + foreign + contradictory + untold;
    assert_eq!((kind(verdict), all), (expected, expected), "{verdict:#?}");
    assert_eq!(verdict.is_clean(), expected == 0);
    assert_eq!(verdict.findings.len(), expected);
}

#[test]
fn a_history_without_faults_is_clean() {
    let resumed = [
        Heard::Closed { code: 1012, why: String::new() },
        connected(),
        Heard::Resumed(true),
        confirmed("e", 2, Some(true)),
    ];
    let heard = events(1..=2).into_iter().chain(resumed).chain(events(3..=5));
    let position = Heard::Position { project: 0, offset: 5 };
    let verdict = judged(&[client(heard.chain([position])), client(events(1..=5))], 5);
    only(&verdict, |v| v.lost, 0);
    assert_eq!((verdict.acknowledged, verdict.deliveries, verdict.told_gaps), (5, 10, 0));
}

#[test]
fn an_event_that_never_came_is_lost_at_the_end_and_in_the_middle() {
    only(&judged(&[client(events(1..=4))], 5), |v| v.lost, 1);
    // Offsets that hide it, as a service would that forgot to append what it acknowledged.
    let hidden = client([event(1, 1), event(3, 2)]);
    only(&check(&[hidden], &without_places(3), None), |v| v.lost, 1);
    only(&judged(&[client([])], 3), |v| v.lost, 3);
}

#[test]
fn a_hole_in_the_offsets_is_a_contradiction_even_where_nothing_was_acknowledged() {
    only(&judged(&[client([event(1, 1), event(3, 3)])], 1), |v| v.contradictory, 1);
    let folded = Heard::Event { event: numbered(0, 3), offset: 3, folded: 1 };
    only(&judged(&[client([event(1, 1), folded])], 1), |v| v.contradictory, 0);
}

#[test]
fn an_event_that_comes_twice_is_a_duplicate() {
    only(&judged(&[client([event(1, 1), event(1, 2)])], 1), |v| v.duplicated, 1);
    // Also across a resume, and at its old place.
    let again = [connected(), confirmed("e", 2, Some(true)), event(2, 2)];
    let verdict = judged(&[client(events(1..=2).into_iter().chain(again))], 2);
    assert_eq!((verdict.duplicated, verdict.contradictory, verdict.lost), (1, 1, 0), "{verdict:#?}");
    // Also after a told gap, as long as the life of the stream is the same.
    let again = [confirmed("e", 2, Some(false)), event(2, 3)];
    let verdict = judged(&[client(events(1..=2).into_iter().chain(again))], 2);
    assert_eq!(verdict.duplicated, 1, "{verdict:#?}");
}

#[test]
fn copies_published_on_purpose_have_to_come_as_often() {
    let twice = Numbered { copies: 2, ..numbered(0, 1) };
    let heard = |offset| Heard::Event { event: twice, offset, folded: 0 };
    let published = [Acknowledged { event: twice, place: None }];
    let judged = |heard: Vec<Heard>| check(&[client(heard)], &published, None);
    only(&judged(vec![heard(1), heard(2)]), |v| v.lost, 0);
    only(&judged(vec![heard(1)]), |v| v.lost, 1);
    only(&judged(vec![heard(1), heard(2), heard(3)]), |v| v.duplicated, 1);
}

#[test]
fn an_event_behind_a_later_one_is_out_of_order() {
    only(&judged(&[client([event(1, 1), event(3, 2), event(2, 3)])], 0), |v| v.out_of_order, 1);
}

#[test]
fn one_place_that_names_two_events_is_found_across_clients_and_acknowledgements() {
    let verdict = judged(&[client([event(1, 1)]), client([event(2, 1)])], 0);
    only(&verdict, |v| v.conflicting, 1);
    let verdict = judged(&[client([event(7, 1)])], 1);
    assert_eq!((verdict.conflicting, verdict.lost), (1, 1), "{verdict:#?}");
    // In another epoch it is another place.
    let other = client([confirmed("f", 0, Some(true)), event(2, 1)]);
    only(&check(&[client([event(1, 1)]), other], &[], None), |v| v.conflicting, 0);
}

#[test]
fn what_was_not_subscribed_to_is_foreign() {
    let foreign = Heard::Event { event: numbered(9, 1), offset: 1, folded: 0 };
    only(&judged(&[client([foreign])], 0), |v| v.foreign, 1);
    only(&judged(&[client([connected(), event(1, 1)])], 0), |v| v.foreign, 1);
    only(&judged(&[client([Heard::Strange("{}".to_owned())])], 0), |v| v.foreign, 1);
    let confirmed = Heard::Confirmed {
        project: 9,
        place: place("e", 0),
        recovered: None,
        has_state: true,
        rewinds: false,
    };
    only(&judged(&[client([confirmed])], 0), |v| v.foreign, 1);
}

#[test]
fn confirmations_and_heartbeats_that_do_not_fit_are_contradictions() {
    let heartbeat = Heard::Position { project: 0, offset: 2 };
    only(&judged(&[client([event(1, 1), heartbeat])], 0), |v| v.contradictory, 1);
    // Recovered, but further on than the client was: a hole that nobody admits.
    only(&judged(&[client([event(1, 1), confirmed("e", 2, Some(true))])], 0), |v| v.contradictory, 1);
    // As if the client had never been there.
    only(&judged(&[client([event(1, 1), confirmed("e", 1, None)])], 0), |v| v.contradictory, 1);
    only(
        &judged(&[client([Heard::Removed { project: 0, reason: "rights".into() }])], 0),
        |v| v.contradictory,
        1,
    );
    only(&judged(&[client([Heard::Degraded])], 0), |v| v.contradictory, 1);
    only(
        &judged(&[client([Heard::Degraded, Heard::Recovered { gap: "none".into() }])], 0),
        |v| v.contradictory,
        0,
    );
    for (recovered, has_state) in [(Some(true), true), (Some(false), false)] {
        let confirmed =
            Heard::Confirmed { project: 0, place: place("e", 0), recovered, has_state, rewinds: false };
        only(&judged(&[client([confirmed])], 0), |v| v.contradictory, 1);
    }
}

#[test]
fn a_told_gap_explains_what_is_missing_in_it_and_nothing_else() {
    let told = [event(1, 1), confirmed("e", 3, Some(false)), event(4, 4)];
    let verdict = judged(&[client(told.clone())], 4);
    only(&verdict, |v| v.lost, 0);
    assert_eq!(verdict.told_gaps, 1);
    // Event 5 was promised again.
    only(&judged(&[client(told)], 5), |v| v.lost, 1);
    // Event 2 lies before the gap: its publisher's next one came before it, too.
    let hidden = [event(1, 1), event(3, 2), confirmed("e", 4, Some(false))];
    only(&check(&[client(hidden)], &without_places(3), None), |v| v.lost, 1);
}

#[test]
fn what_the_store_took_back_must_be_told_to_whoever_had_it() {
    let kept: Kept = [(0, number(1)), (0, number(3))].into();
    let published =
        [acknowledged(2), vec![Acknowledged { event: numbered(0, 3), place: Some(place("f", 2)) }]].concat();
    let judged = |heard: Vec<Heard>| check(&[client(heard)], &published, Some(&kept));
    // One had event 2 and is told; another had not, and goes on.
    let told = vec![event(1, 1), event(2, 2), confirmed("f", 1, Some(false)), event(3, 2)];
    only(&judged(told), |v| v.untold, 0);
    let behind = vec![event(1, 1), confirmed("f", 1, Some(true)), event(3, 2)];
    only(&judged(behind), |v| v.untold, 0);
    let silent = vec![event(1, 1), event(2, 2), confirmed("f", 2, Some(true)), event(3, 3)];
    only(&judged(silent), |v| v.untold, 1);
    // What is missing because the store lost it is told as a number.
    assert_eq!(judged(vec![event(1, 1), confirmed("f", 1, Some(true)), event(3, 2)]).taken_back, 1);
}

#[test]
fn what_was_taken_back_may_be_published_again() {
    let kept: Kept = [(0, number(1)), (0, number(2))].into();
    let published =
        [acknowledged(1), vec![Acknowledged { event: numbered(0, 2), place: Some(place("f", 2)) }]].concat();
    let again = [event(1, 1), event(2, 2), confirmed("f", 1, Some(false)), event(2, 2)];
    only(&check(&[client(again)], &published, Some(&kept)), |v| v.duplicated, 0);
    // Without a word it is a duplicate.
    let silent = [event(1, 1), event(2, 2), confirmed("f", 2, Some(true)), event(2, 3)];
    only(&check(&[client(silent)], &published, Some(&kept)), |v| v.duplicated, 1);
}

#[test]
fn what_a_client_asked_for_twice_may_come_twice() {
    let twice = |rewinds| Heard::Confirmed {
        project: 0,
        place: place("e", 1),
        recovered: Some(true),
        has_state: false,
        rewinds,
    };
    let heard = |rewinds| events(1..=3).into_iter().chain([twice(rewinds)]).chain(events(2..=4));
    only(&judged(&[client(heard(true))], 4), |v| v.duplicated, 0);
    let verdict = judged(&[client(heard(false))], 4);
    assert_eq!((verdict.duplicated, verdict.contradictory), (2, 1), "{verdict:#?}");
    // What does not come again is lost.
    let short = events(1..=3).into_iter().chain([twice(true)]).chain([event(2, 2)]);
    only(&judged(&[client(short)], 3), |v| v.lost, 1);
}
