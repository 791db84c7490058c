//! The first process of a lab's node: everything between the kernel's start and the running services.
//!
//! A node has no distribution on it. This program loads the kernel modules, mounts the file systems,
//! sets the uplink's address, starts netd and agent and starts them again when they end, and runs the
//! commands that the host sends over the control ports. It knows nothing of instances and takes no
//! part in the cloud: on a real machine systemd would stand in its place.
//!
//! Process 1 itself only boots and collects ended orphans (a VMM whose agent was killed becomes its
//! child); the supervisor is its one child, so that nothing it does can end process 1.

pub mod boot;
pub mod control;
pub mod setup;
pub mod supervisor;
