//! How a thread that waits for the kernel is asked to stop.

use std::{
    io::{self, PipeReader, PipeWriter},
    os::fd::{AsFd as _, BorrowedFd},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Held by the thread.
#[derive(Debug)]
pub(crate) struct Stop(PipeReader);

/// Dropped by whoever asks.
#[derive(Debug)]
pub(crate) struct Stopper {
    _end: PipeWriter,
}

/// Both ends.
pub(crate) fn stop() -> io::Result<(Stopper, Stop)> {
    let (reader, writer) = io::pipe()?;
    Ok((Stopper { _end: writer }, Stop(reader)))
}

impl Stop {
    pub(crate) fn is_asked(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits for so long; `true`: it was asked to stop.
    pub(crate) fn wait(&self, time: Duration) -> bool {
        self.wait_for(None, Some(time))
    }

    /// Waits until there is something to read, or for so long; `true`: it was asked to stop.
    pub(crate) fn wait_for(&self, queue: Option<BorrowedFd<'_>>, time: Option<Duration>) -> bool {
        let mut waited = vec![PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::empty())];
        waited.extend(queue.map(|queue| PollFd::from_borrowed_fd(queue, PollFlags::IN)));
        let time = time.and_then(|time| Timespec::try_from(time).ok());
        // Interrupted: whoever waits looks around and waits again.
        let _ = poll(&mut waited, time.as_ref());
        !waited[0].revents().is_empty()
    }
}
