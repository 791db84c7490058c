//! `--trace-exits`: a line for each time that a vCPU comes out of the guest, for who wants to see what a kernel does with its machine.
//!
//! Written by the vCPUs' own threads, a `write` each, so that lines of several vCPUs stand whole and in their order. It costs several times
//! what an exit does; the counters (`metrics::exits`) are always on and cost nothing.
//!
//! What may not happen here: a guest that fills the host's disk. The trace ends after [`LINES_MAX`] lines.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::error::{Error, Result};
use crate::metrics::ExitKind;

/// Some 60 MB; the boot of a Linux kernel takes less than a tenth.
const LINES_MAX: u64 = 1_000_000;

static TRACE: OnceLock<Trace> = OnceLock::new();

pub struct Trace {
    file: File,
    start: Instant,
    lines: AtomicU64,
}

/// Every vCPU that is started from now on writes to `path`, which must not exist.
pub fn start(path: &Path) -> Result<()> {
    let file = File::create_new(path).map_err(Error::file("exit trace", path))?;
    let _ = TRACE.set(Trace { file, start: Instant::now(), lines: AtomicU64::new(0) });
    Ok(())
}

/// The trace, if there is one.
pub fn get() -> Option<&'static Trace> {
    TRACE.get()
}

impl Trace {
    /// An exit without data.
    pub fn exit(&self, vcpu: u8, kind: ExitKind) {
        self.line(vcpu, kind, format_args!(""));
    }

    /// An access to a port or to memory that has no RAM: what was read, or is to be written.
    pub fn access(&self, vcpu: u8, kind: ExitKind, address: u64, data: &[u8]) {
        self.line(vcpu, kind, format_args!(" {address:#x} {} {:#x}", data.len(), Value(data)));
    }

    fn line(&self, vcpu: u8, kind: ExitKind, rest: fmt::Arguments<'_>) {
        let number = self.lines.fetch_add(1, Ordering::Relaxed);
        if number > LINES_MAX {
            return;
        }
        let mut text = String::with_capacity(80);
        let microseconds = self.start.elapsed().as_micros();
        let name = kind.name().trim_start_matches("exit_");
        let _ = match number {
            LINES_MAX => writeln!(text, "the trace ends here: {LINES_MAX} exits"),
            _ => writeln!(text, "{microseconds} vcpu{vcpu} {name}{rest}"),
        };
        // A full disk loses lines, not the guest.
        let _ = (&self.file).write_all(text.as_bytes());
    }
}

/// Up to eight bytes as the number that they are to the guest; of more (string instructions), the first eight.
struct Value<'a>(&'a [u8]);

impl fmt::LowerHex for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = [0; 8];
        let length = self.0.len().min(8);
        bytes[..length].copy_from_slice(&self.0[..length]);
        fmt::LowerHex::fmt(&u64::from_le_bytes(bytes), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traced(what: impl FnOnce(&Trace)) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace");
        let file = File::create_new(&path).unwrap();
        what(&Trace { file, start: Instant::now(), lines: AtomicU64::new(LINES_MAX - 3) });
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_line_says_who_why_where_and_what_and_there_is_a_last_one() {
        let text = traced(|trace| {
            trace.access(1, ExitKind::IoOut, 0x3f8, b"h");
            trace.access(0, ExitKind::MmioRead, 0xd000_0000, &0x7472_6976u32.to_le_bytes());
            trace.exit(0, ExitKind::Halt);
            trace.exit(0, ExitKind::Halt);
            trace.exit(0, ExitKind::Halt);
        });
        let lines: Vec<&str> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
        assert_eq!(
            lines,
            [
                "vcpu1 io_out 0x3f8 1 0x68",
                "vcpu0 mmio_read 0xd0000000 4 0x74726976",
                "vcpu0 hlt",
                "trace ends here: 1000000 exits"
            ]
        );
    }
}
