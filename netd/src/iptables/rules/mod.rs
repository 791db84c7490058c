//! The rules: what happens to a packet.
//!
//! ```text
//!  instance ──tap──▶ port, locked to its MAC and isolated: frames go to the bridge itself, and nowhere else
//!                      │ [raw: in]         is it its own address? whose connection is it? (`arrival.rs`)
//!                      │ [mangle: in]      where is it to be routed? may it be sent, as it was sent? (`judging.rs`)
//!                      │ [nat: dnat]       public destination → private (`translation.rs`)
//!                      │ [mangle: node]    to the node: metadata, DHCP, names, ping; nothing else
//!                      │ [mangle: way]     ways that there are
//!                      │ [mangle: post]    may the instance have this, as it gets it?
//!                      └ [nat: snat]       private source → public, or the node's
//! ```
//!
//! It is what the rules of nf_tables do (`nft/rules/`), said with fewer words:
//!
//! * **Two instances never meet on the bridge.** Their ports are isolated; the gateway answers for all addresses of its segment (`proxy_arp_pvlan`) and routes. So
//!   each packet between neighbours passes these rules once, and frames of other protocols pass nothing.
//! * **Who sends is told by its MAC**, which its port is locked to: a frame from another never leaves the port.
//! * **The VPC that a connection was opened from** is told by the upper half of its mark, since no match looks at zones; that which it was opened to, by the lower.
//! * **What comes back by way of an elastic IP of this node** is judged before its source is translated, since nothing can be judged after: by the address that it will
//!   have, which is known (`groups.rs`).
//!
//! Chains are named for their bridge, tap, VPC or group. Many interfaces cost those of their own segment.

mod arrival;
mod groups;
mod judging;
mod translation;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::ruleset::{Rule, Table};
use crate::api::METADATA_ADDRESS;
use crate::desired::{ElasticIp, LinkName, Network, Segment, VpcId, VpcNumber};
use crate::limits::Limits;

pub use arrival::{ELASTIC_IN, SPOOFED, TOO_MUCH_DHCP};
pub use groups::{DENIED_HAIRPIN, rule_of};
pub use judging::{DENIED_IN, DENIED_OUT, ELASTIC_OUT, TOO_FAST};

/// What packets are marked with that are to be routed by the node's own tables although they come from a bridge. Any number that no rule asks for; 0 is that of
/// ARP, which is looked up in its VPC.
const PUBLIC: u32 = 0x5fff;
/// A connection that was opened to an elastic IP of a VPC, and one that was opened from a VPC: of the range of their numbers.
const TO_VPC: &str = "-m connmark --mark 0x6000/0xf000";
const FROM_VPC: &str = "-m connmark --mark 0x60000000/0xf0000000";
const FROM_NO_VPC: &str = "-m connmark ! --mark 0x60000000/0xf0000000";
const HAIRPIN: &str = "-m connmark --mark 0x60006000/0xf000f000";
const FIRST_WAY: &str = "-m conntrack --ctdir ORIGINAL";
const ANSWERS: &str = "-m conntrack --ctdir REPLY";
/// The destination was translated.
const TRANSLATED: &str = "-m conntrack --ctstate DNAT";
/// The kernel has no entry for the connection yet. One that goes one way without an answer is "new" for ever.
const FIRST_PACKET: &str = "-m conntrack ! --ctstatus CONFIRMED";
const BY_SENDER: &str = " --hashlimit-mode srcip";
const KNOWN: &str = "-m conntrack --ctstate RELATED,ESTABLISHED";
const INVALID: &str = "-m conntrack --ctstate INVALID";

/// What is more of it in a second than it may be, each address by itself (`xt_hashlimit`); twice as much may come at once. Rules of one name measure together, and a
/// rate is a part of the name, since the kernel keeps what it finds by that.
fn beyond(per_second: u32, by: &str, name: &str) -> String {
    // The match's own bound.
    let rate = per_second.min(1_000_000);
    let burst = rate.saturating_mul(2).min(1_000_000);
    format!(
        "-m hashlimit --hashlimit-above {rate}/sec --hashlimit-burst {burst}{by} --hashlimit-htable-size 64 --hashlimit-name mallee-{name}-{rate}"
    )
}

/// netd's part of the kernel's tables, in the order in which they are written: what judges comes first.
pub fn tables(uplink: &LinkName, limits: &Limits, network: &Network) -> [Table; 3] {
    [judging::table(uplink, limits, network), arrival::table(limits, network), translation::table(uplink, network)]
}

fn opened_from(vpc: VpcNumber) -> String {
    format!("-m connmark --mark {:#x}/0xffff0000", vpc.get() << 16)
}

fn opened_to(vpc: VpcNumber) -> String {
    format!("-m connmark --mark {:#x}/0xffff", vpc.get())
}

fn mark(number: u32) -> String {
    format!("MARK --set-xmark {number:#x}/0xffffffff")
}

fn from_bridge(segment: &Segment) -> String {
    format!("-i {}", segment.bridge)
}

fn to_bridge(segment: &Segment) -> String {
    format!("-o {}", segment.bridge)
}

/// A chain that each segment has one of.
fn of_segment(what: &str, segment: &Segment) -> String {
    format!("{what}-{}", segment.bridge)
}

fn of_vpc(what: &str, vpc: VpcNumber) -> String {
    format!("{what}-{:x}", vpc.get())
}

fn vpc_of(network: &Network, segment: &Segment) -> VpcNumber {
    network.vpc_number(&segment.id)
}

/// The addresses of the gateways of a VPC.
fn gateways_of(network: &Network, vpc: &VpcId) -> BTreeSet<Ipv4Addr> {
    network.segments.values().filter(|segment| segment.vpc == *vpc).flat_map(Segment::gateway_addresses).collect()
}

/// The VPC's networks as few as they can be told, and the one in which each gateway's services are.
fn networks_of(network: &Network, vpc: &VpcId) -> Vec<Ipv4Net> {
    let segments = network.segments.values().filter(|segment| segment.vpc == *vpc);
    let mut networks = vec![Ipv4Net::new_assert(METADATA_ADDRESS, 16).trunc()];
    networks.extend(segments.flat_map(|segment| segment.vpc_networks.iter().copied().chain([segment.network])));
    Ipv4Net::aggregate(&networks)
}

fn elastic_ips_of(network: &Network, vpc: VpcNumber) -> impl Iterator<Item = &ElasticIp> {
    network.elastic_ips.values().filter(move |elastic| network.vpc_number(&elastic.segment) == vpc)
}

/// Rules that lead what is for public addresses of this cloud to a chain.
fn for_pools<'a>(network: &'a Network, purpose: &'a str) -> impl Iterator<Item = Rule> + 'a {
    network.public_pools.iter().map(move |pool| Rule::new(purpose).on(format!("-d {pool}")))
}
