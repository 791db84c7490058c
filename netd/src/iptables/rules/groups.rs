//! Security groups: a chain for each group and direction, which the chains of its interfaces call one after the other.
//!
//! Rules accept, each counting what it lets pass, and their order means nothing. A rule whose peer is a group is one rule for each member.
//!
//! **Hairpin.** Who calls an instance of this node by its elastic IP from another of this node appears as its own elastic IP, or as the node. That is written into
//! the packet after everything here, so the address that it will have is told by the one that it has: each group has a third chain, in which a rule for a network is
//! one for each instance whose elastic IP is in there.

use ipnet::Ipv4Net;

use super::{HAIRPIN, Rule, TRANSLATED, Table, elastic_ips_of, opened_from};
use crate::desired::{
    Direction, ElasticIp, GroupId, GroupRule, Interface, Network, Peer, SecurityGroup, Traffic, VpcNumber,
};
use crate::digest;

/// The chain of an interface's groups for what comes by an elastic IP from this node, with its mark.
pub const DENIED_HAIRPIN: &str = "hair-";
/// The three kinds of chains of a group.
pub const OUTBOUND: &str = "go";
const INBOUND: &str = "gi";
const BY_ELASTIC_IP: &str = "ge";
/// Accepts whom nobody has given an elastic IP, in a VPC's name or any.
const AS_NODE: &str = "as-node";

/// Group ids are longer than names of chains may be.
fn chain_of(group: &GroupId, kind: &str) -> String {
    format!("{kind}-{:016x}", digest::fnv1a(group.to_string().as_bytes()))
}

pub fn ask(group: &GroupId, kind: &str) -> Rule {
    Rule::new(format!("rules of {group}")).call(&chain_of(group, kind))
}

/// The ids of group and rule that a rule of a group's chain is of, by its purpose.
pub fn rule_of(purpose: &str) -> Option<(&str, &str)> {
    purpose.split_once(':')?.0.split_once(' ')
}

/// The chain that judges what an interface gets.
pub fn put_inbound(table: &mut Table, interface: &Interface, own: &str) {
    let again = format!("{DENIED_HAIRPIN}{:08x}", interface.mark.get());
    table.put(own, [Rule::new("from this node by an elastic IP").on(HAIRPIN).go(&again)]);
    for (chain, kind) in [(own, INBOUND), (again.as_str(), BY_ELASTIC_IP)] {
        table.put(chain, interface.groups.iter().map(|group| ask(group, kind)));
        table.put(chain, [Rule::new("no group lets it in").drop()]);
    }
}

pub fn put_groups(table: &mut Table, network: &Network) {
    let callers = Callers::of(network);
    table.put(
        AS_NODE,
        callers.elastic.iter().map(|(elastic, vpc)| from(elastic, *vpc, Rule::new("has its own")).leave()),
    );
    table.put(AS_NODE, [Rule::new("appears as the node").accept()]);
    for group in network.security_groups.values() {
        for (kind, direction) in
            [(OUTBOUND, Direction::Outbound), (INBOUND, Direction::Inbound), (BY_ELASTIC_IP, Direction::Inbound)]
        {
            let chain = chain_of(&group.id, kind);
            table.put(&chain, []);
            for rule in group.rules.iter().filter(|rule| rule.direction == direction) {
                let rules = match kind {
                    BY_ELASTIC_IP => callers.rules_of(group, rule),
                    _ => rules_of(network, group, rule),
                };
                table.put(&chain, rules);
            }
        }
    }
}

fn start(group: &SecurityGroup, rule: &GroupRule, peer: &str) -> Rule {
    let way = if rule.direction == Direction::Inbound { "from" } else { "to" };
    Rule::new(format!("{} {}: {way} {peer}", group.id, rule.id)).on(of_traffic(rule.traffic))
}

/// One for each network that the rule's peer is, and each member.
fn rules_of(network: &Network, group: &SecurityGroup, rule: &GroupRule) -> Vec<Rule> {
    let field = if rule.direction == Direction::Inbound { "-s" } else { "-d" };
    match &rule.peer {
        Peer::Networks(networks) => {
            networks.iter().map(|peer| start(group, rule, &peer.to_string()).on(within(field, peer)).accept()).collect()
        }
        Peer::Group(peer) => {
            // Parsing made sure that the peer is there.
            let members = network.security_groups.get(peer).map(|peer| &peer.members);
            let member = |member| {
                let rule_of_member = start(group, rule, &peer.to_string()).on(format!("{field} {member}"));
                match rule.direction {
                    // Whoever comes by way of an elastic IP comes from outside, whatever address it has.
                    Direction::Inbound => rule_of_member.on("-m conntrack ! --ctstate DNAT").accept(),
                    Direction::Outbound => rule_of_member.accept(),
                }
            };
            members.into_iter().flatten().map(member).collect()
        }
    }
}

