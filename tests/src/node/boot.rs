//! From the kernel's first user process to a machine that services can run on.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
};

use super::setup::{STATE, Setup, TRUNK, UPLINK};
use crate::lab::initrd::{MODULES, SETUP};

/// Says something on the console, which the host keeps in a file.
pub fn say(text: &str) {
    println!("mallee-lab-node: {text}");
}

/// Boots as far as the services; returns the node's setup.
pub fn boot() -> io::Result<Setup> {
    mounts()?;
    modules();
    let setup: Setup = serde_json::from_slice(&fs::read(Path::new("/").join(SETUP))?)?;
    nix::unistd::sethostname(&setup.name)?;
    state_disk()?;
    network(&setup)?;
    Ok(setup)
}

fn mounts() -> io::Result<()> {
    let table: &[(&str, &str, &str, &str)] = &[
        ("devtmpfs", "/dev", "devtmpfs", ""),
        ("proc", "/proc", "proc", ""),
        ("sysfs", "/sys", "sysfs", ""),
        ("tmpfs", "/run", "tmpfs", "mode=0755"),
        ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", "nsdelegate"),
        ("devpts", "/dev/pts", "devpts", "mode=0620,ptmxmode=0666"),
        ("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
    ];
    for (source, target, kind, data) in table {
        fs::create_dir_all(target)?;
        match mount(Some(*source), *target, Some(*kind), MsFlags::empty(), Some(*data)) {
            // The kernel mounted it before.
            Err(Errno::EBUSY) => {}
            other => other.map_err(|e| io::Error::other(format!("mounting {target}: {e}")))?,
        }
    }
    // Whoever makes a group below the root may bound these in it.
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +io +pids")?;
    // A mount made by a service is seen by all, and jails can take theirs away.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>)?;
    Ok(())
}

/// Loads every module in order. One that refuses is named on the console; what is missed is found out
/// by whoever needs it.
fn modules() {
    let folder = Path::new("/").join(MODULES);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let no_arguments = CString::default();
    for path in paths.iter().filter(|path| !is_for_another_processor(path, &processor)) {
        let loaded = File::open(path)
            .map_err(|_| Errno::ENOENT)
            .and_then(|file| finit_module(&file, &no_arguments, ModuleInitFlags::empty()));
        match loaded {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => say(&format!("module {}: {error}", path.display())),
        }
    }
}

/// There is a KVM module for each maker's way of virtualisation.
fn is_for_another_processor(module: &Path, cpuinfo: &str) -> bool {
    let name = module.to_string_lossy();
    let has = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
    (name.ends_with("-kvm-amd.ko") && !has("svm")) || (name.ends_with("-kvm-intel.ko") && !has("vmx"))
}

fn state_disk() -> io::Result<()> {
    let device = wait_for("the state disk", || {
        fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
            let serial = fs::read_to_string(entry.path().join("serial")).ok()?;
            (serial.trim() == "state").then(|| Path::new("/dev").join(entry.file_name()))
        })
    })?;
    mount(Some(&device), STATE, Some("ext4"), MsFlags::MS_NOATIME, Some("discard"))
        .map_err(|e| io::Error::other(format!("mounting {}: {e}", device.display())))
}

fn network(setup: &Setup) -> io::Result<()> {
    wait_for("the uplink", || Path::new("/sys/class/net").join(UPLINK).exists().then_some(()))?;
    let address = setup.uplink_address.to_string();
    let gateway = setup.gateway.to_string();
    ip(&["link", "set", "lo", "up"])?;
    ip(&["addr", "add", &address, "dev", UPLINK])?;
    ip(&["link", "set", UPLINK, "up"])?;
    ip(&["route", "add", "default", "via", &gateway])?;
    if Path::new("/sys/class/net").join(TRUNK).exists() {
        ip(&["link", "set", TRUNK, "up"])?;
    }
    Ok(())
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    let status = Command::new("/bin/ip").args(arguments).status()?;
    if status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("ip {}: {status}", arguments.join(" "))))
}

fn wait_for<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> io::Result<T> {
    let began = Instant::now();
    loop {
        if let Some(value) = check() {
            return Ok(value);
        }
        if began.elapsed() > Duration::from_secs(10) {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("{what} did not appear")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
