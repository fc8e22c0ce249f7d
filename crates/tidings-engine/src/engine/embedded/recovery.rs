//! What the journal says, put back into memory.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use tidings_protocol::{Epoch, StreamId, Timestamp, TypeFilter, UserId};

use crate::{
    engine::journal::{Entry, Folder, JournalError, JournalOptions, LogWriter},
    saved::{ClientId, ResumeToken, SavedConnection},
};

use super::Kept;

/// Reads the journal of a folder into `kept`, and begins a log behind it.
pub(super) fn recover(
    options: JournalOptions,
    kept: &mut Kept,
    now: Timestamp,
) -> Result<LogWriter, JournalError> {
    let mut folder = Folder::open(&options.folder)?;
    let mut recovery = Recovery { kept, streams: HashMap::new(), now };
    let recovered = folder.recover(|entry, in_checkpoint| {
        // Every entry was written by us and has its checksum; what does not read now is of a kind that says nothing here.
        let _ = recovery.take(&entry, in_checkpoint);
    })?;
    // Clients find what they had before; whose connection was alive then has lost it now.
    kept.connections.forget_old(now);
    if recovered.machine_crashed {
        tracing::warn!(
            folder = %options.folder.display(),
            "the machine has stopped since the journal was last written, and may have lost its end; \
             streams begin a new epoch where they stand"
        );
        kept.streams.branch_all();
    }
    LogWriter::begin(folder, options)
}

struct Recovery<'a> {
    kept: &'a mut Kept,
    streams: HashMap<u32, StreamId>,
    now: Timestamp,
}

impl Recovery<'_> {
    fn take(&mut self, entry: &Entry<'_>, in_checkpoint: bool) -> Option<()> {
        match entry {
            Entry::Began { .. } | Entry::Ended | Entry::Whole => {}
            Entry::Stream(entry) => {
                let id = StreamId::try_from(&*entry.id).ok()?;
                self.streams.insert(entry.number, id.clone());
                let used_at = Timestamp::from_microsecond(entry.used_at)?;
                let epoch = Epoch::new(&*entry.epoch);
                let stream = self.kept.streams.insert(&id, entry.number, epoch, used_at);
                stream.restore(entry, in_checkpoint);
            }
            Entry::Event { stream, .. } | Entry::Id { stream, .. } | Entry::State { stream, .. } => {
                self.stream(*stream)?.restore_entry(entry, in_checkpoint)?;
            }
            Entry::Forgotten { stream } => {
                let id = self.streams.remove(stream)?;
                self.kept.streams.remove(&id);
            }
            Entry::Connection { client, token, lost_at, subscriptions } => {
                self.restore_connection(*client, *token, *lost_at, None, subscriptions);
            }
            Entry::OwnedConnection { client, token, lost_at, user, subscriptions } => {
                let user = user.as_deref().and_then(|user| UserId::try_from(user).ok());
                self.restore_connection(*client, *token, *lost_at, user, subscriptions);
            }
            Entry::Gone { client } => {
                self.kept.connections.remove(ClientId::from_u128(*client));
            }
        }
        Some(())
    }

    fn restore_connection(
        &mut self,
        client: u128,
        token: [u8; 16],
        lost_at: Option<i64>,
        user: Option<UserId>,
        subscriptions: &[(Cow<'_, str>, Vec<Cow<'_, str>>)],
    ) {
        let subscriptions = subscriptions.iter().filter_map(|(stream, patterns)| {
            let types = match &patterns[..] {
                [] => TypeFilter::everything(),
                patterns => TypeFilter::parse(patterns).ok()?,
            };
            Some((StreamId::try_from(&**stream).ok()?, Arc::new(types)))
        });
        let connection = SavedConnection {
            client: ClientId::from_u128(client),
            token: ResumeToken::from_bytes(token),
            owner: None,
            user,
            subscriptions: subscriptions.collect(),
        };
        let lost_at = lost_at.and_then(Timestamp::from_microsecond).unwrap_or(self.now);
        self.kept.connections.save(connection, Some(lost_at));
    }

    fn stream(&mut self, number: u32) -> Option<&mut crate::engine::streams::Stream> {
        let id = self.streams.get(&number)?;
        Some(self.kept.streams.stream(id, self.now))
    }
}
