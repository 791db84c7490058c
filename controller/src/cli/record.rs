//! What `mallee up` writes down of itself, in `<state>/run`: which processes it started, with what,
//! and what it made outside of the state folder.
//!
//! A process is known by its id *and* the time it started at, because ids are used again. A lock
//! that goes with its holder says whether a `mallee up` is alive; it is never a stale file.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::{CliError, Result};

/// In the order in which they are started.
pub const PROGRAMS: [&str; 3] = ["controller", "netd", "agent"];

/// A process that was started and may live on without who started it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    pub pid: u32,
    /// Clock ticks since the machine's boot (`proc(5)`, field 22 of `stat`).
    pub start_ticks: u64,
    /// Program and arguments: a process with other ones is not taken over.
    pub command: Vec<String>,
    /// Times it was started again since `mallee up` began.
    pub restarts: u32,
}

impl Started {
    /// Whether that very process is still there.
    pub fn alive(&self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }
}

/// What `mallee up` made on this machine, for `mallee down` to remove.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Surroundings {
    pub bridge: Option<String>,
    pub namespace: Option<String>,
    /// The interface that was given, when there is no bridge of our own.
    pub uplink: Option<String>,
    /// Everything that was asked for runs.
    pub ready: bool,
    /// What is being waited for, before that.
    pub phase: String,
}

/// One line of `mallee status`.
#[derive(Debug, Clone, Serialize)]
pub struct Process {
    pub name: String,
    /// 0 when it does not run.
    pub pid: u32,
    pub restarts: u32,
    pub log: PathBuf,
}

pub fn run_folder(state: &Path) -> PathBuf {
    state.join("run")
}

/// Where the netd that `mallee up` starts listens.
pub fn netd_socket(state: &Path) -> PathBuf {
    run_folder(state).join("netd.sock")
}

pub fn log_file(state: &Path, name: &str) -> PathBuf {
    state.join("log").join(format!("{name}.log"))
}

/// Makes the state folder with the folders that `mallee up` needs.
pub fn make_folders(state: &Path) -> Result<()> {
    for folder in [state.to_owned(), run_folder(state), state.join("log")] {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(|source| CliError::File {
            what: "cannot make the folder",
            path: folder,
            source,
        })?;
    }
    Ok(())
}

/// Held for as long as a `mallee up` lives.
pub struct Lock(#[allow(dead_code)] Flock<File>);

/// Takes the lock; `Err(pid)` when a living `mallee up` has it.
pub fn lock(state: &Path) -> Result<std::result::Result<Lock, u32>> {
    let path = run_folder(state).join("up.lock");
    let open = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = open.map_err(|source| CliError::File { what: "cannot open", path: path.clone(), source })?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            let write =
                lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| write!(*lock, "{}", std::process::id()));
            write.map_err(|source| CliError::File { what: "cannot write", path, source })?;
            Ok(Ok(Lock(lock)))
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut text = String::new();
            // An unreadable id only makes the message poorer.
            let _ = file.read_to_string(&mut text);
            Ok(Err(text.trim().parse().unwrap_or(0)))
        }
        Err((_, errno)) => Err(CliError::System("cannot lock the state folder", errno.into())),
    }
}

/// The id of the living `mallee up` of this state folder.
pub fn holder(state: &Path) -> Option<u32> {
    if !run_folder(state).is_dir() {
        return None;
    }
    match lock(state) {
        Ok(Err(pid)) => Some(pid),
        _ => None,
    }
}

pub fn read<T: serde::de::DeserializeOwned>(state: &Path, name: &str) -> Option<T> {
    let text = fs::read(run_folder(state).join(format!("{name}.json"))).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Replaces a record as a whole: a reader never sees half of one.
pub fn write(state: &Path, name: &str, value: &impl Serialize) -> Result<()> {
    let path = run_folder(state).join(format!("{name}.json"));
    let temporary = path.with_extension("new");
    let text = serde_json::to_vec_pretty(value).map_err(|error| CliError::Said(error.to_string()))?;
    fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &path)).map_err(|source| CliError::File {
        what: "cannot write",
        path,
        source,
    })
}

pub fn forget(state: &Path, name: &str) {
    let _ = fs::remove_file(run_folder(state).join(format!("{name}.json")));
}

/// The programs that were started, alive or not.
pub fn processes(state: &Path) -> Vec<Process> {
    PROGRAMS
        .iter()
        .filter_map(|name| {
            let started: Started = read(state, name)?;
            let pid = if started.alive() { started.pid } else { 0 };
            Some(Process { name: (*name).to_owned(), pid, restarts: started.restarts, log: log_file(state, name) })
        })
        .collect()
}

/// When a process started, in clock ticks since the boot; `None` when there is none, or only its
/// remains.
pub fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&stat)
}

/// The command's name may contain blanks and parentheses: what follows the last one counts.
fn parse_stat(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Begins the log anew when it has grown large; the older one is kept once.
pub fn open_log(state: &Path, name: &str) -> io::Result<File> {
    const LIMIT: u64 = 16 << 20;
    let path = log_file(state, name);
    if fs::metadata(&path).is_ok_and(|log| log.len() > LIMIT) {
        fs::rename(&path, path.with_extension("log.1"))?;
    }
    fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_read_past_an_odd_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1000 2";
        assert_eq!(parse_stat(stat), Some(98765));
        assert_eq!(parse_stat(&stat.replace(" S ", " Z ")), None);
        assert_eq!(parse_stat("7 (a"), None);
    }

    #[test]
    fn a_process_is_known_by_its_start_too() {
        let pid = std::process::id();
        let started = Started { pid, start_ticks: start_ticks(pid).unwrap(), command: vec![], restarts: 0 };
        assert!(started.alive());
        assert!(!Started { start_ticks: started.start_ticks + 1, ..started }.alive());
    }

    #[test]
    fn the_lock_is_held_once_and_names_its_holder() {
        let state = tempfile::tempdir().unwrap();
        make_folders(state.path()).unwrap();
        let first = lock(state.path()).unwrap().ok().unwrap();
        assert_eq!(lock(state.path()).unwrap().err(), Some(std::process::id()));
        assert_eq!(holder(state.path()), Some(std::process::id()));
        drop(first);
        assert!(lock(state.path()).unwrap().is_ok());
    }
}
