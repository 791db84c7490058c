//! Rules of a group that differ in port and network alone, folded into one rule and a set.
//!
//! The kernel takes a rule an expression at a time, and looks each expression's kind up by its name: a rule for a port and a network has eight, where an element
//! of a set costs about as much as two. So rules for one port, from networks whose prefixes are equally long, are elements (protocol, port, network) of one set, and
//! the group's chain has one rule that looks the packet up there. Two such elements are equal or have nothing in common, so that a set that is looked up by a digest will do, however the
//! rules of a group overlap; an element that would be there twice stays a rule. Each element counts what it matched, and says in its comment which rule it is, as a rule does.
//!
//! Rules for ranges of ports, for all traffic and for ICMP, and those for members of a group, stay rules: people write few of these.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;

use super::groups::{chain_of, name_of};
use super::set;
use crate::desired::{Direction, GroupId, GroupRule, Peer, SecurityGroup, Traffic};
use crate::nft::layout::{Elements, Name, Set, Type};

/// So many equal rules are folded. With fewer, a set of their own would cost more than they do.
const LEAST: usize = 8;
/// What rules say that look up others in a set.
pub const PURPOSE: &str = "rules for one port";
/// As [`MEMBERS_SET_ID`](super::groups): found by its name.
const SET_ID: u32 = 1001;

/// One that a rule allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party<'a> {
    Network(Ipv4Net),
    Group(&'a GroupId),
}

/// A group's rules for one direction, each with one party.
pub struct Folded<'a> {
    /// By the length of the networks' prefix, what is in a set: protocol, port and network, and the rule.
    pub sets: BTreeMap<u8, BTreeMap<Service, &'a GroupRule>>,
    /// What is rules.
    pub rest: Vec<(&'a GroupRule, Party<'a>)>,
}

/// A protocol, a port and a network.
pub type Service = (u8, u16, Ipv4Net);

pub fn fold(group: &SecurityGroup, direction: Direction) -> Folded<'_> {
    let mut folded = Folded { sets: BTreeMap::new(), rest: Vec::new() };
    for rule in group.rules.iter().filter(|rule| rule.direction == direction) {
        match &rule.peer {
            Peer::Group(group) => folded.rest.push((rule, Party::Group(group))),
            Peer::Networks(networks) => networks.iter().for_each(|network| folded.add(rule, *network)),
        }
    }
    let few = folded.sets.extract_if(.., |_, services| services.len() < LEAST);
    let few = few.flat_map(|(_, services)| services).map(|((_, _, network), rule)| (rule, Party::Network(network)));
    folded.rest.extend(few);
    folded
}

impl<'a> Folded<'a> {
    fn add(&mut self, rule: &'a GroupRule, network: Ipv4Net) {
        if let Traffic::Ports { protocol, from, to } = rule.traffic
            && from == to
        {
            let services = self.sets.entry(network.prefix_len()).or_default();
            if let std::collections::btree_map::Entry::Vacant(place) = services.entry((protocol, from, network)) {
                place.insert(rule);
                return;
            }
        }
        self.rest.push((rule, Party::Network(network)));
    }
}

/// The set of a group's rules for networks of this prefix.
pub fn set_of(group: &GroupId, direction: Direction, prefix: u8) -> Set {
    let name = Name::Owned(format!("{}/{prefix}", chain_of(group, direction)));
    Set { name, counting: true, named: true, ..set("", SET_ID, &[Type::Protocol, Type::Port, Type::Ipv4]) }
}

/// The chain that looks this set up, if it is one of these sets.
pub fn chain_of_set(name: &str) -> Option<&str> {
    name.split_once('/').map(|(chain, _)| chain)
}

