//! VPCs: how packets of two that have the same addresses are kept apart.
//!
//! ```text
//!  from a bridge ──▶ [zones]      which zone are the connection's addresses in?       before conntrack, and before fragments are put together
//!                       │ (conntrack)
//!                       │ [arrived]    drop answers from who was not asked; mark with the VPC to be routed in (which_vpc)
//!                       │ [elastic_in] the first packet to an elastic IP: mark it and its connection with that one's VPC
//!                       └ routing: `ip rule fwmark N lookup N`, else the node's own tables
//! ```
//!
//! **Zones.** Conntrack knows a connection by its addresses and ports, once as its first packet has them and once as its answers do, and each of the two is
//! in a zone. Addresses that mean something only within a VPC are in the zone of its number, public ones in zone 0:
//!
//! | connection | first packet's | answers' |
//! |---|---|---|
//! | within a VPC, with its gateway | VPC | VPC |
//! | to an elastic IP from outside | 0 | its VPC |
//! | out as an elastic IP | VPC | VPC: they come to the elastic IP, which tells the zone |
//! | out as the node | VPC | 0: they come to the node's address, which does not |
//! | to an elastic IP of this node | VPC | 0: what it is answered to is an elastic IP or the node's address |
//! | the node's own, to the public side | 0 | 0 |
//!
//! So two VPCs share an entry's addresses only in the fourth and fifth, where the source is translated, and the kernel picks another port when one is taken.
//! Where answers are in zone 0, an instance with the address of who was asked, or one whose source nobody checks, could write one, be it to another VPC or to
//! the node itself; `answered` lets it only where the connection was opened to an elastic IP of its VPC.
//!
//! **Who asked and who was asked** is kept with the connection: the zone of its first packet is the VPC that opened it, its mark the VPC of the elastic
//! IP that it was opened to. Each packet is marked for the way that it goes: to where the connection was opened to, or back to where it was opened from.
//!
//! Where the bridge knows connections it sees packets before the table for IPv4 does, so the zones are chosen there by the same rules.

use std::borrow::Cow;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use nftnl::{ChainType, Hook, ProtoFamily};

use super::ipv4::MANGLE;
use super::{DENIED_IN, EIP_IN, EIP_OUT, EIP_VPC, ETHER_IPV4, base, chain, map, set};
use crate::api::METADATA_ADDRESS;
use crate::desired::{Network, Segment, VpcId, VpcNumber};
use crate::nft::contents::{Contents, address, number, with_mac};
use crate::nft::expr::Direction::{Original, Reply};
use crate::nft::layout::{Chain, Set, Table, Type};
use crate::nft::rule::Field::{
    AnswersZone, ConnectionMark, ConnectionVpc, EtherDestination, InputName, Ipv4Destination, Ipv4Source, Mark, Number,
    OutputName,
};
use crate::nft::rule::Rule;

/// `NF_IP_PRI_RAW_BEFORE_DEFRAG`: fragments are put together zone by zone (`include/uapi/linux/netfilter_ipv4.h`).
const BEFORE_FRAGMENTS_MEET: i32 = -450;
/// On a bridge: after anti-spoofing and limits, before connections are known (-200).
const BEFORE_CONNTRACK: i32 = -250;

// --- sets and maps; those that the table `bridge` has too are keyed by taps and trunk ports there ---

/// Link to the number of its VPC.
pub const VPC_OF: Set = map("vpc_of", 80, &[Type::LinkName], Type::Number);
/// Link with its gateway's MAC to the chain of its VPC. A frame to another MAC is not routed here.
pub const DOORS: Set = map("doors", 81, &[Type::LinkName, Type::Ether], Type::Verdict);
/// The node's own addresses on the public side.
pub const NODE: Set = set("node_addresses", 83, &[Type::Ipv4]);
/// Bridge with the number of its VPC.
pub const SIDES: Set = set("sides", 84, &[Type::LinkName, Type::Number]);
/// VPC to the address that instances without an elastic IP have for those that they reach by one on this node.
pub const NODE_FOR: Set = map("node_for", 86, &[Type::Number], Type::Ipv4);
/// Bridge with an address on it to the mark of the interface here that holds it.
pub const HOLDERS: Set = map("holders", 87, &[Type::LinkName, Type::Ipv4], Type::Number);

/// VPC to the chain that drops what claims to come from within it.
pub const INSIDE: Set = map("inside", 88, &[Type::Number], Type::Verdict);

pub fn ipv4_sets() -> Vec<Set> {
    vec![VPC_OF, DOORS, NODE, SIDES, NODE_FOR, HOLDERS, INSIDE]
}

/// What the table `bridge` has to choose zones by, beside [`VPC_OF`].
pub fn bridge_sets() -> Vec<Set> {
    vec![DOORS, NODE, EIP_IN, EIP_OUT]
}

pub fn ipv4_chains() -> [Chain; 6] {
    [zone_of_sender(&EIP_VPC), zones(), zones_of_node(), answered(), which_vpc(), home()]
}

