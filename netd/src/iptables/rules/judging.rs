//! The table `mangle`: what may pass, and in which VPC it is routed.
//!
//! Whatever is dropped is dropped here, before the host's own `filter` is asked. What is accepted by a rule of a group's skips the rest of this table alone.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{
    ANSWERS, BY_SENDER, FIRST_PACKET, FIRST_WAY, FROM_NO_VPC, FROM_VPC, HAIRPIN, INVALID, KNOWN, PUBLIC, Rule, TO_VPC,
    TRANSLATED, Table, beyond, elastic_ips_of, for_pools, from_bridge, gateways_of, groups, mark, networks_of,
    of_segment, of_vpc, opened_from, opened_to, to_bridge, vpc_of,
};
use crate::api::METADATA_ADDRESS;
use crate::desired::{LinkName, Network, Segment, VpcNumber};
use crate::limits::Limits;

/// Chains in which an interface's groups are asked, with its mark; their last rules count what no group allows.
pub const DENIED_OUT: &str = "out-";
pub const DENIED_IN: &str = "in-";
/// The purpose of rules that drop what is beyond a rate, in these chains and in that of a segment's questions to its gateway.
pub const TOO_FAST: &str = "beyond its rate";
/// How the purpose of a rule that counts packets from an elastic IP begins.
pub const ELASTIC_OUT: &str = "as elastic IP ";

const HOOKS: [(&str, &str); 5] =
    [("PREROUTING", "in"), ("INPUT", "node"), ("FORWARD", "way"), ("OUTPUT", "home"), ("POSTROUTING", "post")];

pub fn table(uplink: &LinkName, limits: &Limits, network: &Network) -> Table {
    let mut table = Table::new("mangle", &HOOKS);
    for segment in network.segments.values() {
        let at = |hook: &str, side: String, chain: &str| {
            (hook.to_owned(), Rule::new(segment.id.to_string()).on(side).go(&of_segment(chain, segment)))
        };
        for (hook, rule) in [
            at("in", from_bridge(segment), "sent"),
            at("node", from_bridge(segment), "asks"),
            at("way", to_bridge(segment), "to"),
        ] {
            table.put(&hook, [rule]);
        }
        put_sent(&mut table, network, segment);
        put_new(&mut table, limits, network, segment);
        put_to_node(&mut table, limits, network, segment);
        put_ways(&mut table, uplink, network, segment);
        put_received(&mut table, network, segment);
    }
    // After all that lead to a segment, which may be another.
    for segment in network.segments.values() {
        table.put("way", [Rule::new("from an instance").on(from_bridge(segment)).go(&of_segment("left", segment))]);
    }
    // An address of another VPC is nobody's on the public side, nor is one of a part of its own VPC that this node does not reach.
    let networks: Vec<Ipv4Net> = network.vpcs.keys().flat_map(|vpc| networks_of(network, vpc)).collect();
    table.put(
        "within",
        Ipv4Net::aggregate(&networks).into_iter().map(|inside| Rule::new("private").on(format!("-d {inside}")).drop()),
    );
    put_connections(&mut table, network);
    put_post(&mut table, uplink, network);
    groups::put_groups(&mut table, network);
    table
}

/// Each packet is marked for the way that it goes: to where its connection was opened to, or back to where it was opened from.
fn put_connections(table: &mut Table, network: &Network) {
    let there = || Rule::new("to the VPC of its elastic IP").on(FIRST_WAY).on(TO_VPC).call("there");
    let back = || Rule::new("back to the VPC that asked").on(ANSWERS).on(FROM_VPC);
    table.put(
        "in",
        [
            Rule::new("an answer from outside, where an instance was asked").on(ANSWERS).on(HAIRPIN).call("forged"),
            there(),
            back().call("back"),
        ],
    );
    // Errors, too, which the kernel would route as it did the packet that they are about.
    table.put("home", [there(), back().on("-p icmp").call("back")]);
    for chain in ["there", "back", "forged"] {
        table.put(chain, []);
    }
    for (vpc, number) in &network.vpcs {
        table.put("there", [Rule::new(vpc.to_string()).on(opened_to(*number)).then(mark(number.get()))]);
        table.put("back", [Rule::new(vpc.to_string()).on(opened_from(*number)).then(mark(number.get()))]);
        table.put("forged", [Rule::new(vpc.to_string()).on(opened_from(*number)).drop()]);
        put_heard(table, network, of_vpc("heard", *number), *number);
    }
}

