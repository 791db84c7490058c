//! What a node said of itself when it last attended, as the database keeps it.

use std::collections::BTreeMap;

use mallee_agent::api;
use serde::{Deserialize, Serialize};

/// What a node's KVM can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kvm {
    /// No VM runs.
    None,
    /// Only images that say so run.
    Software,
    /// Unmodified kernels run.
    Hardware,
}

impl Kvm {
    pub fn as_str(self) -> &'static str {
        match self {
            Kvm::None => "none",
            Kvm::Software => "software",
            Kvm::Hardware => "hardware",
        }
    }

    /// An image runs here.
    pub fn runs(self, image_runs_on_software_kvm: bool) -> bool {
        match self {
            Kvm::None => false,
            Kvm::Software => image_runs_on_software_kvm,
            Kvm::Hardware => true,
        }
    }
}

/// The part of [`api::NodeFacts`] that outlives a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    pub cpus: u32,
    pub memory_mib: u64,
    pub disk_mib: u64,
    pub kvm: Kvm,
    pub kvm_detail: String,
    pub version: String,
    pub uplink_address: String,
    /// Where tunnels from other nodes end; empty when none can.
    #[serde(default)]
    pub underlay_address: String,
    pub boot_id: String,
    /// Name of a capability to why it is missing, empty when it is there.
    pub network: BTreeMap<String, String>,
}

impl From<api::NodeFacts> for Facts {
    fn from(said: api::NodeFacts) -> Facts {
        let kvm = match said.kvm() {
            api::KvmClass::Hardware => Kvm::Hardware,
            api::KvmClass::Software => Kvm::Software,
            api::KvmClass::None | api::KvmClass::Unspecified => Kvm::None,
        };
        Facts {
            cpus: said.cpus,
            memory_mib: said.memory_mib,
            disk_mib: said.disk_mib,
            kvm,
            kvm_detail: said.kvm_detail,
            version: said.version,
            uplink_address: said.uplink_address,
            underlay_address: said.underlay_address,
            boot_id: said.boot_id,
            network: said.network.into_iter().collect(),
        }
    }
}
