//! Going down in order: processes asked, then killed, files written, root read-only, then the machine.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sync};

use crate::report;
use crate::supervisor::Children;

/// How long processes may take to end after SIGTERM.
const TERM_PATIENCE: Duration = Duration::from_secs(5);
/// The same after SIGKILL: longer only if a process hangs in the kernel.
const KILL_PATIENCE: Duration = Duration::from_secs(2);
/// How long files may stay open for writing after the last process ended.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// What the machine is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    PowerOff,
    Reboot,
}

impl Target {
    /// The target of the command `name`, by which this program may be called.
    pub fn from_command(name: &str) -> Option<Self> {
        match name {
            "poweroff" | "halt" | "shutdown" => Some(Target::PowerOff),
            "reboot" => Some(Target::Reboot),
            _ => None,
        }
    }

    /// The signal by which process 1 is asked for it.
    fn signal(self) -> Signal {
        match self {
            Target::PowerOff => Signal::SIGUSR2,
            Target::Reboot => Signal::SIGINT,
        }
    }

    fn mode(self) -> RebootMode {
        match self {
            Target::PowerOff => RebootMode::RB_POWER_OFF,
            Target::Reboot => RebootMode::RB_AUTOBOOT,
        }
    }
}

/// The commands `poweroff` and `reboot`.
pub fn ask_init(target: Target) -> ExitCode {
    match kill(Pid::from_raw(1), target.signal()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot ask process 1: {error}; this needs root");
            ExitCode::FAILURE
        }
    }
}

/// From now on Ctrl-Alt-Del is a signal to process 1 and not an immediate reset.
pub fn take_ctrl_alt_del() {
    if let Err(error) = nix::sys::reboot::set_cad_enabled(false) {
        report::line(format_args!("Ctrl-Alt-Del stays an immediate reset: {error}"));
    }
}

/// Ends everything and powers off or reboots. Does not return if the kernel obeys.
pub fn go_down(children: &Children, target: Target) -> ExitCode {
    children.close();
    report::line(match target {
        Target::PowerOff => "going down to power off",
        Target::Reboot => "going down to reboot",
    });
    end_processes();
    sync();
    release_file_systems();
    let Err(error) = reboot(target.mode());
    report::line(format_args!("the kernel refuses: {error}"));
    ExitCode::FAILURE
}

/// For the case in which nothing is running yet.
pub fn off_now() -> ExitCode {
    sync();
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    report::line(format_args!("the kernel refuses to power off: {error}"));
    ExitCode::FAILURE
}

fn end_processes() {
    let all = Pid::from_raw(-1);
    // SIGHUP for interactive shells, which ignore SIGTERM; SIGCONT so that stopped ones hear of it.
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCONT] {
        let _ = kill(all, signal);
    }
    if !reap_until_none_is_left(TERM_PATIENCE) {
        let _ = kill(all, Signal::SIGKILL);
        reap_until_none_is_left(KILL_PATIENCE);
    }
}

/// Every process's parent is, in the end, process 1; with no child left, none is left.
fn reap_until_none_is_left(patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return true,
            Ok(WaitStatus::StillAlive) if Instant::now() >= deadline => return false,
            Ok(WaitStatus::StillAlive) => thread::sleep(Duration::from_millis(5)),
            _ => {}
        }
    }
}

/// Unmounts what was mounted on top, and makes the root clean by mounting it read-only.
fn release_file_systems() {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for target in disk_mounts(&mounts) {
        if let Err(error) = umount2(target, MntFlags::empty()) {
            report::line(format_args!("{target} cannot be unmounted: {error}"));
        }
    }
    if let Err(error) = make_root_read_only() {
        report::line(format_args!("/ cannot be made read-only: {error}"));
    }
}

/// The kernel refuses while a file is open for writing, and the last ones close a moment after the processes
/// ended (a thread of ours that copied their output, for one).
fn make_root_read_only() -> nix::Result<()> {
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let deadline = Instant::now() + CLOSE_PATIENCE;
    loop {
        match mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>) {
            Err(Errno::EBUSY) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
            result => return result,
        }
    }
}

/// Mount points of block devices other than the root, the last mounted first.
fn disk_mounts(mounts: &str) -> Vec<&str> {
    let mut targets: Vec<&str> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (device, target) = (fields.next()?, fields.next()?);
            (device.starts_with("/dev/") && target != "/").then_some(target)
        })
        .collect();
    targets.reverse();
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inner_mounts_go_first_and_the_root_stays() {
        let mounts = "/dev/vda / ext4 rw 0 0\nproc /proc proc rw 0 0\n\
                      /dev/vdb /data ext4 rw 0 0\n/dev/vdc /data/more ext4 rw 0 0\n";
        assert_eq!(disk_mounts(mounts), ["/data/more", "/data"]);
    }

    #[test]
    fn commands() {
        assert_eq!(Target::from_command("reboot"), Some(Target::Reboot));
        assert_eq!(Target::from_command("poweroff"), Some(Target::PowerOff));
        assert_eq!(Target::from_command("init"), None);
    }
}
