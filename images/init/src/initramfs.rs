//! From the kernel's hand-over to the root file system's own init.
//!
//! Runs as `/init` of the initial RAM file system. If there is no root to be mounted the machine is
//! powered off with the reason on the console: better a stopped instance that says why than one which
//! boots for ever.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{self, FsType};
use nix::unistd::{chdir, chroot, execv};

use crate::report::{self, Phase};
use crate::{modules, power};

/// How long the root device may take to appear.
const DEVICE_PATIENCE: Duration = Duration::from_secs(15);
const NEW_ROOT: &str = "/root";

/// Magic of ramfs (linux/magic.h); the initial file system is that or tmpfs.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Whether this process still runs from the initial RAM file system.
pub fn is_here() -> bool {
    statfs::statfs("/")
        .is_ok_and(|root| root.filesystem_type() == RAMFS_MAGIC || root.filesystem_type() == statfs::TMPFS_MAGIC)
}

/// Mounts the root and becomes its init. Returns only by powering off.
pub fn run() -> ExitCode {
    // The very first instruction of ours is what the host wants to know of; everything else comes later.
    let mounted = mount_kernel_file_systems();
    open_console();
    report::reached(Phase::Init, kernel_release());
    if let Err(error) = mounted {
        report::line(error);
    }
    let Err(error) = enter_root();
    report::line(format_args!("cannot start from the root file system: {error}"));
    report::line("the machine is powered off; correct the image or root= and start it again");
    power::off_now()
}

/// What is read of the kernel's command line.
#[derive(Debug, PartialEq, Eq)]
struct RootArguments {
    device: PathBuf,
    read_only: bool,
    init: PathBuf,
}

impl RootArguments {
    fn parse(command_line: &str) -> Self {
        let mut arguments = RootArguments { device: "/dev/vda".into(), read_only: false, init: "/sbin/init".into() };
        for word in command_line.split_whitespace() {
            match word.split_once('=') {
                Some(("root", device)) if device.starts_with('/') => {
                    arguments.device = device.into();
                }
                Some(("init", init)) if init.starts_with('/') => arguments.init = init.into(),
                None if word == "ro" => arguments.read_only = true,
                None if word == "rw" => arguments.read_only = false,
                _ => {}
            }
        }
        arguments
    }
}

fn enter_root() -> Result<std::convert::Infallible, String> {
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let arguments = RootArguments::parse(&command_line);
    modules::load_list("core");
    thread::scope(|scope| {
        scope.spawn(|| modules::load_list("rest"));
        modules::load_list("disk");
        wait_for_device(&arguments.device)?;
        mount_root(&arguments)
    })?;
    report::reached(Phase::Root, format_args!("{} mounted", arguments.device.display()));
    switch_root(&arguments.init)
}

fn mount_kernel_file_systems() -> Result<(), String> {
    for (kind, target, flags) in [
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID),
        ("proc", "/proc", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC),
        ("sysfs", "/sys", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC),
    ] {
        mount(Some(kind), target, Some(kind), flags, None::<&str>)
            .map_err(|error| format!("cannot mount {kind} on {target}: {error}"))?;
    }
    Ok(())
}

/// The kernel starts the first process without open files if the RAM file system has no console device.
fn open_console() {
    if let Ok(console) = fs::OpenOptions::new().read(true).write(true).open("/dev/console") {
        for descriptor in 0..=2 {
            if console.as_raw_fd() != descriptor {
                // SAFETY: 0, 1 and 2 belong to nobody but the standard streams.
                unsafe { libc::dup2(console.as_raw_fd(), descriptor) };
            }
        }
        if console.as_raw_fd() <= 2 {
            std::mem::forget(console);
        }
    }
}

fn kernel_release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("Linux {}", release.trim())
}

/// The driver finds its device while its module is loaded, so that this usually returns at once.
fn wait_for_device(device: &Path) -> Result<(), String> {
    let deadline = Instant::now() + DEVICE_PATIENCE;
    while !fs::metadata(device).is_ok_and(|found| found.file_type().is_block_device()) {
        if Instant::now() > deadline {
            return Err(format!(
                "the root device {} did not appear within {} s; there are: {}",
                device.display(),
                DEVICE_PATIENCE.as_secs(),
                block_devices()
            ));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn block_devices() -> String {
    let names: Vec<String> = fs::read_dir("/sys/class/block")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    if names.is_empty() { "none".into() } else { names.join(" ") }
}

fn mount_root(arguments: &RootArguments) -> Result<(), String> {
    let flags = if arguments.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    fs::create_dir_all(NEW_ROOT).map_err(|error| format!("cannot make {NEW_ROOT}: {error}"))?;
    mount(Some(&arguments.device), NEW_ROOT, Some("ext4"), flags | MsFlags::MS_NOATIME, None::<&str>)
        .map_err(|error| format!("cannot mount {} as ext4: {error}", arguments.device.display()))
}

/// Frees the RAM file system, makes the mounted root the only one and starts its init.
fn switch_root(init: &Path) -> Result<std::convert::Infallible, String> {
    let failed = |what: &str, error: nix::Error| format!("cannot {what}: {error}");
    for folder in ["/dev", "/proc", "/sys"] {
        let target = format!("{NEW_ROOT}{folder}");
        mount(Some(folder), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(|error| failed(&format!("move {folder} into the root"), error))?;
    }
    // Best effort: what is left behind only costs memory.
    let _ = fs::remove_dir_all(modules::FOLDER);
    let _ = fs::remove_file("/init");
    chdir(NEW_ROOT).map_err(|error| failed("enter the root", error))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|error| failed("move the root to /", error))?;
    chroot(".").map_err(|error| failed("make it the root", error))?;
    chdir("/").map_err(|error| failed("enter /", error))?;
    let program =
        CString::new(init.as_os_str().as_encoded_bytes()).map_err(|_| "init= holds a zero byte".to_owned())?;
    execv(&program, &[&program]).map_err(|error| failed(&format!("start {}", init.display()), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_names_the_root() {
        let parsed = RootArguments::parse("console=ttyS0 root=/dev/vdb ro quiet init=/bin/sh x=y");
        assert_eq!(parsed.device, Path::new("/dev/vdb"));
        assert!(parsed.read_only);
        assert_eq!(parsed.init, Path::new("/bin/sh"));
    }

    #[test]
    fn without_root_it_is_the_first_virtio_disk_and_writable() {
        let parsed = RootArguments::parse("console=ttyS0 root=LABEL=x rootwait");
        assert_eq!(parsed.device, Path::new("/dev/vda"));
        assert!(!parsed.read_only);
        assert_eq!(parsed.init, Path::new("/sbin/init"));
    }

    #[test]
    fn the_last_of_ro_and_rw_counts() {
        assert!(!RootArguments::parse("ro rw").read_only);
        assert!(RootArguments::parse("rw ro").read_only);
    }
}
