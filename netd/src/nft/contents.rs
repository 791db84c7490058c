//! What the sets and maps hold for a given desired network.
//!
//! Elements of a set that a table does not have (security groups' where the bridge cannot judge by them) are never asked for.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use nftnl::ProtoFamily;

use super::layout::{Elements, NO_ELEMENTS, Name, Set, Table};
use super::rules;
use crate::desired::{Direction, ElasticIp, Interface, LinkName, MacAddress, Network, Segment, VpcNumber};

/// The elements of every set and map, by family and name.
#[derive(Debug)]
pub struct Contents {
    sets: BTreeMap<(u16, Name), Elements>,
}

impl Contents {
    pub fn of(network: &Network) -> Self {
        let mut contents = Self::of_elastic_ips(network, network.elastic_ips.values());
        contents.add_segments(network);
        for (vpc, held) in network.private_addresses() {
            contents.put_bridge(&rules::HELD, place(vpc, held));
        }
        for interface in network.interfaces.values() {
            contents.add_interface(network, interface);
            contents.add_groups_of(interface);
            contents.add_limits_of(interface);
        }
        contents.add_members(network);
        contents.add_vpcs(network);
        contents.add_trunks(network);
        contents.add_crossings(network);
        contents
    }

    /// Those of these elastic IPs alone.
    pub fn of_elastic_ips<'a>(network: &Network, elastic_ips: impl Iterator<Item = &'a ElasticIp>) -> Self {
        let mut contents = Self { sets: BTreeMap::new() };
        contents.add_elastic_ips(network, elastic_ips);
        contents
    }

    /// The elements that `set` is to hold.
    pub fn of_set(&self, table: &Table, set: &Set) -> &Elements {
        self.sets.get(&(table.family as u16, set.name.clone())).unwrap_or(&NO_ELEMENTS)
    }

    /// Takes the elements of `gone` out and puts those of `new` in.
    pub fn replace(&mut self, gone: Self, new: Self) {
        for (set, elements) in gone.sets {
            let held = self.sets.entry(set).or_default();
            elements.keys().for_each(|key| drop(held.remove(key)));
        }
        for (set, elements) in new.sets {
            self.sets.entry(set).or_default().extend(elements);
        }
    }

    pub(super) fn put(&mut self, family: ProtoFamily, set: &Set, key: Vec<u8>, value: Vec<u8>) {
        debug_assert_eq!(key.len() as u32, set.key_length(), "{}", set.name);
        self.sets.entry((family as u16, set.name.clone())).or_default().insert(key, value);
    }

    /// For a set that both tables have.
    pub(super) fn put_both(&mut self, set: &Set, key: Vec<u8>, value: Vec<u8>) {
        self.put(ProtoFamily::Ipv4, set, key.clone(), value.clone());
        self.put(ProtoFamily::Bridge, set, key, value);
    }

    pub(super) fn put_ip(&mut self, set: &Set, key: Vec<u8>) {
        self.put(ProtoFamily::Ipv4, set, key, Vec::new());
    }

    pub(super) fn put_bridge(&mut self, set: &Set, key: Vec<u8>) {
        self.put(ProtoFamily::Bridge, set, key, Vec::new());
    }

    /// What comes by the port goes through the chain.
    pub(super) fn put_sender(&mut self, port: &LinkName, chain: &str) {
        self.put(ProtoFamily::Bridge, &rules::SENDERS, port.padded().to_vec(), chain.as_bytes().to_vec());
    }

    fn add_elastic_ips<'a>(&mut self, network: &Network, elastic_ips: impl Iterator<Item = &'a ElasticIp>) {
        for elastic in elastic_ips {
            let public = address(elastic.public);
            let vpc = network.vpc_number(&elastic.segment);
            let private = place(vpc, elastic.private);
            self.put_both(&rules::EIP_IN, public.clone(), private.clone());
            self.put_both(&rules::EIP_OUT, private, public.clone());
            for family in [ProtoFamily::Ipv4, ProtoFamily::NetDev] {
                self.put(family, &rules::EIP_VPC, public.clone(), number(vpc.get()));
                self.put(family, &rules::EIP_OUT_COUNT, public.clone(), Vec::new());
            }
        }
    }

    fn add_segments(&mut self, network: &Network) {
        for segment in network.segments.values() {
            let bridge = segment.bridge.padded().to_vec();
            let vpc = network.segments.values().filter(|other| other.vpc == segment.vpc);
            for other in vpc {
                self.put_ip(&rules::ROUTED, [bridge.as_slice(), &other.bridge.padded()].concat());
            }
            for own in segment.gateway_addresses() {
                self.put_ip(&rules::GATEWAYS, place(network.vpc_number(&segment.id), own));
            }
        }
    }

    fn add_interface(&mut self, network: &Network, interface: &Interface) {
        let tap_and_mac = with_mac(&interface.tap, interface.mac);
        let mark = number(interface.mark.get());
        for held in interface.addresses() {
            self.put_ip(&rules::INSTANCES, place(network.vpc_number(&interface.segment), held));
            let bound = [tap_and_mac.as_slice(), &address(held)].concat();
            self.put(ProtoFamily::Bridge, &rules::BINDINGS, bound, mark.clone());
        }
        self.put_bridge(&rules::TAPS, interface.tap.padded().to_vec());
        self.put_sender(&interface.tap, rules::FROM_INSTANCE);
        self.put_bridge(&rules::SPOOFED, interface.tap.padded().to_vec());
        self.put_bridge(&rules::FOREIGN, interface.tap.padded().to_vec());
        self.put_bridge(&rules::MACS, tap_and_mac.clone());
        if !interface.source_check {
            self.put(ProtoFamily::Bridge, &rules::ROUTERS, tap_and_mac, mark.clone());
        }
        let own = &network.segments[&interface.segment];
        let is_near = |other: &&Segment| other.id == own.id || (other.vpc == own.vpc && !interface.source_check);
        for gateway in network.segments.values().filter(is_near).flat_map(Segment::gateway_addresses) {
            self.put_bridge(&rules::GATEWAYS_OF, [interface.tap.padded().as_slice(), &address(gateway)].concat());
        }
        let tap = interface.tap.padded();
        self.put(ProtoFamily::Bridge, &rules::MARK_OF, tap.to_vec(), mark);
        self.put_bridge(&rules::SELVES, [tap, tap].concat());
    }

    fn add_groups_of(&mut self, interface: &Interface) {
        for (maps, direction) in [(rules::INBOUND, Direction::Inbound), (rules::OUTBOUND, Direction::Outbound)] {
            for (map, group) in maps.iter().zip(&interface.groups) {
                self.put_both(map, number(interface.mark.get()), rules::chain_of(group, direction).into_bytes());
            }
        }
        for denied in [&rules::DENIED_IN, &rules::DENIED_OUT] {
            self.put_both(denied, number(interface.mark.get()), Vec::new());
        }
    }

    fn add_members(&mut self, network: &Network) {
        for group in network.peer_groups() {
            let set = rules::members_of(group);
            for member in &network.security_groups[group].members {
                self.put_both(&set, address(*member), Vec::new());
            }
        }
    }
}

pub(super) fn address(address: Ipv4Addr) -> Vec<u8> {
    address.octets().to_vec()
}

/// In the host's byte order, as marks and zones are.
pub(super) fn number(number: u32) -> Vec<u8> {
    number.to_ne_bytes().to_vec()
}

/// An address of a VPC.
pub(super) fn place(vpc: VpcNumber, held: Ipv4Addr) -> Vec<u8> {
    [number(vpc.get()), address(held)].concat()
}

/// A link's name and a MAC as they lie in registers: the MAC padded to eight bytes.
pub(super) fn with_mac(link: &LinkName, mac: MacAddress) -> Vec<u8> {
    [link.padded().as_slice(), &mac.octets(), &[0; 2]].concat()
}
