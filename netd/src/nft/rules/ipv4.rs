//! The table for IPv4: what is routed, what is for the node, and what is translated on the way.

use std::net::Ipv4Addr;

use nftnl::{ChainType, Hook, ProtoFamily};

use super::groups::{ALLOWED_IN, ALLOWED_OUT};
use super::vpcs::WHICH_VPC;
use super::{
    DHCP_SERVER, EIP_IN, EIP_OUT, EIP_OUT_COUNT, EIP_VPC, GATEWAYS, INSTANCES, ROUTED, base, chain, groups, limits,
    trunk, vpcs,
};
use crate::api::METADATA_ADDRESS;
use crate::backend::PORTS_OF_INSTANCES;
use crate::desired::InterfaceMark;
use crate::limits::Limits;
use crate::nft::TABLE;
use crate::nft::expr::Header;
use crate::nft::layout::{Chain, Table};
use crate::nft::rule::Field::{ConnectionVpc, InputName, Ipv4Destination, Ipv4Source, Number, OutputName};
use crate::nft::rule::{Rule, State};

// Priorities of hooks (`include/uapi/linux/netfilter_ipv4.h`).
/// Of the type `route`.
pub const MANGLE: i32 = -150;
/// A packet's connection is known, and it is still as the instance sent it.
pub const AS_SENT: i32 = -120;
const NAT_DESTINATION: i32 = -100;
pub const FILTER: i32 = 0;
const NAT_SOURCE: i32 = 100;
/// The packet is as the instance will get it.
const AS_RECEIVED: i32 = 140;

const DNS: u16 = 53;
const HTTP: u16 = 80;

pub fn table(uplink: &str, limits: &Limits) -> Table {
    let mut table = Table {
        family: ProtoFamily::Ipv4,
        name: TABLE,
        sets: vec![EIP_IN, EIP_OUT, EIP_VPC, EIP_OUT_COUNT, INSTANCES, GATEWAYS, ROUTED],
        chains: vec![
            groups::judge_outbound(),
            groups_out(),
            sent(),
            arrived(),
            elastic_in("elastic_in", Hook::PreRouting),
            // So that a program on the node itself reaches an elastic IP too.
            elastic_in("elastic_local", Hook::Out),
            node_from_instance(),
            node_input(),
            node_output(),
            ways(),
            to_remote(),
            to_instance(),
            from_instance_routed(uplink),
            forward(),
            elastic_out(uplink),
            groups::judge_inbound(),
            groups_in(),
            count_out(),
            leaving(),
        ],
        flowtable: None,
    };
    table.sets.extend(vpcs::ipv4_sets());
    table.chains.extend(vpcs::ipv4_chains());
    table.sets.extend(groups::sets());
    table.sets.extend(limits::connection_sets(limits));
    table.chains.extend(limits::connections(limits, [|rule| rule.goto(WHICH_VPC), |rule| rule.goto(COUNT_OUT)]));
    table.sets.extend(trunk::sets(table.family));
    table
}

/// Where a packet comes at last, with its source as it leaves.
const COUNT_OUT: &str = "count_out";

fn counted_out() -> Rule {
    Rule::new("count packets from an elastic IP").found(&[Ipv4Source], &EIP_OUT_COUNT)
}

fn count_out() -> Chain {
    chain(COUNT_OUT, None, vec![counted_out(), Rule::new("all others").accept()])
}

fn elastic_in(name: &'static str, hook: Hook) -> Chain {
    chain(
        name,
        base(ChainType::Nat, hook, NAT_DESTINATION),
        vec![Rule::new("elastic IP to its instance").dnat_by(&EIP_IN)],
    )
}

