//! Security groups: from their messages to rules that can be trusted, and how they fit with the interfaces in them.
//!
//! A rule allows; there is none that forbids. What a rule says of ports means something for TCP and UDP, and of types and codes for
//! ICMP; for every other protocol EC2 knows the number alone, and so do we.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::parse::{field, fields, parse_network};
use super::{GroupId, GroupRuleId, Interface, InvalidNetwork, Network, PrefixListId, check};
use crate::api::{self, security_group_rule::Peer as PeerMessage};

/// Groups that an interface may be in: EC2's own bound unless one asks for more.
pub const MAX_GROUPS: usize = 5;
/// Rules of one group, each direction counted together. EC2 has 60 each way; the bound here is on what a packet may cost.
const MAX_RULES: usize = 1000;

/// The protocol number that stands for all traffic.
const ALL_TRAFFIC: i32 = -1;
/// The type and the code of ICMP that stand for all.
const ANY: i32 = -1;

type Result<T> = std::result::Result<T, InvalidNetwork>;

/// The networks of each prefix list.
pub type PrefixLists = BTreeMap<PrefixListId, Vec<Ipv4Net>>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecurityGroup {
    pub id: GroupId,
    pub rules: Vec<GroupRule>,
    /// The private addresses of the interfaces that are in the group, here and on other nodes.
    pub members: BTreeSet<Ipv4Addr>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRule {
    pub id: GroupRuleId,
    pub direction: Direction,
    pub traffic: Traffic,
    pub peer: Peer,
}

/// As the interface sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    Inbound,
    Outbound,
}

/// What a rule allows, by what is in the packet's headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    All,
    Protocol(u8),
    /// Of a protocol with ports (TCP or UDP): destination ports from the first to the last.
    Ports {
        protocol: u8,
        from: u16,
        to: u16,
    },
    /// None stands for any.
    Icmp {
        kind: Option<u8>,
        code: Option<u8>,
    },
}

/// Who a rule allows to send, or to be sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Whoever has an address in one of these.
    Networks(Vec<Ipv4Net>),
    /// The members of this group, by their private addresses.
    Group(GroupId),
}

pub fn parse_prefix_list(message: &api::PrefixList) -> Result<(PrefixListId, Vec<Ipv4Net>)> {
    let item = format!("prefix list {}", message.id);
    let networks = message.cidrs.iter().map(|cidr| parse_network(&item, cidr)).collect::<Result<_>>()?;
    Ok((field(&item, "id", &message.id)?, networks))
}

pub fn parse_group(message: &api::SecurityGroup, prefix_lists: &PrefixLists) -> Result<SecurityGroup> {
    let item = format!("security group {}", message.id);
    if message.rules.len() > MAX_RULES {
        let problem = format!("has {} rules; {MAX_RULES} are the most", message.rules.len());
        return Err(InvalidNetwork::new(item, problem));
    }
    let group = SecurityGroup {
        id: field(&item, "id", &message.id)?,
        rules: message.rules.iter().map(|rule| parse_rule(&item, rule, prefix_lists)).collect::<Result<_>>()?,
        members: fields(&item, "members", &message.members)?.into_iter().collect(),
    };
    let mut seen = BTreeSet::new();
    match group.rules.iter().find(|rule| !seen.insert(&rule.id)) {
        Some(twice) => Err(InvalidNetwork::new(format!("{item}, rule {}", twice.id), "is given twice")),
        None => Ok(group),
    }
}

fn parse_rule(group: &str, message: &api::SecurityGroupRule, prefix_lists: &PrefixLists) -> Result<GroupRule> {
    let item = format!("{group}, rule {}", message.id);
    let peer = match &message.peer {
        Some(PeerMessage::Cidr(cidr)) => Peer::Networks(vec![parse_network(&item, cidr)?]),
        Some(PeerMessage::SecurityGroup(id)) => Peer::Group(field(&item, "security_group", id)?),
        Some(PeerMessage::PrefixList(id)) => {
            let id: PrefixListId = field(&item, "prefix_list", id)?;
            let networks = prefix_lists.get(&id);
            let problem = || InvalidNetwork::new(&item, format!("its prefix list {id} is not in this network"));
            Peer::Networks(networks.ok_or_else(problem)?.clone())
        }
        None => return Err(InvalidNetwork::new(item, "names no peer: a CIDR, a security group or a prefix list")),
    };
    Ok(GroupRule {
        id: field(&item, "id", &message.id)?,
        direction: if message.egress { Direction::Outbound } else { Direction::Inbound },
        traffic: parse_traffic(&item, message)?,
        peer,
    })
}

fn parse_traffic(item: &str, message: &api::SecurityGroupRule) -> Result<Traffic> {
    if message.protocol == ALL_TRAFFIC {
        return Ok(Traffic::All);
    }
    let protocol = u8::try_from(message.protocol)
        .map_err(|_| InvalidNetwork::new(item, format!("protocol {} is neither -1 nor 0 to 255", message.protocol)))?;
    match i32::from(protocol) {
        libc::IPPROTO_TCP | libc::IPPROTO_UDP => {
            let port = |number: i32| {
                u16::try_from(number)
                    .map_err(|_| InvalidNetwork::new(item, format!("port {number} is outside of 0 to 65535")))
            };
            let (from, to) = (port(message.from_port)?, port(message.to_port)?);
            if from > to {
                return Err(InvalidNetwork::new(item, format!("ports {from} to {to} are no range")));
            }
            Ok(Traffic::Ports { protocol, from, to })
        }
        libc::IPPROTO_ICMP => {
            let number = |what: &str, number: i32| match number {
                ANY => Ok(None),
                number => u8::try_from(number)
                    .map(Some)
                    .map_err(|_| InvalidNetwork::new(item, format!("ICMP {what} {number} is neither -1 nor 0 to 255"))),
            };
            Ok(Traffic::Icmp { kind: number("type", message.from_port)?, code: number("code", message.to_port)? })
        }
        _ => Ok(Traffic::Protocol(protocol)),
    }
}

