//! `--jail`, on the host: what the process has left when its guest runs, seen from outside.

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use common::counter::COUNTING;
use common::machine::{Guarded, Machine, wait_until};
use common::{Place, check};

const UID: u32 = 64_123;

fn jailed(place: &Place, boot_args: &str) -> Command {
    let root = place.path("jail");
    std::fs::create_dir(&root).unwrap();
    // Where the console's file is made; its folder is the user's.
    std::os::unix::fs::chown(place.path(""), Some(UID), Some(UID)).unwrap();
    let mut command = place.command(boot_args);
    command.arg("--jail").arg(root).arg(format!("--jail-uid={UID}")).arg(format!("--jail-gid={UID}"));
    command
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
