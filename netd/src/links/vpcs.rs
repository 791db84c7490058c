//! The routing tables of VPCs.
//!
//! Each VPC has a table of its own, which packets that are marked with its number are looked up in before the node's own tables (`ip rule`). It holds the
//! addresses of the VPC's gateways as *local* routes, and a route to each of its segments. What it does not know goes on to the node's tables, and so to the
//! public side.
//!
//! The kernel puts a local route for each address of a bridge into its own table for local addresses, which comes before all others: a packet of
//! one VPC for an instance would be taken for the gateway of another that has the same address. That route is removed each time that it
//! appears. So a gateway's addresses are the node's within their VPC alone, and those of instances mean nothing to the node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use futures::TryStreamExt;
use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::perform::{del_route, set_route};
use super::plan::{Step, Steps};
use super::requests::Request;
use super::{Link, Links, Observed, PROTOCOL};
use crate::bridging::Bridging;
use crate::desired::{LinkName, Network, VpcNumber};
use crate::error::{Error, Result};

/// Where netd's rules are among others (`ip rule`): before the node's main table, which is at 32766.
const RULE_PRIORITY: u32 = 10_900;
/// After the rules for marks: what a rule for a bridge is for has none.
const BRIDGE_RULE_PRIORITY: u32 = RULE_PRIORITY + 1;
/// The kernel's table of local addresses (`RT_TABLE_LOCAL`).
const LOCAL_TABLE: u32 = 255;

/// A route of a VPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VpcRoute {
    pub vpc: VpcNumber,
    pub way: Way,
    pub network: Ipv4Net,
}

/// Local routes come first in order, since the source of the others must be a local address of the VPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// To the node itself.
    Local,
    /// To a segment. What the node sends there has the gateway's address.
    Segment { gateway: Ipv4Addr },
}

/// What the kernel has of VPCs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Routing {
    /// VPCs whose packets are looked up in their tables.
    pub rules: BTreeSet<VpcNumber>,
    /// Bridges whose packets without a mark are looked up in a VPC's table.
    pub by_bridge: BTreeSet<(LinkName, VpcNumber)>,
    /// Routes in the tables of VPCs, each with the bridge that it leads by.
    pub routes: BTreeMap<VpcRoute, LinkName>,
    /// Addresses of netd's bridges in the kernel's own table.
    pub leaked: BTreeSet<(LinkName, Ipv4Addr)>,
}

impl Routing {
    /// The VPC that each bridge is in, by its segment's route.
    pub fn numbers(&self) -> BTreeMap<LinkName, VpcNumber> {
        let segments = self.routes.iter().filter(|(route, _)| route.way != Way::Local);
        segments.map(|(route, bridge)| (bridge.clone(), route.vpc)).collect()
    }

    /// Takes up a route that leads by one of netd's bridges.
    pub(super) fn add_route(&mut self, message: &RouteMessage, bridge: &LinkName) {
        let destination = destination(message);
        let table = table_of(message);
        if table == LOCAL_TABLE {
            let leaked = destination.filter(|_| message.header.kind == RouteType::Local);
            self.leaked.extend(leaked.map(|network| (bridge.clone(), network.addr())));
            return;
        }
        let (Some(vpc), Some(network)) = (VpcNumber::new(table), destination) else { return };
        let way = match message.header.kind {
            RouteType::Local => Way::Local,
            // A route without the source is another than the wanted one, and is replaced by it.
            _ => Way::Segment { gateway: source(message).unwrap_or(Ipv4Addr::UNSPECIFIED) },
        };
        self.routes.insert(VpcRoute { vpc, way, network }, bridge.clone());
    }
}

fn destination(message: &RouteMessage) -> Option<Ipv4Net> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => {
            Ipv4Net::new(*ip, message.header.destination_prefix_length).ok()
        }
        _ => None,
    })
}

/// The source that the kernel chooses for what it sends by a route.
pub(super) fn source(message: &RouteMessage) -> Option<Ipv4Addr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => Some(*ip),
        _ => None,
    })
}

/// Tables above 255 have no room in the header.
pub(super) fn table_of(message: &RouteMessage) -> u32 {
    let attribute = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    attribute.unwrap_or_else(|| message.header.table.into())
}

