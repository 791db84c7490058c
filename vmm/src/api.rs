//! What other parts may use of the VMM: the JSON of its REST interface and configuration file, the
//! events it writes, and the few numbers that a guest of ours has to know.
//!
//! Paths, member names and meaning are Firecracker's for the part that is served, so that tools
//! written for Firecracker drive this monitor. Members of our own are marked so. Unknown members are
//! refused. Nothing here touches KVM.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub mod client;

/// Numbers that a guest which does not read ACPI has to know.
pub mod guest {
    /// Guest-physical address of the first virtio-mmio window.
    pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
    /// Distance between two virtio-mmio windows, and their size, in bytes. Windows are given out
    /// without a gap; the first one whose magic is not "virt" ends the list.
    pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
    /// First GSI of a virtio-mmio device; device *n* interrupts on this plus *n*.
    pub const VIRTIO_MMIO_FIRST_GSI: u32 = 5;
    /// The first serial port (16550A, IRQ 4).
    pub const SERIAL_PORT: u16 = 0x3f8;
    /// A byte written here is put into the events as `boot_timer` with the host's time.
    pub const BOOT_TIMER_PORT: u16 = 0x03f0;

    /// Bytes that guests of ours write to [`BOOT_TIMER_PORT`].
    pub mod phase {
        /// The guest's first own instruction in user mode (`init` started, or the probe's main).
        pub const INIT: u8 = 1;
        /// The root file system is mounted.
        pub const ROOT: u8 = 2;
        /// The network interface has its address.
        pub const NETWORK: u8 = 3;
        /// Key, host name and user data were read from the metadata service.
        pub const METADATA: u8 = 4;
        /// The ssh server listens.
        pub const LOGIN: u8 = 5;
        /// The user data ran to its end.
        pub const USER_DATA: u8 = 6;
    }
}

/// `GET|PUT|PATCH /machine-config`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// 1 to 32.
    pub vcpu_count: u8,
    pub mem_size_mib: u64,
    /// Only `false` is served.
    #[serde(default)]
    pub smt: bool,
    #[serde(default)]
    pub track_dirty_pages: bool,
}

/// `PATCH /machine-config`: members that are given replace the present ones.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfigPatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
}

impl Default for MachineConfig {
    /// Firecracker's own defaults.
    fn default() -> Self {
        MachineConfig { vcpu_count: 1, mem_size_mib: 128, smt: false, track_dirty_pages: false }
    }
}

/// `PUT /boot-source`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    pub kernel_image_path: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

/// Format of a drive's file. Always stated, never guessed from the file's content. Our own member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum DriveFormat {
    #[default]
    Raw,
    Qcow2,
}

/// A token bucket: `size` tokens that come back evenly within `refill_time` milliseconds, and `one_time_burst` more
/// that do not. A size or refill time of 0 is no limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    pub refill_time: u64,
}

/// What a device may move (tokens are bytes) and how often (operations, packets). What is absent is not limited.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// `PUT /drives/{drive_id}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Drive {
    pub drive_id: String,
    pub path_on_host: PathBuf,
    pub is_root_device: bool,
    #[serde(default)]
    pub is_read_only: bool,
    #[serde(default)]
    pub format: DriveFormat,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PUT /network-interfaces/{iface_id}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    pub iface_id: String,
    /// Name of an existing tap. One that does not exist is made, for the life of the VMM, if the VMM
    /// has the right to.
    pub host_dev_name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
}

/// `PUT /entropy`: a virtio-rng device. (No members are served yet.)
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Entropy {}

/// `PUT /serial`. Without it the guest's serial port is the process's standard input and output.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Serial {
    pub serial_out_path: PathBuf,
    /// Our own: when the file has grown to this many bytes it is renamed to `….1` (replacing an
    /// older one) and begun anew, so that a guest cannot fill the host's disk. Unset: 1 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_limit: Option<u64>,
}

/// `PUT /metrics`: where a JSON line is written at each FlushMetrics action and every 60 s.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file (made if it is not there) or a fifo.
    pub metrics_path: PathBuf,
}

/// `PUT /logger`. What is not given stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file (made if it is not there) or a fifo; standard error until it is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// File and line that a message comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only messages of this module and those below it, such as `mallee_vmm::devices`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// Firecracker's names and their usual spellings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum LogLevel {
    #[serde(alias = "OFF", alias = "off")]
    Off,
    #[serde(alias = "ERROR", alias = "error")]
    Error,
    #[serde(alias = "WARN", alias = "WARNING", alias = "Warn", alias = "warn", alias = "warning")]
    Warning,
    #[serde(alias = "INFO", alias = "info")]
    Info,
    #[serde(alias = "DEBUG", alias = "debug")]
    Debug,
    #[serde(alias = "TRACE", alias = "trace")]
    Trace,
}

/// The firmware tables' identity (SMBIOS). Our own: `PUT /mallee/identity`.
///
/// cloud-init takes the platform for EC2 when `uuid` and `serial` are equal and begin with `ec2`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Identity {
    pub uuid: String,
    pub serial: String,
}

/// The file given with `--config-file`: member names as in Firecracker's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmConfig {
    #[serde(default)]
    pub machine_config: MachineConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    #[serde(default)]
    pub drives: Vec<Drive>,
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
}

/// `PUT /actions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ActionRequest {
    pub action_type: Action,
}

/// What can be asked of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Action {
    InstanceStart,
    FlushMetrics,
    /// Keyboard's Ctrl-Alt-Del: the guest's init reboots, which ends the VMM with [`ExitReason::Reset`].
    SendCtrlAltDel,
    /// Our own: the ACPI power button, for an orderly power-off.
    PowerButton,
}

/// `GET /`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct InstanceInfo {
    pub id: String,
    /// `Not started`, `Running` or `Paused`.
    pub state: String,
    pub vmm_version: String,
    pub app_name: String,
}

/// `GET /version`. The member's name is Firecracker's; the version is ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Version {
    pub firecracker_version: String,
}

/// Body of every refusal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Fault {
    pub fault_message: String,
}

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
