//! Tests that are made once for each of netd's backends.
//!
//! A test is a function; [`on_each_backend`](crate::on_each_backend) makes two tests of it, `nftables::NAME` and `iptables::NAME`. The one that runs is known to the thread, and
//! [`Lab`](super::Lab) starts its netd accordingly.

use std::cell::Cell;

use super::{GATEWAY_MAC, mac};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    Nftables,
    Iptables,
}

thread_local! {
    static OF_TEST: Cell<Backend> = const { Cell::new(Backend::Nftables) };
}

impl Backend {
    /// What netd calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// Of the test that this thread runs.
pub fn backend() -> Backend {
    OF_TEST.get()
}

/// From now on in this thread.
pub fn of_thread(backend: Backend) {
    OF_TEST.set(backend);
}

pub fn run_on(backend: Backend, test: fn()) {
    of_thread(backend);
    test();
}

/// The MAC to which a packet for instance `n` is sent by its neighbours: by iptables, the gateway answers for it and routes.
pub fn neighbour_mac(n: u8) -> [u8; 6] {
    match backend() {
        Backend::Nftables => mac(n),
        Backend::Iptables => GATEWAY_MAC,
    }
}

/// Whether a frame is another one as it may arrive: routed, with another MAC and less time to live, where it is IPv4.
pub fn is_same_packet(found: &[u8], sent: &[u8]) -> bool {
    if sent[12..14] != [8, 0] || found.len() != sent.len() {
        return found == sent;
    }
    let [ttl, checksum] = [22..23, 24..26];
    found[14..ttl.start] == sent[14..ttl.start]
        && found[ttl.end..checksum.start] == sent[ttl.end..checksum.start]
        && found[checksum.end..] == sent[checksum.end..]
}

/// Makes two tests of each function.
#[macro_export]
macro_rules! on_each_backend {
    ($($test:ident),* $(,)?) => {
        mod nftables {
            $(#[test] fn $test() { $crate::common::backend::run_on($crate::common::backend::Backend::Nftables, super::$test) })*
        }
        mod iptables {
            $(#[test] fn $test() { $crate::common::backend::run_on($crate::common::backend::Backend::Iptables, super::$test) })*
        }
    };
}
