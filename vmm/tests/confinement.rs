//! The system call filters, on the program as it is: no rule is unused, and what is in no rule ends the process.
//!
//! Everything is derived from the table of rules (`src/confine/rules.rs`). A kind of thread that no run below brings to life
//! fails the test: a new device belongs into `common::Place::config`, and what its thread only does for a reason from
//! outside into [`runs`].
//!
//! A group of rules may be shared by several kinds of thread (what the language's runtime does, waiting for descriptors). There,
//! "used" means that one of them has; everything else must have been used by the kind itself, or by a thread that one of
//! the kind has started and that is under its filter too.

#[path = "../src/confine/rules.rs"]
mod rules;

mod common;
#[path = "common/trace.rs"]
mod trace;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::gdb::Gdb;
use common::machine::{Process, wait_until};
use common::{Place, check};
use mallee_vmm::api::client::{Client, ClientError};
use mallee_vmm::api::{Action, VmConfig};
use rules::KINDS;
use serde_json::json;
use trace::{Call, Seen};

/// A run of the program that brings threads to life.
struct Run {
    name: &'static str,
    start: fn(&Place, &mut dyn FnMut(std::process::Command)),
}

/// Together these do whatever a thread is allowed for.
fn runs() -> Vec<Run> {
    vec![
        Run { name: "every device, by the rules", start: |place, run| run(place.command("probe.trial=exercise")) },
        Run { name: "every device, broken", start: |place, run| run(place.command("probe.trial=hostile:1")) },
        Run { name: "under a debugger", start: under_a_debugger },
        Run { name: "through the socket, ended by a signal", start: through_the_socket },
        Run { name: "restored from a snapshot", start: restored },
        Run { name: "serving the pages of a snapshot", start: paged },
    ]
}

/// A guest that is looked into, held up while it is idle, and let go.
fn under_a_debugger(place: &Place, run: &mut dyn FnMut(std::process::Command)) {
    let socket = place.path("gdb");
    let mut command = place.command_of(&place.idle_config());
    command.arg("--gdb").arg(&socket);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Its connection breaks where a forbidden call was put in; else the status tells.
            let _ = scope.spawn(|| debug(place, &socket, &is_over)).join();
            signal(&socket, libc::SIGTERM);
        });
        run(command);
        is_over.store(true, Ordering::Relaxed);
    });
}

fn debug(place: &Place, socket: &Path, is_over: &AtomicBool) {
    let mut gdb = loop {
        match Gdb::connect(socket) {
            Ok(gdb) => break gdb,
            Err(_) if is_over.load(Ordering::Relaxed) => return,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    gdb.ask("?");
    let registers = gdb.ask("g");
    gdb.ask(&format!("G{registers}"));
    let entry = gdb.rip();
    gdb.memory(entry, 16);
    gdb.ask("vCont;s:1");
    gdb.send("vCont;c");
    while !place.is_idle() && !is_over.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(10));
    }
    gdb.interrupt();
    gdb.hear();
    gdb.ask("D");
}

/// Configures and starts a VM by requests, asks for this and that, and ends the process while its guest is idle.
fn through_the_socket(place: &Place, run: &mut dyn FnMut(std::process::Command)) {
    let socket = place.path("api.sock");
    let mut config: VmConfig = serde_json::from_value(place.idle_config()).unwrap();
    // So many that their saved state is a large block.
    config.machine_config.vcpu_count = 32;
    let mut command = place.bare_command();
    command.arg("--api-sock").arg(&socket).arg("--id").arg("traced");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // The tracer must be this thread.
        scope.spawn(|| {
            if let Err(why) = drive(place, &socket, &config, &is_over) {
                // As it should be where a forbidden call was put in; else the status tells.
                eprintln!("not driven to its end: {why}");
                signal(&socket, libc::SIGKILL);
            }
        });
        run(command);
        is_over.store(true, Ordering::Relaxed);
    });
}

