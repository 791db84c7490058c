//! DHCP for the segments: fixed leases, known MACs only.
//!
//! * `decode.rs`: from a datagram to a message, trusting nothing of it.
//! * `lease.rs`: from a client's message and a segment to the answer; a pure function.
//! * `server.rs`: one socket per segment, bound to its bridge.
//!
//! [`Servers`] hands each segment's server the leases that it is to give.

mod decode;
mod lease;
mod server;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use tokio::sync::mpsc;

use crate::desired::{Interface, InterfaceId, LinkName, MacAddress, Network, Segment};
use crate::error::Result;
use crate::per_segment::PerSegment;

/// A segment and those who may have an address on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leases {
    pub segment: Segment,
    pub by_mac: BTreeMap<MacAddress, Interface>,
}

impl Leases {
    pub fn of(network: &Network, segment: &Segment) -> Self {
        let of_segment = network.interfaces_of(&segment.id);
        Leases {
            segment: segment.clone(),
            by_mac: of_segment.map(|interface| (interface.mac, interface.clone())).collect(),
        }
    }
}

/// A lease that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    pub interface: InterfaceId,
    pub instance: String,
    pub ipv4: Ipv4Addr,
}

/// The servers of all segments.
pub struct Servers {
    servers: PerSegment<Leases>,
    given: mpsc::UnboundedSender<Given>,
}

impl Servers {
    /// `given` hears of every lease.
    pub fn new(given: mpsc::UnboundedSender<Given>) -> Self {
        Self { servers: PerSegment::default(), given }
    }

    /// Makes the servers those of `network`. `index_of` tells a bridge's link index.
    pub fn apply(&mut self, network: &Network, index_of: impl Fn(&LinkName) -> Option<u32>) -> Result<()> {
        self.servers.apply(
            network,
            index_of,
            |segment| Leases::of(network, segment),
            |segment, bridge_index, leases| {
                Ok(server::serve(server::open(&segment.bridge)?, bridge_index, leases, self.given.clone()))
            },
        )
    }
}

/// What the server of a segment does with a datagram, but for sending the answer.
#[cfg(feature = "fuzzing")]
pub fn answer_to(datagram: &[u8], leases: &Leases) {
    use dhcproto::Encodable;

    let message = decode::decode(datagram);
    if let Some(answer) = message.as_ref().and_then(|message| lease::answer(message, leases)) {
        assert!(answer.message.to_vec().is_ok());
    }
}