impl Network {
    pub(super) fn check_groups(&self) -> check::Result {
        self.interfaces.values().try_for_each(|interface| self.check_groups_of(interface))?;
        for group in self.security_groups.values() {
            for rule in &group.rules {
                if let Peer::Group(peer) = &rule.peer
                    && !self.security_groups.contains_key(peer)
                {
                    let item = format!("security group {}, rule {}", group.id, rule.id);
                    return Err(InvalidNetwork::new(item, format!("its peer {peer} is not in this network")));
                }
            }
        }
        Ok(())
    }

    fn check_groups_of(&self, interface: &Interface) -> check::Result {
        let refuse = |problem| Err(InvalidNetwork::new(format!("interface {}", interface.id), problem));
        if interface.groups.len() > MAX_GROUPS {
            return refuse(format!("is in {} security groups; {MAX_GROUPS} are the most", interface.groups.len()));
        }
        let mut seen = BTreeSet::new();
        for group in &interface.groups {
            if !seen.insert(group) {
                return refuse(format!("is twice in security group {group}"));
            }
            if !self.security_groups.contains_key(group) {
                return refuse(format!("its security group {group} is not in this network"));
            }
        }
        Ok(())
    }

    /// The groups that some rule names as its peer.
    pub fn peer_groups(&self) -> BTreeSet<&GroupId> {
        let rules = self.security_groups.values().flat_map(|group| &group.rules);
        rules
            .filter_map(|rule| match &rule.peer {
                Peer::Group(id) => Some(id),
                Peer::Networks(_) => None,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing;
    use proptest::prelude::*;

    fn rule(protocol: i32, from_port: i32, to_port: i32) -> api::SecurityGroupRule {
        let peer = Some(PeerMessage::Cidr("0.0.0.0/0".into()));
        api::SecurityGroupRule { id: "sgr-1".into(), protocol, from_port, to_port, peer, egress: false }
    }

    fn traffic(protocol: i32, from_port: i32, to_port: i32) -> Result<Traffic> {
        parse_traffic("rule", &rule(protocol, from_port, to_port))
    }

    #[test]
    fn ports_and_types_mean_what_the_protocol_makes_of_them() {
        assert_eq!(traffic(-1, 22, 22), Ok(Traffic::All));
        assert_eq!(traffic(6, 22, 80), Ok(Traffic::Ports { protocol: 6, from: 22, to: 80 }));
        assert_eq!(traffic(1, 8, -1), Ok(Traffic::Icmp { kind: Some(8), code: None }));
        assert_eq!(traffic(1, -1, -1), Ok(Traffic::Icmp { kind: None, code: None }));
        assert_eq!(traffic(50, 1, 2), Ok(Traffic::Protocol(50)));
        for (protocol, from, to) in [(6, 80, 22), (17, -1, 5), (6, 0, 65_536), (1, 256, -1), (1, 3, -2), (256, 0, 0)] {
            assert!(traffic(protocol, from, to).is_err(), "{protocol} {from} {to}");
        }
    }

    /// What is wrong with the network of two instances after `change`.
    fn refusal(change: impl FnOnce(&mut api::NodeNetwork)) -> String {
        let mut message = testing::message();
        change(&mut message);
        Network::parse(&message, &testing::surroundings()).expect_err("it should be refused").to_string()
    }

    #[test]
    fn each_refusal_names_its_item() {
        let group = |id: &str, rules| api::SecurityGroup { id: id.into(), rules, members: vec![] };
        let of_peer = |peer| vec![api::SecurityGroupRule { peer, ..rule(-1, 0, 0) }];
        let bad_rule = "security group sg-2, rule sgr-1: ";
        let cases: [(&str, String); 9] = [
            ("interface eni-1: ", refusal(|n| n.interfaces[0].security_groups.push("sg-9".into()))),
            ("interface eni-1: ", refusal(|n| n.interfaces[0].security_groups = vec!["sg-1".into(); 2])),
            (
                "interface eni-1: ",
                refusal(|n| n.interfaces[0].security_groups = (1..=6).map(|n| format!("sg-{n}")).collect()),
            ),
            ("security group sg-1: ", refusal(|n| n.security_groups.push(n.security_groups[0].clone()))),
            (bad_rule, refusal(|n| n.security_groups.push(group("sg-2", of_peer(None))))),
            (
                bad_rule,
                refusal(|n| {
                    n.security_groups.push(group("sg-2", of_peer(Some(PeerMessage::SecurityGroup("sg-9".into())))));
                }),
            ),
            (
                bad_rule,
                refusal(|n| {
                    n.security_groups.push(group("sg-2", of_peer(Some(PeerMessage::PrefixList("pl-9".into())))));
                }),
            ),
            (
                bad_rule,
                refusal(|n| {
                    n.security_groups.push(group("sg-2", of_peer(Some(PeerMessage::Cidr("10.0.0.1/8".into())))));
                }),
            ),
            (bad_rule, refusal(|n| n.security_groups.push(group("sg-2", vec![rule(-1, 0, 0); 2])))),
        ];
        for (item, message) in cases {
            assert!(message.starts_with(item), "`{message}` does not name {item}");
        }
    }

    proptest! {
        #[test]
        fn a_range_that_is_taken_is_one(protocol: i32, from_port in -2..70_000, to_port in -2..70_000) {
            for protocol in [protocol, 6] {
                if let Ok(Traffic::Ports { from, to, .. }) = traffic(protocol, from_port, to_port) {
                    prop_assert!(from <= to);
                }
            }
        }
    }
}
