//! `--gdb` as GDB sees it: its remote protocol on the socket, with the counting guest on the host's `/dev/kvm`.

mod common;

use common::counter::{COUNT, COUNTING, ENTRY, INCREMENT};
use common::gdb::Gdb;
use common::machine::{Machine, Process, wait_until};

/// The socket is there before the one of the API, which was waited for.
fn connect(machine: &Machine) -> Gdb {
    Gdb::connect(&machine.path("gdb")).unwrap()
}

fn count(gdb: &mut Gdb) -> u64 {
    u64::from_le_bytes(gdb.memory(COUNT, 8).try_into().unwrap())
}

/// Where the guest counts.
fn increment(gdb: &mut Gdb) -> u64 {
    let code = gdb.memory(ENTRY, 0x180);
    ENTRY + code.windows(3).position(|bytes| bytes == INCREMENT).unwrap() as u64
}

fn start(machine: &Machine, vcpus: u8) -> Process {
    std::fs::write(machine.path("config"), machine.config(vcpus).to_string()).unwrap();
    machine.spawn(|command| {
        command.arg("--config-file").arg(machine.path("config")).arg("--gdb").arg(machine.path("gdb"));
    })
}

#[test]
fn a_guest_waits_at_its_first_instruction_and_is_stepped_from_there() {
    let machine = Machine::new(COUNTING);
    let _vm = start(&machine, 1);
    let mut gdb = connect(&machine);
    assert!(gdb.ask("?").starts_with('T'));
    assert_eq!((gdb.rip(), count(&mut gdb)), (ENTRY, 0));
    assert!(machine.console().is_empty());
    // mov $imm32, %edi; xor %eax, %eax; mov $imm32, %ecx
    for address in [ENTRY + 5, ENTRY + 7, ENTRY + 12] {
        assert!(gdb.ask("vCont;s:1").starts_with("T05"));
        assert_eq!(gdb.rip(), address);
    }
}

/// A software KVM knows breakpoints where it emulates, which is ring 0.
#[test]
fn a_hardware_breakpoint_stops_before_its_instruction_and_is_taken_away() {
    let machine = Machine::new(COUNTING);
    let _vm = start(&machine, 1);
    let mut gdb = connect(&machine);
    // The third instruction: rep stosq.
    let address = ENTRY + 12;
    gdb.ok(&format!("Z1,{address:x},1"));
    assert!(gdb.ask("vCont;c").starts_with("T05"));
    assert_eq!(gdb.rip(), address);
    gdb.ok(&format!("z1,{address:x},1"));
    // What is written is what the guest goes on with, and a breakpoint is not seen in memory.
    gdb.ok(&format!("M{COUNT:x},8:0010000000000000"));
    assert_eq!(count(&mut gdb), 0x1000);
    let increment = increment(&mut gdb);
    gdb.ok(&format!("Z0,{increment:x},1"));
    assert_eq!(gdb.memory(increment, 3), INCREMENT);
    // A client that just leaves takes its breakpoints along, and holds nobody up.
    drop(gdb);
    wait_until("the guest counts from there", || machine.counts().iter().any(|it| it.0 == 0x1002));
}

/// None is met here: a software KVM has none for the guest.
#[test]
fn watchpoints_share_the_debug_registers_and_none_is_for_reads_alone() {
    let machine = Machine::new(COUNTING);
    let _vm = start(&machine, 1);
    let mut gdb = connect(&machine);
    gdb.ok(&format!("Z2,{COUNT:x},8"));
    gdb.ok(&format!("Z4,{:x},6", COUNT + 16));
    assert!(gdb.ask(&format!("Z3,{COUNT:x},8")).starts_with('E'));
    gdb.ok(&format!("Z1,{:x},1", ENTRY + 12));
    assert!(gdb.ask(&format!("Z2,{COUNT:x},1")).starts_with('E'));
    gdb.ok(&format!("z4,{:x},6", COUNT + 16));
    gdb.ok(&format!("Z2,{COUNT:x},1"));
    // They are in nobody's way.
    assert!(gdb.ask("vCont;c").contains("hwbreak"));
    assert_eq!(gdb.rip(), ENTRY + 12);
}

#[test]
fn vcpus_are_threads_and_all_of_them_stop() {
    let machine = Machine::new(COUNTING);
    let vm = start(&machine, 2);
    let mut gdb = connect(&machine);
    gdb.ask("qSupported:vContSupported+");
    let threads = gdb.ask("qfThreadInfo");
    assert_eq!(threads.split(',').count(), 2, "{threads}");
    gdb.send("vCont;c");
    wait_until("both count", || machine.counts().last().is_some_and(|it| it.1 > 0));
    for _ in 0..10 {
        gdb.interrupt();
        let why = gdb.hear();
        assert!(why.starts_with("T02"), "{why}");
        let counts = gdb.memory(COUNT, 16);
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(gdb.memory(COUNT, 16), counts);
        // A pause and its end are the monitor's business, and let nobody go.
        vm.pause();
        vm.resume();
        assert_eq!(gdb.memory(COUNT, 16), counts);
        gdb.send("vCont;c");
    }
    gdb.interrupt();
    gdb.hear();
    gdb.ok("D");
    let before = machine.counts().len();
    wait_until("the guest goes on", || machine.counts().len() > before);
    assert_eq!(vm.terminate(), Some(143));
}
