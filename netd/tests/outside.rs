//! `mallee-netd outside`: a public side on a machine that has none.

mod common;

use common::{run, try_run};
use nix::sched::{CloneFlags, unshare};

const NETD: &str = env!("CARGO_BIN_EXE_mallee-netd");

/// Removes the named namespace whatever becomes of the test: its name is the whole machine's.
struct Named(String);

impl Named {
    fn new(what: &str) -> Self {
        Self(format!("mt{}{what}", std::process::id()))
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = try_run(&format!("ip netns del {}", self.0));
    }
}

#[test]
fn up_tap_and_down_are_idempotent_and_leave_nothing() {
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
    let named = Named::new("a");
    let name = &named.0;
    let before = run("ip -o link");
    let up = format!(
        "{NETD} outside up --bridge outbr --address 198.51.100.1/24 --namespace {name} \
         --namespace-address 198.51.100.2/24 --uplink-name pub0"
    );
    for _ in 0..2 {
        run(&up);
        run(&format!("{NETD} outside tap --bridge outbr --name outtap"));
        run("ping -c 1 -W 10 198.51.100.2");
        run(&format!("ip netns exec {name} ping -c 1 -W 10 198.51.100.1"));
        let inside = run(&format!("ip netns exec {name} ip route"));
        assert!(inside.contains("default via 198.51.100.1 dev pub0"), "{inside}");
    }
    assert!(run("ip -o link show outtap").contains("master outbr"));
    let down = format!("{NETD} outside down --bridge outbr --namespace {name}");
    for _ in 0..2 {
        run(&down);
        assert_eq!(run("ip -o link"), before);
        assert!(!run("ip netns list").contains(name.as_str()));
    }
}

#[test]
fn links_of_others_are_left_alone() {
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
    run("ip link add outbr type bridge");
    let up = try_run(&format!("{NETD} outside up --bridge outbr --address 198.51.100.1/24"));
    assert!(!up.status.success());
    assert!(String::from_utf8_lossy(&up.stderr).contains("outbr"));
    assert!(!try_run(&format!("{NETD} outside down --bridge outbr")).status.success());
    run("ip link show outbr");
}

#[test]
fn netd_runs_in_the_namespace_that_was_made() {
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
    let named = Named::new("b");
    let name = &named.0;
    run(&format!(
        "{NETD} outside up --bridge outbr --address 198.51.100.1/24 --namespace {name} \
         --namespace-address 198.51.100.2/24"
    ));
    run(&format!("ip netns exec {name} {NETD} clean"));
    run(&format!("{NETD} outside down --bridge outbr --namespace {name}"));
}
