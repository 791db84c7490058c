//! A VM is saved and goes on elsewhere: in another process, in two at once, from differences, with other files behind its devices. And what cannot be
//! restored leaves a process that can still restore something else.
//!
//! The guest counts (`common::counter`): what it wrote before it was saved, and what it writes afterwards, put together, must be every number once.

mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::counter::{COUNTING, HALTING};
use common::machine::{MEMORY_MIB, Machine, Process, console, counts, wait_until};
use mallee_vmm::api::client::ClientError;
use serde_json::{Value, json};

/// A saved VM: the request that loads it, and what its guest had written.
struct Saved {
    state: PathBuf,
    memory: PathBuf,
    written: String,
}

impl Saved {
    /// The request, with the serial port's output going to `output`.
    fn request(&self, output: &Path) -> Value {
        json!({
            "snapshot_path": self.state, "mem_file_path": self.memory, "serial_out_path": output, "resume_vm": true,
        })
    }

    fn load(&self, vm: &Process, output: &Path) -> Result<(), ClientError> {
        vm.client.put("/snapshot/load", &self.request(output))
    }

    /// The clone whose output this is has gone on from here by more than a few numbers.
    fn goes_on(&self, output: &Path) {
        let all = || counts(&(self.written.clone() + &console(output)));
        let before = counts(&self.written).len();
        wait_until("the clone goes on", || all().len() > before + 5);
        assert!(all().iter().map(|it| it.0).eq(1..=all().len() as u64), "{:?}", all());
        assert!(all().windows(2).all(|pair| pair[0].1 <= pair[1].1), "{:?}", all());
    }
}

/// Lets the guest count a little, and saves it. It stays paused.
fn save(machine: &Machine, vm: &Process, name: &str) -> Saved {
    let before = machine.counts().len();
    wait_until("the guest counts", || machine.counts().len() > before + 5);
    vm.pause();
    let (state, memory) = (machine.path(&format!("{name}.state")), machine.path(&format!("{name}.memory")));
    create(vm, "Full", &state, &memory).unwrap();
    Saved { state, memory, written: machine.console() }
}

fn create(vm: &Process, kind: &str, state: &Path, memory: &Path) -> Result<(), ClientError> {
    let request = json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory });
    vm.client.put("/snapshot/create", &request)
}

