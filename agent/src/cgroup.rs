//! One cgroup (version 2) per instance: its share of the processors and the bound of its memory.
//!
//! Used where the unified hierarchy is mounted with the `cpu` and `memory` controllers. Where it is
//! not (cgroup v1 hosts), instances run without and the agent says so once: the scheduler still
//! counts memory, but nothing in the kernel holds a VMM to it.
//! (Kernel: Documentation/admin-guide/cgroup-v2.rst.)

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::ids::InstanceId;

/// Memory a VMM may use beyond its guest's, MiB: its own code and heap, page tables, and the page
/// cache of what it reads (which the kernel takes back under pressure).
const OVERHEAD_MIB: u64 = 64;

/// `cpu.weight` per vCPU; the default weight of a group is 100.
const WEIGHT_PER_VCPU: u64 = 100;

/// The folder under which the instances' groups are made.
#[derive(Debug, Clone)]
pub struct Cgroups {
    parent: PathBuf,
}

impl Cgroups {
    /// Finds the unified hierarchy and makes `mallee` in it.
    ///
    /// # Errors
    /// Why instances have to do without, in words.
    pub fn find() -> Result<Self, String> {
        let mounts =
            fs::read_to_string("/proc/self/mountinfo").map_err(|error| format!("/proc/self/mountinfo: {error}"))?;
        let root = unified_mount(&mounts).ok_or("the unified cgroup hierarchy (version 2) is not mounted")?;
        let offered = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        for controller in ["cpu", "memory"] {
            if !offered.split_whitespace().any(|name| name == controller) {
                return Err(format!(
                    "{} does not offer the {controller} controller (cgroup version 1 holds it)",
                    root.display()
                ));
            }
        }
        let parent = root.join("mallee");
        Self::prepare(&root, &parent).map_err(|error| format!("{}: {error}", parent.display()))?;
        Ok(Self { parent })
    }

    fn prepare(root: &Path, parent: &Path) -> io::Result<()> {
        fs::write(root.join("cgroup.subtree_control"), "+cpu +memory")?;
        fs::create_dir_all(parent)?;
        fs::write(parent.join("cgroup.subtree_control"), "+cpu +memory")
    }

    /// Makes the instance's group with its bounds (or sets the bounds of one that is there) and
    /// opens the file through which a process puts itself into it.
    pub fn make(&self, id: &InstanceId, vcpus: u8, memory_mib: u64) -> io::Result<OwnedFd> {
        let group = self.group(id);
        match fs::create_dir(&group) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        fs::write(group.join("cpu.weight"), (u64::from(vcpus) * WEIGHT_PER_VCPU).min(10_000).to_string())?;
        fs::write(group.join("memory.max"), ((memory_mib + OVERHEAD_MIB) << 20).to_string())?;
        let procs: File = OpenOptions::new().write(true).open(group.join("cgroup.procs"))?;
        procs.as_fd().try_clone_to_owned()
    }

    /// Removes the group; one that is not there is fine. Everything in it must have ended.
    pub fn remove(&self, id: &InstanceId) -> io::Result<()> {
        match fs::remove_dir(self.group(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn group(&self, id: &InstanceId) -> PathBuf {
        self.parent.join(id.as_str())
    }
}

/// Where `cgroup2` is mounted according to `/proc/self/mountinfo` (proc_pid_mountinfo(5)): the mount
/// point is the fifth field, the type the first after the lone dash.
fn unified_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let is_unified = after.split(' ').next() == Some("cgroup2");
        is_unified.then(|| before.split(' ').nth(4).map(PathBuf::from)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_mount_is_found_among_others() {
        let mountinfo = "\
24 30 0:22 / /proc rw,nosuid - proc proc rw\n\
31 24 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n\
32 24 0:28 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n";
        assert_eq!(unified_mount(mountinfo), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(unified_mount("24 30 0:22 / /proc rw - proc proc rw\n"), None);
    }
}