/// All addresses are no condition.
fn within(field: &str, network: &Ipv4Net) -> String {
    if network.prefix_len() == 0 { String::new() } else { format!("{field} {network}") }
}

/// Who may call an elastic IP from this node, and the addresses that these then have.
struct Callers<'a> {
    network: &'a Network,
    elastic: Vec<(&'a ElasticIp, VpcNumber)>,
}

impl<'a> Callers<'a> {
    fn of(network: &'a Network) -> Self {
        let of_vpc = |vpc: &VpcNumber| elastic_ips_of(network, *vpc).map(|elastic| (elastic, *vpc)).collect::<Vec<_>>();
        Self { network, elastic: network.vpcs.values().flat_map(of_vpc).collect() }
    }

    fn rules_of(&self, group: &SecurityGroup, rule: &GroupRule) -> Vec<Rule> {
        let Peer::Networks(networks) = &rule.peer else { return Vec::new() };
        networks.iter().flat_map(|peer| self.rules_of_network(group, rule, peer)).collect()
    }

    fn rules_of_network(&self, group: &SecurityGroup, rule: &GroupRule, peer: &Ipv4Net) -> Vec<Rule> {
        let start = || start(group, rule, &peer.to_string()).on(TRANSLATED);
        // A node without an address has none to lend.
        let node = self.network.node_addresses.first().is_some_and(|node| peer.contains(node));
        let among: Vec<_> = self.elastic.iter().filter(|(elastic, _)| peer.contains(&elastic.public)).collect();
        if node && among.len() == self.elastic.len() {
            return vec![start().accept()];
        }
        let mut rules: Vec<Rule> =
            among.into_iter().map(|(elastic, vpc)| from(elastic, *vpc, start()).accept()).collect();
        rules.extend(node.then(|| start().call(AS_NODE)));
        rules
    }
}

fn from(elastic: &ElasticIp, vpc: VpcNumber, rule: Rule) -> Rule {
    rule.on(format!("-s {}", elastic.private)).on(opened_from(vpc))
}

/// What x_tables takes for "any" where a number is meant is asked for byte by byte.
fn of_traffic(traffic: Traffic) -> String {
    match traffic {
        Traffic::All => String::new(),
        Traffic::Protocol(0) => "-m u32 --u32 \"6&0xFF=0\"".into(),
        Traffic::Protocol(number) => format!("-p {number}"),
        Traffic::Ports { protocol, from: 0, to: u16::MAX } => format!("-p {protocol}"),
        Traffic::Ports { protocol, from, to } => {
            let name = if i32::from(protocol) == libc::IPPROTO_TCP { "tcp" } else { "udp" };
            format!("-p {name} -m {name} --dport {from}:{to}")
        }
        Traffic::Icmp { kind, code } => {
            let byte_is = |shift: u32, number: Option<u8>| {
                number
                    .map(|number| format!(" -m u32 --u32 \"0>>22&0x3C@0>>{shift}&0xFF={number}\""))
                    .unwrap_or_default()
            };
            format!("-p icmp{}{}", byte_is(24, kind), byte_is(16, code))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_mean_any_to_x_tables_mean_themselves() {
        assert_eq!(of_traffic(Traffic::Protocol(0)), "-m u32 --u32 \"6&0xFF=0\"");
        let any_code = of_traffic(Traffic::Icmp { kind: Some(255), code: None });
        assert_eq!(any_code, "-p icmp -m u32 --u32 \"0>>22&0x3C@0>>24&0xFF=255\"");
        assert_eq!(within("-s", &"0.0.0.0/0".parse().unwrap()), "");
    }

    #[test]
    fn a_rule_is_found_by_what_it_says() {
        assert_eq!(rule_of("sg-1 sgr-2: from 10.0.0.0/8"), Some(("sg-1", "sgr-2")));
        assert_eq!(rule_of("no group lets it in"), None);
    }
}
