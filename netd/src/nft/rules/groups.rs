//! Security groups: a chain for each group and direction, and how a packet finds those of its interface.
//!
//! A packet that is to be judged is marked with the interface that it is judged for. A map leads from that mark to the chain of the interface's first
//! group, another to that of its second, up to [`MAX_GROUPS`](crate::desired::MAX_GROUPS): so what a packet costs depends neither on how many groups there
//! are nor on how many members they have, but only on how many rules its own interface's groups have, and only for the first packet of a
//! connection. Peers that are groups are sets of their members' addresses.
//!
//! Rules lead on to [`ALLOWED_IN`] or [`ALLOWED_OUT`], each counting what it lets pass, and their order means nothing. What none of them accepts comes back and is dropped. So does what
//! belongs to an interface that is in no group.

use std::borrow::Cow;

use ipnet::Ipv4Net;

use super::{DENIED_IN, DENIED_OUT, INBOUND, OUTBOUND, chain};
use crate::desired::{Direction, GroupId, GroupRule, Network, Peer, SecurityGroup, Traffic};
use crate::nft::expr::Header;
use crate::nft::layout::{Chain, Name, Set, Table, Type};
use crate::nft::rule::Field::{Ipv4Destination, Ipv4Source, Mark};
use crate::nft::rule::Rule;

/// The set that is behind every lookup of members is found by its name; numbers are for sets that the kernel has not heard of.
const MEMBERS_SET_ID: u32 = 1000;

/// The chains for what a group allows, where it is counted against what the interface may have; whatever comes there does not come back.
pub const ALLOWED_IN: &str = "allowed_in";
pub const ALLOWED_OUT: &str = "allowed_out";

pub fn judge_inbound() -> Chain {
    judge("judge_inbound", &INBOUND, &DENIED_IN)
}

pub fn judge_outbound() -> Chain {
    judge("judge_outbound", &OUTBOUND, &DENIED_OUT)
}

fn judge(name: &'static str, groups: &[Set], denied: &Set) -> Chain {
    let by_number =
        |(number, map): (usize, &Set)| Rule::new(format!("rules of its group {}", number + 1)).jump_by(&[Mark], map);
    let mut rules: Vec<Rule> = groups.iter().enumerate().map(by_number).collect();
    rules.push(Rule::new("no group allows it").found(&[Mark], denied).drop());
    rules.push(Rule::new("nobody knows whose it is").drop());
    chain(name, None, rules)
}

/// What a table that judges has beside the chains.
pub fn sets() -> impl Iterator<Item = Set> {
    INBOUND.into_iter().chain(OUTBOUND).chain([DENIED_IN, DENIED_OUT])
}

/// The name of a group's chain.
pub fn chain_of(group: &GroupId, direction: Direction) -> String {
    match direction {
        Direction::Inbound => format!("inbound_{group}"),
        Direction::Outbound => format!("outbound_{group}"),
    }
}

/// The set of a group's members.
pub fn members_of(group: &GroupId) -> Set {
    Set {
        name: Cow::Owned(format!("members_{group}")),
        id: MEMBERS_SET_ID,
        key: &[Type::Ipv4],
        value: None,
        counting: false,
        limit: None,
    }
}

/// Adds the chains of the groups that are `asked` for, and the sets that the rules of all name.
pub fn grow(table: &mut Table, network: &Network, asked: impl Fn(&SecurityGroup) -> bool) {
    table.sets.extend(network.peer_groups().into_iter().map(members_of));
    for group in network.security_groups.values().filter(|group| asked(group)) {
        for direction in [Direction::Inbound, Direction::Outbound] {
            table.chains.push(group_chain(group, direction));
        }
    }
}

fn group_chain(group: &SecurityGroup, direction: Direction) -> Chain {
    let rules = group.rules.iter().filter(|rule| rule.direction == direction).flat_map(rules_of).collect();
    Chain { name: Cow::Owned(chain_of(&group.id, direction)), base: None, rules }
}

/// The nftables rules of a group's rule: one for each network that its peer is.
fn rules_of(rule: &GroupRule) -> Vec<Rule> {
    let direction = rule.direction;
    let (field, way) = match direction {
        Direction::Inbound => (Ipv4Source, "from"),
        Direction::Outbound => (Ipv4Destination, "to"),
    };
    let start = |peer: String| {
        let purpose = format!("{}: {} {way} {peer}", rule.id, name_of(rule.traffic));
        of_traffic(Rule::new(Name::Owned(purpose)), rule.traffic)
    };
    let with_network = |network: &Ipv4Net| start(network.to_string()).within(field, *network);
    let matching = match &rule.peer {
        Peer::Networks(networks) => networks.iter().map(with_network).collect(),
        Peer::Group(group) => {
            let rule = start(group.to_string()).found(&[field], &members_of(group));
            vec![match direction {
                // Whoever comes by way of an elastic IP comes from outside, whatever address it has.
                Direction::Inbound => rule.not_through_elastic_ip(),
                Direction::Outbound => rule,
            }]
        }
    };
    let allowed = match direction {
        Direction::Inbound => ALLOWED_IN,
        Direction::Outbound => ALLOWED_OUT,
    };
    matching.into_iter().map(|rule| rule.count().goto(allowed)).collect()
}

fn of_traffic(rule: Rule, traffic: Traffic) -> Rule {
    let byte_is = |rule: Rule, offset, byte: Option<u8>| match byte {
        Some(byte) => rule.bytes_are(Header::Transport, offset, &[byte]),
        None => rule,
    };
    match traffic {
        Traffic::All => rule,
        Traffic::Protocol(number) => rule.protocol(number.into()),
        Traffic::Ports { protocol, from, to } => rule.protocol(protocol.into()).port_from_to(from, to),
        Traffic::Icmp { kind, code } => byte_is(byte_is(rule.protocol(libc::IPPROTO_ICMP), 0, kind), 1, code),
    }
}

fn name_of(traffic: Traffic) -> String {
    let any = |number: Option<u8>| number.map_or("any".to_owned(), |number| number.to_string());
    match traffic {
        Traffic::All => "all traffic".to_owned(),
        Traffic::Protocol(number) => format!("protocol {number}"),
        Traffic::Ports { protocol, from, to } => {
            let name = if i32::from(protocol) == libc::IPPROTO_TCP { "tcp" } else { "udp" };
            if from == to { format!("{name} {from}") } else { format!("{name} {from}-{to}") }
        }
        Traffic::Icmp { kind, code } => format!("icmp {}/{}", any(kind), any(code)),
    }
}