/// An answer may come from a VPC that was asked: by its elastic IP, from within, or by its gateway, which has no public address.
fn put_heard(table: &mut Table, network: &Network, chain: String, vpc: VpcNumber) {
    let within = format!("-m connmark --mark {:#x}", vpc.get() << 16);
    table.put(
        &chain,
        [
            Rule::new("it was asked by an elastic IP").on(opened_to(vpc)).leave(),
            Rule::new("it was asked within its VPC").on(within).leave(),
        ],
    );
    for node in &network.node_addresses {
        table.put(&chain, [Rule::new("the node asked others").on(format!("-d {node}")).drop()]);
    }
    table.put(&chain, for_pools(network, "others asked as an elastic IP").map(Rule::drop));
    table.put(
        &chain,
        [
            Rule::new("its gateway asked").on("-m connmark --mark 0").leave(),
            Rule::new("an answer from a VPC that was not asked").drop(),
        ],
    );
}

/// What instances send: which way it is routed, and whether it may be sent at all.
fn put_sent(table: &mut Table, network: &Network, segment: &Segment) {
    let vpc = vpc_of(network, segment);
    let opened = format!("CONNMARK --set-xmark {:#x}/0xffff0000", vpc.get() << 16);
    table.put(
        &of_segment("sent", segment),
        [
            Rule::new("who was asked?").on(ANSWERS).call(&of_vpc("heard", vpc)),
            Rule::new("opened from this VPC").on("-m conntrack --ctstate NEW --ctdir ORIGINAL").then(opened),
            Rule::new("to the VPC of its elastic IP").on(FIRST_WAY).on(TO_VPC).call("there"),
            Rule::new("back to the VPC that asked").on(ANSWERS).on(FROM_VPC).call("back"),
            Rule::new("back to outside, or to the node")
                .on(ANSWERS)
                .on("-m connmark --mark 0x6000/0xfffff000")
                .then(mark(PUBLIC)),
            Rule::new("not an answer").on(not(KNOWN)).go(&of_segment("new", segment)),
        ],
    );
}

/// `-m conntrack --ctstate S` turned round.
fn not(state: &str) -> String {
    state.replace("--ctstate", "! --ctstate")
}

/// Judges what an instance sends, before anything of it is translated: a group's rules speak of what the instance sees. What a subnet's gateway answers
/// is no group's to forbid, as in EC2.
fn put_new(table: &mut Table, limits: &Limits, network: &Network, segment: &Segment) {
    let chain = of_segment("new", segment);
    for gateway in gateways_of(network, &segment.vpc) {
        table.put(&chain, [Rule::new("the gateway's services").on(format!("-d {gateway}")).leave()]);
    }
    let dhcp = format!("-d {} -p udp -m udp --dport 67", Ipv4Addr::BROADCAST);
    table.put(&chain, [Rule::new("DHCP").on(dhcp).leave(), Rule::new("no part of any connection").on(INVALID).drop()]);
    for interface in network.interfaces_of(&segment.id) {
        let own = format!("{DENIED_OUT}{:08x}", interface.mark.get());
        let from = |held| Rule::new(interface.id.to_string()).on(format!("-s {held}")).go(&own);
        table.put(&chain, interface.addresses().map(from));
        let too_fast = beyond(limits.connection_rate, BY_SENDER, &of_vpc("open", vpc_of(network, segment)));
        table.put(&own, [Rule::new(TOO_FAST).on(FIRST_PACKET).on(too_fast).drop()]);
        table.put(&own, interface.groups.iter().map(|group| groups::ask(group, groups::OUTBOUND)));
        table.put(&own, [Rule::new("no group lets it out").drop()]);
    }
    table.put(&chain, [Rule::new("nobody knows whose it is").drop()]);
}

/// What instances may ask of the node: nothing but what a subnet's gateway answers.
fn put_to_node(table: &mut Table, limits: &Limits, network: &Network, segment: &Segment) {
    let chain = of_segment("asks", segment);
    let metadata = format!("-d {METADATA_ADDRESS} -p tcp -m tcp --dport 80");
    let (too_fast, flood) =
        (beyond(limits.gateway_rate, BY_SENDER, &of_segment("gate", segment)), of_segment("flood", segment));
    for interface in network.interfaces_of(&segment.id) {
        let counted = format!("{TOO_FAST}: {}", interface.tap);
        table.put(&flood, interface.addresses().map(|held| Rule::new(&*counted).on(format!("-s {held}")).drop()));
    }
    table.put(&flood, []);
    table.put(
        &chain,
        [
            // DHCP has a rate of its own, and clients without an address share one.
            Rule::new("more than it may ask").on("! -s 0.0.0.0").on(too_fast).call(&flood),
            Rule::new("answers").on(KNOWN).leave(),
            Rule::new("metadata service").on(metadata).leave(),
            Rule::new("DHCP").on(format!("-d {} -p udp -m udp --dport 67", Ipv4Addr::BROADCAST)).leave(),
        ],
    );
    for gateway in gateways_of(network, &segment.vpc) {
        let to = |what: &str, traffic: &str| Rule::new(what).on(format!("-d {gateway}")).on(traffic).leave();
        table.put(
            &chain,
            [
                to("DHCP of a lease that is held", "-p udp -m udp --dport 67"),
                to("DNS", "-p udp -m udp --dport 53"),
                to("DNS over TCP", "-p tcp -m tcp --dport 53"),
                to("ping the gateway", "-p icmp -m icmp --icmp-type 8"),
            ],
        );
    }
    table.put(&chain, [Rule::new("the node is not the instances' to reach").drop()]);
}

