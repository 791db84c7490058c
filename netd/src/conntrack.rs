//! Conntrack: ending the flows that a change has made wrong, and no others.
//!
//! NAT decides on the first packet of a flow and conntrack remembers. So a changed map alone leaves
//! live flows on the instance that an elastic IP stood for before. What is wrong is decided from the
//! flow and the network as it now is, not from what was changed: a netd that was killed between the
//! transaction and this step finds the same flows wrong when it comes back.

use std::io;
use std::net::Ipv4Addr;

use crate::desired::Network;
use crate::dns;
use crate::error::{Error, Result};
use crate::netfilter::{NetfilterSocket, attribute, put};

// `include/uapi/linux/netfilter/nfnetlink_conntrack.h`
const GET: u16 = 1;
const DELETE: u16 = 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const TUPLE_IP: u16 = 1;
const IP_V4_SOURCE: u16 = 1;
const IP_V4_DESTINATION: u16 = 2;
/// `NLA_F_NESTED`
const NESTED: u16 = 1 << 15;

/// A flow's addresses: as its first packet had them, and as its answers have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Flow {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    reply_source: Ipv4Addr,
    reply_destination: Ipv4Addr,
}

/// What a network says of flows, in the form in which it is asked for each of them.
struct Judge<'a> {
    network: &'a Network,
    public_of: std::collections::BTreeMap<Ipv4Addr, Ipv4Addr>,
    instances: std::collections::BTreeSet<Ipv4Addr>,
}

impl<'a> Judge<'a> {
    fn new(network: &'a Network) -> Self {
        Self {
            network,
            public_of: network.elastic_ips.values().map(|e| (e.private, e.public)).collect(),
            instances: network.private_addresses(),
        }
    }

    /// True when the flow contradicts the network: it is translated otherwise than a new flow would
    /// be, or belongs to an instance that is gone.
    fn is_stale(&self, flow: &Flow) -> bool {
        self.is_inbound_stale(flow)
            || self.is_outbound_stale(flow)
            || self.is_of_nobody(flow.source)
            || self.is_of_nobody(flow.reply_source)
    }

    /// A flow to a public address must go to the instance that it now stands for.
    fn is_inbound_stale(&self, flow: &Flow) -> bool {
        let standing_for = self.network.elastic_ips.get(&flow.destination).map(|e| e.private);
        let is_public = standing_for.is_some() || self.network.in_pool(flow.destination);
        is_public && flow.reply_source != standing_for.unwrap_or(flow.destination)
    }

    /// A flow that leaves as a public address must be of the instance that now has it.
    fn is_outbound_stale(&self, flow: &Flow) -> bool {
        let translated = flow.reply_destination != flow.source;
        translated
            && self.network.in_pool(flow.reply_destination)
            && self.public_of.get(&flow.source) != Some(&flow.reply_destination)
    }

    /// An address of a segment that no instance has now.
    fn is_of_nobody(&self, address: Ipv4Addr) -> bool {
        !self.instances.contains(&address)
            && self.network.segments.values().any(|segment| {
                segment.network.contains(&address)
                    && address != segment.gateway
                    && Some(address) != dns::resolver_address(&segment.network, segment.gateway)
                    && address != segment.network.network()
                    && address != segment.network.broadcast()
            })
    }
}

/// Ends every flow that contradicts `network`; returns how many.
pub fn end_stale_flows(network: &Network) -> Result<usize> {
    let judge = Judge::new(network);
    let mut socket = NetfilterSocket::open().map_err(Error::netfilter("opening a netfilter socket"))?;
    let stale = socket
        .dump(message(GET), libc::AF_INET as u8, &[], |entry| {
            Ok(match read_flow(entry)? {
                Some(flow) if judge.is_stale(&flow) => Some((flow, identity(entry)?)),
                _ => None,
            })
        })
        .map_err(Error::netfilter("listing conntrack entries"))?;
    for (flow, identity) in &stale {
        match socket.request(message(DELETE), libc::AF_INET as u8, 0, identity) {
            Ok(()) => tracing::debug!(?flow, "ended a flow"),
            // It ended by itself, or another took its place.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(Error::netfilter(format!("ending the flow {flow:?}"))(error)),
        }
    }
    Ok(stale.len())
}

/// Asks the kernel whether conntrack is there; an error says what is missing.
pub fn probe() -> Result<()> {
    let mut socket = NetfilterSocket::open().map_err(Error::netfilter("opening a netfilter socket"))?;
    socket
        .dump(message(GET), libc::AF_INET as u8, &[], |_| Ok(None::<()>))
        .map_err(Error::netfilter("asking for conntrack"))?;
    Ok(())
}

