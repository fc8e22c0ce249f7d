//! What follows from what is said about tasks: scripts of messages, and any interleaving and loss of them.

use proptest::prelude::*;
use serde_json::Value;
use tidings_protocol::{EVENT_BYTES_MAX, Event, ProjectId};

use super::{
    events::{WorkerChange, WorkerEvent},
    project::Rank,
    report::{About, End, Failure, Progress, Reason, Report, Route, Said, TaskId},
    task::Pace,
    tracker::{ASK_AFTER_MS, Options, Tracker, report_of_known},
};

const LOST_MS: u64 = 30_000;

struct Lab {
    tracker: Tracker,
    now_ms: u64,
}

impl Lab {
    fn new(has_backend: bool) -> Self {
        let pace = Pace { update_ms: 100, has_backend };
        let options = Options { pace, lost_after_ms: LOST_MS, shows_processes: true };
        Self { tracker: Tracker::new(options), now_ms: 1_000_000 }
    }

    fn say(&mut self, report: Report) {
        self.tracker.take(report, self.now_ms);
    }

    fn pass(&mut self, ms: u64) {
        let end_ms = self.now_ms + ms;
        while let Some(due_ms) = self.tracker.due_ms().filter(|due_ms| *due_ms <= end_ms) {
            self.now_ms = self.now_ms.max(due_ms);
            self.tracker.wake(true, self.now_ms);
        }
        self.now_ms = end_ms;
        self.tracker.wake(true, self.now_ms);
    }

    /// What was told since, shortly.
    #[track_caller]
    fn check(&mut self, expected: &[&str]) {
        assert_eq!(self.told(), expected);
    }

    fn told(&mut self) -> Vec<String> {
        self.tracker.out.drain(..).map(|outgoing| shortly(&outgoing.json)).collect()
    }
}

