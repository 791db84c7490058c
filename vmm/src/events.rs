//! The events file: what happened to the VM and when, one JSON object a line, only ever appended to.
//!
//! Whoever watches the VM may come and go; all it has to do is read the file again. Each line is
//! written with one `write`, so a reader never sees half of one that a crash cut off in the middle of
//! another thread's.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::api::{Event, EventKind};
use crate::error::{Error, Result};

/// Where events go. Without a path they are only logged.
pub struct Events {
    file: Option<Mutex<File>>,
}

impl Events {
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let file = match path {
            None => None,
            Some(path) => Some(Mutex::new(
                OpenOptions::new().create(true).append(true).open(path).map_err(Error::file("events file", path))?,
            )),
        };
        Ok(Events { file })
    }

    /// Records that `kind` happens now.
    pub fn emit(&self, kind: EventKind) {
        self.write(&now(kind));
    }

    /// Records events whose times were taken earlier.
    pub fn write(&self, event: &Event) {
        tracing::debug!(?event.kind, "event");
        let Some(file) = &self.file else { return };
        let Ok(mut line) = serde_json::to_vec(event) else {
            return;
        };
        line.push(b'\n');
        let mut file = file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Err(error) = file.write_all(&line) {
            tracing::error!(%error, "an event was lost");
        }
    }
}

/// An event of this moment.
pub fn now(kind: EventKind) -> Event {
    Event { unix_ns: unix_ns(), monotonic_ns: monotonic_ns(), kind }
}

/// CLOCK_REALTIME (ns since 1970).
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_nanos() as u64
}

fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec to the address of one.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_appended_and_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        Events::open(Some(&path)).unwrap().emit(EventKind::VmBuilt);
        Events::open(Some(&path)).unwrap().emit(EventKind::BootTimer { value: 7 });
        let text = std::fs::read_to_string(path).unwrap();
        let kinds: Vec<EventKind> =
            text.lines().map(|line| serde_json::from_str::<Event>(line).unwrap().kind).collect();
        assert_eq!(kinds, [EventKind::VmBuilt, EventKind::BootTimer { value: 7 }]);
    }
}
