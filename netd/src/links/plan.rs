//! From desired and observed to the steps between them.
//!
//! A pure function, so that it can be tested over many networks: performing the plan leads to the
//! desired network, and the plan of a network that is there already is empty.
//!
//! The order is such that nothing is ever open that should be closed: taps and trunk ports go before the
//! rules that guard them do, and come after.

mod elastic;
mod trunk;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::vpcs::{self, VpcRoute};
use super::{Link, LinkKind, Observed, PortOf};
use crate::bridging::Bridging;
use crate::desired::{Interface, LinkName, MacAddress, Network, Segment, VpcNumber, Wire};
use crate::error::{Error, Result};
pub use elastic::plan_elastic_ips;

/// One change to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    DeleteLink {
        name: LinkName,
    },
    CreateBridge {
        name: LinkName,
        mac: MacAddress,
        mtu: u32,
        ip_rules: bool,
    },
    /// Whether the bridge takes frames through the rules for IPv4 ([`Bridging::IpRules`]).
    SetIpRules {
        name: LinkName,
        on: bool,
    },
    SetMac {
        name: LinkName,
        mac: MacAddress,
    },
    SetMtu {
        name: LinkName,
        mtu: u32,
    },
    SetAlias {
        name: LinkName,
        alias: String,
    },
    SetUp {
        name: LinkName,
    },
    AddAddress {
        bridge: LinkName,
        address: Ipv4Net,
    },
    RemoveAddress {
        bridge: LinkName,
        address: Ipv4Net,
    },
    SetNeighbour {
        bridge: LinkName,
        ip: Ipv4Addr,
        mac: MacAddress,
    },
    RemoveNeighbour {
        bridge: LinkName,
        ip: Ipv4Addr,
    },
    CreateTap {
        name: LinkName,
        owner: u32,
        multi_queue: bool,
    },
    /// Makes a trunk port. `lower` is the index of the trunk interface, which a VLAN lies on.
    CreateTrunkPort {
        name: LinkName,
        wire: Wire,
        lower: Option<u32>,
        mtu: u32,
    },
    /// Makes the link a port of the bridge that neither learns nor floods.
    Attach {
        port: LinkName,
        bridge: LinkName,
        /// It may send a frame back where it came from.
        hairpin: bool,
        /// It sends to the bridge alone, and only from the MACs that are behind it.
        isolated: bool,
    },
    AddForwarding {
        port: LinkName,
        mac: MacAddress,
    },
    RemoveForwarding {
        port: LinkName,
        mac: MacAddress,
    },
    /// Frames to `mac` go through the tunnel to `node`, wherever they went before.
    SetTunnel {
        port: LinkName,
        mac: MacAddress,
        node: Ipv4Addr,
    },
    RemoveTunnel {
        port: LinkName,
        mac: MacAddress,
    },
    /// Broadcasts go to `node` too.
    AddFlood {
        port: LinkName,
        node: Ipv4Addr,
    },
    RemoveFlood {
        port: LinkName,
        node: Ipv4Addr,
    },
    /// Packets of the VPC are looked up in its table.
    AddVpcRule {
        vpc: VpcNumber,
    },
    RemoveVpcRule {
        vpc: VpcNumber,
    },
    /// What comes by the bridge and is not marked (ARP) is looked up in the VPC's table.
    AddBridgeRule {
        bridge: LinkName,
        vpc: VpcNumber,
    },
    RemoveBridgeRule {
        bridge: LinkName,
        vpc: VpcNumber,
    },
    SetVpcRoute {
        route: VpcRoute,
        bridge: LinkName,
    },
    RemoveVpcRoute {
        route: VpcRoute,
        bridge: LinkName,
    },
    /// Takes a bridge's address out of the kernel's own table.
    RemoveLeaked {
        bridge: LinkName,
        address: Ipv4Addr,
    },
    SetRoute {
        ip: Ipv4Addr,
        bridge: LinkName,
        /// Of what the node itself sends there.
        source: Option<Ipv4Addr>,
    },
    RemoveRoute {
        ip: Ipv4Addr,
        bridge: LinkName,
    },
    /// The link with this index (the uplink) begins to answer ARP for the address.
    AddProxy {
        index: u32,
        ip: Ipv4Addr,
    },
    RemoveProxy {
        index: u32,
        ip: Ipv4Addr,
    },
}

