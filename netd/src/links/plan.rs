//! From desired and observed to the steps between them.
//!
//! A pure function, so that it can be tested over many networks: performing the plan leads to the
//! desired network, and the plan of a network that is there already is empty.
//!
//! The order is such that nothing is ever open that should be closed: taps go before the rules that
//! guard them do, and come after.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{Link, LinkKind, Observed};
use crate::api::{DNS_ADDRESS, METADATA_ADDRESS};
use crate::desired::{Interface, LinkName, MacAddress, Network, Segment};
use crate::dns;
use crate::error::{Error, Result};

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
    /// Makes the tap a port of the bridge that neither learns nor floods.
    Attach {
        tap: LinkName,
        bridge: LinkName,
    },
    AddForwarding {
        tap: LinkName,
        mac: MacAddress,
    },
    RemoveForwarding {
        tap: LinkName,
        mac: MacAddress,
    },
    SetRoute {
        ip: Ipv4Addr,
        bridge: LinkName,
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

/// The steps in two halves, with the nftables transaction between them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Closing what is gone, and the segments themselves.
    pub before_rules: Vec<Step>,
    /// Opening what is new.
    pub after_rules: Vec<Step>,
}

impl Plan {
    pub fn is_empty(&self) -> bool {
        self.before_rules.is_empty() && self.after_rules.is_empty()
    }
}

/// The steps from `observed` to `desired`. Fails when a name is taken by a link of somebody else's.
pub fn plan(desired: &Network, observed: &Observed, uplink_index: u32) -> Result<Plan> {
    check_names(desired, observed)?;
    let mut plan = Plan::default();
    let gone = links_to_delete(desired, observed);
    plan.before_rules.extend(gone.iter().map(|name| Step::DeleteLink { name: (*name).clone() }));
    let kept = |name: &LinkName| observed.links.get(name).filter(|_| !gone.contains(name));

    plan_closed_addresses(desired, observed, uplink_index, &mut plan.before_rules);
    for segment in desired.segments.values() {
        plan_bridge(segment, kept(&segment.bridge), &mut plan.before_rules);
    }
    plan_bridge_addresses(desired, observed, &kept, &mut plan.before_rules);
    plan_neighbours(desired, observed, &kept, &mut plan.before_rules);

    plan_routes(desired, observed, uplink_index, &kept, &mut plan.after_rules);
    for interface in desired.interfaces.values() {
        let segment = &desired.segments[&interface.segment];
        plan_tap(interface, segment, kept(&interface.tap), observed, &kept, &mut plan.after_rules);
    }
    Ok(plan)
}

type Steps = Vec<Step>;

fn check_names(desired: &Network, observed: &Observed) -> Result<()> {
    let bridges = desired.segments.values().map(|segment| &segment.bridge);
    let taps = desired.interfaces.values().map(|interface| &interface.tap);
    match bridges.chain(taps).find(|name| observed.foreign.contains(name.as_str())) {
        Some(name) => Err(Error::ForeignLink { name: name.to_string() }),
        None => Ok(()),
    }
}

/// netd's links that are no longer wanted, or that cannot become what is wanted: the owner and the
/// queues of a tap that may be in use cannot be changed.
fn links_to_delete<'a>(desired: &Network, observed: &'a Observed) -> BTreeSet<&'a LinkName> {
    let bridges: BTreeSet<&LinkName> = desired.segments.values().map(|s| &s.bridge).collect();
    let taps: BTreeMap<&LinkName, &Interface> =
        desired.interfaces.values().map(|interface| (&interface.tap, interface)).collect();
    let fits = |name: &LinkName, link: &Link| match &link.kind {
        LinkKind::Bridge => bridges.contains(name),
        LinkKind::Tap { owner, multi_queue, .. } => taps.get(name).is_some_and(|interface| {
            *owner == Some(interface.owner_uid) && *multi_queue == (interface.queue_pairs > 1)
        }),
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
    for (ip, bridge) in &observed.routes {
        if !desired.elastic_ips.contains_key(ip) {
            steps.push(Step::RemoveRoute { ip: *ip, bridge: bridge.clone() });
        }
    }
}

