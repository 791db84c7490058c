//! The machine and what it boots: vCPUs, memory, kernel, firmware identity.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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

/// How a kernel is entered. Our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// Linux's 64-bit boot protocol: in long mode, with a zero page.
    #[default]
    Linux,
    /// PVH: in 32-bit protected mode, with an `hvm_start_info`; for ELF kernels that name such an entry in a note.
    Pvh,
}

/// `PUT /boot-source`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    pub kernel_image_path: PathBuf,
    /// Our own: how the kernel is entered. Unset: `linux`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<BootProtocol>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
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