fn drive(place: &Place, socket: &Path, config: &VmConfig, is_over: &AtomicBool) -> Result<(), ClientError> {
    let client = Client::new(socket);
    let wait_until = |condition: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !condition() && !is_over.load(Ordering::Relaxed) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    wait_until(&|| client.instance().is_ok());
    client.put("/machine-config", &config.machine_config)?;
    client.put("/boot-source", &config.boot_source)?;
    client.put("/serial", &config.serial)?;
    client.put("/entropy", &config.entropy)?;
    client.put("/vsock", &config.vsock)?;
    client.put("/balloon", &config.balloon)?;
    client.put("/console", &config.console)?;
    for drive in &config.drives {
        client.put(&format!("/drives/{}", drive.drive_id), drive)?;
    }
    for interface in &config.network_interfaces {
        client.put(&format!("/network-interfaces/{}", interface.iface_id), interface)?;
    }
    client.put("/metrics", &json!({ "metrics_path": place.path("metrics") }))?;
    client.act(Action::InstanceStart)?;
    let console = config.serial.as_ref().unwrap().serial_out_path.clone();
    wait_until(&|| std::fs::read_to_string(&console).is_ok_and(|text| !text.is_empty()));
    client.act(Action::FlushMetrics)?;
    client.patch("/vm", &json!({ "state": "Paused" }))?;
    for kind in ["Full", "Diff"] {
        let (state, memory) = (place.path("state"), place.path("memory"));
        let request = json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory });
        client.put("/snapshot/create", &request)?;
    }
    client.patch("/vm", &json!({ "state": "Resumed" }))?;
    let limits = json!({ "ops": { "size": 1000, "refill_time": 1000 } });
    let patch = |id: &str, what: serde_json::Value| client.patch(&format!("/drives/{id}"), &what);
    patch("data", json!({ "drive_id": "data", "rate_limiter": limits }))?;
    let interface = json!({ "iface_id": "eth0", "rx_rate_limiter": limits, "tx_rate_limiter": limits });
    client.patch("/network-interfaces/eth0", &interface)?;
    let told = client.get::<VmConfig>("/vm/config")?.network_interfaces.remove(0);
    assert_eq!(told.tx_rate_limiter.and_then(|limiter| limiter.ops).map(|ops| ops.size), Some(1000));
    assert!(told.rx_rate_limiter.is_some_and(|limiter| limiter.ops.is_some() && limiter.bandwidth.is_some()));
    for (id, file) in [("many", "other"), ("overlay", "another-overlay")] {
        let path = console.parent().unwrap().join(file);
        patch(id, json!({ "drive_id": id, "path_on_host": path }))?;
    }
    for id in ["data", "overlay"] {
        patch(id, json!({ "drive_id": id, "size": 2 << 20 }))?;
    }
    client.get::<VmConfig>("/vm/config")?;
    signal(socket, libc::SIGTERM);
    Ok(())
}

/// Has another process save a VM whose guest is idle.
fn save(place: &Place) {
    let saver = place.path("saver.sock");
    let mut command = place.command_of(&place.idle_config());
    command.arg("--api-sock").arg(&saver);
    let process = Process::start(command, &saver);
    wait_until("the guest is idle", || place.is_idle());
    process.pause();
    let request = json!({ "snapshot_path": place.path("state"), "mem_file_path": place.path("memory") });
    process.client.put("/snapshot/create", &request).unwrap();
    assert_eq!(process.terminate(), Some(143));
}