/// Where the bridge knows connections.
pub fn bridge_chains() -> [Chain; 2] {
    let rule = Rule::new("in its VPC's zone, or its answers in none").ether_type(ETHER_IPV4).jump("zone_of_sender");
    [zone_of_sender(&EIP_IN), chain("zones", base(ChainType::Filter, Hook::PreRouting, BEFORE_CONNTRACK), vec![rule])]
}

/// `elastic` is the map of all elastic IPs that counts what is sent to them, where the table has that.
fn zone_of_sender(elastic: &Set) -> Chain {
    let first_packets = |rule: Rule| rule.zone_by(&[InputName], &VPC_OF, Some(Original)).accept();
    chain(
        "zone_of_sender",
        None,
        vec![
            first_packets(Rule::new("to an elastic IP").known(&[Ipv4Destination], elastic)),
            first_packets(Rule::new("answers whom it knows as the node").found(&[Ipv4Destination], &NODE)),
            Rule::new("by its VPC's networks").jump_by(&[InputName, EtherDestination], &DOORS),
            Rule::new("stays on its segment").zone_by(&[InputName], &VPC_OF, None),
        ],
    )
}

/// The chain of a VPC: what stays in it, and what leaves it as an elastic IP.
fn within(network: &Network, vpc: &VpcId, vpc_number: VpcNumber) -> Chain {
    let all = |rule: Rule| rule.zone(Number(vpc_number.get()), None).accept();
    let mut rules: Vec<Rule> = networks_of(network, vpc)
        .into_iter()
        .map(|inside| all(Rule::new(format!("within {inside}")).within(Ipv4Destination, inside)))
        .collect();
    let own = Rule::new("out as its elastic IP").known(&[Number(vpc_number.get()), Ipv4Source], &EIP_OUT);
    rules.push(all(own));
    rules.push(Rule::new("out as the node").zone(Number(vpc_number.get()), Some(Original)).accept());
    Chain { name: Cow::Owned(chain_of(vpc)), base: None, rules }
}

fn chain_of(vpc: &VpcId) -> String {
    format!("within_{vpc}")
}

/// The VPC's networks as few as they can be told, and the one in which each gateway's services are.
fn networks_of(network: &Network, vpc: &VpcId) -> Vec<Ipv4Net> {
    let segments = network.segments.values().filter(|segment| segment.vpc == *vpc);
    let mut networks = vec![Ipv4Net::new_assert(METADATA_ADDRESS, 16).trunc()];
    networks.extend(segments.flat_map(|segment| segment.vpc_networks.iter().copied().chain([segment.network])));
    Ipv4Net::aggregate(&networks)
}

/// The chain for what comes to an instance of the VPC by way of an elastic IP: from outside, with no address of the VPC's, or its groups' rules for networks
/// would take it for a neighbour's.
fn inside(network: &Network, vpc: &VpcId) -> Chain {
    let rule = |network| {
        let rule = Rule::new(format!("outside, nobody is within {network}")).within(Ipv4Source, network);
        rule.found(&[Mark], &DENIED_IN).drop()
    };
    let rules = networks_of(network, vpc).into_iter().map(rule).collect();
    Chain { name: Cow::Owned(inside_of(vpc)), base: None, rules }
}

fn inside_of(vpc: &VpcId) -> String {
    format!("inside_{vpc}")
}

/// The node itself calls by elastic IP too, and whoever turns round on it has its address.
pub fn not_from_inside() -> Rule {
    Rule::new("an address of the VPC's is nobody's outside")
        .through_elastic_ip()
        .not_found(&[Ipv4Source], &NODE)
        .jump_by(&[ConnectionMark], &INSIDE)
}

/// The chain that drops what is for an address of any VPC.
pub const WITHIN_ANY: &str = "within_any";

/// Where a packet comes that is about to leave for the public side: an address of another VPC is nobody's there, nor is one of a part of its own VPC
/// that this node does not reach.
fn within_any(network: &Network) -> Chain {
    let networks: Vec<Ipv4Net> = network.vpcs.keys().flat_map(|vpc| networks_of(network, vpc)).collect();
    let rule = |inside| Rule::new(format!("within {inside}")).within(Ipv4Destination, inside).drop();
    let rules = Ipv4Net::aggregate(&networks).into_iter().map(rule).collect();
    chain(WITHIN_ANY, None, rules)
}

/// Adds the chains of all VPCs.
pub fn grow(table: &mut Table, network: &Network) {
    table.chains.extend(network.vpcs.iter().map(|(vpc, number)| within(network, vpc, *number)));
    if table.family == ProtoFamily::Ipv4 {
        table.chains.push(within_any(network));
        table.chains.extend(network.vpcs.keys().map(|vpc| inside(network, vpc)));
    }
}

fn zones() -> Chain {
    chain(
        "zones",
        base(ChainType::Filter, Hook::PreRouting, BEFORE_FRAGMENTS_MEET),
        vec![
            Rule::new("from an instance").comes_from_segment().goto("zone_of_sender"),
            Rule::new("to an elastic IP from outside").zone_by(&[Ipv4Destination], &EIP_VPC, Some(Reply)),
        ],
    )
}

