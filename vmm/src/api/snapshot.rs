//! Snapshots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `PUT /snapshot/create`: saves a VM that is paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// The state file; one that is there is replaced.
    pub snapshot_path: PathBuf,
    /// The memory file. One that is there is replaced by a full snapshot, and changed in place by a differential one.
    pub mem_file_path: PathBuf,
}

/// What of the memory is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum SnapshotType {
    #[default]
    Full,
    /// What has changed since the last snapshot, or since the start or load; for VMs with `track_dirty_pages`.
    Diff,
}

/// `PUT /snapshot/load`, and the file given with `--restore-file`: a VM as it was saved, in a process that has none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// The state file.
    pub snapshot_path: PathBuf,
    /// The memory file, mapped privately. Either this or `mem_backend`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemBackend>,
    /// Whether differential snapshots can be made of the restored VM.
    #[serde(default, alias = "enable_diff_snapshots")]
    pub track_dirty_pages: bool,
    /// Whether it goes on at once; else it is paused.
    #[serde(default)]
    pub resume_vm: bool,
    /// Taps, and MAC addresses, in the place of those that the saved VM had.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Our own: files in the place of those that its drives had.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drive_overrides: Vec<DriveOverride>,
    /// Our own: where the serial port's output goes. Unset: where the saved VM's went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// Our own: the path of the virtio console. Unset: the saved VM's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console_path: Option<PathBuf>,
}

/// Where the memory of a restored VM comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    pub backend_type: MemBackendType,
    pub backend_path: PathBuf,
}

/// See [`MemBackend`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum MemBackendType {
    /// The memory file is mapped; its pages come as they are touched.
    File,
    /// A page server at a socket gives the pages (userfaultfd), in Firecracker's protocol.
    Uffd,
}

/// One interface of [`SnapshotLoad::network_overrides`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    pub iface_id: String,
    pub host_dev_name: String,
    /// Our own: the MAC address in the device's configuration space from now on; the guest is told that it has changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
}

/// See [`SnapshotLoad`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    pub uds_path: PathBuf,
}

/// See [`SnapshotLoad::drive_overrides`]. The file's content must be what the guest expects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    pub drive_id: String,
    pub path_on_host: PathBuf,
}
