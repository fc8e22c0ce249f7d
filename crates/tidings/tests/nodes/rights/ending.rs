//! The verdict on a scenario in which some clients lose a project, or everything: up to there they have to be as right as all
//! others are to the end.

use std::collections::BTreeSet;

use crate::{
    checker::{Kept, Verdict, check},
    record::{Acknowledged, Heard, Project, Witness},
    stage::{Stage, report},
};

/// Who loses what.
pub(super) struct Expected {
    /// Clients that are closed with 4401.
    pub(super) ended: BTreeSet<usize>,
    /// Clients that lose a project and stay.
    pub(super) shrunk: BTreeSet<usize>,
    /// Confirmations with `recovered: false`.
    pub(super) gaps: usize,
}

/// When a client was told that it has lost a project, or all.
pub(super) fn lost_at(stage: &Stage, client: usize, project: Project) -> Option<u64> {
    let notes = &stage.fleet.members[client];
    notes.lost(project).or_else(|| notes.closed().map(|(at, _)| at))
}

/// When the newest event of a project was published that a client has.
pub(super) fn last_sent_ms(stage: &Stage, client: usize, project: Project) -> Option<u64> {
    let records = stage.fleet.members[client].since(0);
    let sent = records.iter().filter_map(|record| match record.heard {
        Heard::Event { event, .. } if event.project == project => stage.book.sent_ms(event),
        _ => None,
    });
    sent.max()
}

/// Holds when there is nobody who got nothing.
pub(super) fn stays(stage: &Stage, stuck: &[usize]) {
    let Some(&first) = stuck.first() else { return };
    let records = stage.fleet.members[first].since(0);
    let last = &records[records.len().saturating_sub(15)..];
    panic!("stuck: {stuck:?}; client {first} heard last {last:#?}");
}

/// Ends a scenario in which the store keeps everything.
pub(super) async fn conclude(mut stage: Stage, row: &str, expected: &Expected) {
    rest(&mut stage, expected).await;
    let verdict = judge(stage, expected, None).await;
    tell(row, &verdict);
    assert_eq!(verdict.told_gaps, expected.gaps, "subscriptions that were told of a gap");
}

/// The same where the store may have lost the newest.
pub(super) async fn conclude_after_loss(mut stage: Stage, row: &str, expected: &Expected) {
    rest(&mut stage, expected).await;
    let kept = stage.kept().await;
    tell(row, &judge(stage, expected, Some(&kept)).await);
}

async fn rest(stage: &mut Stage, expected: &Expected) {
    // Nobody waits for those who have nothing to wait for.
    stage.fleet.send_away(expected.ended.iter().copied());
    let stuck = stage.come_to_rest().await;
    stays(stage, &stuck);
}

async fn judge(stage: Stage, expected: &Expected, kept: Option<&Kept>) -> Verdict {
    let acknowledged = stage.book.acknowledged();
    let witnesses = stage.fleet.ended().await;
    let (mut whole, mut deliveries, mut told_gaps) = (Vec::new(), 0, 0);
    for (client, witness) in witnesses.iter().enumerate() {
        let was_ended = witness
            .records
            .iter()
            .any(|record| matches!(record.heard, Heard::Closed { code: 4400..=4499, .. }));
        assert_eq!(
            was_ended,
            expected.ended.contains(&client),
            "client {client} was closed for good, or was not"
        );
        let mut has_lost = false;
        for &project in &witness.projects {
            let (part, lost) = part_of(witness, project, client);
            match lost {
                None if !was_ended => whole.push(part),
                reason => {
                    let reason = reason
                        .unwrap_or_else(|| panic!("client {client} was closed without a word on p{project}"));
                    assert_eq!(
                        reason,
                        if was_ended { "expired" } else { "rights" },
                        "client {client}, p{project}"
                    );
                    has_lost |= !was_ended;
                    // What the store takes back later is no concern of his.
                    let verdict =
                        check(std::slice::from_ref(&part), &before_the_end(&part, &acknowledged), None);
                    assert!(verdict.is_clean(), "client {client} before it lost p{project}: {verdict:#?}");
                    deliveries += verdict.deliveries;
                    told_gaps += verdict.told_gaps;
                }
            }
        }
        assert_eq!(has_lost, expected.shrunk.contains(&client), "client {client} lost a project, or did not");
    }
    let mut verdict = check(&whole, &acknowledged, kept);
    assert!(verdict.is_clean(), "{verdict:#?}");
    verdict.deliveries += deliveries;
    verdict.told_gaps += told_gaps;
    verdict
}

/// A client's way through one project, up to where it has lost it, and why.
fn part_of(witness: &Witness, project: Project, client: usize) -> (Witness, Option<String>) {
    let (mut records, mut lost) = (Vec::new(), None);
    for record in &witness.records {
        let is_of = match &record.heard {
            Heard::Event { event, .. } => event.project == project,
            Heard::Confirmed { project: of, .. } | Heard::Position { project: of, .. } => *of == project,
            Heard::Removed { project: of, reason } if *of == project => {
                lost = Some(reason.to_string());
                false
            }
            Heard::Removed { .. } => false,
            _ => true,
        };
        assert!(
            lost.is_none()
                || !(is_of && matches!(record.heard, Heard::Event { .. } | Heard::Confirmed { .. })),
            "client {client} got {record:?} after it had lost p{project}"
        );
        if is_of && lost.is_none() {
            records.push(record.clone());
        }
    }
    if lost.is_some() {
        // Nobody is told of its end any more.
        records.retain(|record| !matches!(record.heard, Heard::Degraded | Heard::Recovered { .. }));
    }
    (Witness { projects: vec![project], records }, lost)
}

/// What somebody could have before his end.
fn before_the_end(part: &Witness, acknowledged: &[Acknowledged]) -> Vec<Acknowledged> {
    let (mut epoch, mut last) = (None, 0);
    for record in &part.records {
        match &record.heard {
            Heard::Confirmed { place, .. } => (epoch, last) = (Some(place.epoch.clone()), place.offset),
            Heard::Event { offset, .. } => last = *offset,
            _ => {}
        }
    }
    let had = |one: &&Acknowledged| {
        let place = one.place.as_ref().expect("publishers over HTTP know the place");
        part.projects.contains(&one.event.project)
            && epoch.as_ref() == Some(&place.epoch)
            && place.offset <= last
    };
    acknowledged.iter().filter(had).cloned().collect()
}

fn tell(row: &str, verdict: &Verdict) {
    let Verdict { acknowledged, deliveries, lost, duplicated, out_of_order, told_gaps, taken_back, .. } =
        verdict;
    report(format_args!(
        "{row} | acknowledged {acknowledged} | deliveries {deliveries} | lost {lost} | duplicated {duplicated} | \
         out of order {out_of_order} | told gaps {told_gaps} | taken back {taken_back}"
    ));
}