/// What the sets of these groups hold.
pub fn elements<'a>(groups: impl Iterator<Item = &'a SecurityGroup>) -> BTreeMap<Name, Elements> {
    let mut sets = BTreeMap::new();
    for group in groups {
        for direction in [Direction::Inbound, Direction::Outbound] {
            for (prefix, services) in fold(group, direction).sets {
                let elements = services
                    .into_iter()
                    .map(|(service, rule)| (key(service), purpose(rule, Party::Network(service.2)).into_bytes()));
                sets.insert(set_of(&group.id, direction, prefix).name, elements.collect());
            }
        }
    }
    sets
}

/// As it lies in registers, each part padded.
fn key((protocol, port, network): Service) -> Vec<u8> {
    let [high, low] = port.to_be_bytes();
    [&[protocol, 0, 0, 0, high, low, 0, 0][..], &network.network().octets()].concat()
}

/// What a rule or an element is for. [`Show`](crate::nft::counters) finds the rule's id by its colon.
pub fn purpose(rule: &GroupRule, party: Party) -> String {
    let way = way(rule.direction);
    let what = name_of(rule.traffic);
    match party {
        Party::Network(network) => format!("{}: {what} {way} {network}", rule.id),
        Party::Group(group) => format!("{}: {what} {way} {group}", rule.id),
    }
}

pub fn way(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "from",
        Direction::Outbound => "to",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rule(n: usize, traffic: Traffic, networks: Vec<Ipv4Net>) -> GroupRule {
        let id = format!("sgr-{n}").parse().unwrap();
        GroupRule { id, direction: Direction::Inbound, traffic, peer: Peer::Networks(networks) }
    }

    fn any_rules() -> impl Strategy<Value = Vec<GroupRule>> {
        let network = (0_u32..4, prop_oneof![Just(8_u8), Just(9), Just(32)])
            .prop_map(|(n, prefix)| Ipv4Net::new((n << 29 | n).into(), prefix).unwrap().trunc());
        let traffic = prop_oneof![
            4 => (0_u16..6).prop_map(|port| Traffic::Ports { protocol: 6, from: port, to: port }),
            1 => Just(Traffic::Ports { protocol: 6, from: 0, to: 6 }),
            1 => Just(Traffic::All),
        ];
        let rules = proptest::collection::vec((traffic, proptest::collection::vec(network, 1..4)), 0..40);
        rules.prop_map(|rules| {
            rules.into_iter().enumerate().map(|(n, (traffic, networks))| rule(n, traffic, networks)).collect()
        })
    }

    proptest! {
        #[test]
        fn each_rule_is_a_rule_or_an_element_and_none_is_lost(rules in any_rules()) {
            let mut wanted: Vec<String> = Vec::new();
            for rule in &rules {
                let Peer::Networks(networks) = &rule.peer else { unreachable!() };
                wanted.extend(networks.iter().map(|network| purpose(rule, Party::Network(*network))));
            }
            let group = SecurityGroup { id: "sg-1".parse().unwrap(), rules: rules.clone(), members: Default::default() };
            let folded = fold(&group, Direction::Inbound);
            let mut made: Vec<String> = folded.rest.iter().map(|(rule, party)| purpose(rule, *party)).collect();
            let sets = elements(std::iter::once(&group));
            prop_assert_eq!(sets.len(), folded.sets.len());
            for (name, elements) in &sets {
                prop_assert_eq!(chain_of_set(name), Some("inbound_sg-1"));
                prop_assert!(elements.len() >= LEAST);
                made.extend(elements.values().map(|value| String::from_utf8(value.clone()).unwrap()));
            }
            wanted.sort();
            made.sort();
            prop_assert_eq!(made, wanted);
            let outbound = fold(&group, Direction::Outbound);
            prop_assert!(outbound.sets.is_empty() && outbound.rest.is_empty());
        }
    }

    #[test]
    fn an_element_is_what_the_registers_hold() {
        let network = "10.1.0.0/16".parse().unwrap();
        assert_eq!(key((6, 0x1234, network)), [6, 0, 0, 0, 0x12, 0x34, 0, 0, 10, 1, 0, 0]);
    }
}