/// The steps in two halves, with the backend's rules between them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Closing what is gone, and the segments themselves.
    pub before_rules: Vec<Step>,
    /// Making links, which stay down, while the rules are written: both take the kernel a while where there are many.
    pub beside_rules: Vec<Step>,
    /// Opening what is new.
    pub after_rules: Vec<Step>,
}

impl Plan {
    pub fn is_empty(&self) -> bool {
        self.steps().next().is_none()
    }

    /// Addresses that had another MAC in `observed`: somebody else holds them now.
    pub fn new_holders<'a>(&'a self, observed: &'a Observed) -> impl Iterator<Item = (&'a LinkName, Ipv4Addr)> {
        self.steps().filter_map(|step| match step {
            Step::SetNeighbour { bridge, ip, .. } => {
                observed.neighbours.contains_key(&(bridge.clone(), *ip)).then_some((bridge, *ip))
            }
            _ => None,
        })
    }

    /// All steps, in an order that they may be done in.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.before_rules.iter().chain(&self.beside_rules).chain(&self.after_rules)
    }
}

/// Indexes of the node's own interfaces, which netd uses and never changes, and what its kernel can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ground {
    pub uplink: u32,
    /// None where VLANs cannot be; then no network with one is taken.
    pub trunk: Option<u32>,
    /// How neighbours are judged.
    pub bridging: Bridging,
}

/// The steps from `observed` to `desired`. Fails when a name is taken by a link of somebody else's.
pub fn plan(desired: &Network, observed: &Observed, ground: Ground) -> Result<Plan> {
    check_names(desired, observed)?;
    let mut plan = Plan::default();
    let gone = links_to_delete(desired, observed, ground);
    plan.before_rules.extend(gone.iter().map(|name| Step::DeleteLink { name: (*name).clone() }));
    let kept = |name: &LinkName| observed.links.get(name).filter(|_| !gone.contains(name));

    plan_closed_addresses(desired, observed, ground.uplink, &mut plan.before_rules);
    vpcs::plan_gone(desired, observed, ground.bridging, &mut plan.before_rules);
    for segment in desired.segments.values() {
        plan_bridge(segment, kept(&segment.bridge), ground.bridging, &mut plan.before_rules);
    }
    plan_bridge_addresses(desired, observed, &kept, &mut plan.before_rules);
    vpcs::plan_routing(desired, observed, ground.bridging, &kept, &mut plan.before_rules);
    plan_neighbours(desired, observed, &kept, &mut plan.before_rules);

    plan_routes(desired, observed, ground.uplink, &kept, &mut plan.after_rules);
    for interface in desired.interfaces.values() {
        let segment = &desired.segments[&interface.segment];
        let place = PortOf {
            bridge: segment.bridge.clone(),
            pinned: true,
            hairpin: ground.bridging == Bridging::IpRules,
            isolated: ground.bridging == Bridging::Routed,
        };
        plan_tap(interface, segment.mtu, &place, observed, &kept, &mut plan);
    }
    for (segment, trunk) in desired.trunks() {
        trunk::plan_port(desired, segment, trunk, ground, observed, &kept, &mut plan.after_rules);
    }
    Ok(plan)
}

pub(super) type Steps = Vec<Step>;

/// Refuses a network that needs the name of a link which is not netd's.
pub fn check_names(desired: &Network, observed: &Observed) -> Result<()> {
    let bridges = desired.segments.values().map(|segment| &segment.bridge);
    let taps = desired.interfaces.values().map(|interface| &interface.tap);
    let ports = desired.trunks().map(|(_, trunk)| &trunk.port);
    match bridges.chain(taps).chain(ports).find(|name| observed.foreign.contains(name.as_str())) {
        Some(name) => Err(Error::ForeignLink { name: name.to_string() }),
        None => Ok(()),
    }
}

