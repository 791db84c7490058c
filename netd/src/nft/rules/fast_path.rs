//! The fast path: how a connection that goes on passes by the rules.
//!
//! ```text
//!   uplink ──▶ [counted_in] ──▶ flow table ──── a connection that it knows ───▶ neighbour, bridge, tap
//!                                   └─ any other: the chains for IPv4, routing, …, [flows]: into the flow table, if it is to go on
//!   tap ──▶ [bridge: from_instance, limits] ──▶ segment's bridge ──▶ flow table ──▶ [counted_out] ──▶ uplink
//! ```
//!
//! Rules decide on the first packets of a connection. After them nothing is left to decide, and what its packets still cost is looking up routes and going through
//! chains. A *flow table* (`Documentation/networking/nf_flowtable.rst`) keeps the outcome: it takes a packet where its device hands it up, translates it, takes one
//! from its time to live, and sends it on.
//!
//! * **Who gets in**: TCP that is established, UDP that was answered for more than two seconds (the kernel calls both *assured*), between an instance and the public
//!   side or between segments of a VPC. A question and its answer are not worth an entry. `flows` is the last chain of those that see a routed packet, so that what
//!   a host's own rules forbid never comes to it.
//! * **Devices** are the uplink and the bridges, never taps: what an instance sends passes the table `bridge` (anti-spoofing, limits) before its bridge hands it up, and
//!   what it gets leaves by the bridge too. A flow is known by the device that it comes by beside its addresses and ports, so that two VPCs with the same addresses do
//!   not meet, nor does a forged answer that comes from elsewhere: such a packet is a stranger to the flow table and is judged by the rules.
//! * **What the kernel hands back** to the rules: the end of a TCP connection, fragments, packets with options, those that are too large or whose time to live is over, all
//!   that belongs to a connection that was ended in conntrack (`../../conntrack.rs`) or whose route is no longer what it was. After 30 s of silence the entry goes, and
//!   the connection is the rules' again.
//! * **The way back** of a flow is looked up when it gets in, with the mark of the packet that brings it in. To the public side that is none; in a VPC it is the VPC's number.
//! * **Not hairpins**: their translation is twofold, and they are counted on the way.
//! * **Elastic IPs are counted at the uplink**, before the flow table for what comes and after all else for what leaves, since what it takes passes no rule of `ip`. Those
//!   rules count the rest, which neither comes nor leaves by the uplink.
//!
//! Whatever looks at *each* packet of a connection in the host's own rules for routed packets (quotas, accounting, marks) sees those of the fast path no more: that
//! is what `--fast-path off` is for. Packets of instances keep the mark of their interface there, which only traffic control on the uplink could see.

use std::collections::BTreeSet;

use nftnl::{ChainType, Hook, ProtoFamily};

use super::{EIP_IN, EIP_OUT_COUNT, EIP_VPC, ETHER_IPV4, chain, set, vpcs};
use crate::desired::Network;
use crate::nft::TABLE;
use crate::nft::contents::Contents;
use crate::nft::expr::Direction::Reply;
use crate::nft::layout::{Base, Chain, Flowtable, Set, Table, Type};
use crate::nft::rule::Field::{InputName, Ipv4Destination, Ipv4Source, Number, OutputName};
use crate::nft::rule::Rule;

/// Pairs of different bridges that are routed to one another.
const CROSSINGS: Set = set("crossings", 90, &[Type::LinkName, Type::LinkName]);

pub const FLOWTABLE: &str = "fast";
/// `NF_IP_PRI_LAST`.
const AFTER_ALL: i32 = i32::MAX;

// The family `netdev` numbers its hooks from 0 (`enum nf_dev_hooks`), and the library has names for those of `ip` alone.
const INGRESS: Hook = Hook::PreRouting;
const EGRESS: Hook = Hook::In;
/// Before the flow table.
const COUNTING: i32 = Flowtable::PRIORITY - 10;

/// Segments with a way into the flow table. The kernel tells its devices in one message of 32 kB.
const MOST_SEGMENTS: usize = 1024;

/// The table in the family of devices.
pub fn counting(uplink: &str) -> Table {
    let ipv4 = |purpose| Rule::new(purpose).ether_type(ETHER_IPV4);
    let counted_in = ipv4("count packets to an elastic IP").not_for_others().known(&[Ipv4Destination], &EIP_VPC);
    let counted_out = ipv4("count packets from an elastic IP").found(&[Ipv4Source], &EIP_OUT_COUNT);
    let at = |name, hook, rule| {
        let device = Some(uplink.to_owned());
        chain(name, Some(Base { kind: ChainType::Filter, hook, priority: COUNTING, device }), vec![rule])
    };
    Table {
        family: ProtoFamily::NetDev,
        name: TABLE,
        sets: vec![EIP_VPC, EIP_OUT_COUNT],
        chains: vec![at("counted_in", INGRESS, counted_in), at("counted_out", EGRESS, counted_out)],
        flowtable: None,
    }
}

