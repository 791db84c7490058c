//! The checks, one file a subject.

mod balloon;
mod boot;
mod console;
mod cpus;
mod drive;
mod entropy;
mod jail;
mod network;
mod snapshot;
mod vsock;

use super::Check;

/// All of them, in the order in which they run unless some are named.
pub const ALL: &[Check] = &[
    boot::CHECK,
    cpus::CHECK,
    vsock::CHECK,
    entropy::CHECK,
    console::CHECK,
    drive::CHECK,
    network::CHECK,
    network::VHOST_CHECK,
    balloon::CHECK,
    snapshot::CHECK,
    jail::CHECK,
];

pub fn find(name: &str) -> Option<&'static Check> {
    ALL.iter().find(|check| check.name == name)
}
