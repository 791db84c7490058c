//! The duties of process 1: children are started and reaped here, and the signals that mean "go down"
//! arrive here.
//!
//! Process 1 reaps every orphan of the machine with one `waitpid(-1)`. Any other wait for a child would
//! race with it; so whoever wants a child's end asks [`Children`] to start it and gets the end by a channel.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::button;
use crate::power::Target;
use crate::report;

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exited(i32),
    Killed(Signal),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::Exited(0) => write!(f, "ended well"),
            Ended::Exited(code) => write!(f, "ended with status {code}"),
            Ended::Killed(signal) => write!(f, "was killed by {signal}"),
        }
    }
}

/// The children that somebody waits for.
#[derive(Clone, Default)]
pub struct Children {
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    waiting: HashMap<Pid, Sender<Ended>>,
    /// The machine goes down: nothing is started any more.
    closed: bool,
}

/// A started child; its end comes by the channel.
pub struct Started {
    pub end: Receiver<Ended>,
}

impl Started {
    /// Blocks until the child ended.
    pub fn wait(&self) -> Ended {
        // The sender lives in the table until the reaper uses it, and the table as long as the process.
        self.end.recv().unwrap_or(Ended::Exited(-1))
    }
}

impl Children {
    /// Starts `command`, or returns `None` when the machine is going down. The table is locked meanwhile, so
    /// that the reaper cannot see the end of a child which is not in it yet. The command is consumed: what it holds
    /// open (a log, a pipe's end) is the child's alone afterwards.
    pub fn start(&self, mut command: Command) -> std::io::Result<Option<Started>> {
        let (sender, end) = channel();
        let mut table = self.lock();
        if table.closed {
            return Ok(None);
        }
        unblock_signals(&mut command);
        let child = command.spawn()?;
        table.waiting.insert(Pid::from_raw(child.id().cast_signed()), sender);
        Ok(Some(Started { end }))
    }

    /// Starts `command` and waits for its end. Going down counts as having been killed.
    pub fn run(&self, command: Command) -> std::io::Result<Ended> {
        Ok(self.start(command)?.map_or(Ended::Killed(Signal::SIGTERM), |started| started.wait()))
    }

    /// From now on nothing is started.
    pub fn close(&self) {
        self.lock().closed = true;
    }

    /// Reaps whatever has ended and tells those who wait for it.
    pub fn reap(&self) {
        let mut table = self.lock();
        loop {
            let (pid, ended) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Ended::Exited(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Ended::Killed(signal)),
                Ok(WaitStatus::StillAlive) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(_) => return,
            };
            if let Some(sender) = table.waiting.remove(&pid) {
                // Nobody listens any more: fine.
                let _ = sender.send(ended);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A child begins with no signal blocked. It inherits its parent's mask across `execve` (signal(7)), and ours
/// blocks SIGCHLD: an ssh server that never hears of its shell's end never closes the session.
fn unblock_signals(command: &mut Command) {
    let unblock = || SigSet::empty().thread_set_mask().map_err(std::io::Error::from);
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; this is one, sigprocmask, and
    // allocates nothing.
    unsafe { command.pre_exec(unblock) };
}

/// Signals that process 1 acts on. They must be blocked before any thread starts, so that only the
/// supervisor's descriptor gets them.
pub struct Signals(SignalFd);

impl Signals {
    pub fn take() -> nix::Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2] {
            set.add(signal);
        }
        set.thread_block()?;
        SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map(Signals)
    }
}

/// Serves until the machine is to go down, and says how.
pub fn run(children: &Children, signals: &Signals) -> Target {
    let buttons = button::open_all();
    loop {
        let mut watched = vec![PollFd::new(signals.0.as_fd(), PollFlags::POLLIN)];
        watched.extend(buttons.iter().map(|one: &OwnedFd| PollFd::new(one.as_fd(), PollFlags::POLLIN)));
        match poll(&mut watched, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => report::line(format_args!("poll: {error}")),
        }
        while let Ok(Some(signal)) = signals.0.read_signal() {
            match target_of(signal.ssi_signo.cast_signed()) {
                Some(target) => return target,
                None => children.reap(),
            }
        }
        if buttons.iter().any(button::was_pressed) {
            return Target::PowerOff;
        }
    }
}

/// What a signal to process 1 asks for. SIGINT is the kernel's word for Ctrl-Alt-Del; the others are those of busybox,
/// whose shell prefers its own `reboot`, `poweroff` and `halt` to programs of these names.
fn target_of(signal: i32) -> Option<Target> {
    match Signal::try_from(signal) {
        Ok(Signal::SIGINT | Signal::SIGTERM) => Some(Target::Reboot),
        Ok(Signal::SIGUSR1 | Signal::SIGUSR2) => Some(Target::PowerOff),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_those_of_the_kernel_and_of_busybox() {
        assert_eq!(target_of(libc::SIGINT), Some(Target::Reboot));
        assert_eq!(target_of(libc::SIGTERM), Some(Target::Reboot));
        assert_eq!(target_of(libc::SIGUSR1), Some(Target::PowerOff));
        assert_eq!(target_of(libc::SIGUSR2), Some(Target::PowerOff));
        assert_eq!(target_of(libc::SIGCHLD), None);
    }

    #[test]
    fn a_child_inherits_no_blocked_signal() {
        let mut blocked = SigSet::empty();
        blocked.add(Signal::SIGCHLD);
        blocked.thread_block().unwrap();
        let mut command = Command::new("cat");
        command.arg("/proc/self/status");
        unblock_signals(&mut command);
        let status = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let mask = status.lines().find(|line| line.starts_with("SigBlk:")).unwrap();
        assert_eq!(mask.split_whitespace().last(), Some("0000000000000000"));
    }

    #[test]
    fn nothing_is_started_when_the_machine_goes_down() {
        let children = Children::default();
        children.close();
        assert!(children.start(Command::new("true")).unwrap().is_none());
        assert_eq!(children.run(Command::new("true")).unwrap(), Ended::Killed(Signal::SIGTERM));
    }
}