/// What instances may ask of the node: nothing but what a subnet's gateway answers.
fn node_from_instance() -> Chain {
    chain(
        "node_from_instance",
        None,
        vec![
            Rule::new("answers").state(State::EstablishedOrRelated).accept(),
            Rule::new("metadata service").destination_is(METADATA_ADDRESS).tcp_to(HTTP).accept(),
            Rule::new("DHCP").destination_is(Ipv4Addr::BROADCAST).udp_to(DHCP_SERVER).accept(),
            Rule::new("DHCP of a lease that is held")
                .found(&[ConnectionVpc, Ipv4Destination], &GATEWAYS)
                .udp_to(DHCP_SERVER)
                .accept(),
            Rule::new("DNS").found(&[ConnectionVpc, Ipv4Destination], &GATEWAYS).udp_to(DNS).accept(),
            Rule::new("DNS over TCP").found(&[ConnectionVpc, Ipv4Destination], &GATEWAYS).tcp_to(DNS).accept(),
            Rule::new("ping the gateway")
                .found(&[ConnectionVpc, Ipv4Destination], &GATEWAYS)
                .protocol(libc::IPPROTO_ICMP)
                .bytes_are(Header::Transport, 0, &[8])
                .accept(),
            Rule::new("the node is not the instances' to reach").drop(),
        ],
    )
}

/// From the public side no gateway is to be reached: the node has their addresses in the VPCs' routing tables only.
fn node_input() -> Chain {
    let from_instance = Rule::new("from an instance").comes_from_segment().goto("node_from_instance");
    chain("node_input", base(ChainType::Filter, Hook::In, FILTER), vec![from_instance, trunk::to_tunnel()])
}

/// A packet whose connection is known, and which is still as it was sent.
fn arrived() -> Chain {
    let mut rules = vec![Rule::new("from an instance").comes_from_segment().goto("sent")];
    rules.extend(vpcs::from_outside());
    chain("arrived", base(ChainType::Filter, Hook::PreRouting, AS_SENT), rules)
}

fn sent() -> Chain {
    chain(
        "sent",
        None,
        vec![
            Rule::new("no part of what there is").not_state(State::Established).goto("groups_out"),
            Rule::new("of a connection that there is").goto(WHICH_VPC),
        ],
    )
}

/// Judges what an instance sends, before anything of it is translated: a group's rules speak of what the instance sees. Its frames were
/// marked with who it is (`bridge.rs`). What a subnet's gateway answers is no group's to forbid, as in EC2.
fn groups_out() -> Chain {
    chain(
        "groups_out",
        None,
        vec![
            Rule::new("from another node, which has judged it").unmarked().goto(WHICH_VPC),
            Rule::new("about a connection that there is").state(State::Related).goto(ALLOWED_OUT),
            Rule::new("the gateway's services").found(&[ConnectionVpc, Ipv4Destination], &GATEWAYS).goto(ALLOWED_OUT),
            Rule::new("DHCP").destination_is(Ipv4Addr::BROADCAST).udp_to(DHCP_SERVER).goto(ALLOWED_OUT),
            Rule::new("no part of any connection").state(State::Invalid).drop(),
            Rule::new("its groups decide").jump("judge_outbound"),
        ],
    )
}

/// A packet as it leaves, with everything translated.
fn leaving() -> Chain {
    let judged =
        Rule::new("to an instance, and no part of what there is").goes_to_segment().not_state(State::Established);
    chain(
        "leaving",
        base(ChainType::Filter, Hook::PostRouting, AS_RECEIVED),
        vec![judged.goto("groups_in"), counted_out()],
    )
}

/// Judges what an instance is to get, after everything was translated.
fn groups_in() -> Chain {
    chain(
        "groups_in",
        None,
        vec![
            Rule::new("about a connection that there is").state(State::Related).goto(ALLOWED_IN),
            // Taps take no packet that claims a gateway's address. From outside one may come, but only by way of an elastic IP.
            Rule::new("from the gateway itself")
                .not_through_elastic_ip()
                .found(&[ConnectionVpc, Ipv4Source], &GATEWAYS)
                .goto(ALLOWED_IN),
            Rule::new("no part of any connection").state(State::Invalid).drop(),
            Rule::new("to another node, which judges it").unmarked().goto(COUNT_OUT),
            vpcs::not_from_inside(),
            Rule::new("its groups decide").jump("judge_inbound"),
        ],
    )
}

/// What the node itself sends to an instance is judged by that instance's groups too, unless it is the gateway's.
fn node_output() -> Chain {
    chain("node_output", base(ChainType::Filter, Hook::Out, FILTER), for_its_holder().into())
}

