//! `--jail`, on the host: what the process has left when its guest runs, seen from outside.

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::counter::COUNTING;
use common::machine::{Guarded, Machine, Process, wait_until};
use common::{Place, check};
use mallee_vmm::api::Action;
use serde_json::json;

const UID: u32 = 64_123;

fn jailed(place: &Place, boot_args: &str) -> Command {
    // Where the console's file is made; its folder is the user's.
    chown(place.path(""), Some(UID), Some(UID)).unwrap();
    let mut command = place.command(boot_args);
    into_jail(&mut command, place);
    command
}

fn into_jail(command: &mut Command, place: &Place) {
    let root = place.path("jail");
    std::fs::create_dir(&root).unwrap();
    command.arg("--jail").arg(root).arg(format!("--jail-uid={UID}")).arg(format!("--jail-gid={UID}"));
}

/// The process in the jail: the only child of the one that was started.
fn inner(outer: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn status(pid: u32, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line[name.len()..].trim_start_matches(':').trim().to_owned()
}

fn everything_in(folder: &Path, relative: &str, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{relative}/{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            everything_in(&entry.path(), &name, found);
        } else {
            found.insert(name);
        }
    }
}

#[test]
fn a_running_monitor_has_nothing_left_but_what_its_configuration_names() {
    let place = Place::new();
    let mut child = Guarded(jailed(&place, "probe.ip=10.0.0.2/24 probe.metadata=off").spawn().unwrap());
    wait_until("the guest's lines", || place.console().contains("probe"));
    let pid = inner(child.0.id()).unwrap();

    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    let ids = [UID.to_string(), UID.to_string(), UID.to_string(), UID.to_string()].join("\t");
    assert_eq!((status(pid, "Uid"), status(pid, "Gid")), (ids.clone(), ids));
    assert_eq!(
        (status(pid, "Groups"), status(pid, "NoNewPrivs"), status(pid, "Seccomp")),
        ("".into(), "1".into(), "2".into())
    );
    for namespace in ["mnt", "pid", "ipc", "uts", "net"] {
        let of = |id: u32| std::fs::read_link(format!("/proc/{id}/ns/{namespace}")).unwrap();
        assert_ne!(of(pid), of(child.0.id()), "{namespace}");
    }
    // The tap stays where it was made; in here is a loopback alone.
    let interfaces = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    assert_eq!(
        interfaces.lines().skip(2).map(|line| line.split(':').next().unwrap().trim()).collect::<Vec<_>>(),
        ["lo"]
    );
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    assert!(limits.lines().any(|line| line.starts_with("Max core file size        0  ")), "{limits}");

    let mut found = BTreeSet::new();
    everything_in(&Path::new("/proc").join(pid.to_string()).join("root"), "", &mut found);
    let folder = place.path("").display().to_string();
    let folder = folder.trim_end_matches('/');
    let expected: BTreeSet<String> = ["/dev/kvm", "/dev/net/tun", "/dev/null", "/dev/urandom"]
        .map(str::to_owned)
        .into_iter()
        .chain([common::probe().to_str().unwrap().to_owned()])
        .collect();
    let beyond: Vec<_> = found.iter().filter(|path| !path.starts_with(folder)).cloned().collect();
    assert_eq!(beyond.into_iter().collect::<BTreeSet<_>>(), expected);

    // The signal goes through the process outside, and so does the status.
    // SAFETY: numbers only, and the process is our child.
    check(unsafe { libc::kill(child.0.id() as i32, libc::SIGTERM) }).unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(143));
}

#[test]
fn every_device_works_in_a_jail_and_the_guests_end_is_told() {
    let place = Place::new();
    let status = jailed(&place, "probe.trial=exercise").status().unwrap();
    assert_eq!(status.code(), Some(0), "{}", place.console());
    assert!(place.console().contains("probe: trial passed"), "{}", place.console());
}

/// A cgroup that goes with its test: of version 2 where that is mounted, else in one of the hierarchies of version 1.
struct Group(PathBuf);

