//! The nodes: what each is to be, what each is, and which takes the next instance.
//!
//! An agent keeps one stream open ([`session`]). Down it goes the node's *whole* desired state,
//! computed from the database ([`desired`]) whenever somebody woke the node ([`Nodes::wake`]); up it
//! comes what the node observes ([`observed`]), its spans and its consoles. A message lost, doubled
//! or late does no harm: every one of them is whole, and carries the generation that it was made from.
//!
//! In memory is only who is connected. Everything that has to outlive this process is in the
//! database: a handler changes it, gives the node's state its next number
//! ([`crate::state::nodes::touch`]) in the same transaction, and calls [`Nodes::wake`] after the commit.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use mallee_agent::api;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::DropGuard;

use crate::Cloud;

mod blobs;
mod clock_offset;
mod console;
mod desired;
mod facts;
mod observed;
mod registry;
pub mod schedule;
pub mod segments;
mod service;
mod session;

pub use console::ConsoleError;
pub use facts::{Facts, Kvm};
pub use registry::{add, give_credentials, list, remove};
pub use service::serve;

/// Who is connected.
#[derive(Default)]
pub struct Nodes {
    links: Mutex<HashMap<String, Link>>,
}

/// The stream of one connected node. The stream lives for as long as this is in the map: taken out of it or replaced, it ends.
struct Link {
    /// Tells the stream of now from one that a reconnect has replaced.
    session: u64,
    wake: Arc<Notify>,
    out: mpsc::Sender<api::ToAgent>,
    consoles: HashMap<u64, oneshot::Sender<api::ConsoleReply>>,
    heard_ns: i64,
    /// Of the newest network that the node says it has.
    network: watch::Sender<u64>,
    /// Ends the stream's tasks.
    _open: DropGuard,
}

/// A node as an operator sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeSummary {
    pub name: String,
    pub zone: String,
    /// Its agent's stream is open.
    pub connected: bool,
    /// `none`, `software` or `hardware`; `unknown` before it first attended.
    pub kvm: String,
    pub kvm_detail: String,
    pub cpus: u32,
    pub memory_mib: u64,
    pub uplink_address: String,
    pub version: String,
    /// Instances that are placed on it and not terminated.
    pub instances: u32,
    /// Nanoseconds since 1970; 0: never.
    pub last_seen_unix_ns: i64,
}

impl Nodes {
    fn links(&self) -> MutexGuard<'_, HashMap<String, Link>> {
        // A panic elsewhere cannot leave the map half changed: each change is one insert or remove.
        self.links.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Has the node's desired state computed and sent again; without effect while it is away, for
    /// it is sent the whole when it comes back.
    pub fn wake(&self, node: &str) {
        if let Some(link) = self.links().get(node) {
            link.wake.notify_one();
        }
    }

    /// Waits until the node says that it has the network of this generation, or goes away.
    pub async fn has_network(&self, node: &str, generation: i64) {
        let Some(mut network) = self.links().get(node).map(|link| link.network.subscribe()) else { return };
        // An error means that the stream has ended.
        let _ = network.wait_for(|has| *has >= generation.cast_unsigned()).await;
    }

    /// Ends the node's stream if it has one.
    pub fn cut(&self, node: &str) {
        self.links().remove(node);
    }

    /// The stream of that session has ended. False when another one has taken its place.
    fn leave(&self, node: &str, session: u64) -> bool {
        let mut links = self.links();
        let own = links.get(node).is_some_and(|link| link.session == session);
        if own {
            links.remove(node);
        }
        own
    }

    /// The node's agent has its stream open.
    pub fn connected(&self, node: &str) -> bool {
        self.links().contains_key(node)
    }
}

/// The newest bytes of an instance's console, asked of its node.
pub async fn console(
    cloud: &Cloud,
    node: &str,
    instance: &str,
    max_bytes: u32,
) -> std::result::Result<api::ConsoleReply, ConsoleError> {
    console::ask(cloud, node, instance, max_bytes).await
}