/// Rules of VPCs and bridges that are gone.
pub(super) fn plan_gone(desired: &Network, observed: &Observed, bridging: Bridging, steps: &mut Steps) {
    let by_bridge = wanted_bridge_rules(desired, bridging);
    for (bridge, vpc) in observed.routing.by_bridge.difference(&by_bridge) {
        steps.push(Step::RemoveBridgeRule { bridge: bridge.clone(), vpc: *vpc });
    }
    let wanted: BTreeSet<VpcNumber> = desired.vpcs.values().copied().collect();
    let gone = observed.routing.rules.difference(&wanted);
    steps.extend(gone.map(|vpc| Step::RemoveVpcRule { vpc: *vpc }));
}

/// Where no rule of the backend's marks ARP with its VPC, `ip rule` tells it by the bridge.
fn wanted_bridge_rules(desired: &Network, bridging: Bridging) -> BTreeSet<(LinkName, VpcNumber)> {
    if bridging != Bridging::Routed {
        return BTreeSet::new();
    }
    desired.segments.values().map(|segment| (segment.bridge.clone(), desired.vpc_number(&segment.id))).collect()
}

/// After the bridges are up and have their addresses.
pub(super) fn plan_routing<'a>(
    desired: &Network,
    observed: &Observed,
    bridging: Bridging,
    kept: &impl Fn(&LinkName) -> Option<&'a Link>,
    steps: &mut Steps,
) {
    let wanted = wanted_routes(desired);
    let found = &observed.routing;
    for segment in desired.segments.values() {
        let bridge = &segment.bridge;
        // The kernel makes the routes when the link comes up, or gets an address.
        let stays_up = kept(bridge).is_some_and(|link| link.up);
        for address in segment.gateway_addresses() {
            let had = observed.addresses.contains(&(bridge.clone(), Ipv4Net::from(address)));
            if !stays_up || !had || found.leaked.contains(&(bridge.clone(), address)) {
                steps.push(Step::RemoveLeaked { bridge: bridge.clone(), address });
            }
        }
    }
    let is_there = |route: &VpcRoute, bridge: &LinkName| {
        found.routes.get(route) == Some(bridge) && kept(bridge).is_some_and(|link| link.up)
    };
    for (route, bridge) in &found.routes {
        // Those of a link that goes, go with it.
        if kept(bridge).is_some_and(|link| link.up) && !wanted.contains_key(route) {
            steps.push(Step::RemoveVpcRoute { route: *route, bridge: bridge.clone() });
        }
    }
    for (route, bridge) in &wanted {
        if !is_there(route, bridge) {
            steps.push(Step::SetVpcRoute { route: *route, bridge: bridge.clone() });
        }
    }
    for vpc in desired.vpcs.values().filter(|vpc| !found.rules.contains(vpc)) {
        steps.push(Step::AddVpcRule { vpc: *vpc });
    }
    for (bridge, vpc) in wanted_bridge_rules(desired, bridging).difference(&found.by_bridge) {
        steps.push(Step::AddBridgeRule { bridge: bridge.clone(), vpc: *vpc });
    }
}

/// A local route is the same by whichever of its VPC's bridges it leads.
fn wanted_routes(desired: &Network) -> BTreeMap<VpcRoute, LinkName> {
    let mut routes = BTreeMap::new();
    for segment in desired.segments.values() {
        let vpc = desired.vpc_number(&segment.id);
        for address in segment.gateway_addresses() {
            let route = VpcRoute { vpc, way: Way::Local, network: Ipv4Net::from(address) };
            routes.entry(route).or_insert_with(|| segment.bridge.clone());
        }
        let way = Way::Segment { gateway: segment.gateway };
        routes.insert(VpcRoute { vpc, way, network: segment.network }, segment.bridge.clone());
    }
    routes
}

impl Links {
    pub(super) async fn observe_rules(&self, observed: &mut Observed) -> Result<()> {
        let mut rules = self.handle.rule().get(IpVersion::V4).execute();
        while let Some(message) = rules.try_next().await.map_err(Error::link("listing routing rules"))? {
            observed.routing.rules.extend(vpc_of_rule(&message));
            observed.routing.by_bridge.extend(bridge_of_rule(&message));
        }
        Ok(())
    }

    pub(super) fn add_vpc_rule(vpc: VpcNumber) -> Request {
        new_rule(rule(vpc))
    }

    pub(super) fn add_bridge_rule(bridge: &LinkName, vpc: VpcNumber) -> Request {
        new_rule(bridge_rule(bridge, vpc))
    }

