//! How subnets reach more than one node.
//!
//! The operator chooses one way for the whole cloud ([`Segments`]): not at all (each node's part of a subnet is alone),
//! VLANs on the nodes' trunk interfaces, or VXLANs between their underlay addresses. A node that cannot carry the chosen
//! kind takes no instances ([`Segments::missing_on`]; `schedule.rs`).
//!
//! A node with instances of a VPC is given all subnets of the VPC that have instances, and is told of every instance of the VPC on
//! other nodes ([`Reach`]): it routes between subnets itself, and learns nothing from the wire. So what begins or ends on
//! one node is news to all ([`touch_others`]).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use mallee_netd::api as net;
use sha2::{Digest as _, Sha256};

use super::Facts;
use crate::Cloud;
use crate::error::{Error, Result};
use crate::ids::SubnetId;
use crate::state::instances::{self, Instance};
use crate::state::lifecycle::Wanted;
use crate::state::network;
use crate::state::nodes::{self, Node};
use crate::state::{Tx, segments};

/// The cloud's kind of segments, with the numbers that it may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segments {
    Local,
    Vlan(RangeInclusive<u32>),
    Vxlan(RangeInclusive<u32>),
}

/// VLAN ids: 0 is no VLAN and 4095 is reserved (IEEE 802.1Q-2018, table 9-2).
const VLAN_IDS: RangeInclusive<u32> = 1..=4094;
/// VXLAN network identifiers have 24 bits (RFC 7348, section 5).
const VNIS: RangeInclusive<u32> = 1..=0xff_ffff;

impl FromStr for Segments {
    type Err = String;

    /// `local`, `vlan:FIRST-LAST` or `vxlan:FIRST-LAST`.
    fn from_str(text: &str) -> std::result::Result<Segments, String> {
        if text == "local" {
            return Ok(Segments::Local);
        }
        let (kind, numbers) = text.split_once(':').unwrap_or((text, ""));
        let possible = match kind {
            "vlan" => VLAN_IDS,
            "vxlan" => VNIS,
            _ => return Err("give local, vlan:100-199 or vxlan:5000-5999".to_owned()),
        };
        let range = numbers
            .split_once('-')
            .and_then(|(first, last)| Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?))
            .filter(|range| !range.is_empty() && possible.contains(range.start()) && possible.contains(range.end()))
            .ok_or_else(|| {
                format!(
                    "{kind}:{numbers}: give a first and a last number between {} and {}",
                    possible.start(),
                    possible.end()
                )
            })?;
        Ok(if kind == "vlan" { Segments::Vlan(range) } else { Segments::Vxlan(range) })
    }
}

impl fmt::Display for Segments {
    /// As it is parsed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.wire() {
            None => f.write_str("local"),
            Some((kind, numbers)) => write!(f, "{kind}:{}-{}", numbers.start(), numbers.end()),
        }
    }
}

impl Segments {
    /// The capability that a node needs, and the numbers.
    fn wire(&self) -> Option<(&'static str, RangeInclusive<u32>)> {
        match self {
            Segments::Local => None,
            Segments::Vlan(range) => Some(("vlan", range.clone())),
            Segments::Vxlan(range) => Some(("vxlan", range.clone())),
        }
    }

    /// A subnet may have instances on several nodes.
    pub(super) fn span_nodes(&self) -> bool {
        *self != Segments::Local
    }

    /// Why a node cannot carry the cloud's segments; `None`: it can.
    pub(super) fn missing_on(&self, facts: &Facts) -> Option<String> {
        let (kind, _) = self.wire()?;
        match facts.network.get(kind).map(String::as_str) {
            Some("") => None,
            Some(why) => Some(format!("{kind}: {why}")),
            None => Some(format!("{kind}: its netd has not said that it can")),
        }
    }
}

/// What a node is told of other nodes; by default nothing.
#[derive(Default)]
pub(super) struct Reach {
    wire: Option<Wire>,
    numbers: HashMap<SubnetId, u32>,
    /// MACs of gateways on the wire: this node's, and all others'.
    pub router_mac: String,
    pub peer_router_macs: Vec<String>,
    pub remotes: Vec<net::RemoteInterface>,
}

enum Wire {
    Vlan,
    Vxlan {
        /// Every other node's underlay address.
        peers: Vec<String>,
    },
}

impl Reach {
    /// Of the instances on these subnets, which are those of the VPCs that the node has. Numbers that subnets still need are given out before
    /// anything is read: see [`ensure_numbers`].
    pub async fn read(tx: &mut Tx, cloud: &Cloud, node: &Node, subnets: &HashSet<&SubnetId>) -> Result<Reach> {
        let config = &cloud.config.segments;
        let carries = |node: &Node| node.facts.as_ref().is_some_and(|facts| config.missing_on(facts).is_none());
        let Some((kind, _)) = config.wire().filter(|_| carries(node)) else {
            return Ok(Reach::default());
        };
        let underlays: HashMap<String, String> = nodes::all(tx)
            .await?
            .into_iter()
            .filter(|other| other.name != node.name && carries(other))
            .map(|other| (other.name, other.facts.map(|facts| facts.underlay_address).unwrap_or_default()))
            .collect();
        let numbers = segments::numbers(tx, kind).await?;
        let elsewhere: Vec<Instance> = instances::elsewhere(tx, &node.name)
            .await?
            .into_iter()
            .filter(|one| one.state.wanted() != Wanted::Gone && underlays.contains_key(&one.node))
            .filter(|one| subnets.contains(&one.subnet_id) && numbers.contains_key(&one.subnet_id))
            .collect();
        Ok(Reach {
            numbers,
            router_mac: router_mac(&node.name),
            peer_router_macs: underlays
                .keys()
                .map(|name| router_mac(name))
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect(),
            remotes: elsewhere.iter().map(|one| remote(one, &underlays[&one.node])).collect(),
            wire: Some(match config {
                Segments::Vxlan(_) => Wire::Vxlan { peers: peers(underlays) },
                Segments::Vlan(_) | Segments::Local => Wire::Vlan,
            }),
        })
    }