/// Serves the pages of a saved VM to one that is restored, and all of them, as that is saved again.
fn paged(place: &Place, run: &mut dyn FnMut(std::process::Command)) {
    save(place);
    let (socket, list) = (place.path("pages"), place.path("working-set"));
    let mut server = std::process::Command::new(common::program());
    server.arg("--serve-pages").arg(&socket).arg("--memory").arg(place.path("memory")).arg("--working-set").arg(&list);
    let is_over = AtomicBool::new(false);
    let wait_until = |condition: &mut dyn FnMut() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !condition() && !is_over.load(Ordering::Relaxed) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            wait_until(&mut || socket.exists());
            let api = place.path("api.sock");
            let request = json!({
                "snapshot_path": place.path("state"),
                "mem_backend": { "backend_type": "Uffd", "backend_path": socket },
            });
            std::fs::write(place.path("load"), request.to_string()).unwrap();
            let mut command = place.bare_command();
            command.arg("--api-sock").arg(&api).arg("--restore-file").arg(place.path("load"));
            let mut monitor = command.spawn().unwrap();
            let client = Client::new(&api);
            wait_until(&mut || client.instance().is_ok() || monitor.try_wait().unwrap().is_some());
            let again = json!({ "snapshot_path": place.path("again"), "mem_file_path": place.path("again.memory") });
            let _ = client.put("/snapshot/create", &again);
            signal(&api, libc::SIGTERM);
            wait_until(&mut || monitor.try_wait().unwrap().is_some());
            let _ = monitor.kill();
            let _ = monitor.wait();
            wait_until(&mut || std::fs::metadata(&list).is_ok_and(|list| list.len() > 0));
            signal(&socket, libc::SIGTERM);
        });
        run(server);
        is_over.store(true, Ordering::Relaxed);
    });
}

/// Restores a VM that was saved by another process, and ends it while its guest is idle.
fn restored(place: &Place, run: &mut dyn FnMut(std::process::Command)) {
    save(place);
    let socket = place.path("api.sock");
    let request = json!({
        "snapshot_path": place.path("state"), "mem_file_path": place.path("memory"), "track_dirty_pages": true,
        "resume_vm": true,
    });
    std::fs::write(place.path("load"), request.to_string()).unwrap();
    let mut command = place.bare_command();
    command.arg("--api-sock").arg(&socket).arg("--restore-file").arg(place.path("load"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let client = Client::new(&socket);
            let deadline = Instant::now() + Duration::from_secs(60);
            while client.instance().is_err() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            let paused = client.patch("/vm", &json!({ "state": "Paused" }));
            let _ = paused.and_then(|()| client.patch("/vm", &json!({ "state": "Resumed" })));
            signal(&socket, libc::SIGTERM);
        });
        run(command);
    });
}

/// To the process that serves `socket`, if there is one.
fn signal(socket: &Path, signal: libc::c_int) {
    let ours = socket.as_os_str().as_encoded_bytes();
    let serves = |id: &i32| {
        let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == ours)
    };
    let ids = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    if let Some(process) = ids.into_iter().find(serves) {
        // SAFETY: numbers only; the process is the one that serves our socket.
        check(unsafe { libc::kill(process, signal) }).unwrap();
    }
}

fn trace(run: &Run, inject: Option<(usize, Call)>) -> Seen {
    let mut seen = None;
    let place = Place::new();
    (run.start)(&place, &mut |command| seen = Some(trace::run(command, inject)));
    let seen = seen.unwrap();
    if inject.is_none() {
        // A page server has nothing to put in order before it ends.
        let terminated = libc::WIFSIGNALED(seen.status) && libc::WTERMSIG(seen.status) == libc::SIGTERM;
        let ended = terminated || libc::WIFEXITED(seen.status) && matches!(libc::WEXITSTATUS(seen.status), 0 | 143);
        assert!(ended, "{}: wait status {:#x}\n{}\n{:x?}", run.name, seen.status, place.console(), seen.forbidden);
    }
    seen
}

/// Every group of every kind.
fn groups() -> impl Iterator<Item = (usize, usize, &'static [rules::Rule])> {
    KINDS
        .iter()
        .enumerate()
        .flat_map(|(kind, table)| table.rules.iter().enumerate().map(move |(group, it)| (kind, group, *it)))
}

/// Calls that these runs do not reach, because somebody on the host must talk to the guest through vsock or the console, or because not every host has
/// vhost-net: `mallee-guest` does, and the virtual lab has. The main thread has them for the sake of the workers, and one for a person who types faster than the guest reads.
const UNTRIED: &[(&str, &[i64])] = &[
    (
        "MONITOR",
        &[
            libc::SYS_accept4,
            libc::SYS_clock_nanosleep,
            libc::SYS_ioctl,
            libc::SYS_recvfrom,
            libc::SYS_sendto,
            libc::SYS_shutdown,
        ],
    ),
    ("NET", &[libc::SYS_ioctl]),
    ("VSOCK", &[libc::SYS_accept4, libc::SYS_ioctl, libc::SYS_recvfrom, libc::SYS_sendto, libc::SYS_shutdown]),
    ("CONSOLE", &[libc::SYS_accept4, libc::SYS_ioctl, libc::SYS_sendto]),
];