    pub(super) fn remove_vpc_rule(vpc: VpcNumber) -> Request {
        del_rule(rule(vpc))
    }

    pub(super) fn remove_bridge_rule(bridge: &LinkName, vpc: VpcNumber) -> Request {
        del_rule(bridge_rule(bridge, vpc))
    }

    pub(super) fn set_vpc_route(&self, route: VpcRoute, bridge: &LinkName) -> Result<Request> {
        Ok(set_route(vpc_route(route, self.index(bridge)?)))
    }

    pub(super) fn remove_vpc_route(route: VpcRoute, bridge_index: u32) -> Request {
        del_route(vpc_route(route, bridge_index))
    }

    /// Removes a bridge's address from the kernel's own table.
    pub(super) fn remove_leaked(&self, bridge: &LinkName, address: Ipv4Addr) -> Result<Request> {
        let message = RouteMessageBuilder::<Ipv4Addr>::new()
            .table_id(LOCAL_TABLE)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            // Whoever made it.
            .protocol(RouteProtocol::Unspec)
            .destination_prefix(address, 32)
            .output_interface(self.index(bridge)?)
            .build();
        Ok(del_route(message))
    }
}

fn new_rule(message: RuleMessage) -> Request {
    Request { message: RouteNetlinkMessage::NewRule(message), flags: NLM_F_CREATE | NLM_F_EXCL }
}

fn del_rule(message: RuleMessage) -> Request {
    Request { message: RouteNetlinkMessage::DelRule(message), flags: 0 }
}

fn vpc_route(route: VpcRoute, bridge_index: u32) -> RouteMessage {
    let message = RouteMessageBuilder::<Ipv4Addr>::new()
        .table_id(route.vpc.get())
        .destination_prefix(route.network.network(), route.network.prefix_len())
        .output_interface(bridge_index)
        .protocol(PROTOCOL);
    match route.way {
        Way::Local => message.kind(RouteType::Local).scope(RouteScope::Host).build(),
        Way::Segment { gateway } => message.scope(RouteScope::Link).pref_source(gateway).build(),
    }
}

fn rule(vpc: VpcNumber) -> RuleMessage {
    to_table(vpc, RULE_PRIORITY, [RuleAttribute::FwMark(vpc.get())])
}

/// With the mask, no mark is a mark of 0; without, it would be any.
fn bridge_rule(bridge: &LinkName, vpc: VpcNumber) -> RuleMessage {
    let unmarked = [RuleAttribute::FwMark(0), RuleAttribute::FwMask(u32::MAX)];
    let by = RuleAttribute::Iifname(bridge.to_string());
    to_table(vpc, BRIDGE_RULE_PRIORITY, unmarked.into_iter().chain([by]))
}

fn to_table(vpc: VpcNumber, priority: u32, of: impl IntoIterator<Item = RuleAttribute>) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.action = RuleAction::ToTable;
    message.attributes =
        vec![RuleAttribute::Priority(priority), RuleAttribute::Table(vpc.get()), RuleAttribute::Protocol(PROTOCOL)];
    message.attributes.extend(of);
    message
}

/// The VPC of a rule, if it is one of netd's.
fn vpc_of_rule(message: &RuleMessage) -> Option<VpcNumber> {
    let number = |find: fn(&RuleAttribute) -> Option<u32>| message.attributes.iter().find_map(find);
    let mark = number(|attribute| if let RuleAttribute::FwMark(mark) = attribute { Some(*mark) } else { None });
    let table = number(|attribute| if let RuleAttribute::Table(table) = attribute { Some(*table) } else { None });
    let ours = message.attributes.contains(&RuleAttribute::Protocol(PROTOCOL));
    VpcNumber::new(mark?).filter(|_| ours && mark == table)
}

/// The bridge and VPC of a rule, if it is one of netd's for a bridge.
fn bridge_of_rule(message: &RuleMessage) -> Option<(LinkName, VpcNumber)> {
    let attributes = &message.attributes;
    let bridge = attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Iifname(name) => name.parse().ok(),
        _ => None,
    });
    let table = attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Table(table) => VpcNumber::new(*table),
        _ => None,
    });
    bridge.zip(table).filter(|_| attributes.contains(&RuleAttribute::Protocol(PROTOCOL)))
}
