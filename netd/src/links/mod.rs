//! Links, addresses, routes and neighbours, through rtnetlink.
//!
//! * `observed.rs`: what the kernel has, read back.
//! * `known.rs`, `monitor.rs`: what was read is what there is for as long as the kernel tells of nothing else.
//! * `plan.rs`: from desired and observed to the list of steps between them; a pure function.
//! * `perform.rs`, `requests.rs`: does the steps, many requests at a time.
//! * `tap.rs`: makes a persistent tap, which rtnetlink cannot.
//! * `trunk.rs`: makes a trunk port, and tells a VXLAN which node a MAC is on.
//! * `vpcs.rs`: the routing tables of VPCs.
//! * `ground.rs`: the node's own interfaces: uplink, trunk, underlay.
//!
//! What is netd's is told by the link's *group* ([`GROUP`]), which is set in the same request that
//! makes the link, so that no crash leaves a link without its mark; routes, routing rules and proxy neighbours
//! carry netd's *protocol* ([`PROTOCOL`]). Nothing else is ever changed or removed.

mod ground;
mod known;
mod monitor;
mod observed;
mod perform;
mod plan;
mod requests;
mod tap;
mod trunk;
mod vpcs;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::TryStreamExt;
use netlink_packet_route::route::RouteProtocol;
use rtnetlink::Handle;

use crate::desired::LinkName;
use crate::error::{Error, Result};

pub use ground::{Kernel, NodeLinks, Site, Uplink};
pub use known::Known;
#[cfg(test)]
pub use observed::Traffic;
pub use observed::{Link, LinkKind, Observed, PortOf};
pub use plan::{Ground, Plan, Step, check_names, plan, plan_elastic_ips};
pub use tap::{TapOptions, create as create_tap, open as open_tap};

/// The link group of netd's bridges and taps: "mall" in ASCII.
pub const GROUP: u32 = u32::from_be_bytes(*b"mall");

/// The routing protocol number of netd's routes and proxy neighbours; none is registered there
/// (`include/uapi/linux/rtnetlink.h`, `RTPROT_*`).
pub const PROTOCOL: RouteProtocol = RouteProtocol::Other(109);

/// The UDP port of VXLAN (RFC 7348, section 5); Linux's own default is an older one.
pub const VXLAN_PORT: u16 = 4789;

/// A connection to the kernel's rtnetlink, in the network namespace of the thread that made it. It
/// costs a socket, so each piece of work opens its own, and none inherits another's broken one.
#[derive(Clone)]
pub struct Links {
    handle: Handle,
    /// Of links that this piece of work has come across: several steps speak of one link.
    indexes: Arc<Mutex<BTreeMap<LinkName, u32>>>,
}

impl Links {
    /// Connects; needs a running tokio, which drives the connection.
    pub fn connect() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::io("opening an rtnetlink socket"))?;
        tokio::spawn(connection);
        Ok(Self { handle, indexes: Arc::default() })
    }

    /// The raw handle, for the one-shot commands of `outside.rs`.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    fn indexes(&self) -> MutexGuard<'_, BTreeMap<LinkName, u32>> {
        // A map of numbers is whole whatever happened to the thread that last held it.
        self.indexes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index of the link called `name`, if there is one.
    pub async fn index_of(&self, name: &LinkName) -> Result<Option<u32>> {
        let mut found = self.handle.link().get().match_name(name.to_string()).execute();
        match found.try_next().await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) if is_errno(&error, libc::ENODEV) => Ok(None),
            Err(error) => Err(Error::link(format!("looking for {name}"))(error)),
        }
    }
}

/// True when the kernel answered a request with this error number.
pub(crate) fn is_errno(error: &rtnetlink::Error, number: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -number)
}
