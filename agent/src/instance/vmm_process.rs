//! The VMM's process: starting it so that it outlives the agent, and finding it again.
//!
//! A VMM inherits a locked descriptor of its instance's `lock` file and holds it until it ends,
//! however it ends. So "does a VMM of this instance run?" has one answer, the kernel's: is the file
//! locked? Its process id is written into the file by the child itself before it becomes the VMM; an
//! agent that is killed at any instruction in between leaves either no process or one that the next
//! agent finds. A second VMM on the same disk cannot be started: it would need the lock.
//!
//! Signals and the wait for the end go through a pidfd, which stays with the process even if its
//! number is given to another (pidfd_open(2)).

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::confine::{Binding, Descriptors, Jail, LOWEST_UID};
use super::folder::Folder;

/// Where the program lies in the jail.
const PROGRAM: &str = "/mallee-vmm";

/// A VMM that ran when the value was made.
#[derive(Debug)]
pub struct VmmProcess {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
}

/// What to start.
#[derive(Debug)]
pub struct Launch<'a> {
    pub folder: &'a Folder,
    pub uid: u32,
    /// The program's path on the host.
    pub program: &'a Path,
    /// Its arguments; paths are those in the jail.
    pub arguments: Vec<String>,
    pub bindings: Vec<Binding>,
    pub cgroup: Option<OwnedFd>,
}

impl VmmProcess {
    /// Starts a VMM in its jail.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] when one runs; else what kept it from starting, with the end
    /// of its log.
    pub fn spawn(mut launch: Launch<'_>) -> io::Result<Self> {
        let lock = lock_exclusively(&launch.folder.lock())?;
        let pid_file = OpenOptions::new().write(true).truncate(true).open(launch.folder.lock())?;
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(launch.folder.log())?;
        log.set_len(0)?;
        let host = std::fs::canonicalize(launch.program)?;
        launch.bindings.push(Binding { host, inside: PROGRAM, writable: false });
        let descriptors = Descriptors {
            lock: lock.as_fd(),
            pid_file: pid_file.as_fd(),
            cgroup: launch.cgroup.as_ref().map(AsFd::as_fd),
        };
        let jail = Jail::prepare(&launch.folder.jail_root(), launch.uid, &launch.bindings, &descriptors)?;
        let mut command = Command::new(PROGRAM);
        command.args(&launch.arguments).env_clear().env("RUST_LOG", "info").stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        // SAFETY: `Jail::enter` makes system calls on memory that was prepared before the fork and
        // allocates nothing; the descriptors it names are open until `spawn` has returned.
        unsafe { command.pre_exec(move || jail.enter()) };
        let child = command.spawn().map_err(|error| with_log(error, launch.folder))?;
        // Dropping `Child` neither kills nor waits: that is what a VMM that outlives us needs.
        Self::open(child.id())
    }