/// The message of a refusal.
fn refusal(result: Result<(), ClientError>) -> String {
    match result {
        Err(ClientError::Refused { status: 400, message }) => message,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_guest_goes_on_in_another_process_and_in_the_first_one() {
    for vcpus in [1, 2] {
        let machine = Machine::new(COUNTING);
        let first = machine.start(machine.config(vcpus));
        if vcpus == 2 {
            wait_until("the other vCPU counts", || machine.counts().last().is_some_and(|last| last.1 > 0));
        }
        let saved = save(&machine, &first, "first");
        let output = machine.path("second.console");
        let second = machine.idle();
        saved.load(&second, &output).unwrap();
        assert_eq!(second.state(), "Running");
        saved.goes_on(&output);
        if vcpus == 2 {
            let other = |text: &str| counts(text).last().unwrap().1;
            let all = || saved.written.clone() + &console(&output);
            wait_until("the other vCPU goes on", || other(&all()) > other(&saved.written));
        }
        // Saving has changed nothing for the one that was saved.
        first.resume();
        wait_until("the first goes on", || machine.counts().len() > counts(&saved.written).len() + 5);
        // A VM that was restored can be saved, too.
        second.pause();
        let (state, memory) = (machine.path("again.state"), machine.path("again.memory"));
        create(&second, "Full", &state, &memory).unwrap();
        let again = Saved { state, memory, written: saved.written.clone() + &console(&output) };
        let third = machine.idle();
        again.load(&third, &machine.path("third.console")).unwrap();
        again.goes_on(&machine.path("third.console"));
    }
}

#[test]
fn clones_of_one_snapshot_share_its_files_and_nothing_else() {
    let machine = Machine::new(COUNTING);
    let first = machine.start(machine.config(1));
    let saved = save(&machine, &first, "first");
    drop(first);
    let before = std::fs::read(&saved.memory).unwrap();
    let clones: Vec<_> = (0..2).map(|_| machine.idle()).collect();
    let outputs = ["a.console", "b.console"].map(|name| machine.path(name));
    for (clone, output) in clones.iter().zip(&outputs) {
        saved.load(clone, output).unwrap();
    }
    outputs.iter().for_each(|output| saved.goes_on(output));
    assert_eq!(std::fs::read(&saved.memory).unwrap(), before);
    let refused = create(&clones[0], "Diff", &machine.path("x"), &saved.memory);
    assert!(refusal(refused).contains("paused"));
    clones[0].pause();
    let refused = refusal(create(&clones[0], "Diff", &machine.path("x"), &saved.memory));
    assert!(refused.contains("track_dirty_pages"), "{refused}");
    // The file's name is taken by a new one; who has the old one mapped does not notice.
    create(&clones[0], "Full", &machine.path("x"), &saved.memory).unwrap();
    saved.goes_on(&outputs[1]);
}

#[test]
fn every_clone_is_of_another_generation() {
    /// Where the DSDT says that the id is (`memory::layout`).
    const GENERATION_ID: u64 = 0xe_f000;
    let id = |memory: &Path| {
        let mut id = [0; 16];
        let file = std::fs::File::open(memory).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut id, GENERATION_ID).unwrap();
        id
    };
    let machine = Machine::new(COUNTING);
    let first = machine.start(machine.config(1));
    let saved = save(&machine, &first, "first");
    let mut ids = vec![[0; 16], id(&saved.memory)];
    for name in ["a", "b"] {
        let (clone, memory) = (machine.idle(), machine.path(&format!("{name}.memory")));
        saved.load(&clone, &machine.path(name)).unwrap();
        clone.pause();
        create(&clone, "Full", &machine.path("state"), &memory).unwrap();
        ids.push(id(&memory));
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 4, "{ids:x?}");
}

#[test]
fn differences_on_a_copy_of_their_base_are_what_a_full_snapshot_has() {
    let machine = Machine::new(COUNTING);
    let mut config = machine.config(2);
    config["machine-config"]["track_dirty_pages"] = json!(true);
    let vm = machine.start(config);
    let base = save(&machine, &vm, "base");
    let (state, memory, full) = (machine.path("later.state"), machine.path("later.memory"), machine.path("full"));
    for _ in 0..3 {
        vm.resume();
        let before = machine.counts().len();
        wait_until("the guest counts", || machine.counts().len() > before + 5);
        vm.pause();
        if !memory.exists() {
            std::fs::copy(&base.memory, &memory).unwrap();
        }
        create(&vm, "Diff", &state, &memory).unwrap();
        create(&vm, "Full", &machine.path("full.state"), &full).unwrap();
        assert!(std::fs::read(&memory).unwrap() == std::fs::read(&full).unwrap());
    }
    assert!(std::fs::read(&memory).unwrap() != std::fs::read(&base.memory).unwrap());
    let later = Saved { state, memory, written: machine.console() };
    let output = machine.path("clone.console");
    let clone = machine.idle();
    let mut request = later.request(&output);
    request["enable_diff_snapshots"] = json!(true);
    clone.client.put("/snapshot/load", &request).unwrap();
    later.goes_on(&output);

    // A restored VM has changed only what it has changed.
    clone.pause();
    let refused = refusal(create(&clone, "Diff", &machine.path("clone.state"), &later.memory));
    assert!(refused.contains("is the memory of a VM that runs"), "{refused}");
    let layer = machine.path("layer");
    create(&clone, "Diff", &machine.path("clone.state"), &layer).unwrap();
    let size = std::fs::metadata(&layer).unwrap();
    assert_eq!(size.len(), MEMORY_MIB << 20);
    assert!(
        std::os::unix::fs::MetadataExt::blocks(&size) * 512 < 256 << 10,
        "{} blocks",
        std::os::unix::fs::MetadataExt::blocks(&size)
    );
}

#[test]
fn a_halted_guest_stays_halted_and_alive() {
    let machine = Machine::new(HALTING);
    let first = machine.start(machine.config(3));
    wait_until("the guest's line", || machine.console().ends_with('\n'));
    first.pause();
    let (state, memory) = (machine.path("state"), machine.path("memory"));
    create(&first, "Full", &state, &memory).unwrap();
    let second = machine.idle();
    let saved = Saved { state, memory, written: String::new() };
    saved.load(&second, &machine.path("second")).unwrap();
    second.pause();
    second.resume();
    assert_eq!(second.state(), "Running");
    assert_eq!(second.terminate(), Some(143));
}

#[test]
fn the_command_line_restores_and_waits_if_it_is_told_to() {
    let machine = Machine::new(COUNTING);
    let first = machine.start(machine.config(1));
    let saved = save(&machine, &first, "first");
    let output = machine.path("second.console");
    let mut request = saved.request(&output);
    request["resume_vm"] = json!(false);
    std::fs::write(machine.path("load"), request.to_string()).unwrap();
    let second = machine.spawn(|command| {
        command.arg("--restore-file").arg(machine.path("load"));
    });
    assert_eq!((second.state().as_str(), console(&output).as_str()), ("Paused", ""));
    second.resume();
    saved.goes_on(&output);

    std::fs::write(&saved.state, "not a snapshot").unwrap();
    let mut command = std::process::Command::new(common::program());
    let status = command.arg("--restore-file").arg(machine.path("load")).stderr(Stdio::null()).status();
    assert_eq!(status.unwrap().code(), Some(2));
}

#[test]
fn what_cannot_be_restored_is_refused_by_name_and_the_next_try_may_succeed() {
    let machine = Machine::new(COUNTING);
    let disk = machine.path("disk");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let mut config = machine.config(1);
    config["drives"] = json!([{ "drive_id": "root", "path_on_host": disk, "is_root_device": true }]);
    config["vsock"] = json!({ "guest_cid": 3, "uds_path": machine.path("vsock") });
    let first = machine.start(config);
    let saved = save(&machine, &first, "first");
    assert_eq!(first.terminate(), Some(143));
    let vm = machine.idle();
    let output = machine.path("second.console");
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut request = saved.request(&output);
        change(&mut request);
        let why = refusal(vm.client.put("/snapshot/load", &request));
        assert_eq!(vm.state(), "Not started", "{why}");
        why
    };

    let whole = std::fs::read(&saved.state).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 4;
    let mut newer = whole.clone();
    newer[8] += 1;
    let cases: [(&[u8], &str); 5] = [
        (&[], "not a snapshot"),
        (&whole[..whole.len() - 1], "length"),
        (&damaged, "checksum"),
        (&newer, "version 2"),
        (b"MALLEEVM", "length"),
    ];
    for (bytes, expected) in cases {
        std::fs::write(machine.path("broken"), bytes).unwrap();
        let why = refused(&|request| request["snapshot_path"] = json!(machine.path("broken")));
        assert!(why.contains(expected), "{why}");
    }
    let missing = machine.path("missing");
    assert!(refused(&|request| request["snapshot_path"] = json!(missing)).contains("missing"));
    assert!(refused(&|request| request["mem_file_path"] = json!(missing)).contains("missing"));
    assert!(refused(&|request| request["mem_file_path"] = json!(machine.path("kernel"))).contains("bytes"));
    assert!(refused(&|request| request["mem_file_path"] = Value::Null).contains("mem_file_path"));
    let drive = json!([{ "drive_id": "root", "path_on_host": missing }]);
    assert!(refused(&|request| request["drive_overrides"] = drive.clone()).contains("missing"));
    assert!(refused(&|request| request["turbo"] = json!(true)).contains("turbo"));
    assert!(!machine.path("vsock").exists(), "a device of a VM that was not made is left");

    saved.load(&vm, &output).unwrap();
    saved.goes_on(&output);
    assert!(refusal(saved.load(&vm, &output)).contains("after starting"));
    let configured = machine.idle();
    configured.client.put("/machine-config", &json!({ "vcpu_count": 2, "mem_size_mib": 64 })).unwrap();
    assert!(refusal(saved.load(&configured, &output)).contains("configuring"));
}