/// What the node itself sends to an instance is the gateway's, in the VPC's zone, but for what goes by way of an elastic IP.
fn zones_of_node() -> Chain {
    chain(
        "zones_of_node",
        base(ChainType::Filter, Hook::Out, BEFORE_FRAGMENTS_MEET),
        vec![
            Rule::new("to an elastic IP").known(&[Ipv4Destination], &EIP_IN).accept(),
            Rule::new("as the gateway").zone_by(&[OutputName], &VPC_OF, None),
        ],
    )
}

/// Marks what comes from the public side.
pub fn from_outside() -> [Rule; 3] {
    let answer = |purpose| Rule::new(purpose).goes(Reply).vpc_in(ConnectionVpc);
    let [to, back] = by_connection();
    [to.accept(), answer("an answer from outside, where an instance was asked").vpc_in(ConnectionMark).drop(), back]
}

/// The chain for packets from a segment that were judged; they do not come back. Until here, a mark said who had sent a packet.
pub const WHICH_VPC: &str = "which_vpc";

fn which_vpc() -> Chain {
    chain(
        WHICH_VPC,
        None,
        vec![
            Rule::new("an answer").goes(Reply).goto("answered"),
            Rule::new("to the VPC of its elastic IP").mark_with_vpc(ConnectionMark).accept(),
            Rule::new("in its own VPC").mark_by(&[InputName], &VPC_OF),
            Rule::new("on its way").accept(),
        ],
    )
}

/// An instance's answers.
fn answered() -> Chain {
    chain(
        "answered",
        None,
        vec![
            Rule::new("an answer from a VPC that was not asked")
                .zero(AnswersZone)
                .not_found(&[InputName, ConnectionMark], &SIDES)
                .drop(),
            Rule::new("back to the VPC that asked").mark_with_vpc(ConnectionVpc).accept(),
            Rule::new("back to outside, or to the node").zero(ConnectionVpc).mark_with(Number(0)).accept(),
            Rule::new("in its own VPC").mark_by(&[InputName], &VPC_OF),
            Rule::new("on its way").accept(),
        ],
    )
}

fn by_connection() -> [Rule; 2] {
    [
        Rule::new("to the VPC of its elastic IP").goes(Original).mark_with_vpc(ConnectionMark),
        Rule::new("back to the VPC that asked").goes(Reply).mark_with_vpc(ConnectionVpc),
    ]
}

/// What the node itself sends on a connection of others: what a program says to an elastic IP, and errors (ICMP), which the kernel would route as it
/// did the packet that they are about (`fwmark_reflect`) and not back to where that came from.
fn home() -> Chain {
    let [to, back] = by_connection();
    let back = Rule { exprs: [Rule::new("").protocol(libc::IPPROTO_ICMP).exprs, back.exprs].concat(), ..back };
    chain("home", base(ChainType::Route, Hook::Out, MANGLE), vec![to, back])
}

impl Contents {
    pub(in crate::nft) fn add_vpcs(&mut self, network: &Network) {
        for (id, vpc) in &network.vpcs {
            self.put(ProtoFamily::Ipv4, &INSIDE, number(vpc.get()), inside_of(id).into_bytes());
            if let Some(node) = network.node_addresses.first() {
                self.put(ProtoFamily::Ipv4, &NODE_FOR, number(vpc.get()), address(*node));
            }
        }
        for node in &network.node_addresses {
            self.put_both(&NODE, address(*node), Vec::new());
        }
        for segment in network.segments.values() {
            let vpc = network.vpc_number(&segment.id);
            let side = [segment.bridge.padded().as_slice(), &number(vpc.get())].concat();
            self.put_ip(&SIDES, side);
            self.put(ProtoFamily::Ipv4, &VPC_OF, segment.bridge.padded().to_vec(), number(vpc.get()));
            let chain = chain_of(&segment.vpc).into_bytes();
            self.put(ProtoFamily::Ipv4, &DOORS, with_mac(&segment.bridge, segment.gateway_mac), chain.clone());
            let taps = network.interfaces_of(&segment.id).map(|interface| &interface.tap);
            for port in taps.chain(segment.trunk.as_ref().map(|trunk| &trunk.port)) {
                self.put(ProtoFamily::Bridge, &VPC_OF, port.padded().to_vec(), number(vpc.get()));
                self.put(ProtoFamily::Bridge, &DOORS, with_mac(port, segment.gateway_mac), chain.clone());
            }
            for interface in network.interfaces_of(&segment.id) {
                for held in interface.addresses().map(|ip| on_bridge(segment, ip)) {
                    self.put(ProtoFamily::Ipv4, &HOLDERS, held, number(interface.mark.get()));
                }
            }
        }
    }
}

/// A bridge's name and an address on it, as they lie in registers.
pub(super) fn on_bridge(segment: &Segment, held: Ipv4Addr) -> Vec<u8> {
    [segment.bridge.padded().as_slice(), &address(held)].concat()
}
