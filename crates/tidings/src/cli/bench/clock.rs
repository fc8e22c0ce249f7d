//! Time and CPU time. Nanoseconds since the start, because tables of times hold plain numbers.

use std::{
    fs,
    time::{Duration, Instant},
};

/// A point in time, in nanoseconds since the clock was made.
pub(super) type Nanos = u64;

/// The clock of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock(Instant);

impl Clock {
    #[allow(clippy::disallowed_methods, reason = "measures a real server; there is no time to pause")]
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    #[inline]
    pub(super) fn now(self) -> Nanos {
        nanos(self.0.elapsed())
    }
}

pub(super) fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A process whose use of CPU and memory can be read, on Linux from `/proc`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Process(u32);

/// Linux counts CPU time for `/proc` in hundredths of a second, on every architecture.
const TICK: Duration = Duration::from_millis(10);

impl Process {
    /// Fails if there is no such process, or no `/proc`.
    pub(super) fn new(pid: u32) -> anyhow::Result<Self> {
        let process = Self(pid);
        anyhow::ensure!(
            process.cpu().is_some(),
            "--pid {pid}: no such process, or this system has no /proc (CPU and memory are read on Linux only)"
        );
        Ok(process)
    }

    pub(super) fn own() -> Self {
        Self(std::process::id())
    }

    /// CPU time used so far, in user code and in the kernel.
    pub(super) fn cpu(self) -> Option<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0)).ok()?;
        // The program's name is in brackets and may hold anything; fields are counted behind it.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace().skip(11).map(str::parse::<u32>);
        let ticks = fields.next()?.ok()?.checked_add(fields.next()?.ok()?)?;
        Some(TICK * ticks)
    }

    /// Memory in RAM (`VmRSS`).
    pub(super) fn memory_bytes(self) -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.0)).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
    }
}

/// How many files this process may have open, where the system tells.
pub(super) fn open_files_max() -> Option<usize> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_own_process_can_be_read() {
        let own = Process::new(std::process::id()).unwrap();
        assert!(own.cpu().is_some());
        assert!(own.memory_bytes().unwrap() > 1 << 20);
        assert!(open_files_max().unwrap() > 10);
        assert!(Process::new(u32::MAX).unwrap_err().to_string().contains("no such process"));
    }
}