fn plan_bridge(segment: &Segment, found: Option<&Link>, steps: &mut Steps) {
    let name = || segment.bridge.clone();
    let (mac, mtu) = (segment.gateway_mac, segment.mtu);
    if found.is_none() {
        steps.push(Step::CreateBridge { name: name(), mac, mtu });
    }
    if found.is_some_and(|link| link.mac != mac.octets()) {
        steps.push(Step::SetMac { name: name(), mac });
    }
    if found.is_some_and(|link| link.mtu != mtu) {
        steps.push(Step::SetMtu { name: name(), mtu });
    }
    plan_alias_and_up(&segment.bridge, &segment.id.to_string(), found, steps);
}

/// The alias tells a person what the link is; `ip link` shows it.
fn plan_alias_and_up(name: &LinkName, alias: &str, found: Option<&Link>, steps: &mut Steps) {
    if found.and_then(|link| link.alias.as_deref()) != Some(alias) {
        steps.push(Step::SetAlias { name: name.clone(), alias: alias.to_owned() });
    }
    if !found.is_some_and(|link| link.up) {
        steps.push(Step::SetUp { name: name.clone() });
    }
}

/// The addresses of a segment's gateway: its own, and those of the services that instances find there.
pub(super) fn gateway_addresses(segment: &Segment) -> impl Iterator<Item = Ipv4Net> {
    let own = Ipv4Net::new_assert(segment.gateway, segment.network.prefix_len());
    let resolver = dns::resolver_address(&segment.network, segment.gateway);
    let services = [Some(METADATA_ADDRESS), Some(DNS_ADDRESS), resolver].into_iter().flatten();
    std::iter::once(own).chain(services.map(|address| Ipv4Net::new_assert(address, 32)))
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
/// ARP, and the first packet to it waits for no answer.
fn plan_neighbours<'a>(
    desired: &Network,
    observed: &Observed,
    kept: &impl Fn(&LinkName) -> Option<&'a Link>,
    steps: &mut Steps,
) {
    let wanted: BTreeMap<(LinkName, Ipv4Addr), MacAddress> = desired
        .interfaces
        .values()
        .map(|interface| ((desired.bridge_of(&interface.segment).clone(), interface.ipv4), interface.mac))
        .collect();
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
        let there = kept(bridge).is_some() && observed.routes.get(ip) == Some(bridge);
        if !there {
            steps.push(Step::SetRoute { ip: *ip, bridge: bridge.clone() });
        }
        if !observed.proxies.contains(&(uplink_index, *ip)) {
            steps.push(Step::AddProxy { index: uplink_index, ip: *ip });
        }
    }
}