/// Marks a packet to an instance with the interface that it is to be judged for. A mark means something to others, too (`ip rule`, other programs'
/// tables), so no other goes further than to routing.
fn for_its_holder() -> [Rule; 2] {
    [
        Rule::new("it is for nobody").goes_to_segment().mark_with(Number(InterfaceMark::NOBODY.get())),
        Rule::new("it is for who has the address").mark_by(&[OutputName, Ipv4Destination], &vpcs::HOLDERS),
    ]
}

/// What is routed is marked with its VPC no more: a mark means something to others too.
fn of_connection() -> Rule {
    Rule::new("of a connection that there is").state(State::Established).mark_with(Number(0)).accept()
}

/// Whom a packet is for, and then the way to there.
fn to_instance() -> Chain {
    let [nobody, holder] = for_its_holder();
    chain(
        "to_instance",
        None,
        vec![of_connection(), holder.goto("ways"), trunk::for_nobody_here().goto("to_remote"), nobody.goto("ways")],
    )
}

fn to_remote() -> Chain {
    let rules = vec![
        Rule::new("to an instance of the VPC on another node").found(&[InputName, OutputName], &ROUTED).accept(),
        Rule::new("by way of an elastic IP, or not at all").goto("ways"),
    ];
    chain("to_remote", None, rules)
}

/// Ways that there are; whether a connection may take one is for `groups_in`.
fn ways() -> Chain {
    chain(
        "ways",
        None,
        vec![
            Rule::new("about a connection that there is").state(State::Related).accept(),
            Rule::new("no part of any connection").state(State::Invalid).drop(),
            Rule::new("a source that would not be translated stays in its VPC")
                .comes_from_segment()
                .through_elastic_ip()
                .not_found(&[ConnectionVpc, Ipv4Source], &INSTANCES)
                .drop(),
            Rule::new("through an elastic IP").through_elastic_ip().accept(),
            Rule::new("from a segment of the same VPC").found(&[InputName, OutputName], &ROUTED).accept(),
            Rule::new("private addresses are not for the public side").drop(),
        ],
    )
}

fn from_instance_routed(uplink: &str) -> Chain {
    chain(
        "from_instance",
        None,
        vec![
            of_connection(),
            Rule::new("it is routed").mark_with(Number(0)),
            Rule::new("about a connection that there is").state(State::Related).accept(),
            Rule::new("no part of any connection").state(State::Invalid).drop(),
            trunk::from_tunnel(),
            Rule::new("a source that would not be translated stays here")
                .not_found(&[ConnectionVpc, Ipv4Source], &INSTANCES)
                .drop(),
            Rule::new("private addresses are not the public side's").jump(vpcs::WITHIN_ANY),
            Rule::new("out to the public side").output_is(uplink).accept(),
            Rule::new("the node's other networks are not the instances'").drop(),
        ],
    )
}

fn forward() -> Chain {
    chain(
        "forward",
        base(ChainType::Filter, Hook::Forward, FILTER),
        vec![
            Rule::new("to an instance").goes_to_segment().goto("to_instance"),
            Rule::new("from an instance").comes_from_segment().goto("from_instance"),
        ],
    )
}

/// An instance appears outside as its elastic IP, or as the node when it has none. The same holds
/// for a packet that turns round on this node ("hairpin": an instance calls another, or itself, by
/// an elastic IP): untranslated, the answer would go straight to the caller, from an address that it
/// never called; and between VPCs a private address means nothing.
fn elastic_out(uplink: &str) -> Chain {
    chain(
        "elastic_out",
        base(ChainType::Nat, Hook::PostRouting, NAT_SOURCE),
        vec![
            Rule::new("instance out as its elastic IP")
                .output_is(uplink)
                .snat_by(&[ConnectionVpc, Ipv4Source], &EIP_OUT),
            Rule::new("instance out as the node")
                .output_is(uplink)
                .found(&[ConnectionVpc, Ipv4Source], &INSTANCES)
                .masquerade(PORTS_OF_INSTANCES),
            Rule::new("hairpin as its elastic IP").through_elastic_ip().snat_by(&[ConnectionVpc, Ipv4Source], &EIP_OUT),
            Rule::new("hairpin as the node").through_elastic_ip().snat_by(&[ConnectionVpc], &vpcs::NODE_FOR),
            Rule::new("a node without an address has none to lend").through_elastic_ip().vpc_in(ConnectionVpc).drop(),
        ],
    )
}