/// An event in short, which has to be one by the contract.
fn shortly(json: &str) -> String {
    let event = Event::parse(json.as_bytes(), EVENT_BYTES_MAX, jiff::Timestamp::UNIX_EPOCH.into());
    event.unwrap_or_else(|error| panic!("{json}: {error}"));
    let event: Value = serde_json::from_str(json).expect("it was parsed");
    let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
    let subject = text("task_id") + &text("process_id");
    let attempt = event["attempt"].as_u64().map(|attempt| attempt.to_string()).unwrap_or_default();
    let more = match text("type").as_str() {
        "task.progress" if text("state") == "retrying" => "retrying".to_owned(),
        "task.progress" => format!("{}/{}", event["progress"]["current"], event["progress"]["total"]),
        "process.progress" => format!("{}%", event["progress"]),
        _ => text("reason") + &text("outcome"),
    };
    let again = if text("id").contains('+') { "again" } else { "" };
    let words = [text("project_id"), subject, text("type"), attempt, more, again.to_owned()];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn project(id: &str) -> ProjectId {
    ProjectId::try_from(id).expect("an id")
}

/// A report on task `t`, which belongs to project `p`.
fn report(route: Route, retries: Option<u32>, said: Said) -> Report {
    of_task("t", route, retries, said)
}

fn of_task(id: &str, route: Route, retries: Option<u32>, said: Said) -> Report {
    let project = (route != Route::Events).then(|| (Rank::Arguments, project("p")));
    let about = About { name: Some("app.task".into()), retries, project, ..About::default() };
    Report { task_id: id.into(), route, about, said, at: None }
}

fn started(pid: i64) -> Said {
    Said::Started { pid: Some(pid) }
}

fn progress(current: u32) -> Said {
    Said::Progress(Progress { current: current.into(), total: 9.0, ..Progress::default() })
}

fn retrying() -> Said {
    Said::Retrying { error: "OSError: try".into() }
}

fn completed() -> Said {
    Said::Ended(End::Completed { result: None, is_repr: false })
}

fn failed(reason: Reason) -> Said {
    Said::Ended(End::Failed(Failure { reason, error: "E".into(), traceback: None }))
}

#[test]
fn a_task_starts_goes_on_and_ends_once_by_whichever_way_it_is_heard() {
    use Route::{Backend, Events};
    let mut lab = Lab::new(true);
    // The order in which they were seen to come, and both ways to their end.
    for (route, retries, said) in [
        (Events, Some(0), Said::Known),
        (Backend, Some(0), started(7)),
        (Backend, Some(0), progress(1)),
        (Events, None, Said::Started { pid: None }),
        (Backend, Some(0), completed()),
        (Events, None, completed()),
        (Backend, Some(0), progress(2)),
        (Backend, Some(0), started(7)),
    ] {
        lab.say(report(route, retries, said));
    }
    lab.pass(10_000);
    lab.check(&["p t task.started 0", "p t task.progress 0 1/9", "p t task.completed 0"]);
}

#[test]
fn what_begins_without_a_word_is_told_to_have_started() {
    for said in [progress(1), completed(), failed(Reason::Revoked)] {
        let mut lab = Lab::new(true);
        lab.say(report(Route::Backend, Some(2), said));
        assert_eq!(lab.told()[0], "p t task.started 2");
    }
}

#[test]
fn updates_are_told_at_their_pace_and_the_last_one_before_the_end() {
    let mut lab = Lab::new(true);
    for step in 0..5 {
        lab.say(report(Route::Backend, Some(0), progress(step)));
    }
    lab.check(&["p t task.started 0", "p t task.progress 0 0/9"]);
    lab.pass(99);
    lab.check(&[]);
    lab.pass(1);
    lab.check(&["p t task.progress 0 4/9"]);
    lab.say(report(Route::Backend, Some(0), progress(8)));
    lab.say(report(Route::Backend, Some(0), completed()));
    lab.check(&["p t task.progress 0 8/9", "p t task.completed 0"]);
}

#[test]
fn a_retry_is_no_end_and_each_attempt_starts_once() {
    for knows_retries in [true, false] {
        let mut lab = Lab::new(true);
        let retries = |attempt| knows_retries.then_some(attempt);
        for (attempt, said) in [
            (0, started(1)),
            (0, retrying()),
            (1, started(1)),
            (1, retrying()),
            (2, started(2)),
            (2, progress(3)),
            (2, completed()),
        ] {
            lab.say(report(Route::Backend, retries(attempt), said));
        }
        lab.check(&[
            "p t task.started 0",
            "p t task.progress 0 retrying",
            "p t task.started 1",
            "p t task.progress 1 retrying",
            "p t task.started 2",
            "p t task.progress 2 3/9",
            "p t task.completed 2",
        ]);
    }
}

#[test]
fn what_is_late_of_an_attempt_that_is_over_says_nothing() {
    let mut lab = Lab::new(true);
    lab.say(report(Route::Backend, Some(0), started(1)));
    // Another worker was faster than the word that the first attempt has failed.
    lab.say(report(Route::Backend, Some(1), started(2)));
    lab.say(report(Route::Backend, Some(0), retrying()));
    lab.say(report(Route::Backend, Some(0), failed(Reason::Error)));
    lab.say(report(Route::Backend, Some(1), completed()));
    lab.check(&["p t task.started 0", "p t task.started 1", "p t task.completed 1"]);
}

#[test]
fn events_alone_tell_retries_also_where_they_overtake_one_another() {
    let mut lab = Lab::new(false);
    let mut first = report(Route::Events, Some(0), Said::Known);
    first.about.project = Some((Rank::Hint, project("p")));
    lab.say(first);
    for (retries, said) in [
        (None, Said::Started { pid: None }),
        (Some(1), Said::Known),
        (None, retrying()),
        (None, Said::Started { pid: None }),
        (None, completed()),
    ] {
        lab.say(report(Route::Events, retries, said));
    }
    lab.check(&[
        "p t task.started 0",
        "p t task.progress 0 retrying",
        "p t task.started 1",
        "p t task.completed 1",
    ]);
}

#[test]
fn an_end_by_events_waits_a_moment_for_the_result_backend_and_no_longer() {
    let mut lab = Lab::new(true);
    lab.say(report(Route::Backend, Some(0), progress(1)));
    lab.say(report(Route::Events, None, completed()));
    lab.check(&["p t task.started 0", "p t task.progress 0 1/9"]);
    // It ignores its result.
    lab.pass(250);
    lab.check(&["p t task.completed 0"]);
    let mut lab = Lab::new(true);
    lab.say(report(Route::Backend, Some(0), started(1)));
    lab.say(report(Route::Events, None, failed(Reason::Error)));
    lab.say(report(Route::Backend, Some(0), failed(Reason::TimeLimit)));
    lab.pass(1000);
    lab.check(&["p t task.started 0", "p t task.failed 0 time_limit"]);
}

#[test]
fn a_message_that_is_delivered_again_starts_again_only_if_its_attempt_had_ended() {
    let mut lab = Lab::new(true);
    lab.say(report(Route::Backend, Some(0), started(1)));
    lab.say(report(Route::Backend, Some(0), started(2)));
    lab.say(report(Route::Backend, Some(0), failed(Reason::WorkerLost)));
    lab.say(report(Route::Backend, Some(0), started(2)));
    lab.say(report(Route::Backend, Some(0), started(3)));
    lab.say(report(Route::Backend, Some(0), failed(Reason::Error)));
    lab.check(&[
        "p t task.started 0",
        "p t task.failed 0 worker_lost",
        "p t task.started 0 again",
        "p t task.failed 0 error again",
    ]);
}

#[test]
fn a_result_corrects_a_failure_that_was_told() {
    let mut lab = Lab::new(true);
    lab.say(report(Route::Backend, Some(0), failed(Reason::Error)));
    lab.say(report(Route::Backend, Some(0), completed()));
    lab.say(report(Route::Backend, Some(0), failed(Reason::Error)));
    lab.check(&["p t task.started 0", "p t task.failed 0 error", "p t task.completed 0"]);
}

#[test]
fn a_task_that_no_worker_knows_is_lost_after_a_while_and_found_again_if_it_lives() {
    let mut lab = Lab::new(true);
    let id: TaskId = "t".into();
    lab.say(report(Route::Backend, Some(0), started(1)));
    assert!(lab.tracker.take_questions(lab.now_ms).is_empty());
    lab.pass(ASK_AFTER_MS);
    assert_eq!(lab.tracker.take_questions(lab.now_ms), std::slice::from_ref(&id));
    assert!(lab.tracker.take_questions(lab.now_ms).is_empty(), "it was asked just now");
    lab.tracker.miss(std::slice::from_ref(&id), lab.now_ms);
    lab.pass(LOST_MS / 2);
    // A worker knows it after all.
    lab.say(report_of_known(id.clone(), About::default()));
    lab.pass(ASK_AFTER_MS);
    lab.tracker.miss(std::slice::from_ref(&id), lab.now_ms);
    lab.pass(LOST_MS - 1);
    lab.tracker.miss(std::slice::from_ref(&id), lab.now_ms);
    lab.check(&["p t task.started 0"]);
    lab.pass(1);
    lab.tracker.miss(std::slice::from_ref(&id), lab.now_ms);
    lab.check(&["p t task.failed 0 lost"]);
    lab.say(report(Route::Backend, Some(0), progress(5)));
    lab.say(report(Route::Backend, Some(0), completed()));
    lab.check(&["p t task.started 0 again", "p t task.progress 0 5/9", "p t task.completed 0"]);
}

#[test]
fn the_tasks_of_a_worker_that_leaves_or_falls_silent_are_asked_about_at_once() {
    for change in [WorkerChange::Offline, WorkerChange::Beats { every_s: 1.0 }] {
        let mut lab = Lab::new(true);
        let mut report = report(Route::Backend, Some(0), started(1));
        report.about.worker = Some("w1".into());
        lab.say(report);
        let online = WorkerEvent { worker: "w1".into(), change: WorkerChange::Online };
        lab.tracker.take_worker(&online, lab.now_ms);
        lab.tracker.take_worker(&WorkerEvent { worker: "w1".into(), change }, lab.now_ms);
        lab.pass(3_000);
        assert_eq!(lab.tracker.take_questions(lab.now_ms).len(), 1, "{change:?}");
    }
}

#[test]
fn a_project_that_is_found_late_is_told_all_and_a_less_reliable_one_changes_nothing() {
    let mut lab = Lab::new(true);
    let without = |said| Report { about: About::default(), ..report(Route::Backend, Some(0), said) };
    lab.say(without(started(1)));
    lab.say(without(progress(1)));
    lab.say(without(completed()));
    lab.pass(5_000);
    lab.check(&[]);
    assert_eq!(lab.tracker.counts().without_project, 1);
    assert!(lab.tracker.homeless()[0].reason.contains("result_extended"));
    assert!(lab.tracker.register(&"t".into(), project("p"), Some("app.task".into()), false, lab.now_ms));
    lab.check(&["p t task.started 0", "p t task.progress 0 1/9", "p t task.completed 0"]);

    let mut lab = Lab::new(true);
    assert!(lab.tracker.register(&"t".into(), project("registered"), None, false, lab.now_ms));
    lab.say(report(Route::Backend, Some(0), started(1)));
    lab.check(&["registered t task.started 0"]);
}

#[test]
fn a_task_that_turns_out_to_be_another_projects_is_over_where_it_was() {
    let mut lab = Lab::new(true);
    lab.say(report(Route::Backend, Some(0), started(1)));
    assert!(!lab.tracker.register(&"t".into(), project("q"), None, false, lab.now_ms));
    assert!(lab.tracker.register(&"t".into(), project("q"), None, true, lab.now_ms));
    lab.say(report(Route::Backend, Some(0), completed()));
    lab.check(&[
        "p t task.started 0",
        "p t task.failed 0 lost",
        "q t task.started 0",
        "q t task.completed 0",
    ]);
}

#[test]
fn a_child_inherits_its_project() {
    let mut lab = Lab::new(true);
    lab.say(report(Route::Backend, Some(0), started(1)));
    let about = About { name: Some("app.child".into()), parent: Some("t".into()), ..About::default() };
    let about = About { has_arguments: true, ..about };
    lab.say(Report { task_id: "c".into(), about, ..report(Route::Backend, Some(0), started(2)) });
    lab.check(&["p t task.started 0", "p c task.started 0"]);
}

#[test]
fn a_child_that_has_a_project_of_its_own_is_never_told_in_its_parents() {
    let mut lab = Lab::new(true);
    lab.say(report(Route::Backend, Some(0), started(1)));
    // Its events come first, and without a hint they say no project.
    let about = About { name: Some("app.child".into()), parent: Some("t".into()), ..About::default() };
    for said in [Said::Known, Said::Started { pid: None }] {
        let about = about.clone();
        lab.say(Report { task_id: "c".into(), about, ..report(Route::Events, Some(0), said) });
    }
    lab.pass(10_000);
    let about = About { project: Some((Rank::Arguments, project("q"))), has_arguments: true, ..about };
    lab.say(Report { task_id: "c".into(), about, ..report(Route::Backend, Some(0), started(2)) });
    lab.check(&["p t task.started 0", "q c task.started 0"]);
}

#[test]
fn a_group_of_a_known_size_is_a_process() {
    let mut lab = Lab::new(true);
    let member = |id: &str, said| {
        let mut report = of_task(id, Route::Backend, Some(0), said);
        report.about.group = Some("g".into());
        report
    };
    lab.say(member("a", started(1)));
    assert_eq!(lab.tracker.take_unsized_groups(), [TaskId::from("g")]);
    lab.tracker.group_sized(&"g".into(), Some(3), lab.now_ms);
    lab.pass(1000);
    lab.check(&["p a task.started 0", "p g process.started"]);
    lab.say(member("a", completed()));
    lab.say(member("b", failed(Reason::Error)));
    lab.pass(1000);
    lab.say(member("c", completed()));
    lab.check(&[
        "p a task.completed 0",
        "p g process.progress 33%",
        "p b task.started 0",
        "p b task.failed 0 error",
        "p g process.progress 66%",
        "p c task.started 0",
        "p c task.completed 0",
        "p g process.completed failed",
    ]);
}

#[test]
fn a_group_of_several_projects_is_told_to_none_and_one_that_turns_out_to_be_is_over() {
    let member = |id: &str, name: &str| {
        let mut report = of_task(id, Route::Backend, Some(0), started(1));
        report.about.group = Some("g".into());
        report.about.project = Some((Rank::Arguments, project(name)));
        report
    };
    let mut lab = Lab::new(true);
    lab.say(member("a", "p"));
    lab.say(member("b", "q"));
    lab.tracker.group_sized(&"g".into(), Some(2), lab.now_ms);
    lab.pass(1000);
    lab.check(&["p a task.started 0", "q b task.started 0"]);
    let mut lab = Lab::new(true);
    lab.say(member("a", "p"));
    lab.tracker.group_sized(&"g".into(), Some(2), lab.now_ms);
    lab.say(member("b", "q"));
    lab.check(&[
        "p a task.started 0",
        "p g process.started",
        "q b task.started 0",
        "p g process.completed failed",
    ]);
}

#[test]
fn a_chain_is_a_process_from_its_second_step_on() {
    let step = |id: &str, parent: Option<&str>, child: Option<&str>, said| {
        let mut report = of_task(id, Route::Backend, Some(0), said);
        report.about.parent = parent.map(Into::into);
        report.about.children = child.map(Into::into).into_iter().collect();
        report
    };
    let mut lab = Lab::new(true);
    lab.say(step("a", None, None, started(1)));
    lab.say(step("a", None, Some("b"), completed()));
    lab.pass(1000);
    lab.say(step("b", Some("a"), None, started(1)));
    lab.say(step("b", Some("a"), None, completed()));
    lab.check(&[
        "p a task.started 0",
        "p a task.completed 0",
        "p a process.started",
        "p a process.progress 50%",
        "p b task.started 0",
        "p b task.completed 0",
        "p a process.completed success",
    ]);
    // One that breaks, and whose length is known.
    let mut lab = Lab::new(true);
    let mut first = step("a", None, Some("b"), completed());
    first.about.chain_length = Some(3);
    lab.say(first);
    lab.pass(1000);
    lab.say(step("b", Some("a"), None, failed(Reason::Error)));
    lab.say(step("c", Some("b"), None, failed(Reason::NotRun)));
    lab.check(&[
        "p a task.started 0",
        "p a task.completed 0",
        "p a process.started",
        "p a process.progress 33%",
        "p b task.started 0",
        "p b task.failed 0 error",
        "p a process.completed failed",
        "p c task.started 0",
        "p c task.failed 0 not_run",
    ]);
}

/// What one task really did, as both ways would tell it.
#[derive(Clone, Debug)]
struct Life {
    backend: Vec<(u32, Said)>,
    events: Vec<(Option<u32>, Said)>,
    last_attempt: u32,
    end: Said,
}

fn life() -> impl Strategy<Value = Life> {
    let end = prop_oneof![
        Just(completed()),
        Just(failed(Reason::Error)),
        Just(failed(Reason::TimeLimit)),
        Just(failed(Reason::Revoked)),
    ];
    (0..3_u32, 0..3_u32, any::<bool>(), end).prop_map(|(last_attempt, steps, tells_start, end)| {
        let (mut backend, mut events) = (Vec::new(), Vec::new());
        for attempt in 0..=last_attempt {
            events.push((Some(attempt), Said::Known));
            events.push((None, Said::Started { pid: None }));
            if tells_start {
                backend.push((attempt, started(attempt.into())));
            }
            backend.extend((0..steps).map(|step| (attempt, progress(step))));
            let said = if attempt == last_attempt { end.clone() } else { retrying() };
            backend.push((attempt, said.clone()));
            events.push((None, said));
        }
        Life { backend, events, last_attempt, end }
    })
}

proptest! {
    /// Whatever is lost and however the two ways interleave: after a resync the last thing told is how it ended. Where the result
    /// backend says which attempt it means (`result_extended`), each attempt has one start and at most one end, the last one has its
    /// end, and nothing of an attempt comes before its start or after its end.
    #[test]
    fn any_interleaving_and_loss_ends_in_the_right_state(
        life in life(),
        choices in prop::collection::vec((any::<bool>(), 0..10_u8, 0..400_u64), 40),
        knows_retries: bool,
    ) {
        let mut lab = Lab::new(true);
        let (mut backend, mut events) = (life.backend.iter(), life.events.iter());
        for (takes_backend, luck, pause_ms) in choices {
            if takes_backend {
                if let Some((attempt, said)) = backend.next().filter(|_| luck > 2) {
                    lab.say(report(Route::Backend, knows_retries.then_some(*attempt), said.clone()));
                }
            } else if let Some((retries, said)) = events.next().filter(|_| luck > 2) {
                lab.say(report(Route::Events, *retries, said.clone()));
            }
            lab.pass(pause_ms);
        }
        let read = report(Route::Resync, knows_retries.then_some(life.last_attempt), life.end.clone());
        lab.tracker.take_read(read, lab.now_ms, lab.now_ms);
        lab.pass(60_000);
        let told = lab.told();
        let kind = if life.end == completed() { "task.completed" } else { "task.failed" };
        let is_end = |line: &str| line.contains("task.completed") || line.contains("task.failed");
        let last_end = told.iter().rfind(|line| is_end(line)).cloned().unwrap_or_default();
        prop_assert!(last_end.contains(kind), "{told:?}");
        prop_assert!(is_end(told.last().map_or("", String::as_str)), "{told:?}");
        if !knows_retries {
            return Ok(());
        }
        prop_assert!(last_end.contains(&format!("{kind} {}", life.last_attempt)), "{told:?}");
        for attempt in 0..=life.last_attempt + 1 {
            let of_attempt: Vec<_> = told
                .iter()
                .filter(|line| line.split(' ').nth(3) == Some(attempt.to_string().as_str()))
                .collect();
            let starts = of_attempt.iter().filter(|line| line.contains("started")).count();
            let ends = of_attempt.iter().filter(|line| is_end(line)).count();
            prop_assert!(starts == usize::from(!of_attempt.is_empty()) && ends <= 1, "{told:?}");
            prop_assert!(of_attempt.first().is_none_or(|line| line.contains("started")), "{told:?}");
            prop_assert!(ends == 0 || of_attempt.last().is_some_and(|line| is_end(line)), "{told:?}");
        }
    }
}
