//! The rules: what happens to a packet.
//!
//! ```text
//!  instance ──tap──▶ [bridge: from_instance]  is it who it says it is?
//!                        │
//!                        ├─ to a neighbour on the segment ──▶ [groups of both] ──▶ its tap
//!                        └─ to the gateway's MAC
//!                              │ [zones]           whose addresses are these? (`vpcs.rs`)
//!                              │ [arrived]         may it send this, as it was sent (groups_out)? where is it to be routed (which_vpc)?
//!                              │ [elastic_in]      public destination → private
//!                              │ [node_input]      to the node: metadata, DHCP, ping; nothing else
//!                              │ [forward]         to_instance, from_instance
//!                              │ [flows]           does its connection go on by the fast path? (`fast_path.rs`)
//!                              │ [elastic_out]     private source → public, or masquerade
//!                              └ [leaving]         may the instance have this, as it gets it (groups_in)?
//!  other nodes ─trunk▶ [bridge: from_trunk]     is it of an instance that is there? (`trunk.rs`)
//! ```
//!
//! * `ipv4.rs`: the table for IPv4, which routed packets pass.
//! * `bridge.rs`: the table for frames: anti-spoofing, and what passes between neighbours.
//! * `groups.rs`, `folded.rs`: security groups, in both.
//! * `limits.rs`: how much one instance may use of what all share, in both.
//! * `vpcs.rs`: how VPCs with the same addresses are kept apart, in both.
//! * `trunk.rs`: what comes from other nodes and goes there, in both.
//! * `fast_path.rs`: how connections that there are pass by all that, and what is counted in a third table, that of devices, since they do.
//!
//! Rules name sets and maps and never an instance, so they are the same on every node but for the uplink's name, how the kernel can judge
//! between neighbours, a chain for each security group and VPC, and two where there is a trunk. What is in the sets is in `contents.rs`.
//!
//! **A packet of a connection that there is** is nearly every packet, so what it passes is as little as can be: one chain for each hook that the kernel has, in
//! which the first rules are for it. Whatever is decided once for a connection is decided for its first packet, in chains that this one does not come to. What
//! costs most is a chain at a hook of its own, and a link's name to be looked up: one chain that did both was a sixth of all that the rules cost a packet. So names
//! are looked up where it matters which link it is, and else a link is known for one of netd's by its group.
//!
//! Traffic that is not of netd's bridges or taps falls through every chain untouched: a host's other
//! networks are none of netd's business.

mod bridge;
pub mod fast_path;
pub mod folded;
mod groups;
mod ipv4;
pub mod limits;
mod trunk;
mod vpcs;

use std::borrow::Cow;

use nftnl::{ChainType, Hook, ProtoFamily};

use super::layout::{Base, Chain, Set, Table, Type};
use super::rule::Rule;
use crate::bridging::Bridging;
use crate::desired::{LinkName, MAX_GROUPS, Network, SecurityGroup};
use crate::limits::Limits;
pub use groups::{chain_of, members_of};

// --- sets and maps of the table `ip` ---

const fn set(name: &'static str, id: u32, key: &'static [Type]) -> Set {
    Set { name: Cow::Borrowed(name), id, key, value: None, counting: false, named: false, limit: None }
}

const fn map(name: &'static str, id: u32, key: &'static [Type], value: Type) -> Set {
    let mut map = set(name, id, key);
    map.value = Some(value);
    map
}

const fn counting(name: &'static str, id: u32, key: &'static [Type]) -> Set {
    let mut set = set(name, id, key);
    set.counting = true;
    set
}

const fn counting_map(name: &'static str, id: u32, key: &'static [Type], value: Type) -> Set {
    let mut map = map(name, id, key, value);
    map.counting = true;
    map
}

const fn by_group(name: &'static str, id: u32) -> Set {
    map(name, id, &[Type::Number], Type::Verdict)
}

/// Public address to the private one that it stands for, and its VPC.
pub const EIP_IN: Set = map("eip_in", 1, &[Type::Ipv4], Type::Place);
/// Private address of a VPC to the public one that it appears as.
pub const EIP_OUT: Set = map("eip_out", 2, &[Type::Number, Type::Ipv4], Type::Ipv4);
/// Public address to the VPC of what it stands for; counts packets to each.
pub const EIP_VPC: Set = counting_map("eip_vpc", 3, &[Type::Ipv4], Type::Number);
/// Counts packets from each public address.
pub const EIP_OUT_COUNT: Set = counting("eip_out_count", 4, &[Type::Ipv4]);
/// The private addresses that instances hold, each with its VPC.
pub const INSTANCES: Set = set("instances", 6, &[Type::Number, Type::Ipv4]);
/// The addresses of each VPC's gateways, resolvers and metadata service: the node itself, as its instances see it.
pub const GATEWAYS: Set = set("gateways", 7, &[Type::Number, Type::Ipv4]);
/// Pairs of bridges that are routed to one another: segments of one VPC.
pub const ROUTED: Set = set("routed", 8, &[Type::LinkName, Type::LinkName]);