fn plan_tap<'a>(
    interface: &Interface,
    segment: &Segment,
    found: Option<&Link>,
    observed: &Observed,
    kept: &impl Fn(&LinkName) -> Option<&'a Link>,
    steps: &mut Steps,
) {
    let tap = &interface.tap;
    if found.is_none() {
        steps.push(Step::CreateTap {
            name: tap.clone(),
            owner: interface.owner_uid,
            multi_queue: interface.queue_pairs > 1,
        });
    }
    if found.is_none_or(|link| link.mtu != segment.mtu) {
        steps.push(Step::SetMtu { name: tap.clone(), mtu: segment.mtu });
    }
    let attached = found.is_some_and(|link| {
        matches!(&link.kind, LinkKind::Tap { bridge: Some(bridge), pinned: true, .. }
            if *bridge == segment.bridge && kept(bridge).is_some())
    });
    if !attached {
        steps.push(Step::Attach { tap: tap.clone(), bridge: segment.bridge.clone() });
    }
    // Forwarding entries go when a port leaves its bridge.
    let entry = |mac| attached && observed.forwarding.contains(&(tap.clone(), mac));
    for (other, mac) in &observed.forwarding {
        if other == tap && attached && *mac != interface.mac {
            steps.push(Step::RemoveForwarding { tap: tap.clone(), mac: *mac });
        }
    }
    if !entry(interface.mac) {
        steps.push(Step::AddForwarding { tap: tap.clone(), mac: interface.mac });
    }
    plan_alias_and_up(tap, &interface.id.to_string(), found, steps);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api;
    use crate::desired::testing;
    use crate::links::Traffic;
    use proptest::prelude::*;

    const UPLINK: u32 = 2;

    /// The kernel, as far as plans concern it.
    fn perform(world: &mut Observed, step: &Step) {
        let link = |world: &mut Observed, name: &LinkName, change: &dyn Fn(&mut Link)| {
            change(world.links.get_mut(name).unwrap_or_else(|| panic!("{name} is not there")));
        };
        match step.clone() {
            Step::DeleteLink { name } => delete(world, &name),
            Step::CreateBridge { name, mac, mtu } => {
                create(world, &name, LinkKind::Bridge, mac.octets(), mtu);
            }
            Step::CreateTap { name, owner, multi_queue } => {
                let kind = LinkKind::Tap { owner: Some(owner), multi_queue, bridge: None, pinned: false };
                create(world, &name, kind, [2; 6], 1500);
            }
            Step::SetMac { name, mac } => link(world, &name, &|link| link.mac = mac.octets()),
            Step::SetMtu { name, mtu } => link(world, &name, &|link| link.mtu = mtu),
            Step::SetAlias { name, alias } => {
                link(world, &name, &|link| link.alias = Some(alias.clone()));
            }
            Step::SetUp { name } => link(world, &name, &|link| link.up = true),
            Step::AddAddress { bridge, address } => {
                assert!(world.links.contains_key(&bridge));
                assert!(world.addresses.insert((bridge, address)), "added twice");
            }
            Step::RemoveAddress { bridge, address } => {
                assert!(world.addresses.remove(&(bridge, address)));
            }
            Step::SetNeighbour { bridge, ip, mac } => {
                assert!(world.links.contains_key(&bridge));
                world.neighbours.insert((bridge, ip), mac);
            }
            Step::RemoveNeighbour { bridge, ip } => {
                assert!(world.neighbours.remove(&(bridge, ip)).is_some());
            }
            Step::Attach { tap, bridge } => {
                assert!(world.links.contains_key(&bridge));
                world.forwarding.retain(|(name, _)| *name != tap);
                link(world, &tap, &|link| {
                    if let LinkKind::Tap { bridge: of, pinned, .. } = &mut link.kind {
                        (*of, *pinned) = (Some(bridge.clone()), true);
                    }
                });
            }
            Step::AddForwarding { tap, mac } => {
                assert!(world.forwarding.insert((tap, mac)), "added twice");
            }
            Step::RemoveForwarding { tap, mac } => {
                assert!(world.forwarding.remove(&(tap, mac)));
            }
            Step::SetRoute { ip, bridge } => {
                assert!(world.links.contains_key(&bridge));
                world.routes.insert(ip, bridge);
            }
            Step::RemoveRoute { ip, .. } => drop(world.routes.remove(&ip)),
            Step::AddProxy { index, ip } => assert!(world.proxies.insert((index, ip))),
            Step::RemoveProxy { index, ip } => assert!(world.proxies.remove(&(index, ip))),
        }
    }

    fn create(world: &mut Observed, name: &LinkName, kind: LinkKind, mac: [u8; 6], mtu: u32) {
        let link = Link {
            index: 10 + world.links.len() as u32,
            kind,
            mac,
            mtu,
            alias: None,
            up: false,
            carrier: false,
            traffic: Traffic::default(),
        };
        assert!(world.links.insert(name.clone(), link).is_none(), "{name} is there already");
    }

    /// What hangs on a link goes with it.
    fn delete(world: &mut Observed, name: &LinkName) {
        assert!(world.links.remove(name).is_some());
        world.addresses.retain(|(bridge, _)| bridge != name);
        world.neighbours.retain(|(bridge, _), _| bridge != name);
        world.routes.retain(|_, bridge| bridge != name);
        world.forwarding.retain(|(tap, _)| tap != name);
        for link in world.links.values_mut() {
            if let LinkKind::Tap { bridge, pinned, .. } = &mut link.kind
                && bridge.as_ref() == Some(name)
            {
                (*bridge, *pinned) = (None, false);
            }
        }
        let links = &world.links;
        world.forwarding.retain(|(tap, _)| matches!(&links[tap].kind, LinkKind::Tap { bridge: Some(_), .. }));
    }

    fn perform_all(world: &mut Observed, plan: &Plan) {
        for step in plan.before_rules.iter().chain(&plan.after_rules) {
            perform(world, step);
        }
    }

    /// One of a few networks: which interfaces, owners, queues, elastic IPs, MTU and gateway MAC.
    fn any_network() -> impl Strategy<Value = Network> {
        let interfaces = proptest::collection::btree_map(1_u8..5, (0_u32..2, 1_u32..3, 0_u8..4), 0..5);
        (interfaces, 0_u32..2, 1_u8..3, any::<bool>()).prop_map(|(interfaces, mtu, mac, second)| {
            let mut message = testing::message();
            let template = message.interfaces[0].clone();
            (message.interfaces, message.elastic_ips) = (vec![], vec![]);
            message.segments[0].mtu = 1400 + mtu * 100;
            message.segments[0].gateway_mac = format!("02:00:00:00:00:{mac:02x}");
            if second {
                let mut segment = message.segments[0].clone();
                segment.id = "subnet-2".into();
                (segment.cidr, segment.gateway) = ("10.0.0.0/24".into(), "10.0.0.1".into());
                message.segments.push(segment);
            }
            for (n, (owner_uid, queue_pairs, public)) in interfaces {
                let on_second = second && n > 2;
                let ipv4 = if on_second { format!("10.0.0.{}", 3 + n) } else { format!("172.31.0.{}", 3 + n) };
                let segment = if on_second { "subnet-2" } else { "subnet-1" };
                message.interfaces.push(api::Interface {
                    id: format!("eni-{n}"),
                    segment: segment.into(),
                    mac: format!("02:00:00:00:0{public}:{:02x}", 16 + n),
                    ipv4: ipv4.clone(),
                    owner_uid,
                    queue_pairs,
                    ..template.clone()
                });
                let public_ip = format!("198.51.100.{}", 130 + public);
                let taken = message.elastic_ips.iter().any(|e| e.public_ip == public_ip);
                if public > 0 && !taken {
                    message.elastic_ips.push(api::ElasticIp { public_ip, private_ip: ipv4, segment: segment.into() });
                }
            }
            Network::parse(&message, &testing::uplink()).unwrap()
        })
    }

    proptest! {
        #[test]
        fn every_plan_leads_there_and_then_nothing_is_left_to_do(
            networks in proptest::collection::vec(any_network(), 1..5),
            cut in any::<proptest::sample::Index>(),
        ) {
            let mut world = Observed::default();
            for network in &networks {
                // Killed somewhere on the way, and started again.
                let first = plan(network, &world, UPLINK).unwrap();
                let steps: Vec<Step> =
                    first.before_rules.iter().chain(&first.after_rules).cloned().collect();
                for step in &steps[..cut.index(steps.len() + 1)] {
                    perform(&mut world, step);
                }
                let rest = plan(network, &world, UPLINK).unwrap();
                perform_all(&mut world, &rest);
                prop_assert_eq!(plan(network, &world, UPLINK).unwrap(), Plan::default());
                prop_assert_eq!(world.links.len(), network.segments.len() + network.interfaces.len());
                prop_assert_eq!(world.proxies.len(), network.elastic_ips.len());
            }
            let nothing = Network::default();
            let last = plan(&nothing, &world, UPLINK).unwrap();
            perform_all(&mut world, &last);
            prop_assert_eq!(world, Observed::default());
        }

        #[test]
        fn taps_close_before_the_rules_change_and_open_after(
            from in any_network(), to in any_network(),
        ) {
            let mut world = Observed::default();
            let first = plan(&from, &world, UPLINK).unwrap();
            perform_all(&mut world, &first);
            let plan = plan(&to, &world, UPLINK).unwrap();
            let closes = |step: &Step| matches!(step, Step::DeleteLink { .. } | Step::RemoveProxy { .. });
            let opens = |step: &Step| {
                matches!(step, Step::CreateTap { .. } | Step::Attach { .. } | Step::AddProxy { .. })
            };
            prop_assert!(!plan.before_rules.iter().any(opens));
            prop_assert!(!plan.after_rules.iter().any(closes));
        }
    }

    #[test]
    fn a_name_that_somebody_else_has_is_refused() {
        let world = Observed { foreign: ["tpeni1".to_owned()].into(), ..Observed::default() };
        let error = plan(&testing::network(), &world, UPLINK).unwrap_err();
        assert!(error.to_string().contains("tpeni1"));
    }
}
