//! Network namespaces by name, as `ip netns` keeps them.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, setns};

use super::{CliError, Result};

/// Where `ip netns` keeps them.
const FOLDER: &str = "/run/netns";

pub fn path(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

/// Has the command's process enter the namespace before it executes its program. Only the network
/// is changed: `/sys` still shows the host's, so nothing of ours reads it.
pub fn enter(command: &mut Command, namespace: &Path) -> Result<()> {
    let file = File::open(namespace).map_err(|source| CliError::File {
        what: "cannot enter the network namespace",
        path: namespace.to_owned(),
        source,
    })?;
    // SAFETY: between fork and exec only `setns` is called, a bare system call on a descriptor that
    // the closure owns; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from));
    }
    Ok(())
}

/// What tells a namespace from every other: the inode behind its file.
pub fn identity(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|metadata| metadata.ino())
}

/// The namespace that a process is in.
pub fn of_process(pid: u32) -> Option<u64> {
    identity(Path::new(&format!("/proc/{pid}/ns/net")))
}
