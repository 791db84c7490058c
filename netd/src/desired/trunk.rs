//! Segments that reach beyond this node: over a VLAN on the trunk interface, or over a VXLAN.
//!
//! Both are the same to the rest of netd: a *trunk port* on the segment's bridge, and the *remote* interfaces that are
//! behind it. Only how the port is made differs ([`Wire`]), and that a VXLAN must be told on which node each remote is.
//! What the node can carry depends on its kernel and its interfaces, which are looked at elsewhere and handed in
//! ([`Surroundings`]): a segment that cannot be carried is refused here with the reason found there.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;

use super::parse::{field, fields, is_host_of, link_name};
use super::{InterfaceId, InvalidNetwork, LinkName, MacAddress, Network, Segment, SegmentId};
use crate::api::{self, VXLAN_OVERHEAD, segment::Kind};

/// What parsing must know of the node itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surroundings {
    pub uplink: UplinkAddresses,
    /// What carries VLAN segments, or why nothing does.
    pub trunk: Result<TrunkLink, String>,
    /// What carries VXLAN segments, or why nothing does.
    pub underlay: Result<Underlay, String>,
}

/// The public side's interface and its own addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UplinkAddresses {
    pub name: String,
    /// The interface's IPv4 addresses with their networks.
    pub addresses: Vec<ipnet::Ipv4Net>,
}

/// The interface whose other end is a switch's trunk port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrunkLink {
    pub name: LinkName,
    /// Bytes.
    pub mtu: u32,
}

/// Where this node's tunnels end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    pub address: Ipv4Addr,
    /// Bytes, of the interface that has the address.
    pub mtu: u32,
}

impl Default for Surroundings {
    /// A node of which nothing is known yet.
    fn default() -> Self {
        let unknown = || "the node's interfaces have not been looked at yet".to_owned();
        Self { uplink: UplinkAddresses::default(), trunk: Err(unknown()), underlay: Err(unknown()) }
    }
}

/// A VLAN's number, 1 to 4094: 0 is no VLAN and 4095 is reserved (IEEE 802.1Q-2018, table 9-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VlanId(u16);

impl VlanId {
    pub fn new(number: u32) -> Option<Self> {
        (1..=4094).contains(&number).then_some(Self(number as u16))
    }

    pub fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A VXLAN network identifier: 24 bits (RFC 7348, section 5). 0 is left out, which many switches do not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vni(u32);

impl Vni {
    pub fn new(number: u32) -> Option<Self> {
        (1..1 << 24).contains(&number).then_some(Self(number))
    }

    pub fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a trunk port is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// Tagged frames on the trunk interface.
    Vlan { vid: VlanId },
    /// A tunnel from this address.
    Vxlan { vni: Vni, local: Ipv4Addr },
}

/// How a segment reaches other nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trunk {
    /// The port on the segment's bridge.
    pub port: LinkName,
    pub wire: Wire,
    /// Underlay addresses of the other nodes with this segment; none on a VLAN, where the switch knows.
    pub peers: BTreeSet<Ipv4Addr>,
    /// MAC of this node's gateway on the wire.
    pub router: MacAddress,
    /// MACs of the other nodes' gateways on the wire.
    pub peer_routers: BTreeSet<MacAddress>,
}

/// An interface of an instance on another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteInterface {
    pub id: InterfaceId,
    pub segment: SegmentId,
    pub mac: MacAddress,
    pub ipv4: Ipv4Addr,
    pub secondary: Vec<Ipv4Addr>,
    /// Underlay address of its node. Checked to be there on a VXLAN segment.
    pub node: Option<Ipv4Addr>,
    pub source_check: bool,
}

impl RemoteInterface {
    /// Every address that it holds.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        std::iter::once(self.ipv4).chain(self.secondary.iter().copied())
    }
}

/// A segment's trunk, and the largest MTU that it carries.
pub(super) struct Carried {
    pub trunk: Option<Trunk>,
    pub default_mtu: u32,
    pub largest_mtu: u32,
}

/// MTU of a segment that names none, where the wire does not ask for less (IEEE 802.3).
const DEFAULT_MTU: u32 = 1500;