/// netd's links that are no longer wanted, or that cannot become what is wanted: the owner and the
/// queues of a tap that may be in use cannot be changed, nor can what a trunk port lies on.
fn links_to_delete<'a>(desired: &Network, observed: &'a Observed, ground: Ground) -> BTreeSet<&'a LinkName> {
    let bridges: BTreeSet<&LinkName> = desired.segments.values().map(|s| &s.bridge).collect();
    let taps: BTreeMap<&LinkName, &Interface> =
        desired.interfaces.values().map(|interface| (&interface.tap, interface)).collect();
    let wires: BTreeMap<&LinkName, Wire> = desired.trunks().map(|(_, trunk)| (&trunk.port, trunk.wire)).collect();
    let fits = |name: &LinkName, link: &Link| match &link.kind {
        LinkKind::Bridge { .. } => bridges.contains(name),
        LinkKind::Tap { owner, multi_queue } => taps.get(name).is_some_and(|interface| {
            *owner == Some(interface.owner_uid) && *multi_queue == (interface.queue_pairs > 1)
        }),
        LinkKind::Trunk { wire, lower } => {
            wires.get(name).is_some_and(|wanted| wire == wanted && *lower == trunk::lower(*wanted, ground))
        }
        LinkKind::Other => false,
    };
    observed.links.iter().filter(|(name, link)| !fits(name, link)).map(|(name, _)| name).collect()
}

/// Public addresses that this node no longer answers for.
fn plan_closed_addresses(desired: &Network, observed: &Observed, uplink_index: u32, steps: &mut Steps) {
    for (index, ip) in &observed.proxies {
        if *index != uplink_index || !desired.elastic_ips.contains_key(ip) {
            steps.push(Step::RemoveProxy { index: *index, ip: *ip });
        }
    }
    for (ip, (bridge, _)) in &observed.routes {
        if !desired.elastic_ips.contains_key(ip) {
            steps.push(Step::RemoveRoute { ip: *ip, bridge: bridge.clone() });
        }
    }
}

fn plan_bridge(segment: &Segment, found: Option<&Link>, bridging: Bridging, steps: &mut Steps) {
    let name = || segment.bridge.clone();
    let (mac, mtu) = (segment.gateway_mac, segment.mtu);
    let ip_rules = bridging == Bridging::IpRules;
    if found.is_none() {
        steps.push(Step::CreateBridge { name: name(), mac, mtu, ip_rules });
    }
    if found.is_some_and(|link| link.kind != LinkKind::Bridge { ip_rules }) {
        steps.push(Step::SetIpRules { name: name(), on: ip_rules });
    }
    if found.is_some_and(|link| link.mac != mac.octets()) {
        steps.push(Step::SetMac { name: name(), mac });
    }
    if found.is_some_and(|link| link.mtu != mtu) {
        steps.push(Step::SetMtu { name: name(), mtu });
    }
    plan_alias_and_up(&segment.bridge, &segment.id.to_string(), found, steps);
}

fn plan_alias_and_up(name: &LinkName, alias: &str, found: Option<&Link>, steps: &mut Steps) {
    plan_alias(name, alias, found, steps);
    plan_up(name, found, steps);
}

/// The alias tells a person what the link is; `ip link` shows it.
fn plan_alias(name: &LinkName, alias: &str, found: Option<&Link>, steps: &mut Steps) {
    if found.and_then(|link| link.alias.as_deref()) != Some(alias) {
        steps.push(Step::SetAlias { name: name.clone(), alias: alias.to_owned() });
    }
}

fn plan_up(name: &LinkName, found: Option<&Link>, steps: &mut Steps) {
    if !found.is_some_and(|link| link.up) {
        steps.push(Step::SetUp { name: name.clone() });
    }
}

/// The addresses of a segment's gateway are each alone: with its prefix, the kernel would make a route to the segment's network, in the table that all
/// VPCs share.
pub(super) fn gateway_addresses(segment: &Segment) -> impl Iterator<Item = Ipv4Net> {
    segment.gateway_addresses().map(Ipv4Net::from)
}

fn plan_bridge_addresses<'a>(
    desired: &Network,
    observed: &Observed,
    kept: &impl Fn(&LinkName) -> Option<&'a Link>,
    steps: &mut Steps,
) {
    let wanted: BTreeSet<(LinkName, Ipv4Net)> = desired
        .segments
        .values()
        .flat_map(|segment| gateway_addresses(segment).map(|address| (segment.bridge.clone(), address)))
        .collect();
    for (bridge, address) in &observed.addresses {
        if kept(bridge).is_some() && !wanted.contains(&(bridge.clone(), *address)) {
            steps.push(Step::RemoveAddress { bridge: bridge.clone(), address: *address });
        }
    }
    for (bridge, address) in wanted {
        let there = kept(&bridge).is_some() && observed.addresses.contains(&(bridge.clone(), address));
        if !there {
            steps.push(Step::AddAddress { bridge, address });
        }
    }
}

