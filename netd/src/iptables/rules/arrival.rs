//! The table `raw`: whose a packet is, before its connection is known.
//!
//! Anti-spoofing, and the conntrack zone that the packet's addresses are in (what zones are for is in `nft/rules/vpcs.rs`). A rule can put a packet into a zone
//! once; the first does.

use std::net::Ipv4Addr;

use super::{
    Rule, Table, beyond, elastic_ips_of, for_pools, from_bridge, mark, networks_of, of_segment, of_vpc, to_bridge,
    vpc_of,
};
use crate::desired::{Interface, MacAddress, Network, Segment, VpcId, VpcNumber};
use crate::limits::Limits;

/// What the chain of an interface's own packets is called, with its tap; its rules that drop count what is in another's name.
pub const SPOOFED: &str = "as-";
/// The purpose of the rule that does not count those.
pub const TOO_MUCH_DHCP: &str = "too much DHCP";
/// How the purpose of a rule that counts packets to an elastic IP begins.
pub const ELASTIC_IN: &str = "to elastic IP ";

pub fn table(limits: &Limits, network: &Network) -> Table {
    let mut table = Table::new("raw", &[("PREROUTING", "raw-in"), ("OUTPUT", "raw-out")]);
    for segment in network.segments.values() {
        table.put("raw-in", [Rule::new("from an instance").on(from_bridge(segment)).go(&of_segment("from", segment))]);
        put_segment(&mut table, limits, network, segment);
    }
    table.put("raw-in", for_pools(network, "to an elastic IP from outside").map(|rule| rule.call("elastic")));
    table.put("known", []);
    table.put("elastic", []);
    for elastic in network.elastic_ips.values() {
        let vpc = network.vpc_number(&elastic.segment);
        let rule = || Rule::new(format!("{ELASTIC_IN}{}", elastic.public)).on(format!("-d {}", elastic.public));
        table.put("elastic", [rule().then(format!("CT --zone-reply {}", vpc.get()))]);
        table.put("known", [rule().then("CT --zone-orig mark")]);
    }
    table.put("both", [Rule::new("all of the connection").then("CT --zone mark")]);
    table.put("first", [Rule::new("its first packet's addresses").then("CT --zone-orig mark")]);
    for (vpc, number) in &network.vpcs {
        put_zone(&mut table, network, vpc, *number);
    }
    put_node(&mut table, network);
    table
}

/// Who is known on a segment.
fn put_segment(table: &mut Table, limits: &Limits, network: &Network, segment: &Segment) {
    let chain = of_segment("from", segment);
    table.put(&chain, []);
    for interface in network.interfaces_of(&segment.id) {
        let own = format!("{SPOOFED}{}", interface.tap);
        table.put(&chain, [Rule::new(interface.id.to_string()).on(from_mac(interface.mac)).go(&own)]);
        table.put(&own, as_itself(interface, limits, &of_vpc("zone", vpc_of(network, segment))));
    }
    table.put(&chain, [Rule::new("of nobody here").drop()]);
}

fn from_mac(mac: MacAddress) -> String {
    format!("-m mac --mac-source {mac}")
}

/// `chaddr` of a DHCP message (RFC 2131, section 2): 28 bytes behind the UDP header, whose place the header of IPv4 tells.
fn for_client(mac: MacAddress, is: bool) -> String {
    let [a, b, c, d, e, f] = mac.octets();
    let not = if is { "" } else { "! " };
    format!("-m u32 {not}--u32 \"0>>22&0x3C@36=0x{a:02x}{b:02x}{c:02x}{d:02x}&&0>>22&0x3C@40>>16=0x{e:02x}{f:02x}\"")
}

/// What is not provably the interface's own falls to the last rule.
fn as_itself(interface: &Interface, limits: &Limits, zone: &str) -> Vec<Rule> {
    let to_server = "-p udp -m udp --dport 67";
    let broadcast = format!("-s {} -d {}", Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST);
    let too_much = beyond(limits.dhcp_rate, "", &format!("dhcp-{}", interface.tap));
    let mut rules = vec![
        Rule::new(TOO_MUCH_DHCP).on(to_server).on(too_much).drop(),
        Rule::new("DHCP request in its own name")
            .on(broadcast)
            .on("-p udp -m udp --sport 68 --dport 67")
            .on(for_client(interface.mac, true))
            .go(zone),
        Rule::new("instances do not serve DHCP").on("-p udp -m udp --sport 67").drop(),
        Rule::new("DHCP request in another's name").on(to_server).on(for_client(interface.mac, false)).drop(),
    ];
    rules.extend(interface.addresses().map(|own| Rule::new("from its own address").on(format!("-s {own}")).go(zone)));
    rules.push(Rule::new("in another's name").drop());
    rules
}

fn put_zone(table: &mut Table, network: &Network, vpc: &VpcId, number: VpcNumber) {
    let chain = of_vpc("zone", number);
    table.put(&chain, [Rule::new("in its own VPC").then(mark(number.get()))]);
    table.put(&chain, for_pools(network, "perhaps to an elastic IP here").map(|rule| rule.call("known")));
    for node in &network.node_addresses {
        table.put(&chain, [Rule::new("answers whom it knows as the node").on(format!("-d {node}")).go("first")]);
    }
    for inside in networks_of(network, vpc) {
        table.put(&chain, [Rule::new("stays in its VPC").on(format!("-d {inside}")).go("both")]);
    }
    for elastic in elastic_ips_of(network, number) {
        table.put(&chain, [Rule::new("out as its elastic IP").on(format!("-s {}", elastic.private)).go("both")]);
    }
    table.put(&chain, [Rule::new("out as the node").go("first")]);
}

/// What the node itself sends to an instance is the gateway's, in the VPC's zone, but for what goes by way of an elastic IP.
fn put_node(table: &mut Table, network: &Network) {
    table.put("raw-out", for_pools(network, "to an elastic IP").map(Rule::leave));
    for segment in network.segments.values() {
        let zone = format!("CT --zone {}", vpc_of(network, segment).get());
        table.put("raw-out", [Rule::new("as the gateway").on(to_bridge(segment)).then(zone)]);
    }
}
