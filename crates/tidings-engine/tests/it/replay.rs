//! Any cut of any stream, resumed, is the stream: the history against a model that forgets nothing.

use std::{collections::HashMap, sync::Weak, time::Duration};

use futures_util::FutureExt as _;
use proptest::prelude::*;
use serde_json::json;
use tidings_engine::engine::{
    CatchUp, Deliver, Engine, HistoryLimits, PageLimit,
    embedded::{EmbeddedEngine, EmbeddedOptions, system_clock},
};
use tidings_protocol::{Position, TypeFilter};

use crate::{contract::Deliveries, event, stream};

/// An event of the model: its key, if a newer one of it may stand for it.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Durable,
    Latest(u8),
}

fn kinds() -> impl Strategy<Value = Vec<Kind>> {
    let kind = prop_oneof![2 => Just(Kind::Durable), 5 => (0..6_u8).prop_map(Kind::Latest)];
    proptest::collection::vec(kind, 1..700)
}

fn engine(events: usize) -> EmbeddedEngine {
    let options = EmbeddedOptions {
        history: HistoryLimits { events, age: Duration::from_hours(1), bytes: 1 << 20 },
        connection_timeout: Duration::from_hours(1),
        journal: None,
    };
    let nobody: Weak<dyn Deliver> = Weak::<Deliveries>::new();
    EmbeddedEngine::open(options, system_clock(), nobody).unwrap()
}

fn event_of(kind: Kind, number: usize) -> tidings_protocol::Event {
    match kind {
        Kind::Durable => event(&json!({"type": "a.b", "project_id": "p", "number": number})),
        Kind::Latest(task) => event(&json!({"type": "task.progress", "project_id": "p",
            "task_id": format!("t{task}"), "progress": {"current": number, "total": 1000}})),
    }
}

/// Whether `offsets` is what somebody who has everything up to `cut` needs: in order, every durable event, and of each key at
/// least the newest.
fn check(kinds: &[Kind], cut: usize, offsets: &[usize]) -> Result<(), TestCaseError> {
    prop_assert!(offsets.is_sorted_by(|one, next| one < next), "{offsets:?}");
    prop_assert!(offsets.iter().all(|offset| *offset > cut && *offset <= kinds.len()));
    let mut newest = HashMap::new();
    for (offset, kind) in (1..).zip(kinds) {
        if let Kind::Latest(task) = kind {
            newest.insert(*task, offset);
        }
    }
    for (offset, kind) in (1..).zip(kinds).skip(cut) {
        let needed = match kind {
            Kind::Durable => true,
            Kind::Latest(task) => newest[task] == offset,
        };
        prop_assert!(!needed || offsets.contains(&offset), "{offset} ({kind:?}) is missing behind {cut}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_cut_of_any_stream_resumed_is_the_stream(
        kinds in kinds(),
        cut in any::<prop::sample::Index>(),
        kept in prop_oneof![Just(5_usize), Just(50), Just(1000)],
        page_records in 1..40_usize,
        folded in any::<bool>(),
    ) {
        let engine = engine(kept);
        let events = kinds.iter().enumerate().map(|(number, kind)| event_of(*kind, number)).collect();
        let appended = engine.append(events).now_or_never().unwrap().unwrap();
        let cut = cut.index(kinds.len() + 1);
        let since = Position { offset: cut as u64, ..appended[0].position.clone() };
        let everything = TypeFilter::everything();
        let joined = engine.join(&stream("p"), Some(&since), &everything).now_or_never().unwrap().unwrap();
        let durable_behind = kinds[cut..].iter().filter(|kind| matches!(kind, Kind::Durable)).count();
        let complete = match joined.catch_up {
            CatchUp::Recovered(records) => {
                let offsets: Vec<_> =
                    records.iter().map(|record| usize::try_from(record.offset).unwrap()).collect();
                check(&kinds, cut, &offsets)?;
                true
            }
            CatchUp::State(_) => {
                prop_assert!(durable_behind > kept || kept < 6, "the history reaches back to {cut}");
                false
            }
        };
        // The same in pages, as somebody who is behind reads it.
        let limit = PageLimit { records: page_records, bytes: usize::MAX, folded };
        let (mut at, mut offsets) = (since, Vec::new());
        loop {
            let page = engine.history(&stream("p"), Some(&at), limit).now_or_never().unwrap().unwrap();
            prop_assert_eq!(page.complete, complete || !offsets.is_empty() && page.complete);
            if !page.complete {
                return Ok(());
            }
            offsets.extend(page.records.iter().map(|record| usize::try_from(record.offset).unwrap()));
            match page.records.last() {
                Some(last) if page.more => at.offset = last.offset,
                _ => break,
            }
        }
        check(&kinds, cut, &offsets)?;
        if folded {
            let latest = offsets.iter().filter(|offset| matches!(kinds[**offset - 1], Kind::Latest(_))).count();
            prop_assert!(latest <= 6, "one for each key at most");
        }
    }
}
