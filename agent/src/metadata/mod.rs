//! The instance metadata service on 169.254.169.254.
//!
//! netd gives the address to every segment's gateway; the agent listens on it, once per segment and
//! bound to that segment's bridge, so that the caller is known by where the request came in and its
//! source address, which anti-spoofing on the taps keeps true. [`tree`] is what is told, [`token`]
//! the session tokens of IMDSv2, [`server`] the protocol.
//!
//! What is told follows desired state at once: it is read anew for each request.

mod answer;
pub mod server;
mod token;
mod tree;

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;

pub use token::Tokens;

use crate::api::{self, DesiredNode};
use crate::ids::InstanceId;

/// What one instance is told about.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub instance: InstanceId,
    pub metadata: api::Metadata,
    pub region: String,
    /// `eni-…`.
    pub interface: String,
    /// Seconds since 1970; EC2's `pendingTime`.
    pub created_unix_s: u64,
}

/// Who sits at which address of which segment.
#[derive(Debug)]
pub struct Directory {
    entries: RwLock<HashMap<(String, Ipv4Addr), Arc<Entry>>>,
    segments: watch::Sender<Vec<String>>,
}

impl Default for Directory {
    fn default() -> Self {
        Self { entries: RwLock::default(), segments: watch::Sender::new(Vec::new()) }
    }
}

impl Directory {
    /// Replaces everything by what `desired` says; `created` knows when an instance was first seen.
    pub fn update(&self, desired: &DesiredNode, created: impl Fn(&InstanceId) -> u64) {
        let network = desired.network.clone().unwrap_or_default();
        let mut entries = HashMap::new();
        for instance in &desired.instances {
            let Some(interface) = network.interfaces.iter().find(|interface| interface.id == instance.interface) else {
                continue;
            };
            let Ok(id) = instance.id.parse::<InstanceId>() else { continue };
            let entry = Arc::new(Entry {
                created_unix_s: created(&id),
                instance: id,
                metadata: instance.metadata.clone().unwrap_or_default(),
                region: desired.region.clone(),
                interface: interface.id.clone(),
            });
            let addresses = std::iter::once(&interface.ipv4).chain(&interface.secondary_ipv4);
            for address in addresses.filter_map(|address| address.parse().ok()) {
                entries.insert((interface.segment.clone(), address), entry.clone());
            }
        }
        *self.entries.write().unwrap_or_else(PoisonError::into_inner) = entries;
        let segments: Vec<String> = network.segments.into_iter().map(|segment| segment.id).collect();
        self.segments.send_if_modified(|old| {
            let differs = *old != segments;
            *old = segments;
            differs
        });
    }

    pub fn find(&self, segment: &str, address: Ipv4Addr) -> Option<Arc<Entry>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.get(&(segment.to_owned(), address)).cloned()
    }

    pub fn segments(&self) -> watch::Receiver<Vec<String>> {
        self.segments.subscribe()
    }
}