#[test]
fn memory_comes_from_a_page_server_which_knows_the_next_time_what_is_touched_first() {
    let machine = Machine::new(COUNTING);
    let first = machine.start(machine.config(2));
    let saved = save(&machine, &first, "first");
    drop(first);
    let (socket, list) = (machine.path("pages"), machine.path("working-set"));
    let mut server = std::process::Command::new(common::program());
    server.arg("--serve-pages").arg(&socket).arg("--memory").arg(&saved.memory).arg("--working-set").arg(&list);
    let mut server = server.spawn().unwrap();
    wait_until("the page server's socket", || socket.exists());
    let load = |vm: &Process, output: &Path| {
        let mut request = saved.request(output);
        request["mem_file_path"] = Value::Null;
        request["mem_backend"] = json!({ "backend_type": "Uffd", "backend_path": socket });
        vm.client.put("/snapshot/load", &request).unwrap();
        saved.goes_on(output);
    };
    let recorded = || std::fs::read_to_string(&list).unwrap_or_default();
    let mut lists = Vec::new();
    for output in ["a.console", "b.console"].map(|name| machine.path(name)) {
        let vm = machine.idle();
        load(&vm, &output);
        assert_eq!(vm.terminate(), Some(143));
        wait_until("the list is written", || !recorded().is_empty());
        lists.push(recorded());
    }
    let runs: Vec<(u64, u64)> = serde_json::from_str(&lists[0]).unwrap();
    let count = common::counter::COUNT / 4096;
    assert!(runs.iter().any(|(page, length)| (*page..page + length).contains(&count)), "{runs:?}");
    assert!(runs.iter().map(|(_, length)| length).sum::<u64>() < (MEMORY_MIB << 20) / 4096 / 4, "{runs:?}");
    assert_eq!(lists[0], lists[1], "a list that is there is not written again");

    // Without its page server a VM has no memory, and ends.
    let vm = machine.idle();
    load(&vm, &machine.path("c.console"));
    server.kill().unwrap();
    server.wait().unwrap();
    assert_eq!(vm.wait(), Some(1));
}