/// Every instance is a permanent neighbour of its gateway: nobody can take its place by answering
/// ARP, and the first packet to it waits for no answer. Those on other nodes are neighbours too: each node's
/// gateway has the same MAC, so that the answer to an ARP request over the trunk would not find its way back.
fn plan_neighbours<'a>(
    desired: &Network,
    observed: &Observed,
    kept: &impl Fn(&LinkName) -> Option<&'a Link>,
    steps: &mut Steps,
) {
    let wanted: BTreeMap<(LinkName, Ipv4Addr), MacAddress> =
        desired.holders().map(|(segment, ipv4, mac)| ((desired.bridge_of(segment).clone(), ipv4), mac)).collect();
    for (bridge, ip) in observed.neighbours.keys() {
        if kept(bridge).is_some() && !wanted.contains_key(&(bridge.clone(), *ip)) {
            steps.push(Step::RemoveNeighbour { bridge: bridge.clone(), ip: *ip });
        }
    }
    for (key, mac) in wanted {
        let there = kept(&key.0).is_some() && observed.neighbours.get(&key) == Some(&mac);
        if !there {
            let (bridge, ip) = key;
            steps.push(Step::SetNeighbour { bridge, ip, mac });
        }
    }
}

/// The uplink answers ARP for an elastic IP by proxy, which the kernel does for an address whose
/// route leads elsewhere; so each has a host route to its segment (see `README.md`).
fn plan_routes<'a>(
    desired: &Network,
    observed: &Observed,
    uplink_index: u32,
    kept: &impl Fn(&LinkName) -> Option<&'a Link>,
    steps: &mut Steps,
) {
    for (ip, elastic) in &desired.elastic_ips {
        let bridge = desired.bridge_of(&elastic.segment);
        let source = desired.node_addresses.first().copied();
        let there = kept(bridge).is_some() && observed.routes.get(ip) == Some(&(bridge.clone(), source));
        if !there {
            steps.push(Step::SetRoute { ip: *ip, bridge: bridge.clone(), source });
        }
        if !observed.proxies.contains(&(uplink_index, *ip)) {
            steps.push(Step::AddProxy { index: uplink_index, ip: *ip });
        }
    }
}

fn plan_tap<'a>(
    interface: &Interface,
    mtu: u32,
    place: &PortOf,
    observed: &Observed,
    kept: &impl Fn(&LinkName) -> Option<&'a Link>,
    plan: &mut Plan,
) {
    let tap = &interface.tap;
    let found = kept(tap);
    // Nothing passes a port that is down.
    let steps = if found.is_none() { &mut plan.beside_rules } else { &mut plan.after_rules };
    if found.is_none() {
        steps.push(Step::CreateTap {
            name: tap.clone(),
            owner: interface.owner_uid,
            multi_queue: interface.queue_pairs > 1,
        });
    }
    if found.is_none_or(|link| link.mtu != mtu) {
        steps.push(Step::SetMtu { name: tap.clone(), mtu });
    }
    plan_attachment(tap, place, found, &BTreeSet::from([interface.mac]), observed, kept, steps);
    plan_alias(tap, &interface.id.to_string(), found, steps);
    plan_up(tap, found, &mut plan.after_rules);
}

/// The port's place on its bridge, and the static forwarding entries for the MACs behind it.
fn plan_attachment<'a>(
    port: &LinkName,
    place: &PortOf,
    found: Option<&Link>,
    macs: &BTreeSet<MacAddress>,
    observed: &Observed,
    kept: &impl Fn(&LinkName) -> Option<&'a Link>,
    steps: &mut Steps,
) {
    let attached = found.is_some_and(|link| link.port.as_ref() == Some(place) && kept(&place.bridge).is_some());
    if !attached {
        let PortOf { bridge, hairpin, isolated, .. } = place.clone();
        steps.push(Step::Attach { port: port.clone(), bridge, hairpin, isolated });
    }
    // Forwarding entries go when a port leaves its bridge.
    let entries: BTreeSet<MacAddress> = match attached {
        true => observed.forwarding_of(port).collect(),
        false => BTreeSet::new(),
    };
    for mac in entries.difference(macs) {
        steps.push(Step::RemoveForwarding { port: port.clone(), mac: *mac });
    }
    for mac in macs.difference(&entries) {
        steps.push(Step::AddForwarding { port: port.clone(), mac: *mac });
    }
}

#[cfg(test)]
mod tests;
