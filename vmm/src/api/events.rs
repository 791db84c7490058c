//! The events that a VMM writes, and what it finds out about KVM.

use serde::{Deserialize, Serialize};

/// One line (JSON) of the file given with `--events-path`.
///
/// The file is only appended to, so that whoever watches the VM can be restarted and read it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// CLOCK_REALTIME, nanoseconds since 1970.
    pub unix_ns: u64,
    /// CLOCK_MONOTONIC, nanoseconds.
    pub monotonic_ns: u64,
    #[serde(flatten)]
    pub kind: EventKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// The process began: its first own instructions, after the loader's.
    ProcessStarted { pid: u32 },
    /// The VM is built: memory, vCPUs, devices, kernel loaded.
    VmBuilt,
    /// The first vCPU enters the guest.
    FirstRun,
    /// The guest wrote its first byte to the serial port.
    FirstSerialByte,
    /// The guest wrote `value` to the boot timer port.
    BootTimer { value: u8 },
    /// The VMM ends; nothing follows.
    Exit { reason: ExitReason, message: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off. Exit status 0.
    PowerOff,
    /// The guest asked for a reset; the caller starts it again if it wants to. Exit status 0.
    Reset,
    /// The configuration or an image cannot be used. Exit status 2.
    BadConfiguration,
    /// KVM or the host failed. Exit status 1.
    HostFailure,
    /// SIGTERM or SIGINT. Exit status 143 or 130.
    Signal,
}

/// What `mallee-vmm --check-kvm` prints, as JSON: found out by running instructions in a throw-away VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmCheck {
    /// `none`, `software` or `hardware`.
    pub class: KvmClass,
    /// Why, in words for a person.
    pub detail: String,
}

/// See `KvmClass` in the agent's `node.proto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvmClass {
    None,
    Software,
    Hardware,
}
