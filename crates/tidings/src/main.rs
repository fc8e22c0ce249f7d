//! The binary `tidings`.

use std::process::ExitCode;

/// Gives back what closed connections held; see `docs/decisions/0007-jemalloc.md`.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    tidings::cli::main()
}
