//! What of the host is behind a device: a tap, a disk's file, the console's file. All of it is opened
//! before the VM exists, so that a wrong path is an error and not half a machine.

pub mod console;
pub mod disk;
pub mod reclaim;
pub mod tap;
pub mod tap_counters;
pub mod terminal;
pub mod vhost;
pub mod vsock;
