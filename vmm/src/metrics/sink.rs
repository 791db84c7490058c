//! Where lines of metrics go (`PUT /metrics`), and when: at each FlushMetrics action, once a minute, and at the end.
//!
//! The file may be a fifo. It is opened for reading too and never waited for: without a reader, or with one
//! that is too slow, lines are lost and counted, and the VM goes on.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use vmm_sys_util::timerfd::TimerFd;

use super::{PROCESS, json};
use crate::error::{Error, Result};

/// Firecracker's own period.
const PERIOD: Duration = Duration::from_secs(60);

pub struct Sink {
    file: File,
    timer: TimerFd,
    /// Totals at the last line.
    before: Value,
    /// What a fifo did not take of the last line.
    rest: Vec<u8>,
}

impl Sink {
    /// Opens the file or fifo at `path`; a file that is not there is made.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(Error::file("metrics", path))?;
        let timer = TimerFd::new()
            .and_then(|mut timer| timer.reset(PERIOD, Some(PERIOD)).map(|()| timer))
            .map_err(|error| Error::Host { what: "timer", source: io::Error::from_raw_os_error(error.errno()) })?;
        Ok(Sink { file, timer, before: Value::Null, rest: Vec::new() })
    }

    /// Becomes readable when a line is due.
    pub fn timer_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Writes the line that is due.
    pub fn tick(&mut self) {
        let _ = self.timer.wait();
        let _ = self.flush();
    }

    /// Writes a line now.
    pub fn flush(&mut self) -> io::Result<()> {
        let written = self.finish_last().and_then(|()| self.write_line());
        match &written {
            Ok(totals) => self.before = totals.clone(),
            // What was counted since is in the next line.
            Err(error) => {
                PROCESS.missed_metrics.increment();
                tracing::warn!(%error, "a line of metrics was lost");
            }
        }
        written.map(drop)
    }

    /// Writes a line or nothing of it; the totals that it brings the reader to.
    fn write_line(&mut self) -> io::Result<Value> {
        let (mut line, totals) = json::line(&self.before);
        line.push('\n');
        let count = self.file.write(line.as_bytes())?;
        self.rest = line.into_bytes().split_off(count);
        Ok(totals)
    }

    /// A line longer than a pipe takes at once (PIPE_BUF, pipe(7)) may have been cut: its end comes before the next one.
    fn finish_last(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            let count = self.file.write(&self.rest)?;
            self.rest.drain(..count);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_flush_is_a_line_of_json() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics");
        let mut sink = Sink::open(&path).unwrap();
        sink.flush().unwrap();
        sink.flush().unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().all(|line| serde_json::from_str::<Value>(line).unwrap()["vcpu"].is_object()));
    }

    #[test]
    fn a_fifo_that_nobody_reads_loses_lines_and_stops_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the name is NUL-terminated.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let mut sink = Sink::open(&path).unwrap();
        let missed = PROCESS.missed_metrics.get();
        let mut lines = 0;
        while sink.flush().is_ok() {
            lines += 1;
        }
        assert!(lines > 0 && PROCESS.missed_metrics.get() > missed);
    }
}
