//! What all connections have seen together: the books, and everything that should not have been.

use std::{borrow::Cow, collections::BTreeMap};

use super::{book::Book, clock::Clock, inflate::Inflater};

/// Shared by the connections of a run.
#[derive(Debug)]
pub(super) struct Tally {
    pub(super) clock: Clock,
    pub(super) books: Vec<Book>,
    pub(super) errors: Errors,
    pub(super) inflater: Inflater,
    /// Slow and stuck connections that the server closed, as it may, by what it said.
    pub(super) slow_closed: BTreeMap<String, u64>,
    /// Connections that could not be resumed by their token and subscribed with `since` instead.
    pub(super) resume_expired: u64,
    /// Frames that came compressed.
    pub(super) compressed: u64,
}

impl Tally {
    pub(super) fn new(clock: Clock, books: Vec<Book>) -> Self {
        Self {
            clock,
            books,
            errors: Errors::default(),
            inflater: Inflater::default(),
            slow_closed: BTreeMap::new(),
            resume_expired: 0,
            compressed: 0,
        }
    }

    pub(super) fn deliveries(&self) -> u64 {
        self.books.iter().map(|book| book.deliveries).sum()
    }
}

/// Errors by kind, with the first of each kind in words.
#[derive(Debug, Default)]
pub(super) struct Errors(BTreeMap<&'static str, (u64, Cow<'static, str>)>);

impl Errors {
    #[cold]
    pub(super) fn add(&mut self, kind: &'static str, count: u64, example: impl Into<Cow<'static, str>>) {
        if count > 0 {
            self.0.entry(kind).or_insert_with(|| (0, example.into())).0 += count;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, u64, &str)> {
        self.0.iter().map(|(&kind, (count, example))| (kind, *count, example.as_ref()))
    }
}