// --- sets of both tables ---

/// Interface to the rules of its first group, of its second, and so on. An interface is named by its mark here.
pub const INBOUND: [Set; MAX_GROUPS] = [
    by_group("inbound1", 9),
    by_group("inbound2", 10),
    by_group("inbound3", 11),
    by_group("inbound4", 12),
    by_group("inbound5", 13),
];
pub const OUTBOUND: [Set; MAX_GROUPS] = [
    by_group("outbound1", 14),
    by_group("outbound2", 15),
    by_group("outbound3", 16),
    by_group("outbound4", 17),
    by_group("outbound5", 18),
];
/// Counts what no group let in or out, by interface.
pub const DENIED_IN: Set = counting("denied_in", 19, &[Type::Number]);
pub const DENIED_OUT: Set = counting("denied_out", 20, &[Type::Number]);

// --- sets of the table `bridge` ---

/// The taps.
pub const TAPS: Set = set("taps", 1, &[Type::LinkName]);
/// Tap with the MAC behind it.
pub const MACS: Set = set("macs", 2, &[Type::LinkName, Type::Ether]);
/// Tap with the MAC and the address behind it to the mark of the interface there; trunk port with those behind it to nobody's.
pub const BINDINGS: Set = map("bindings", 3, &[Type::LinkName, Type::Ether, Type::Ipv4], Type::Number);
/// The same of instances that may send for others (no source check), with the MAC alone.
pub const ROUTERS: Set = map("routers", 4, &[Type::LinkName, Type::Ether], Type::Number);
/// Tap or trunk port to the chain for what comes by it.
pub const SENDERS: Set = map("senders", 21, &[Type::LinkName], Type::Verdict);
/// The chain for what comes from an instance.
pub const FROM_INSTANCE: &str = "from_instance";
/// Counts what was dropped, by tap.
pub const SPOOFED: Set = counting("spoofed", 5, &[Type::LinkName]);
/// Counts frames of protocols that segments do not have, by tap.
pub const FOREIGN: Set = counting("foreign", 9, &[Type::LinkName]);
/// Tap to the mark of the interface behind it.
pub const MARK_OF: Set = map("mark_of", 6, &[Type::LinkName], Type::Number);
/// Tap with the addresses of its segment's gateway; with those of all gateways of its VPC where no source is checked.
pub const GATEWAYS_OF: Set = set("gateways_of", 7, &[Type::LinkName, Type::Ipv4]);
/// The private addresses that instances of each VPC hold, here and on other nodes.
pub const HELD: Set = set("held", 22, &[Type::Number, Type::Ipv4]);
/// Each tap with itself.
pub const SELVES: Set = set("selves", 8, &[Type::LinkName, Type::LinkName]);

pub const ETHER_IPV4: u16 = 0x0800;
const DHCP_SERVER: u16 = 67;

/// What rules depend on that is a node's own.
#[derive(Debug, Clone)]
pub struct Node {
    pub uplink: LinkName,
    pub bridging: Bridging,
    pub limits: Limits,
    pub fast_path: bool,
}

/// Name of tables that are there for the time of a question.
pub const PROBE: &str = "mallee_probe";

/// netd's tables: that of IPv4, that of bridges, and with a fast path that of devices. Of security groups, they have the chains of those that are `asked` for.
pub fn tables(node: &Node, network: &Network, asked: impl Fn(&SecurityGroup) -> bool) -> Vec<Table> {
    let uplink = node.uplink.as_str();
    let mut tables = vec![ipv4::table(uplink, &node.limits), bridge::table(node.bridging, &node.limits)];
    let judging = |table: &&mut Table| table.sets.contains(&DENIED_IN);
    for table in tables.iter_mut().filter(judging) {
        groups::grow(table, network, &asked);
        vpcs::grow(table, network);
    }
    tables.iter_mut().for_each(|table| trunk::grow(table, network));
    if node.fast_path {
        fast_path::grow(&mut tables[0], uplink, network);
        tables.push(fast_path::counting(uplink));
    }
    tables
}

/// The sets that say what elastic IPs stand for, of each table.
pub fn elastic_ip_sets(node: &Node) -> [(ProtoFamily, Vec<Set>); 3] {
    let of_devices = if node.fast_path { vec![EIP_VPC, EIP_OUT_COUNT] } else { vec![] };
    let of_bridges = if node.bridging == Bridging::Conntrack { vec![EIP_IN, EIP_OUT] } else { vec![] };
    [
        (ProtoFamily::Ipv4, vec![EIP_IN, EIP_OUT, EIP_VPC, EIP_OUT_COUNT]),
        (ProtoFamily::Bridge, of_bridges),
        (ProtoFamily::NetDev, of_devices),
    ]
}

fn base(kind: ChainType, hook: Hook, priority: i32) -> Option<Base> {
    Some(Base { kind, hook, priority, device: None })
}

fn chain(name: &'static str, base: Option<Base>, rules: Vec<Rule>) -> Chain {
    Chain { name: Cow::Borrowed(name), base, rules }
}
