//! A guest that does all it can to hurt its monitor, on the host's `/dev/kvm`, with the system call filters on.
//!
//! The guest is the probe in its hostile mode (`images/probe/src/trial/hostile.rs` says what it does). It looks from inside that a device with a
//! broken ring stops, that the others go on, and that a reset mends it; here it is seen that the process lives to the guest's orderly
//! end and has not grown.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};

use common::{MEMORY_MIB, Place};
use mallee_vmm::api::{EventKind, ExitReason};

/// What the process may have beyond the guest's memory, in KiB. It starts with 4 MiB; what a guest can make it hold (chains, a frame for each
/// direction, lines of log) is far less.
const OWN_KIB: i64 = 12 * 1024;

/// Runs it to its end: status, peak of its resident memory in KiB, and its log.
#[expect(clippy::zombie_processes, reason = "wait4 waits for it, and says what it used")]
fn run(place: &Place, trial: &str) -> (ExitStatus, i64, String) {
    let log = std::fs::File::create(place.path("log")).unwrap();
    let child = place.command(&format!("probe.trial={trial}")).stderr(Stdio::from(log)).spawn().unwrap();
    // SAFETY: all zeroes is a valid `rusage`, and both places are written by the kernel; the child is waited for here alone.
    let (status, usage) = unsafe {
        let (mut status, mut usage) = (0, std::mem::zeroed::<libc::rusage>());
        assert_eq!(libc::wait4(child.id() as libc::pid_t, &mut status, 0, &mut usage), child.id() as libc::pid_t);
        (status, usage)
    };
    (ExitStatus::from_raw(status), usage.ru_maxrss, std::fs::read_to_string(place.path("log")).unwrap())
}

fn endures(trial: &str) {
    let place = Place::new();
    let (status, peak_kib, log) = run(&place, trial);
    let end = place.last_event();
    let guest = place.console();
    assert!(status.success(), "{trial}: {status}, {end:?}\n{guest}\n{log}");
    assert!(
        matches!(end, Some(EventKind::Exit { reason: ExitReason::PowerOff, .. })),
        "{trial}: {end:?}\n{guest}\n{log}"
    );
    assert!(guest.contains("probe: trial passed"), "{trial}:\n{guest}\n{log}");
    let own = peak_kib - MEMORY_MIB as i64 * 1024;
    assert!(own < OWN_KIB, "{trial}: the process grew to {own} KiB beyond the guest's memory");
}

#[test]
fn every_device_serves_a_driver_that_keeps_the_rules() {
    endures("exercise");
}

#[test]
fn no_hostile_driver_ends_hangs_or_grows_the_process() {
    // Each seed is another order of attacks on each device.
    for seed in 1..=6 {
        endures(&format!("hostile:{seed}"));
    }
}
