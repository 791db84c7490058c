//! A VM that is paused stands still and goes on as if nothing had been, wherever its vCPUs are at that moment.

mod common;

use common::counter::{self, COUNTING, HALTING};
use common::machine::{Machine, wait_until};
use mallee_vmm::api::client::ClientError;

#[test]
fn a_paused_guest_stands_still_and_goes_on_without_losing_a_step() {
    for vcpus in [1, 2] {
        let machine = Machine::new(COUNTING);
        let vm = machine.start(machine.config(vcpus));
        assert_eq!(vm.state(), "Running");
        for _ in 0..50 {
            let before = machine.counts().len();
            vm.pause();
            assert_eq!(vm.state(), "Paused");
            let text = machine.console();
            // Pausing again changes nothing, and gives a guest that still runs the time to be seen.
            vm.pause();
            std::thread::sleep(std::time::Duration::from_millis(2));
            assert_eq!(machine.console(), text);
            vm.resume();
            assert_eq!(vm.state(), "Running");
            wait_until("the guest goes on", || machine.counts().len() > before + 1);
        }
        // Every number once, in order; the other vCPU's never gets smaller.
        let counts = machine.counts();
        assert!(counts.iter().map(|it| it.0).eq(1..=counts.len() as u64), "{counts:?}");
        assert!(counts.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{counts:?}");
        if vcpus == 2 {
            wait_until("the other vCPU counts", || machine.counts().last().is_some_and(|last| last.1 > 0));
        }
    }
}

#[test]
fn a_halted_vcpu_and_one_that_was_never_woken_pause_too() {
    let machine = Machine::new(HALTING);
    let vm = machine.start(machine.config(3));
    wait_until("the guest's line", || machine.console().ends_with('\n'));
    for _ in 0..50 {
        vm.pause();
        vm.resume();
    }
    vm.pause();
    assert_eq!(vm.state(), "Paused");
    assert_eq!(vm.terminate(), Some(143), "a paused VM ends when it is told to");
}

#[test]
fn what_is_not_started_cannot_be_paused_and_nonsense_is_refused() {
    let machine = Machine::new(COUNTING);
    let vm = machine.idle();
    let refused = vm.set_state("Paused").unwrap_err();
    assert!(matches!(refused, ClientError::Refused { status: 400, .. }), "{refused}");
    assert!(counter::parse("0000000g 00000000").is_none());
    let vm = machine.start(machine.config(1));
    let refused = vm.set_state("Stopped").unwrap_err();
    assert!(matches!(refused, ClientError::Refused { status: 400, .. }), "{refused}");
    assert_eq!(vm.state(), "Running");
}