/// Adds the flow table, and what leads to it, to the table of IPv4.
pub fn grow(table: &mut Table, uplink: &str, network: &Network) {
    table.flowtable = Some(flowtable(uplink, network));
    table.sets.push(CROSSINGS);
    table.chains.push(flows(uplink));
    let outside = Rule::new("to an elastic IP, counted at the uplink").input_is(uplink);
    begin(table, "zones", outside.zone_by(&[Ipv4Destination], &EIP_IN, Some(Reply)).accept());
    begin(table, "leaving", Rule::new("counted at the uplink").output_is(uplink).accept());
}

fn flowtable(uplink: &str, network: &Network) -> Flowtable {
    let bridges = network.segments.values().map(|segment| segment.bridge.to_string());
    let devices: BTreeSet<String> = bridges.take(MOST_SEGMENTS).chain([uplink.to_owned()]).collect();
    Flowtable { name: FLOWTABLE, devices }
}

fn begin(table: &mut Table, name: &str, rule: Rule) {
    let found = table.chains.iter_mut().filter(|chain| chain.name == name);
    found.for_each(|chain| chain.rules.insert(0, rule.clone()));
}

fn flows(uplink: &str) -> Chain {
    let assured = |purpose| Rule::new(purpose).assured();
    let outside = assured("between an instance and the public side").input_is(uplink).goes_to_segment();
    // A frame that `br_netfilter` takes through the rules for IPv4 is not routed: it comes and leaves by the same bridge.
    let crossing = |purpose| assured(purpose).not_through_elastic_ip().found(&[InputName, OutputName], &CROSSINGS);
    let base = Base { kind: ChainType::Filter, hook: Hook::Forward, priority: AFTER_ALL, device: None };
    chain(
        "flows",
        Some(base),
        vec![
            outside.into_flowtable(FLOWTABLE),
            crossing("between segments of a VPC").mark_by(&[InputName], &vpcs::VPC_OF).into_flowtable(FLOWTABLE),
            crossing("it is routed").mark_with(Number(0)),
        ],
    )
}

/// What a kernel needs to have for a fast path: tables that are made and gone again.
pub fn needed() -> [Table; 2] {
    // The loopback device is in each network namespace.
    let mut ip = Table {
        family: ProtoFamily::Ipv4,
        name: super::PROBE,
        sets: vec![vpcs::VPC_OF, CROSSINGS],
        chains: vec![flows("lo")],
        flowtable: None,
    };
    ip.flowtable = Some(Flowtable { name: FLOWTABLE, devices: BTreeSet::from(["lo".to_owned()]) });
    [ip, Table { name: super::PROBE, ..counting("lo") }]
}

impl Contents {
    pub(in crate::nft) fn add_crossings(&mut self, network: &Network) {
        for segment in network.segments.values() {
            let others = network.segments.values().filter(|other| other.vpc == segment.vpc && other.id != segment.id);
            for other in others {
                self.put_ip(&CROSSINGS, [segment.bridge.padded(), other.bridge.padded()].concat());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bridging::Bridging;
    use crate::desired::testing;
    use crate::limits::Limits;
    use crate::nft::rules::{Node, tables};

    #[test]
    fn an_elastic_ip_is_counted_once() {
        let network = testing::network();
        let node = Node {
            uplink: "pub0".parse().unwrap(),
            bridging: Bridging::Conntrack,
            limits: Limits::default(),
            fast_path: true,
        };
        let tables = tables(&node, &network, |_| true);
        let [ip, _, devices] = tables.as_slice() else { panic!("three tables") };
        for name in ["zones", "leaving"] {
            let chain = ip.chains.iter().find(|chain| chain.name == name).unwrap();
            assert!(chain.rules[0].purpose.ends_with("counted at the uplink"), "{name}");
        }
        assert_eq!(devices.sets, [EIP_VPC, EIP_OUT_COUNT]);
        let bridges = network.segments.values().map(|segment| segment.bridge.to_string());
        assert_eq!(ip.flowtable.clone().unwrap().devices, bridges.chain(["pub0".to_owned()]).collect());
    }
}