impl Group {
    fn new() -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        // proc_pid_mountinfo(5): the mount point is the fifth field, the type the first behind the dash.
        let of_type = |wanted: &str| {
            let mut mounts = mounts.lines().filter_map(|line| line.split_once(" - "));
            let mount = mounts.find(|(_, kind)| kind.split(' ').next() == Some(wanted))?;
            mount.0.split(' ').nth(4).map(PathBuf::from)
        };
        let root = of_type("cgroup2").or_else(|| of_type("cgroup")).expect("a cgroup hierarchy is mounted");
        let group = root.join(format!("mallee-jail-test-{}", std::process::id()));
        std::fs::create_dir(&group).unwrap();
        Group(group)
    }

    fn members(&self) -> BTreeSet<u32> {
        let text = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        wait_until("the cgroup is empty", || self.members().is_empty());
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn a_jail_is_in_the_cgroup_and_on_the_network_that_its_caller_made() {
    let place = Place::new();
    let group = Group::new();
    let mut elsewhere = Command::new("sleep");
    elsewhere.arg("3600");
    // SAFETY: one system call, between fork and exec.
    unsafe { elsewhere.pre_exec(|| check(libc::unshare(libc::CLONE_NEWNET))) };
    let elsewhere = Guarded(elsewhere.spawn().unwrap());
    let network = format!("/proc/{}/ns/net", elsewhere.0.id());
    let mut command = jailed(&place, "probe.ip=10.0.0.2/24 probe.metadata=off");
    command.arg("--jail-cgroup").arg(&group.0).arg("--jail-netns").arg(&network);
    let child = Guarded(command.spawn().unwrap());
    wait_until("the guest's lines", || place.console().contains("probe"));
    let pid = inner(child.0.id()).unwrap();
    assert_eq!(group.members(), BTreeSet::from([child.0.id(), pid]));
    let namespace = |path: &str| std::fs::read_link(path).unwrap();
    assert_eq!(namespace(&format!("/proc/{pid}/ns/net")), namespace(&network));
    let interfaces = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    assert!(interfaces.contains("tap0:"), "{interfaces}");
}

/// As with a caller who has only the socket: what its requests may name is said when the process starts.
#[test]
fn a_jail_without_a_configuration_holds_what_was_bound() {
    let place = Place::new();
    let made = place.path("made");
    std::fs::create_dir(&made).unwrap();
    for path in [&made, &place.path("data"), &place.path("other")] {
        chown(path, Some(UID), Some(UID)).unwrap();
    }
    let mut command = place.bare_command();
    into_jail(&mut command, &place);
    command.arg("--jail-bind").arg(common::probe()).arg("--jail-bind").arg(place.path("other"));
    command.arg("--jail-bind-writable").arg(place.path("data"));
    command.arg("--api-sock").arg(made.join("api"));
    let process = Process::start(command, &made.join("api"));
    let client = &process.client;
    client.put("/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": common::MEMORY_MIB })).unwrap();
    client.put("/serial", &json!({ "serial_out_path": made.join("console") })).unwrap();
    let start = |kernel: &Path, drive: &str, is_read_only: bool| {
        client.put("/boot-source", &json!({ "kernel_image_path": kernel, "boot_args": "probe.metadata=off" })).unwrap();
        let drive = json!({
            "drive_id": "d", "path_on_host": place.path(drive), "is_root_device": false, "is_read_only": is_read_only,
        });
        client.put("/drives/d", &drive).unwrap();
        client.act(Action::InstanceStart).map_err(|error| error.to_string())
    };
    // The jail's own root could be read by anybody; Landlock says that it was not named.
    let unnamed = if has_landlock() { "Permission denied" } else { "Is a directory" };
    for (kernel, drive, is_read_only, why) in [
        (Path::new("/"), "data", false, unnamed),
        (common::probe(), "root", true, "No such file"),
        (common::probe(), "other", false, "Read-only file system"),
    ] {
        let error = start(kernel, drive, is_read_only).unwrap_err();
        assert!(error.contains(why), "{drive}: {error}");
    }
    start(common::probe(), "data", false).unwrap();
    let console = || std::fs::read_to_string(made.join("console")).unwrap_or_default();
    wait_until("the guest's lines", || console().contains("probe"));
    assert_eq!(process.terminate(), Some(143));
}

/// Whether the kernel has it, and has it on (landlock_create_ruleset(2), "checking the version").
fn has_landlock() -> bool {
    let nowhere = std::ptr::null::<u8>();
    // SAFETY: with this flag the kernel reads nothing.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nowhere, 0, 1) >= 1 }
}

#[test]
fn a_jail_on_a_folder_that_is_not_empty_is_refused() {
    let place = Place::new();
    let mut command = jailed(&place, "");
    std::fs::write(place.path("jail/file"), "").unwrap();
    assert_eq!(command.status().unwrap().code(), Some(2));
}

#[test]
fn the_end_of_the_process_outside_is_the_end_of_the_jail() {
    let place = Place::new();
    let mut child = Guarded(jailed(&place, "probe.ip=10.0.0.2/24 probe.metadata=off").spawn().unwrap());
    wait_until("the guest's lines", || place.console().contains("probe"));
    let pid = inner(child.0.id()).unwrap();
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    wait_until("the end of the jail", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.rsplit(") ").next().unwrap().starts_with('Z')
    });
}

#[test]
fn a_vm_is_saved_in_one_jail_and_goes_on_in_another() {
    let machine = Machine::new(COUNTING);
    std::os::unix::fs::chown(machine.path(""), Some(UID), Some(UID)).unwrap();
    let start = |jail: &str, option: &str, file: &str| {
        std::fs::create_dir(machine.path(jail)).unwrap();
        machine.spawn(|command| {
            command.arg("--jail").arg(machine.path(jail)).arg(format!("--jail-uid={UID}"));
            command.arg(option).arg(machine.path(file));
        })
    };
    std::fs::write(machine.path("config"), machine.config(1).to_string()).unwrap();
    let first = start("jail1", "--config-file", "config");
    wait_until("the guest counts", || machine.counts().len() > 5);
    first.pause();
    let files = serde_json::json!({ "snapshot_path": machine.path("state"), "mem_file_path": machine.path("memory") });
    first.client.put("/snapshot/create", &files).unwrap();
    assert_eq!(first.terminate(), Some(143));

    let before = machine.counts().len();
    let mut request = files;
    request["resume_vm"] = true.into();
    std::fs::write(machine.path("load"), request.to_string()).unwrap();
    let second = start("jail2", "--restore-file", "load");
    wait_until("the guest goes on", || machine.counts().len() > before + 5);
    let counts = machine.counts();
    assert!(counts.iter().map(|it| it.0).eq(1..=counts.len() as u64), "{counts:?}");
    assert_eq!(second.terminate(), Some(143));
}