/// Ways that there are; whether a connection may take one is for the groups.
fn put_ways(table: &mut Table, uplink: &LinkName, network: &Network, segment: &Segment) {
    let to = of_segment("to", segment);
    table.put(
        &to,
        [
            Rule::new("answers").on(KNOWN).leave(),
            Rule::new("no part of any connection").on(INVALID).drop(),
            Rule::new("through an elastic IP").on(TRANSLATED).leave(),
        ],
    );
    let near = network.segments.values().filter(|other| other.vpc == segment.vpc);
    table.put(&to, near.map(|other| Rule::new("from a segment of the same VPC").on(from_bridge(other)).leave()));
    table.put(&to, [Rule::new("private addresses are not for the public side").drop()]);
    table.put(
        &of_segment("left", segment),
        [
            Rule::new("answers").on(KNOWN).leave(),
            // Would leave untranslated.
            Rule::new("no part of any connection").on("-m conntrack --ctstate INVALID,UNTRACKED").drop(),
            Rule::new("private addresses are not the public side's").call("within"),
            Rule::new("out to the public side").on(format!("-o {uplink}")).leave(),
            Rule::new("the node's other networks are not the instances'").drop(),
        ],
    );
}

/// Judges what an instance is to get.
fn put_received(table: &mut Table, network: &Network, segment: &Segment) {
    let chain = of_segment("gets", segment);
    table.put(&chain, [Rule::new("answers").on(KNOWN).leave()]);
    for gateway in gateways_of(network, &segment.vpc) {
        // No instance may claim its address. From outside one may come, but only by way of an elastic IP.
        let from = Rule::new("from the gateway itself").on(format!("-s {gateway}"));
        table.put(&chain, [from.on(not(TRANSLATED)).leave()]);
    }
    table.put(&chain, [Rule::new("no part of any connection").on(INVALID).drop()]);
    for interface in network.interfaces_of(&segment.id) {
        let own = format!("{DENIED_IN}{:08x}", interface.mark.get());
        let to = |held| Rule::new(interface.id.to_string()).on(format!("-d {held}")).go(&own);
        table.put(&chain, interface.addresses().map(to));
        table.put(&own, networks_of(network, &segment.vpc).into_iter().map(|inside| nobody_outside(network, inside)));
        groups::put_inbound(table, interface, &own);
    }
    table.put(&chain, [Rule::new("it is for nobody").drop()]);
}

/// A group's rule for a network of the VPC would take who comes from outside with such an address for a neighbour. The node itself calls by elastic IP too.
fn nobody_outside(network: &Network, inside: Ipv4Net) -> Rule {
    let from = Rule::new("an address of the VPC's is nobody's outside").on(TRANSLATED).on(FROM_NO_VPC);
    let nodes = network.node_addresses.iter().filter(|node| inside.contains(*node));
    nodes
        .fold(from.on(format!("-s {inside}")), |rule, node| rule.on(format!("-m conntrack ! --ctorigsrc {node}")))
        .drop()
}

fn put_post(table: &mut Table, uplink: &LinkName, network: &Network) {
    table.put(
        "post",
        [
            Rule::new("out of an instance").on(format!("-o {uplink}")).on("-m connmark ! --mark 0").call("count"),
            Rule::new("between elastic IPs").on(HAIRPIN).call("count"),
        ],
    );
    table.put("count", []);
    for vpc in network.vpcs.values() {
        for elastic in elastic_ips_of(network, *vpc) {
            let rule = || Rule::new(format!("{ELASTIC_OUT}{}", elastic.public)).on(format!("-s {}", elastic.private));
            table.put("count", [rule().on(FIRST_WAY).on(opened_from(*vpc)), rule().on(ANSWERS).on(opened_to(*vpc))]);
        }
    }
    for segment in network.segments.values() {
        let received = of_segment("gets", segment);
        table.put("post", [Rule::new("to an instance").on(to_bridge(segment)).go(&received)]);
    }
}