#[test]
fn devices_of_a_restored_guest_go_on_with_other_things_behind_them() {
    let place = common::Place::new();
    let start = |socket: &Path, config: Option<&Path>| {
        let mut command = place.bare_command();
        command.arg("--api-sock").arg(socket);
        config.into_iter().for_each(|config| {
            command.arg("--config-file").arg(config);
        });
        Process::start(command, socket)
    };
    let mut config = place.idle_config();
    config["network-interfaces"][0]["guest_mac"] = json!("06:00:00:00:00:02");
    std::fs::write(place.path("config"), config.to_string()).unwrap();
    let first = start(&place.path("api1"), Some(&place.path("config")));
    wait_until("the probe has its address", || place.is_idle());
    first.inside("ip address add 10.0.0.1/24 dev tap0");
    first.inside("ip link set tap0 up");
    first.inside("ping -c 1 -W 10 10.0.0.2");
    first.pause();
    create(&first, "Full", &place.path("state"), &place.path("memory")).unwrap();
    first.resume();
    first.inside("ping -c 1 -W 10 10.0.0.2");

    let data = place.path("other-data");
    std::fs::copy(place.path("data"), &data).unwrap();
    std::fs::copy(place.path("root"), place.path("other-root")).unwrap();
    let second = start(&place.path("api2"), None);
    let request = json!({
        "snapshot_path": place.path("state"),
        "mem_backend": { "backend_type": "File", "backend_path": place.path("memory") },
        "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap7", "guest_mac": "06:00:00:00:00:03" }],
        "drive_overrides": [
            { "drive_id": "root", "path_on_host": place.path("other-root") },
            { "drive_id": "data", "path_on_host": data },
            { "drive_id": "many", "path_on_host": place.path("other") },
            { "drive_id": "overlay", "path_on_host": place.path("another-overlay") },
        ],
        "vsock_override": { "uds_path": place.path("other-vsock") },
        "console_path": place.path("other-hvc0"),
        "serial_out_path": place.path("other-console"),
    });
    second.client.put("/snapshot/load", &request).unwrap();
    assert_eq!(second.state(), "Paused");
    second.resume();
    second.inside("ip address add 10.0.0.1/24 dev tap7");
    second.inside("ip link set tap7 up");
    // The guest sleeps; the frame's interrupt must wake it.
    second.inside("ping -c 3 -i 0.2 -W 10 10.0.0.2");
    first.inside("ping -c 1 -W 10 10.0.0.2");
    let restored: Value = second.client.get("/vm/config").unwrap();
    assert_eq!(restored["network-interfaces"][0]["guest_mac"], "06:00:00:00:00:03");
    assert_eq!(second.terminate(), Some(143));
    assert!(!place.path("other-vsock").exists() && place.path("vsock").exists());
}
