//! `--gdb` with GDB itself at the other end, and the counting guest on the host's `/dev/kvm`. `tests/gdb.rs` looks at single packets.

mod common;

use common::counter::{COUNT, COUNTING, ENTRY, INCREMENT};
use common::debugger::Debugger;
use common::machine::{Machine, Process, wait_until};
use serde_json::json;

fn start(machine: &Machine, vcpus: u8) -> Process {
    std::fs::write(machine.path("config"), machine.config(vcpus).to_string()).unwrap();
    machine.spawn(|command| {
        command.arg("--config-file").arg(machine.path("config")).arg("--gdb").arg(machine.path("gdb"));
    })
}

fn connect(machine: &Machine) -> Debugger {
    let (debugger, said) = Debugger::connected_to(&machine.path("gdb"));
    assert!(said.contains("Remote debugging using"), "{said}");
    debugger
}

fn has_counted(machine: &Machine, count: u64) -> bool {
    machine.counts().iter().any(|it| it.0 == count)
}

/// Where the guest counts, found as its code is read.
fn increment(gdb: &mut Debugger) -> u64 {
    let [a, b, c] = INCREMENT;
    gdb.ask(&format!("find /b {ENTRY}, +0x180, {a}, {b}, {c}"));
    gdb.number("$_")
}

#[test]
fn a_guest_is_walked_through_from_its_first_instruction() {
    let machine = Machine::new(COUNTING);
    let _vm = start(&machine, 1);
    let mut gdb = connect(&machine);
    assert_eq!(gdb.rip(), ENTRY);
    assert!(gdb.ask("x/i $rip").contains("mov    $0x300000,%edi"));
    gdb.ask("stepi");
    assert_eq!((gdb.rip(), gdb.number("$rdi")), (ENTRY + 5, 0x30_0000));
    let said = gdb.ask(&format!("hbreak *{}", ENTRY + 12));
    assert!(said.contains("Hardware assisted breakpoint 1 at"), "{said}");
    let said = gdb.ask("continue");
    assert!(said.contains("Breakpoint 1, ") && gdb.rip() == ENTRY + 12, "{said}");
    // The guest's own `rep stosq` stores what was written to registers, where they say.
    for (register, value) in [("rdi", COUNT), ("rcx", 1), ("rax", 0x1000)] {
        gdb.ask(&format!("set ${register} = {value}"));
        assert_eq!(gdb.number(&format!("${register}")), value);
    }
    gdb.ask("stepi");
    let count = format!("*(unsigned long *) {COUNT}");
    assert_eq!((gdb.number(&count), gdb.number("$rcx")), (0x1000, 0));
    gdb.ask(&format!("set var {count} = 0x2000"));
    assert_eq!(gdb.number(&count), 0x2000);
    assert!(gdb.ask("x/b 0x7fff00000000").contains("Cannot access memory"));
    let said = gdb.ask("detach");
    assert!(said.contains("detached"), "{said}");
    wait_until("the guest counts from there", || has_counted(&machine, 0x2001));
}

/// Also where KVM cannot carry out an `int3` and stops in front of it.
#[test]
fn a_software_breakpoint_is_met_stepped_over_and_met_again() {
    let machine = Machine::new(COUNTING);
    let vm = start(&machine, 1);
    let mut gdb = connect(&machine);
    gdb.ask(&format!("break *{}", ENTRY + 7));
    gdb.ask(&format!("break *{}", ENTRY + 12));
    for (number, address) in [(1, ENTRY + 7), (2, ENTRY + 12), (1, ENTRY + 7)] {
        let said = gdb.ask("continue");
        assert!(said.contains(&format!("Breakpoint {number}, ")) && gdb.rip() == address, "{said}");
        if number == 2 {
            gdb.ask(&format!("set $rip = {ENTRY}"));
        }
    }
    gdb.ask("delete");
    gdb.ask("detach");
    wait_until("the guest counts", || has_counted(&machine, 2));
    assert_eq!(vm.terminate(), Some(143));
}

/// Whatever becomes of a client, the next one finds the guest.
#[test]
fn a_debugger_that_is_killed_while_the_guest_runs_makes_room_for_another() {
    let machine = Machine::new(COUNTING);
    let _vm = start(&machine, 2);
    let mut gdb = connect(&machine);
    gdb.say("continue");
    wait_until("both count", || machine.counts().last().is_some_and(|it| it.1 > 0));
    drop(gdb);
    let mut gdb = connect(&machine);
    let count = gdb.number(&format!("*(unsigned long *) {COUNT}"));
    gdb.ask("detach");
    wait_until("the guest goes on", || has_counted(&machine, count + 2));
}

/// As it is put: in the guest's memory, which a snapshot shows, and not in what GDB shows.
#[test]
fn a_software_breakpoint_is_in_memory_until_the_debugger_leaves() {
    let machine = Machine::new(COUNTING);
    let vm = start(&machine, 1);
    let mut gdb = connect(&machine);
    let increment = increment(&mut gdb);
    gdb.ask("set breakpoint always-inserted on");
    gdb.ask(&format!("break *{increment}"));
    assert_eq!(gdb.number(&format!("*(unsigned int *) {increment}")) & 0xff_ffff, 0x05_ff48);
    let first_byte = || {
        vm.pause();
        let files = json!({ "snapshot_path": machine.path("state"), "mem_file_path": machine.path("memory") });
        vm.client.put("/snapshot/create", &files).unwrap();
        vm.resume();
        std::fs::read(machine.path("memory")).unwrap()[increment as usize]
    };
    assert_eq!(first_byte(), 0xcc);
    gdb.ask("detach");
    wait_until("the guest counts", || has_counted(&machine, 2));
    assert_eq!(first_byte(), INCREMENT[0]);
}

#[test]
fn vcpus_are_threads() {
    let machine = Machine::new(COUNTING);
    let vm = start(&machine, 2);
    let mut gdb = connect(&machine);
    let threads = gdb.ask("info threads");
    assert!(threads.contains("(vCPU 0)") && threads.contains("(vCPU 1)"), "{threads}");
    gdb.say("continue");
    wait_until("both count", || machine.counts().last().is_some_and(|it| it.1 > 0));
    gdb.interrupt();
    let said = gdb.hear();
    assert!(said.contains("SIGINT"), "{said}");
    // The one writes lines, the other is in its loop of two instructions.
    gdb.ask("thread 2");
    let other = gdb.ask("x/i $rip");
    assert!(other.contains("incq") || other.contains("jmp"), "{other}");
    gdb.ask("thread 1");
    let all = gdb.ask("thread apply all -q output/x $rip");
    assert_eq!(all.matches("0x20").count(), 2, "{all}");
    gdb.ask("detach");
    let before = machine.counts().len();
    wait_until("the guest goes on", || machine.counts().len() > before);
    assert_eq!(vm.terminate(), Some(143));
}
