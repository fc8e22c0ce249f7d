//! A connection without a socket of its own: what a shard writes comes out as a stream of bytes, for a response body.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use futures_core::Stream;
use parking_lot::Mutex;

use crate::{
    hub::{Letter, Mailbox},
    shard::{ConnectionKey, Socket},
};

/// What may wait between the shard and the response; more waits in the shard, where it is shared.
const WAITING_BYTES_MAX: usize = 64 * 1024;

/// The reading end. Dropping it ends the connection.
#[derive(Debug)]
pub struct EventStream(Arc<Pipe>);

/// The writing end, which a shard has in place of a socket. Dropping it ends the stream.
#[derive(Debug)]
pub(crate) struct PipeSocket(Arc<Pipe>);

#[derive(Debug)]
struct Pipe {
    waiting: Mutex<Waiting>,
    /// Of the shard, and who it knows this as.
    mailbox: Arc<Mailbox>,
    key: OnceLock<ConnectionKey>,
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: BytesMut,
    reader: Option<Waker>,
    reader_gone: bool,
    writer_gone: bool,
    writer_blocked: bool,
}

pub(crate) fn pipe(mailbox: Arc<Mailbox>) -> (PipeSocket, EventStream) {
    let pipe = Arc::new(Pipe { waiting: Mutex::default(), mailbox, key: OnceLock::new() });
    (PipeSocket(Arc::clone(&pipe)), EventStream(pipe))
}

impl PipeSocket {
    pub(crate) fn set_key(&self, key: ConnectionKey) {
        let _first_and_only = self.0.key.set(key);
        // The reader may have gone before the shard knew of it.
        if self.0.waiting.lock().reader_gone {
            self.0.stir();
        }
    }
}

impl Pipe {
    fn stir(&self) {
        if let Some(&key) = self.key.get() {
            self.mailbox.put(Letter::Stirred(key));
        }
    }
}

impl Socket for PipeSocket {
    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut waiting = self.0.waiting.lock();
        if waiting.reader_gone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let room = WAITING_BYTES_MAX.saturating_sub(waiting.bytes.len());
        if room == 0 {
            waiting.writer_blocked = true;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut written = 0;
        for slice in slices {
            let taken = slice.len().min(room - written);
            waiting.bytes.extend_from_slice(&slice[..taken]);
            written += taken;
        }
        if let Some(reader) = waiting.reader.take() {
            reader.wake();
        }
        Ok(written)
    }

    fn read(&self, _: &mut [u8]) -> io::Result<usize> {
        if self.0.waiting.lock().reader_gone { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }
}

impl Drop for PipeSocket {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting.lock();
        waiting.writer_gone = true;
        if let Some(reader) = waiting.reader.take() {
            reader.wake();
        }
    }
}

impl Stream for EventStream {
    type Item = Bytes;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut waiting = self.0.waiting.lock();
        if !waiting.bytes.is_empty() {
            let bytes = waiting.bytes.split().freeze();
            if std::mem::take(&mut waiting.writer_blocked) {
                drop(waiting);
                self.0.stir();
            }
            return Poll::Ready(Some(bytes));
        }
        if waiting.writer_gone {
            return Poll::Ready(None);
        }
        waiting.reader = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.0.waiting.lock().reader_gone = true;
        self.0.stir();
    }
}