    /// The VMM that runs in `folder`, if one does.
    pub fn find(folder: &Folder) -> io::Result<Option<Self>> {
        // A child that was just forked has the lock but may not have written its number yet.
        for _ in 0..500 {
            if !is_locked(&folder.lock())? {
                return Ok(None);
            }
            if let Some(pid) = read_pid(&folder.lock())? {
                match Self::open(pid) {
                    // Still locked after the pidfd was opened: the number was not another's meanwhile.
                    Ok(process) if is_locked(&folder.lock())? => return Ok(Some(process)),
                    Ok(_) => return Ok(None),
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    Err(error) => return Err(error),
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(io::Error::other(format!(
            "{} is locked, but by no process that it names; end the process that `fuser` shows for it",
            folder.lock().display()
        )))
    }

    fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes two numbers; the descriptor it returns is new and ours alone.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = Errno::result(fd)?;
        // SAFETY: `fd` was just returned by the kernel and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        // SAFETY: `fd` is owned by the value that watches it, and stays the same descriptor until then.
        let pidfd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)?;
        Ok(Self { pid, pidfd })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the end. May be dropped and called again.
    pub async fn ended(&self) {
        // A pidfd is readable from the end of its process on; an error of the wait itself means that
        // the runtime is shutting down.
        let _ = self.pidfd.readable().await;
        self.reap();
    }

    /// Takes the exit status of a child, so that it does not stay a zombie. A VMM that was found again
    /// is no child of ours: init reaps it.
    fn reap(&self) {
        // SAFETY: an all-zero siginfo_t is a valid value to be written over.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let fd = self.pidfd.get_ref().as_raw_fd() as libc::id_t;
        // SAFETY: `info` is valid for the call; a failure (ECHILD) is what is described above.
        unsafe { libc::waitid(libc::P_PIDFD, fd, &mut info, libc::WEXITED | libc::WNOHANG) };
    }

    /// Sends a signal; one that ended already is fine.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> io::Result<()> {
        let fd = self.pidfd.get_ref().as_raw_fd();
        // SAFETY: a descriptor, a number, a null siginfo (pidfd_send_signal(2): as kill(2) would), no flag.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, fd, signal as i32, std::ptr::null::<libc::siginfo_t>(), 0)
        };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Ends every process that runs under `uid` in a jail of this instance: for a VMM that was taken over
/// and let go of its lock. The user id alone does not tell: another cloud on the same machine may have
/// given out the same one.
pub fn kill_all_in(folder: &Folder, uid: u32) {
    use std::os::unix::fs::MetadataExt;
    // Never the machine's own users, whatever a damaged record may say.
    if uid < LOWEST_UID || uid == nix::unistd::geteuid().as_raw() {
        return;
    }
    let (Ok(processes), Ok(ours)) = (std::fs::read_dir("/proc"), std::fs::metadata(folder.vm())) else { return };
    for entry in processes.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let is_of_user = entry.metadata().is_ok_and(|found| found.uid() == uid);
        // The jail's `/vm` is this instance's folder, whatever path leads to it.
        let is_inside = || {
            let found = std::fs::metadata(entry.path().join("root").join("vm"));
            found.is_ok_and(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino()))
        };
        if is_of_user && !is_zombie(&entry.path()) && is_inside() {
            tracing::warn!(pid, uid, "a process that nobody answers for runs in an instance's jail: killed");
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// It ended and waits for its parent to take notice (proc_pid_stat(5): the state follows the name).
fn is_zombie(process: &Path) -> bool {
    let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}

/// Opens and locks. The value must be closed, never unlocked: unlocking would unlock it for the child too.
fn lock_exclusively(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    // Opened again for reading alone: the VMM inherits it and must not be able to write a number here.
    let file = {
        drop(file);
        File::open(path)?
    };
    // `mallee-agent show` holds the lock for an instant to see whether it is free.
    for _ in 0..50 {
        if flock(&file, libc::LOCK_EX)? {
            return Ok(file);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, "a VMM of this instance runs already"))
}

fn is_locked(path: &Path) -> io::Result<bool> {
    match File::open(path) {
        Ok(file) => Ok(!flock(&file, libc::LOCK_SH)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// True when the lock was got. Let go by closing the file.
fn flock(file: &File, kind: i32) -> io::Result<bool> {
    // SAFETY: the descriptor is open for the length of the call.
    match Errno::result(unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(Errno::EWOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn read_pid(path: &Path) -> io::Result<Option<u32>> {
    let mut text = String::new();
    File::open(path)?.take(16).read_to_string(&mut text)?;
    Ok(text.trim().parse().ok())
}

fn with_log(error: io::Error, folder: &Folder) -> io::Error {
    let log = log_end(folder);
    if log.is_empty() { error } else { io::Error::new(error.kind(), format!("{}: {error}", log.replace('\n', "; "))) }
}

/// The last lines of what a VMM wrote on its standard error.
pub fn log_end(folder: &Folder) -> String {
    let text = std::fs::read(folder.log()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(3)..].join("\n")
}