    /// The subnet would have to have a number and has none: nothing on other nodes can be told that it is the same.
    pub fn lacks_number(&self, subnet: &SubnetId) -> bool {
        self.wire.is_some() && !self.numbers.contains_key(subnet)
    }

    /// How the subnet's segment on this node reaches the others.
    pub fn kind(&self, subnet: &SubnetId) -> net::segment::Kind {
        match (&self.wire, self.numbers.get(subnet)) {
            (Some(Wire::Vlan), Some(number)) => net::segment::Kind::Vlan(net::VlanSegment { vid: *number }),
            (Some(Wire::Vxlan { peers }), Some(number)) => {
                net::segment::Kind::Vxlan(net::VxlanSegment { vni: *number, peers: peers.clone() })
            }
            _ => net::segment::Kind::Local(net::LocalSegment {}),
        }
    }
}

/// A node's gateways' MAC on the wire, made from the node's name: locally administered, with no list to keep. Two of a thousand
/// nodes have the same with a chance of one in ten thousand, and then a switch sees it move, which is all.
fn router_mac(node: &str) -> String {
    let [a, b, c, d, ..] = <[u8; 32]>::from(Sha256::digest(node));
    format!("02:6e:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

fn peers(underlays: HashMap<String, String>) -> Vec<String> {
    let mut peers: Vec<String> = underlays.into_values().filter(|address| !address.is_empty()).collect();
    peers.sort();
    peers
}

fn remote(one: &Instance, underlay: &str) -> net::RemoteInterface {
    net::RemoteInterface {
        id: one.interface_id.to_string(),
        segment: one.subnet_id.to_string(),
        mac: one.mac.clone(),
        ipv4: one.private_ip.0.to_string(),
        node: underlay.to_owned(),
        source_dest_check_off: !one.source_dest_check,
        secondary_ipv4: one.secondary_ips.iter().map(ToString::to_string).collect(),
    }
}

/// Gives every subnet its number for as long as there are any; writes only when one has none and could have one. Subnets are without one where the
/// operator has chosen another kind, or a range too small for those that there are: they take no instances ([`give_number`]) and are on no node ([`Reach::lacks_number`]).
pub(super) async fn ensure_numbers(cloud: &Cloud) -> Result<()> {
    let Some((kind, range)) = cloud.config.segments.wire() else { return Ok(()) };
    let mut snapshot = cloud.db.snapshot().await?;
    let numbered = segments::numbers(&mut snapshot, kind).await?;
    let subnets = network::subnets(&mut snapshot).await?;
    drop(snapshot);
    let lacking = subnets.iter().any(|subnet| !numbered.contains_key(&subnet.id));
    if !lacking || range.clone().all(|number| numbered.values().any(|taken| *taken == number)) {
        return Ok(());
    }
    let mut tx = cloud.db.begin().await?;
    segments::allocate(&mut tx, kind, range).await?;
    Ok(tx.commit().await?)
}

/// Gives a subnet its number in the transaction that makes it or puts something in it; [`Error::Node`] when none is left for it.
pub async fn give_number(tx: &mut Tx, cloud: &Cloud, subnet: &SubnetId) -> Result<()> {
    let Some((kind, range)) = cloud.config.segments.wire() else { return Ok(()) };
    match segments::allocate(tx, kind, range).await?.contains_key(subnet) {
        true => Ok(()),
        false => Err(no_number_left(cloud, subnet)),
    }
}

pub(super) fn no_number_left(cloud: &Cloud, subnet: &SubnetId) -> Error {
    let segments = &cloud.config.segments;
    Error::Node(format!(
        "no number of {segments} is left for {subnet}: start the controller with a larger range (--segments)"
    ))
}

/// Instances' networks begin or end on these nodes: every other node's state is to have its next number, in the
/// transaction that changes it. The others' names, to be woken after the commit.
pub async fn touch_others(tx: &mut Tx, cloud: &Cloud, changed: &[&str]) -> Result<Vec<String>> {
    match cloud.config.segments.span_nodes() {
        true => nodes::touch_others(tx, changed).await,
        false => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_ranges_are_read_and_impossible_ones_refused() {
        assert_eq!("local".parse(), Ok(Segments::Local));
        assert_eq!("vlan:100-199".parse(), Ok(Segments::Vlan(100..=199)));
        assert_eq!("vxlan:5000-16777215".parse(), Ok(Segments::Vxlan(5000..=16_777_215)));
        for good in ["local", "vlan:100-199", "vxlan:5000-5999"] {
            assert_eq!(good.parse::<Segments>().unwrap().to_string(), good);
        }
        for bad in
            ["", "vlan", "vlan:", "vlan:0-10", "vlan:1-4095", "vlan:20-10", "vxlan:1-16777216", "gre:1-2", "vlan:a-b"]
        {
            assert!(bad.parse::<Segments>().is_err(), "{bad}");
        }
    }
}
