//! Measurements of the monitor, each beside its peers in the same run.
//!
//! Every monitor gets the same kernel and the same memory, and no device but the serial port and what is measured. Runs
//! alternate between the monitors, so that a machine that grows slower is slower for all of them. What
//! is written down ([`record`]) is every sample, the median of each series and the ratio of each peer to
//! `mallee-vmm`, with the machine's facts ([`facts`]): a number without its machine says nothing.
//!
//! Nothing here judges: there is no threshold, and a slow run is no failure. A monitor that is not
//! installed, or that cannot run the guest on this KVM, is left out and named.

pub mod disk;
pub mod echo;
pub mod error;
pub mod facts;
pub mod floor;
pub mod guest;
pub mod memory;
pub mod monitors;
pub mod net;
pub mod record;
pub mod run;
pub mod serial;
pub mod snapshot;
pub mod up;

pub use error::BenchError;
