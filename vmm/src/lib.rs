//! # mallee-vmm: one process, one microVM
//!
//! **Owns**: the KVM file descriptors, the guest's memory, its vCPUs, every device the guest can see
//! and the files and taps behind them, the boot of a kernel, and the socket through which the VM is
//! controlled.
//!
//! **May not**: know of EC2, subnets or elastic IPs; create or configure network interfaces (it opens
//! a tap that is there); start other programs.
//!
//! # How data flows
//!
//! ```text
//!  config file ─┐                       ┌─ vCPU threads ── port and MMIO exits ──▶ bus ──▶ devices
//!  REST socket ─┴▶ monitor ─▶ builder ──┤                                            │ (on activation)
//!  signals ───────▶ (main thread)       └─ device workers ◀── ioeventfd kicks ───────┘
//!                     │                        │ readv/writev on guest memory
//!                     ▼                        ▼
//!                 events file             tap, disk file, /dev/urandom
//! ```
//!
//! * [`monitor`](crate) waits on the main thread for requests, signals and the end of the guest.
//! * `builder` turns a [`api::VmConfig`] into a running VM and reads like a boot: memory, kernel, tables, devices, vCPUs.
//! * `bus` dispatches what a vCPU could not do on its own; `devices` is what the guest sees,
//!   `backends` what of the host is behind it. No device opens a file, no backend parses a descriptor.
//! * Every virtio device moves to a thread of its own when its driver says DRIVER_OK and comes back on reset,
//!   so that a slow disk never holds up the network, and nothing of it exists before the guest asks for it. A network interface has a thread for each
//!   pair of queues, or the kernel's threads in their place (vhost-net).
//!
//! # The guest is the enemy
//!
//! Whatever is read from guest memory or comes with an exit is untrusted: addresses are checked over their whole range,
//! lengths are bounded before anything is allocated, queue registers are frozen from DRIVER_OK on, a broken ring stops
//! its own queue and sets DEVICE_NEEDS_RESET. No guest input panics the process.
//!
//! With `default-features = false` only [`api`] is left: what other parts may use.

pub mod api;

#[cfg(feature = "monitor")]
mod backends;
#[cfg(feature = "monitor")]
mod boot;
#[cfg(feature = "monitor")]
mod builder;
#[cfg(feature = "monitor")]
mod bus;
#[cfg(feature = "monitor")]
mod check_kvm;
#[cfg(feature = "monitor")]
pub mod cli;
#[cfg(feature = "monitor")]
mod confine;
#[cfg(feature = "monitor")]
mod cpu;
#[cfg(feature = "monitor")]
mod devices;
#[cfg(feature = "monitor")]
mod error;
#[cfg(feature = "monitor")]
mod events;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(feature = "monitor")]
mod gate;
#[cfg(feature = "monitor")]
mod gdb;
#[cfg(feature = "monitor")]
mod kick;
#[cfg(feature = "monitor")]
mod log;
#[cfg(feature = "monitor")]
mod memory;
#[cfg(feature = "monitor")]
mod metrics;
#[cfg(feature = "monitor")]
mod monitor;
#[cfg(feature = "monitor")]
mod pager;
#[cfg(feature = "monitor")]
mod rate_limiter;
#[cfg(feature = "monitor")]
mod rest;
#[cfg(feature = "monitor")]
mod snapshot;
#[cfg(feature = "monitor")]
mod trace;
#[cfg(feature = "monitor")]
mod vcpu;
#[cfg(feature = "monitor")]
mod vm;
