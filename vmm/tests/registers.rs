//! What a driver's accesses to its devices' registers cost, on the host's `/dev/kvm`: the probe guest answers pings, each of which takes an interrupt, whose
//! reason it reads and acknowledges.

mod common;

use std::path::Path;

use common::Place;
use common::machine::{Process, wait_until};

/// So many are looked at. A guest that is busy with one packet when the next one comes takes none for that.
const INTERRUPTS: u64 = 20;

/// The idle guest, which has its address and is reached from its monitor's network namespace.
fn reachable(place: &Place, more: &[&str]) -> Process {
    let socket = place.path("api");
    let mut command = place.command_of(&place.idle_config());
    command.arg("--api-sock").arg(&socket).args(more);
    let process = Process::start(command, &socket);
    wait_until("the probe has its address", || place.is_idle());
    process.inside("ip address add 10.0.0.1/24 dev tap0");
    process.inside("ip link set tap0 up");
    process.inside("ping -c 1 -W 10 10.0.0.2");
    process
}

/// Pings, so slowly that the guest should sleep in between, until `seen` says that it has been interrupted often enough.
fn ping_until(process: &Process, seen: impl Fn() -> bool) {
    wait_until("the interrupts", || {
        process.inside("ping -c 10 -i 0.02 -W 10 10.0.0.2");
        seen()
    });
}

/// A counter that `GET /metrics` tells, for the only vCPU or summed over queues.
fn counted(socket: &Path, begin: &str) -> u64 {
    let answer = common::metrics(socket);
    let lines: Vec<_> = answer.lines().filter(|line| line.starts_with(begin)).collect();
    assert!(!lines.is_empty(), "{begin} in {answer}");
    lines.iter().map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn neither_the_reason_of_an_interrupt_nor_its_acknowledgement_is_an_exit() {
    let place = Place::new();
    let process = reachable(&place, &[]);
    let count = || {
        ["exits_total{vcpu=\"0\",reason=\"mmio_read\"}", "exits_total{vcpu=\"0\",reason=\"mmio_write\"}"]
            .map(|name| counted(&place.path("api"), &format!("mallee_vmm_vcpu_{name}")))
    };
    let interrupts = || counted(&place.path("api"), "mallee_vmm_queue_interrupts_total{device=\"net");
    let (exits, raised) = (count(), interrupts());
    ping_until(&process, || interrupts() >= raised + INTERRUPTS);
    assert_eq!(count(), exits);
}

#[test]
fn who_traces_exits_sees_what_a_driver_reads() {
    let place = Place::new();
    let trace = place.path("trace");
    let process = reachable(&place, &["--trace-exits", trace.to_str().unwrap()]);
    let reads = || {
        let text = std::fs::read_to_string(&trace).unwrap();
        text.lines().filter(|line| line.contains("mmio_read") && line.contains("060 4")).count() as u64
    };
    let before = reads();
    ping_until(&process, || reads() >= before + INTERRUPTS);
}
