//! What other parts may use of the VMM: the JSON of its REST interface and configuration file, the
//! events it writes, and the few numbers that a guest of ours has to know.
//!
//! Paths, member names and meaning are Firecracker's for the part that is served, so that tools
//! written for Firecracker drive this monitor. Members of our own are marked so. Unknown members are
//! refused. Nothing here touches KVM.

use serde::{Deserialize, Serialize};

pub mod client;
mod control;
mod devices;
mod drive;
mod events;
pub mod guest;
pub mod jail;
mod limits;
mod machine;
mod network;
mod observe;
mod snapshot;

pub use control::*;
pub use devices::*;
pub use drive::*;
pub use events::*;
pub use limits::*;
pub use machine::*;
pub use network::*;
pub use observe::*;
pub use snapshot::*;

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
    pub vsock: Option<Vsock>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// Our own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
}
