//! Security groups: a chain for each group and direction, and how a packet finds those of its interface.
//!
//! A packet that is to be judged is marked with the interface that it is judged for. A map leads from that mark to the chain of the interface's first
//! group, another to that of its second, up to [`MAX_GROUPS`](crate::desired::MAX_GROUPS): so what a packet costs depends neither on how many groups there
//! are nor on how many members they have, but only on how many rules its own interface's groups have, and only for the first packet of a
//! connection. Peers that are groups are sets of their members' addresses.
//!
//! Many rules of a kind are elements of a set, which one rule of the chain looks up (`folded.rs`).
//!
//! Rules lead on to [`ALLOWED_IN`] or [`ALLOWED_OUT`], each counting what it lets pass, and their order means nothing. What none of them accepts comes back and is dropped. So does what
//! belongs to an interface that is in no group.

use std::borrow::Cow;

use super::folded::{self, Party};
use super::{DENIED_IN, DENIED_OUT, INBOUND, OUTBOUND, chain, set};
use crate::desired::{Direction, GroupId, GroupRule, Network, SecurityGroup, Traffic};
use crate::nft::expr::Header;
use crate::nft::layout::{Chain, Name, Set, Table, Type};
use crate::nft::rule::Field;
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
    Set { name: Cow::Owned(format!("members_{group}")), ..set("", MEMBERS_SET_ID, &[Type::Ipv4]) }
}

/// Adds the chains of the groups that are `asked` for, with their sets, and the sets of members that the rules of all name.
pub fn grow(table: &mut Table, network: &Network, asked: impl Fn(&SecurityGroup) -> bool) {
    table.sets.extend(network.peer_groups().into_iter().map(members_of));
    for group in network.security_groups.values().filter(|group| asked(group)) {
        for direction in [Direction::Inbound, Direction::Outbound] {
            grow_by(table, group, direction);
        }
    }
}

fn grow_by(table: &mut Table, group: &SecurityGroup, direction: Direction) {
    let folded = folded::fold(group, direction);
    let mut rules: Vec<Rule> = folded.rest.into_iter().map(|(rule, party)| rule_of(rule, party)).collect();
    for prefix in folded.sets.into_keys() {
        let set = folded::set_of(&group.id, direction, prefix);
        let purpose = format!("{}, {} networks of /{prefix}", folded::PURPOSE, folded::way(direction));
        let rule = Rule::new(Name::Owned(purpose)).service_found(address_in(direction), prefix, &set);
        rules.push(rule.goto(allowed(direction)));
        table.sets.push(set);
    }
    table.chains.push(Chain { name: Cow::Owned(chain_of(&group.id, direction)), base: None, rules });
}

/// The address of who is at the other end.
fn address_in(direction: Direction) -> Field {
    match direction {
        Direction::Inbound => Ipv4Source,
        Direction::Outbound => Ipv4Destination,
    }
}

fn allowed(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => ALLOWED_IN,
        Direction::Outbound => ALLOWED_OUT,
    }
}

/// The nftables rule of a group's rule, for one party.
fn rule_of(rule: &GroupRule, party: Party) -> Rule {
    let address = address_in(rule.direction);
    let start = of_traffic(Rule::new(Name::Owned(folded::purpose(rule, party))), rule.traffic);
    let matching = match party {
        Party::Network(network) => start.within(address, network),
        Party::Group(group) => {
            let found = start.found(&[address], &members_of(group));
            match rule.direction {
                // Whoever comes by way of an elastic IP comes from outside, whatever address it has.
                Direction::Inbound => found.not_through_elastic_ip(),
                Direction::Outbound => found,
            }
        }
    };
    matching.count().goto(allowed(rule.direction))
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

pub fn name_of(traffic: Traffic) -> String {
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