fn message(kind: u16) -> u16 {
    (libc::NFNL_SUBSYS_CTNETLINK << 8) as u16 | kind
}

fn read_flow(entry: &[u8]) -> io::Result<Option<Flow>> {
    let addresses = |tuple| -> io::Result<Option<(Ipv4Addr, Ipv4Addr)>> {
        let ip = attribute(attribute(entry, tuple)?.unwrap_or_default(), TUPLE_IP)?.unwrap_or_default();
        let address = |kind| -> io::Result<Option<Ipv4Addr>> {
            let bytes = attribute(ip, kind)?.and_then(|value| <[u8; 4]>::try_from(value).ok());
            Ok(bytes.map(Ipv4Addr::from))
        };
        Ok(address(IP_V4_SOURCE)?.zip(address(IP_V4_DESTINATION)?))
    };
    Ok(addresses(TUPLE_ORIGINAL)?.zip(addresses(TUPLE_REPLY)?).map(
        |((source, destination), (reply_source, reply_destination))| Flow {
            source,
            destination,
            reply_source,
            reply_destination,
        },
    ))
}

/// The attributes that name this entry and no later one with the same addresses and ports.
fn identity(entry: &[u8]) -> io::Result<Vec<u8>> {
    let mut identity = Vec::new();
    for (kind, flags) in [(TUPLE_ORIGINAL, NESTED), (ZONE, 0), (ID, 0)] {
        if let Some(value) = attribute(entry, kind)? {
            put(&mut identity, kind | flags, value);
        }
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing;
    use proptest::prelude::*;

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    fn flow(source: &str, destination: &str, reply_source: &str, reply_destination: &str) -> Flow {
        Flow {
            source: ip(source),
            destination: ip(destination),
            reply_source: ip(reply_source),
            reply_destination: ip(reply_destination),
        }
    }

    /// 172.31.0.4 has 198.51.100.130; 172.31.0.5 has none; the pool is 198.51.100.128/25.
    fn stale(flow: Flow) -> bool {
        let network = testing::network();
        Judge::new(&network).is_stale(&flow)
    }

    #[test]
    fn a_flow_as_a_new_one_would_be_stays() {
        assert!(!stale(flow("203.0.113.1", "198.51.100.130", "172.31.0.4", "203.0.113.1")));
        assert!(!stale(flow("172.31.0.4", "203.0.113.1", "203.0.113.1", "198.51.100.130")));
        assert!(!stale(flow("172.31.0.5", "203.0.113.1", "203.0.113.1", "198.51.100.2")));
        assert!(!stale(flow("172.31.0.5", "172.31.0.4", "172.31.0.4", "172.31.0.5")));
        // To the resolver.
        assert!(!stale(flow("172.31.0.5", "172.31.0.2", "172.31.0.2", "172.31.0.5")));
    }

    #[test]
    fn a_flow_through_an_address_that_moved_goes() {
        assert!(stale(flow("203.0.113.1", "198.51.100.130", "172.31.0.5", "203.0.113.1")));
        assert!(stale(flow("172.31.0.5", "203.0.113.1", "203.0.113.1", "198.51.100.130")));
        assert!(stale(flow("172.31.0.4", "203.0.113.1", "203.0.113.1", "198.51.100.131")));
        // The address was on another node, and an instance here spoke to it there.
        assert!(stale(flow("172.31.0.5", "198.51.100.130", "198.51.100.130", "198.51.100.2")));
        // The address was here and is no longer.
        assert!(stale(flow("203.0.113.1", "198.51.100.140", "172.31.0.4", "203.0.113.1")));
    }

    #[test]
    fn a_flow_of_an_instance_that_is_gone_goes() {
        assert!(stale(flow("172.31.0.9", "203.0.113.1", "203.0.113.1", "198.51.100.2")));
        assert!(stale(flow("172.31.0.1", "172.31.0.9", "172.31.0.9", "172.31.0.1")));
    }

    proptest! {
        #[test]
        fn flows_of_other_networks_are_never_touched(a: [u8; 4], b: [u8; 4]) {
            let network = testing::network();
            let foreign = |ip: Ipv4Addr| {
                !network.in_pool(ip) && network.segments.values().all(|s| !s.network.contains(&ip))
            };
            let (a, b) = (Ipv4Addr::from(a), Ipv4Addr::from(b));
            prop_assume!(foreign(a) && foreign(b));
            let flow = Flow { source: a, destination: b, reply_source: b, reply_destination: a };
            prop_assert!(!Judge::new(&network).is_stale(&flow));
        }

        #[test]
        fn reading_any_entry_ends(entry: Vec<u8>) {
            let _ = read_flow(&entry);
            let _ = identity(&entry);
        }
    }
}
