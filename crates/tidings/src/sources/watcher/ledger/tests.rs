//! Random histories of a folder, of which the kernel tells a part: what is announced always adds up to what is there.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::sources::watcher::{difference::Changes, index::Kind};

const TIMING: Timing = Timing { quiet_ms: 300, wait_ms_max: 2000 };

fn path(text: &str) -> RelPath {
    text.split('/').fold(RelPath::root(), |path, part| path.join(part.as_bytes()))
}

/// A folder that is nowhere, and a subscriber that adds up what it is told.
struct World {
    ledger: Ledger,
    files: BTreeMap<RelPath, Entry>,
    heard: BTreeMap<RelPath, Entry>,
    announcements: Vec<(RelPath, &'static str)>,
    now: u64,
    inodes: u64,
}

impl World {
    fn new() -> Self {
        let ledger = Ledger::new(Index::default(), TIMING, false, 1000);
        Self {
            ledger,
            files: BTreeMap::new(),
            heard: BTreeMap::new(),
            announcements: Vec::new(),
            now: 1_000_000,
            inodes: 0,
        }
    }

    fn wall_ns(&self) -> i64 {
        i64::try_from(self.now).unwrap() * NS_PER_MS
    }

    fn write(&mut self, path: &RelPath) {
        self.inodes += 1;
        let inode = self.inodes;
        let at = self.wall_ns();
        let new = Entry { kind: Kind::File, size: 0, modified_ns: at, changed_ns: at, inode, fresh: false };
        let entry = self.files.entry(path.clone()).or_insert(new);
        (entry.size, entry.modified_ns, entry.changed_ns) = (entry.size + 1, at, at);
    }

    /// What a look at the path finds.
    fn sights(&self, path: &RelPath, deep: bool) -> Vec<Sight> {
        if let (Some(entry), false) = (self.files.get(path), deep) {
            return vec![Sight::File(path.clone(), *entry)];
        }
        let folders: BTreeSet<_> =
            self.files.keys().flat_map(|file| file.folders().collect::<Vec<_>>()).collect();
        let within: Vec<_> = folders.iter().filter(|folder| folder.is_in(path)).collect();
        if within.is_empty() {
            return vec![if path.is_root() { self.listing(path) } else { Sight::Gone(path.clone()) }];
        }
        within.into_iter().map(|folder| self.listing(folder)).collect()
    }

    fn listing(&self, folder: &RelPath) -> Sight {
        let in_it = self.files.iter().filter(|(path, _)| path.is_in(folder));
        let (files, others): (Vec<_>, Vec<_>) = in_it.partition(|(path, _)| path.parent() == *folder);
        let first = |path: &RelPath| path.below(folder).parts().next().unwrap().into();
        Sight::Folder {
            path: folder.clone(),
            files: files.into_iter().map(|(path, entry)| (path.name().into(), *entry)).collect(),
            others: others.into_iter().map(|(path, _)| first(path)).collect(),
            ignored: HashSet::new(),
        }
    }

    fn pass(&mut self, ms: u64, fails: bool) {
        let end = self.now + ms;
        while let Some(at) = self.ledger.next_due().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.look(fails);
        }
        self.now = end;
    }

    fn look(&mut self, fails: bool) {
        let Some(due) = self.ledger.take_due(self.now) else { return };
        let mut difference = self.ledger.compare(&due.written);
        for path in &due.folders {
            self.sights(path, true).into_iter().for_each(|sight| difference.see(sight));
        }
        for path in &due.paths {
            self.sights(path, false).into_iter().for_each(|sight| difference.see(sight));
        }
        let found = difference.end();
        let changes = self.ledger.settle(self.now, self.wall_ns(), &due, found);
        if fails {
            self.ledger.not_announced(self.now, &changes);
            self.now += 500;
        } else {
            self.hear(&changes);
            self.ledger.announced(self.now, &changes);
        }
    }

    /// What comes, comes once; what goes was there.
    fn hear(&mut self, changes: &Changes) {
        for (path, change) in changes {
            assert_eq!(self.heard.get(path), change.before.as_ref(), "{path:?}");
            let kind = match (change.before, change.after) {
                (None, Some(_)) => "new",
                (Some(_), Some(_)) => "modified",
                _ => "gone",
            };
            self.announcements.push((path.clone(), kind));
            match change.after {
                Some(after) => self.heard.insert(path.clone(), after),
                None => self.heard.remove(path),
            };
        }
    }