pub(super) fn parse_kind(message: &api::Segment, around: &Surroundings) -> Result<Carried, InvalidNetwork> {
    let item = format!("segment {}", message.id);
    let refused = |problem: String| InvalidNetwork::new(&item, problem);
    let trunk = |wire, peers| {
        let gateway: MacAddress = field(&item, "gateway_mac", &message.gateway_mac)?;
        let peer_routers: Vec<MacAddress> = fields(&item, "peer_router_macs", &message.peer_router_macs)?;
        let (router, peer_routers) = match message.router_mac.as_str() {
            "" => (gateway, vec![gateway]),
            own => (field(&item, "router_mac", own)?, peer_routers),
        };
        Ok(Some(Trunk {
            port: link_name(&item, &api::trunk_port_name(&message.id))?,
            wire,
            peers,
            router,
            peer_routers: peer_routers.into_iter().collect(),
        }))
    };
    match &message.kind {
        Some(Kind::Local(_)) => Ok(Carried { trunk: None, default_mtu: DEFAULT_MTU, largest_mtu: u32::MAX }),
        Some(Kind::Vlan(vlan)) => {
            let vid =
                VlanId::new(vlan.vid).ok_or_else(|| refused(format!("VID {} is not one of 1 to 4094", vlan.vid)))?;
            let link = around.trunk.as_ref().map_err(|missing| refused(format!("kind vlan (VID {vid}): {missing}")))?;
            let trunk = trunk(Wire::Vlan { vid }, BTreeSet::new())?;
            Ok(Carried { trunk, default_mtu: link.mtu.min(DEFAULT_MTU), largest_mtu: link.mtu })
        }
        Some(Kind::Vxlan(vxlan)) => {
            let vni =
                Vni::new(vxlan.vni).ok_or_else(|| refused(format!("VNI {} is not one of 1 to 16777215", vxlan.vni)))?;
            let underlay =
                around.underlay.as_ref().map_err(|missing| refused(format!("kind vxlan (VNI {vni}): {missing}")))?;
            let peers = parse_peers(&item, &vxlan.peers, underlay)?;
            let trunk = trunk(Wire::Vxlan { vni, local: underlay.address }, peers)?;
            let largest_mtu = underlay.mtu.saturating_sub(VXLAN_OVERHEAD);
            let default_mtu = largest_mtu.min(DEFAULT_MTU - VXLAN_OVERHEAD);
            Ok(Carried { trunk, default_mtu, largest_mtu })
        }
        None => Err(refused("has no kind; give local, vlan or vxlan".into())),
    }
}

fn parse_peers(item: &str, texts: &[String], underlay: &Underlay) -> Result<BTreeSet<Ipv4Addr>, InvalidNetwork> {
    let peers: Vec<Ipv4Addr> = fields(item, "peers", texts)?;
    for peer in &peers {
        let problem = match peer {
            _ if *peer == underlay.address => "is this node itself",
            _ if peer.is_unspecified() || peer.is_loopback() => "is no other node's",
            _ if peer.is_multicast() || peer.is_broadcast() => "is a group's; each peer is named by its own address",
            _ => continue,
        };
        return Err(InvalidNetwork::new(item, format!("peer {peer} {problem}")));
    }
    Ok(peers.into_iter().collect())
}

pub(super) fn parse_remote(message: &api::RemoteInterface) -> Result<RemoteInterface, InvalidNetwork> {
    let item = format!("remote interface {}", message.id);
    Ok(RemoteInterface {
        id: field(&item, "id", &message.id)?,
        segment: field(&item, "segment", &message.segment)?,
        mac: field(&item, "mac", &message.mac)?,
        ipv4: field(&item, "ipv4", &message.ipv4)?,
        secondary: fields(&item, "secondary_ipv4", &message.secondary_ipv4)?,
        node: match message.node.as_str() {
            "" => None,
            node => Some(field(&item, "node", node)?),
        },
        source_check: !message.source_dest_check_off,
    })
}

impl Network {
    /// The segments that reach other nodes, with how.
    pub fn trunks(&self) -> impl Iterator<Item = (&Segment, &Trunk)> {
        self.segments.values().filter_map(|segment| Some((segment, segment.trunk.as_ref()?)))
    }

