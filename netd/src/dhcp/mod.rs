//! DHCP for the segments: fixed leases, known MACs only.
//!
//! * `decode.rs`: from a datagram to a message, trusting nothing of it.
//! * `lease.rs`: from a client's message and a segment to the answer; a pure function.
//! * `server.rs`: one socket per segment, bound to its bridge.
//!
//! [`Servers`] keeps one server per segment and hands each the leases it is to give. A server ends
//! with its segment; when a bridge was made anew, so is its server, since a socket is bound to the
//! link and not to the name.

mod decode;
mod lease;
mod server;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::desired::{Interface, InterfaceId, LinkName, MacAddress, Network, Segment, SegmentId};
use crate::error::Result;

/// A segment and those who may have an address on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leases {
    pub segment: Segment,
    pub by_mac: BTreeMap<MacAddress, Interface>,
}

/// A lease that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    pub interface: InterfaceId,
    pub instance: String,
    pub ipv4: Ipv4Addr,
}

struct Server {
    bridge_index: u32,
    leases: watch::Sender<Arc<Leases>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The servers of all segments.
pub struct Servers {
    servers: BTreeMap<SegmentId, Server>,
    given: mpsc::UnboundedSender<Given>,
}

impl Servers {
    /// `given` hears of every lease.
    pub fn new(given: mpsc::UnboundedSender<Given>) -> Self {
        Self { servers: BTreeMap::new(), given }
    }

    /// Makes the servers those of `network`. `index_of` tells a bridge's link index.
    pub fn apply(&mut self, network: &Network, index_of: impl Fn(&LinkName) -> Option<u32>) -> Result<()> {
        self.servers.retain(|id, server| {
            let bridge = network.segments.get(id).map(|segment| &segment.bridge);
            bridge.and_then(&index_of) == Some(server.bridge_index) && !server.task.is_finished()
        });
        for segment in network.segments.values() {
            let by_mac =
                network.interfaces_of(&segment.id).map(|interface| (interface.mac, interface.clone())).collect();
            let leases = Arc::new(Leases { segment: segment.clone(), by_mac });
            match self.servers.get(&segment.id) {
                Some(server) => {
                    server.leases.send_replace(leases);
                }
                None => {
                    if let Some(bridge_index) = index_of(&segment.bridge) {
                        self.start(bridge_index, leases)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn start(&mut self, bridge_index: u32, leases: Arc<Leases>) -> Result<()> {
        let id = leases.segment.id.clone();
        let socket = server::open(&leases.segment.bridge)?;
        let (leases, watched) = watch::channel(leases);
        let task = tokio::spawn(server::serve(socket, bridge_index, watched, self.given.clone()));
        self.servers.insert(id, Server { bridge_index, leases, task });
        Ok(())
    }
}