    fn told(&mut self) -> Vec<(String, &'static str)> {
        std::mem::take(&mut self.announcements).into_iter().map(|(path, kind)| (path.text(), kind)).collect()
    }

    fn made(&mut self, name: &str) {
        self.write(&path(name));
        for touch in [Touch::Created, Touch::Written, Touch::Closed] {
            self.ledger.touch(self.now, path(name), touch);
        }
    }
}

#[derive(Clone, Debug)]
enum Act {
    Write(usize),
    Remove(usize),
    Rename(usize, usize),
    Pass(u64),
    Fail(u64),
}

const NAMES: [&str; 8] = ["a", "b", "d/a", "d/b", "d/e/a", "d!", "d/e!", "f/a"];

fn act() -> impl Strategy<Value = Act> {
    let name = 0..NAMES.len();
    prop_oneof![
        4 => name.clone().prop_map(Act::Write),
        2 => name.clone().prop_map(Act::Remove),
        2 => (name.clone(), name).prop_map(|(from, to)| Act::Rename(from, to)),
        3 => (0..1000_u64).prop_map(Act::Pass),
        1 => (0..1000_u64).prop_map(Act::Fail),
    ]
}

fn perform(world: &mut World, act: &Act) -> Vec<(RelPath, Touch)> {
    match *act {
        Act::Write(name) => {
            let name = path(NAMES[name]);
            let is_new = !world.files.contains_key(&name);
            world.write(&name);
            let first = if is_new { Touch::Created } else { Touch::Written };
            vec![(name.clone(), first), (name.clone(), Touch::Written), (name, Touch::Closed)]
        }
        Act::Remove(name) => {
            world.files.remove(&path(NAMES[name]));
            vec![(path(NAMES[name]), Touch::Other)]
        }
        Act::Rename(from, to) => {
            let (from, to) = (path(NAMES[from]), path(NAMES[to]));
            let Some(mut entry) = world.files.remove(&from) else { return Vec::new() };
            entry.changed_ns = world.wall_ns();
            world.files.insert(to.clone(), entry);
            vec![(from, Touch::Other), (to, Touch::Placed)]
        }
        Act::Pass(ms) => {
            world.pass(ms, false);
            Vec::new()
        }
        Act::Fail(ms) => {
            world.pass(ms, true);
            Vec::new()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn whatever_the_kernel_loses_or_tells_late_what_is_announced_adds_up_to_what_is_there(
        acts in prop::collection::vec((act(), any::<bool>(), any::<bool>()), 1..60)
    ) {
        let mut world = World::new();
        let mut late = Vec::new();
        for (act, is_lost, is_late) in &acts {
            for (path, touch) in perform(&mut world, act) {
                match (is_lost, is_late) {
                    (true, _) => {}
                    (_, true) => late.push((path, touch)),
                    _ => world.ledger.touch(world.now, path, touch),
                }
            }
            if matches!(act, Act::Pass(_)) {
                for (path, touch) in late.drain(..).rev() {
                    world.ledger.touch(world.now, path, touch);
                }
            }
        }
        let now = world.now;
        world.ledger.touch_everything(now);
        world.pass(20_000, false);
        // Attributes alone are not told of.
        let content = |files: &BTreeMap<RelPath, Entry>| {
            files.iter().map(|(path, file)| (path.clone(), file.size, file.modified_ns, file.inode)).collect::<Vec<_>>()
        };
        prop_assert_eq!(content(&world.heard), content(&world.files));
        prop_assert_eq!(world.ledger.next_due(), None);
        prop_assert!(world.ledger.writers.is_empty());
    }
}

#[test]
fn what_comes_and_goes_between_two_looks_is_nothing_and_what_is_made_and_changed_is_new() {
    let mut world = World::new();
    world.made("gone");
    world.files.remove(&path("gone"));
    let now = world.now;
    world.ledger.touch(now, path("gone"), Touch::Other);
    world.made("kept");
    world.now += 100;
    world.made("kept");
    world.pass(299, false);
    assert_eq!(world.told(), []);
    world.pass(1, false);
    assert_eq!(world.told(), [("kept".to_owned(), "new")]);
}

#[test]
fn a_half_written_upload_is_announced_when_it_is_closed_or_silent() {
    let mut world = World::new();
    for upload in ["closed", "silent"] {
        let now = world.now;
        world.write(&path(upload));
        world.ledger.touch(now, path(upload), Touch::Created);
    }
    for _ in 0..20 {
        world.pass(1000, false);
        for upload in ["closed", "silent"] {
            world.write(&path(upload));
            let now = world.now;
            world.ledger.touch(now, path(upload), Touch::Written);
        }
    }
    assert_eq!(world.told(), []);
    let now = world.now;
    world.ledger.touch(now, path("closed"), Touch::Closed);
    world.pass(300, false);
    assert_eq!(world.told(), [("closed".to_owned(), "new")]);
    world.pass(SETTLE_MS, false);
    assert_eq!(world.told(), [("silent".to_owned(), "new")]);
}

#[test]
fn without_a_word_of_the_kernel_a_new_file_has_settled_when_two_looks_find_the_same() {
    let mut world = World::new();
    for step in 0..3 {
        world.write(&path("upload"));
        let now = world.now;
        world.ledger.touch_everything(now);
        world.pass(2000, false);
        assert_eq!(world.told(), [], "step {step}");
    }
    world.pass(SETTLE_MS, false);
    assert_eq!(world.told(), [("upload".to_owned(), "new")]);
}

#[test]
fn a_busy_file_is_told_of_now_and_then_and_no_other_waits_for_it() {
    let mut world = World::new();
    world.made("log");
    world.pass(300, false);
    world.told();
    let mut times = Vec::new();
    for tick in 0..200 {
        world.write(&path("log"));
        let now = world.now;
        world.ledger.touch(now, path("log"), Touch::Written);
        if tick == 100 {
            world.made("other");
        }
        world.pass(50, false);
        times.extend(world.told().into_iter().map(|(path, _)| (path, tick * 50)));
    }
    let (log, other): (Vec<_>, Vec<_>) = times.into_iter().partition(|(path, _)| path == "log");
    assert_eq!(other, [("other".to_owned(), 5250)]);
    assert_eq!(log.len(), 5, "{log:?}");
}

#[test]
fn a_file_that_was_told_of_while_it_is_written_is_told_of_again_even_within_one_tick_of_the_clock() {
    let mut world = World::new();
    world.made("a");
    world.pass(300, false);
    world.told();
    // The second writing has the same size and the same times.
    let now = world.now;
    world.ledger.touch(now, path("a"), Touch::Written);
    world.files.get_mut(&path("a")).unwrap().fresh = true;
    world.files.get_mut(&path("a")).unwrap().size += 1;
    world.pass(2000, false);
    assert_eq!(world.told(), [("a".to_owned(), "modified")]);
    let now = world.now;
    world.ledger.touch(now, path("a"), Touch::Written);
    world.pass(4000, false);
    assert_eq!(world.told(), [("a".to_owned(), "modified")]);
    // Attributes are no content.
    world.files.get_mut(&path("a")).unwrap().changed_ns += 1;
    let now = world.now;
    world.ledger.touch(now, path("a"), Touch::Other);
    world.pass(4000, false);
    assert_eq!(world.told(), []);
}

#[test]
fn what_is_too_much_is_left_out_until_there_is_room() {
    let mut world = World::new();
    for number in 0..1001 {
        world.made(&format!("f{number:04}"));
    }
    world.pass(300, false);
    assert_eq!((world.told().len(), world.ledger.is_full()), (1000, true));
    for number in 0..200 {
        let now = world.now;
        let name = path(&format!("f{number:04}"));
        world.files.remove(&name);
        world.ledger.touch(now, name, Touch::Other);
    }
    world.pass(4000, false);
    assert_eq!((world.told().len(), world.ledger.is_full()), (201, false));
    assert_eq!(world.heard, world.files);
}

#[test]
fn what_cannot_be_seen_stays_and_what_is_not_watched_any_more_is_forgotten_and_not_deleted() {
    let mut world = World::new();
    for name in ["seen/a", "unseen/a", "ignored/a"] {
        world.made(name);
    }
    world.pass(300, false);
    let nothing = HashSet::new();
    let mut difference = world.ledger.compare(&nothing);
    let names = |names: &[&[u8]]| names.iter().map(|name| (*name).into()).collect::<HashSet<_>>();
    difference.see(Sight::Folder {
        path: RelPath::root(),
        files: Vec::new(),
        others: names(&[b"seen", b"unseen"]),
        ignored: names(&[b"ignored"]),
    });
    difference.see(Sight::Folder {
        path: path("seen"),
        files: Vec::new(),
        others: HashSet::new(),
        ignored: HashSet::new(),
    });
    let changes: Vec<_> =
        difference.end().into_iter().map(|(path, change)| (path.text(), change.forgotten)).collect();
    assert_eq!(changes, [("ignored/a".to_owned(), true), ("seen/a".to_owned(), false)]);
}
