//! The desired network of the node, in types that can be trusted.
//!
//! What arrives over gRPC is text. [`Network::parse`] turns the whole of it into the types below or
//! refuses the whole of it, naming the item that cannot be ([`InvalidNetwork`]). Nothing past this
//! module checks an address again, and nothing in this module looks at the kernel: what depends on
//! the node itself (the uplink's own network) is handed in.

mod check;
mod elastic;
mod groups;
mod numbers;
mod parse;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod testing;
mod trunk;
mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::api::{DNS_ADDRESS, METADATA_ADDRESS};
pub use elastic::{ElasticChange, parse_elastic_ips};
pub use groups::{Direction, GroupRule, MAX_GROUPS, Peer, SecurityGroup, Traffic};
pub use numbers::{InterfaceMark, VpcNumber};
use parse::is_host_of;
pub use trunk::{RemoteInterface, Surroundings, Trunk, TrunkLink, Underlay, UplinkAddresses, VlanId, Vni, Wire};
pub use types::{
    GroupId, GroupRuleId, InterfaceId, LinkName, MAX_LINK_NAME, MacAddress, PrefixListId, SegmentId, VpcId,
};

/// Why a desired network was refused: the item, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{item}: {problem}")]
pub struct InvalidNetwork {
    /// The item as the caller knows it, for example "interface eni-0123".
    pub item: String,
    /// What is wrong with it.
    pub problem: String,
}

impl InvalidNetwork {
    pub(crate) fn new(item: impl std::fmt::Display, problem: impl Into<String>) -> Self {
        Self { item: item.to_string(), problem: problem.into() }
    }
}

/// The whole network of one node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    pub generation: u64,
    pub segments: BTreeMap<SegmentId, Segment>,
    pub interfaces: BTreeMap<InterfaceId, Interface>,
    /// By public address.
    pub elastic_ips: BTreeMap<Ipv4Addr, ElasticIp>,
    pub public_pools: Vec<Ipv4Net>,
    pub security_groups: BTreeMap<GroupId, SecurityGroup>,
    /// Interfaces on other nodes.
    pub remotes: BTreeMap<InterfaceId, RemoteInterface>,
    /// What stands for each VPC in the kernel.
    pub vpcs: BTreeMap<VpcId, VpcNumber>,
    /// This node's own addresses on the public side.
    pub node_addresses: Vec<Ipv4Addr>,
}

/// A layer-2 segment: one subnet as seen from this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub id: SegmentId,
    pub vpc: VpcId,
    pub network: Ipv4Net,
    pub gateway: Ipv4Addr,
    pub gateway_mac: MacAddress,
    /// Bytes.
    pub mtu: u32,
    /// What guests are told instead of the segment's own resolver.
    pub dns_servers: Vec<Ipv4Addr>,
    pub ntp_servers: Vec<Ipv4Addr>,
    /// The VPC's networks.
    pub vpc_networks: Vec<Ipv4Net>,
    pub domain: Option<String>,
    /// The bridge that is the segment on this node.
    pub bridge: LinkName,
    /// How it reaches other nodes; none of a local segment.
    pub trunk: Option<Trunk>,
}

/// One network interface of one instance, behind one tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub id: InterfaceId,
    pub segment: SegmentId,
    pub mac: MacAddress,
    /// The primary address, which DHCP leases.
    pub ipv4: Ipv4Addr,
    pub secondary: Vec<Ipv4Addr>,
    pub hostname: Option<String>,
    pub owner_uid: u32,
    pub queue_pairs: u32,
    pub instance: String,
    pub source_check: bool,
    /// The security groups it is in, at most [`MAX_GROUPS`], none twice.
    pub groups: Vec<GroupId>,
    /// The tap that it is behind.
    pub tap: LinkName,
    /// What packets that are judged for it are marked with.
    pub mark: InterfaceMark,
}

/// A public address that stands for a private one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElasticIp {
    pub public: Ipv4Addr,
    pub private: Ipv4Addr,
    pub segment: SegmentId,
}

impl Segment {
    /// The addresses of the segment's gateway: its own, and those of the services that instances find there.
    pub fn gateway_addresses(&self) -> impl Iterator<Item = Ipv4Addr> + use<> {
        [Some(self.gateway), Some(METADATA_ADDRESS), Some(DNS_ADDRESS), self.resolver_address()].into_iter().flatten()
    }

    /// The resolver's address: the network's plus two, as in EC2 (VPC User Guide, "Amazon DNS server"). None where that is the gateway's, or no host's.
    pub fn resolver_address(&self) -> Option<Ipv4Addr> {
        let address = Ipv4Addr::from(u32::from(self.network.network()).checked_add(2)?);
        (is_host_of(&self.network, address) && address != self.gateway).then_some(address)
    }
}

impl Interface {
    /// Every address that it holds, the primary one first.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        std::iter::once(self.ipv4).chain(self.secondary.iter().copied())
    }
}

impl Network {
    /// The addresses of instances on a segment, with their interfaces.
    pub fn interfaces_of<'a>(&'a self, segment: &'a SegmentId) -> impl Iterator<Item = &'a Interface> + 'a {
        self.interfaces.values().filter(move |interface| interface.segment == *segment)
    }

    /// The bridge of an interface or elastic IP's segment. Parsing made sure that it is there.
    pub fn bridge_of(&self, segment: &SegmentId) -> &LinkName {
        &self.segments[segment].bridge
    }

    /// Whether an interface here has the address.
    pub fn is_held(&self, segment: &SegmentId, address: Ipv4Addr) -> bool {
        self.interfaces_of(segment).any(|interface| interface.addresses().any(|held| held == address))
    }

    /// What an elastic IP stands for, with its VPC.
    pub fn place_of(&self, elastic: &ElasticIp) -> (VpcNumber, Ipv4Addr) {
        (self.vpc_number(&elastic.segment), elastic.private)
    }

    /// An address on a segment's bridge, with its VPC.
    pub fn place_on(&self, bridge: &LinkName, address: Ipv4Addr) -> Option<(VpcNumber, Ipv4Addr)> {
        let segment = self.segments.values().find(|segment| segment.bridge == *bridge)?;
        Some((self.vpc_number(&segment.id), address))
    }

    /// The private addresses that instances hold, here and on other nodes, each with its VPC.
    pub fn private_addresses(&self) -> BTreeSet<(VpcNumber, Ipv4Addr)> {
        self.holders().map(|(segment, ipv4, _)| (self.vpc_number(segment), ipv4)).collect()
    }

    /// Every private address that an instance holds, here or on another node, with its segment and the MAC that it is at.
    pub fn holders(&self) -> impl Iterator<Item = (&SegmentId, Ipv4Addr, MacAddress)> {
        let here = self.interfaces.values().flat_map(|one| one.addresses().map(move |ip| (&one.segment, ip, one.mac)));
        let there = self.remotes.values().flat_map(|one| one.addresses().map(move |ip| (&one.segment, ip, one.mac)));
        here.chain(there)
    }

    /// True when `address` is in one of the pools for elastic IPs.
    pub fn in_pool(&self, address: Ipv4Addr) -> bool {
        self.public_pools.iter().any(|pool| pool.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resolver_is_behind_the_gateway() {
        let network = testing::network();
        let mut segment = network.segments.values().next().unwrap().clone();
        assert_eq!(segment.resolver_address(), Some(Ipv4Addr::new(172, 31, 0, 2)));
        segment.gateway = Ipv4Addr::new(172, 31, 0, 2);
        assert_eq!(segment.resolver_address(), None);
    }
}