/// Calls that come of two threads meeting, of a stop from outside, or of how the allocator's thresholds stand when a block
/// grows: no run can be made to need them, and none to do without.
const BY_CHANCE: [i64; 3] = [libc::SYS_sched_yield, libc::SYS_restart_syscall, libc::SYS_mremap];

#[test]
fn no_rule_is_unused_and_every_kind_of_thread_is_seen() {
    let mut used: BTreeMap<usize, BTreeSet<(usize, usize)>> = BTreeMap::new();
    let mut alive = BTreeSet::new();
    for run in runs() {
        let seen = trace(&run, None);
        alive.extend(seen.alive);
        for (kind, rules) in seen.used {
            used.entry(kind).or_default().extend(rules);
        }
    }
    let never: Vec<_> = (0..KINDS.len()).filter(|kind| !alive.contains(kind)).map(|kind| KINDS[kind].name).collect();
    assert!(never.is_empty(), "no run brings these kinds of thread to life: {never:?}");

    let mut unused = Vec::new();
    let mut tried_after_all: BTreeSet<(&str, i64)> =
        UNTRIED.iter().flat_map(|(kind, calls)| calls.iter().map(|call| (*kind, *call))).collect();
    for (kind, table) in KINDS.iter().enumerate() {
        for (group, rules) in table.rules.iter().enumerate() {
            for (index, rule) in rules.iter().enumerate() {
                let is_used =
                    |kind: usize, group: usize| used.get(&kind).is_some_and(|it| it.contains(&(group, index)));
                let sharers = groups().filter(|(_, _, other)| format!("{other:?}") == format!("{rules:?}"));
                if BY_CHANCE.contains(&rule.call) {
                    continue;
                }
                if !is_used(kind, group) && !sharers.into_iter().any(|(kind, group, _)| is_used(kind, group)) {
                    if UNTRIED.iter().any(|(kind, calls)| *kind == table.name && calls.contains(&rule.call)) {
                        tried_after_all.remove(&(table.name, rule.call));
                        continue;
                    }
                    unused.push(format!("{}: {} {:x?}", table.name, rule.name, rule.args));
                }
            }
        }
    }
    assert!(unused.is_empty(), "rules that no thread needed:\n{}", unused.join("\n"));
    // Not an error: some of these depend on how fast a thread is beside another.
    if !tried_after_all.is_empty() {
        eprintln!("tried after all, perhaps to be taken out of UNTRIED: {tried_after_all:?}");
    }
}

/// Calls that no thread of a monitor has a use for, two of them only by their arguments.
const FORBIDDEN: [Call; 3] = [
    Call { number: libc::SYS_execve, args: [0; 6] },
    // Memory that is executable.
    Call { number: libc::SYS_mmap, args: [0, 4096, 4, 0x22, u64::MAX, 0] },
    // Typing into the terminal that the process was started from.
    Call { number: libc::SYS_ioctl, args: [0, libc::TIOCSTI, 0, 0, 0, 0] },
];

#[test]
fn a_forbidden_call_of_any_thread_ends_the_process() {
    let runs = runs();
    // Which run a kind lives in.
    let alive: Vec<BTreeSet<usize>> = runs.iter().map(|run| trace(run, None).alive).collect();
    for (kind, table) in KINDS.iter().enumerate() {
        let place = alive.iter().position(|alive| alive.contains(&kind));
        let run = &runs[place.unwrap_or_else(|| panic!("no run brings a {} thread to life", table.name))];
        for call in FORBIDDEN {
            let seen = trace(run, Some((kind, call)));
            assert!(seen.was_injected, "{}: no thread of the kind made a call", table.name);
            let killed = libc::WIFSIGNALED(seen.status) && libc::WTERMSIG(seen.status) == libc::SIGSYS;
            assert!(killed, "{}: {call:x?} was survived, wait status {:#x}", table.name, seen.status);
        }
    }
}
