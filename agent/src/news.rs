//! News of instances from those who serve them.
//!
//! netd and the metadata service see a guest come up before its VMM can tell of it. They know an instance by its id and no more; what becomes of the
//! news is its own task's to say (`instance/task/report.rs`).

use tokio::sync::mpsc;

use crate::ids::InstanceId;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// The guest took its DHCP lease.
    Leased { unix_ns: u64 },
    /// The guest asked for metadata.
    FetchedMetadata { unix_ns: u64 },
}

/// To the node, which passes them on to the instance's task.
pub type Sender = mpsc::Sender<(InstanceId, News)>;