    /// The interfaces behind a segment's trunk port.
    pub fn remotes_of<'a>(&'a self, segment: &'a SegmentId) -> impl Iterator<Item = &'a RemoteInterface> + 'a {
        self.remotes.values().filter(move |remote| remote.segment == *segment)
    }

    pub(super) fn check_remote(&self, remote: &RemoteInterface) -> Result<(), InvalidNetwork> {
        let refused = |problem| Err(InvalidNetwork::new(format!("remote interface {}", remote.id), problem));
        let Some(segment) = self.segments.get(&remote.segment) else {
            return refused(format!("its segment {} is not in this network", remote.segment));
        };
        let Some(trunk) = &segment.trunk else {
            return refused(format!("{} is a local segment, which no other node has", segment.id));
        };
        if self.interfaces.contains_key(&remote.id) {
            return refused("is an interface of this node too".into());
        }
        let resolver = segment.resolver_address();
        let services = [Some(segment.gateway), resolver];
        let is_bad = |ip: &Ipv4Addr| !is_host_of(&segment.network, *ip) || services.contains(&Some(*ip));
        if let Some(bad) = remote.addresses().find(is_bad) {
            return refused(format!("address {bad} cannot be an instance's on {}", segment.id));
        }
        if remote.mac == segment.gateway_mac {
            return refused(format!("MAC {} is the gateway's of {}", remote.mac, segment.id));
        }
        if trunk.peer_routers.contains(&remote.mac) || trunk.router == remote.mac {
            return refused(format!("MAC {} is a node's on {}", remote.mac, segment.id));
        }
        match (trunk.wire, remote.node) {
            (Wire::Vlan { .. }, _) => Ok(()),
            (Wire::Vxlan { .. }, Some(node)) if trunk.peers.contains(&node) => Ok(()),
            (Wire::Vxlan { .. }, Some(node)) => refused(format!("its node {node} is no peer of {}", segment.id)),
            (Wire::Vxlan { .. }, None) => refused(format!("names no node, which {} (VXLAN) needs", segment.id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing::{self, surroundings};
    use proptest::prelude::*;

    fn refusal(change: impl FnOnce(&mut api::NodeNetwork)) -> String {
        let mut message = testing::trunk_message();
        change(&mut message);
        Network::parse(&message, &surroundings()).expect_err("it should be refused").to_string()
    }

    fn vxlan(network: &mut api::NodeNetwork) -> &mut api::VxlanSegment {
        match &mut network.segments[1].kind {
            Some(Kind::Vxlan(vxlan)) => vxlan,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_carried_is_taken_and_a_tunnels_mtu_is_lowered() {
        let network = Network::parse(&testing::trunk_message(), &surroundings()).unwrap();
        let mtus: Vec<u32> = network.segments.values().map(|segment| segment.mtu).collect();
        assert_eq!(mtus, [1500, 1450]);
        let ports: Vec<String> = network.trunks().map(|(_, trunk)| trunk.port.to_string()).collect();
        assert_eq!(ports, ["tksubnet1", "tksubnet2"]);
        assert_eq!(network.remotes.len(), 2);
    }

    #[test]
    fn each_refusal_names_its_item_and_the_number() {
        let vid = |vid| move |n: &mut api::NodeNetwork| n.segments[0].kind = Some(Kind::Vlan(api::VlanSegment { vid }));
        let cases = [
            ("segment subnet-1", "VID 0", refusal(vid(0))),
            ("segment subnet-1", "VID 4095", refusal(vid(4095))),
            ("segment subnet-1", "VID 4097", refusal(vid(4097))),
            (
                "segment subnet-3",
                "VID 7",
                refusal(|n| {
                    let mut third = n.segments[0].clone();
                    third.id = "subnet-3".into();
                    (third.cidr, third.gateway) = ("10.3.0.0/24".into(), "10.3.0.1".into());
                    n.segments.push(third);
                }),
            ),
            ("segment subnet-2", "VNI 0", refusal(|n| vxlan(n).vni = 0)),
            ("segment subnet-2", "VNI 16777216", refusal(|n| vxlan(n).vni = 1 << 24)),
            ("segment subnet-2", "10.9.0.1", refusal(|n| vxlan(n).peers.push("10.9.0.1".into()))),
            ("segment subnet-2", "239.1.1.1", refusal(|n| vxlan(n).peers.push("239.1.1.1".into()))),
            ("segment subnet-2", "mtu 1500", refusal(|n| n.segments[1].mtu = 1500)),
            ("segment subnet-2", "overlaps", refusal(|n| n.segments[1].cidr = "172.31.0.0/19".into())),
            ("remote interface eni-91", "subnet-9", refusal(|n| n.remotes[0].segment = "subnet-9".into())),
            (
                "remote interface eni-91",
                "02:00:00:00:01:01",
                refusal(|n| n.remotes[0].mac = "02:00:00:00:01:01".into()),
            ),
            ("remote interface eni-91", "172.31.0.4", refusal(|n| n.remotes[0].ipv4 = "172.31.0.4".into())),
            ("remote interface eni-91", "172.31.0.1", refusal(|n| n.remotes[0].ipv4 = "172.31.0.1".into())),
            (
                "remote interface eni-91",
                "172.31.0.4",
                refusal(|n| n.remotes[0].secondary_ipv4 = vec!["172.31.0.4".into()]),
            ),
            (
                "remote interface eni-91",
                "172.31.0.1",
                refusal(|n| n.remotes[0].secondary_ipv4 = vec!["172.31.0.1".into()]),
            ),
            ("remote interface eni-91", "gateway", refusal(|n| n.remotes[0].mac = "02:00:00:00:00:01".into())),
            ("remote interface eni-1", "this node too", refusal(|n| n.remotes[0].id = "eni-1".into())),
            ("remote interface eni-92", "10.9.0.7", refusal(|n| n.remotes[1].node = "10.9.0.7".into())),
            ("remote interface eni-92", "no node", refusal(|n| n.remotes[1].node.clear())),
            (
                "remote interface eni-91",
                "local",
                refusal(|n| n.segments[0].kind = Some(Kind::Local(api::LocalSegment {}))),
            ),
        ];
        for (item, what, message) in cases {
            assert!(message.starts_with(item) && message.contains(what), "`{message}` does not name {item} and {what}");
        }
    }

    #[test]
    fn what_the_node_lacks_is_told_as_the_reason() {
        let missing = || Err("this kernel has no 802.1Q (CONFIG_VLAN_8021Q)".to_owned());
        let around = Surroundings { trunk: missing(), ..surroundings() };
        let error = Network::parse(&testing::trunk_message(), &around).unwrap_err().to_string();
        assert!(error.starts_with("segment subnet-1") && error.contains("CONFIG_VLAN_8021Q"), "{error}");
    }

    proptest! {
        /// Whatever numbers and texts arrive, parsing ends, and what it takes keeps its promises.
        #[test]
        fn nothing_bad_gets_through(
            vid in 0_u32..5000,
            vni: u32,
            peer in "(10\\.9\\.0\\.[0-9]{1,3}|.{0,12})",
            ipv4 in "172\\.31\\.0\\.[0-9]{1,3}",
            mac in "02:00:00:00:0[01]:0[0-9]",
        ) {
            let mut message = testing::trunk_message();
            message.segments[0].kind = Some(Kind::Vlan(api::VlanSegment { vid }));
            vxlan(&mut message).vni = vni;
            vxlan(&mut message).peers.push(peer);
            (message.remotes[0].ipv4, message.remotes[0].mac) = (ipv4, mac);
            if let Ok(network) = Network::parse(&message, &surroundings()) {
                prop_assert!((1..=4094).contains(&vid) && (1..1 << 24).contains(&vni));
                let remote = &network.remotes[&"eni-91".parse().unwrap()];
                for interface in network.interfaces.values() {
                    prop_assert!(interface.mac != remote.mac && interface.ipv4 != remote.ipv4);
                }
                prop_assert_ne!(remote.ipv4, network.segments[&remote.segment].gateway);
            }
        }
    }
}
