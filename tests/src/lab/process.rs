//! A process known exactly: by its id and by when it started.
//!
//! An id alone may have been given to another process since; id and start time (`starttime`, field
//! 22 of /proc/PID/stat, proc(5)) together never are within one boot of the machine.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::error::{LabError, OnPath};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    /// Clock ticks between the machine's boot and the process's start.
    pub started: u64,
}

impl Process {
    /// The running process; it stays the same one when it executes another program.
    pub fn own() -> std::io::Result<Process> {
        let pid = std::process::id() as i32;
        let started = start_time(pid).ok_or_else(|| std::io::Error::other("/proc is not readable"))?;
        Ok(Process { pid, started })
    }

    pub fn read(path: &Path) -> Option<Process> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    pub fn write(&self, path: &Path) -> Result<(), LabError> {
        let text = serde_json::to_vec(self).map_err(std::io::Error::other).on("writing", path)?;
        fs::write(path, text).on("writing", path)
    }

    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Asks it to end, and ends it when it has not after `patience`. Returns once it is gone.
    pub fn end(&self, patience: Duration) -> nix::Result<()> {
        let asked = Instant::now();
        self.signal(Signal::SIGTERM)?;
        while self.is_alive() {
            if asked.elapsed() > patience {
                self.signal(Signal::SIGKILL)?;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> nix::Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Err(Errno::ESRCH) => Ok(()),
            other => other,
        }
    }
}

/// When process `pid` started; none when there is no such process or it is a zombie (it has ended,
/// only nobody has asked how).
fn start_time(pid: i32) -> Option<u64> {
    parse_start_time(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The second field is the program's name in parentheses and may hold any character.
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let tail = "1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 99";
        assert_eq!(parse_start_time(&format!("12 (a ) b) S {tail}")), Some(4711));
        assert_eq!(parse_start_time(&format!("12 (dead) Z {tail}")), None);
    }

    #[test]
    fn a_process_is_told_from_another_with_its_id() {
        let own = Process::own().unwrap();
        assert!(own.is_alive());
        let other = Process { started: own.started + 1, ..own };
        assert!(!other.is_alive());
        // Ending one that is not there any more is done at once and hits nobody.
        other.end(Duration::ZERO).unwrap();
        assert!(own.is_alive());
    }
}
