//! Every plan leads there, wherever it is cut off, and then nothing is left to do.

use super::*;
use crate::api::{self, segment::Kind};
use crate::desired::testing;
use crate::links::Traffic;
use crate::links::vpcs::Way;
use proptest::prelude::*;

const GROUND: Ground = Ground { uplink: 2, trunk: Some(3), bridging: Bridging::IpRules };

/// The kernel, as far as plans concern it.
fn perform(world: &mut Observed, step: &Step) {
    let link = |world: &mut Observed, name: &LinkName, change: &dyn Fn(&mut Link)| {
        change(world.links.get_mut(name).unwrap_or_else(|| panic!("{name} is not there")));
    };
    match step.clone() {
        Step::DeleteLink { name } => delete(world, &name),
        Step::CreateBridge { name, mac, mtu, ip_rules } => {
            create(world, &name, LinkKind::Bridge { ip_rules }, mac.octets(), mtu);
        }
        Step::SetIpRules { name, on } => link(world, &name, &|link| link.kind = LinkKind::Bridge { ip_rules: on }),
        Step::CreateTap { name, owner, multi_queue } => {
            let kind = LinkKind::Tap { owner: Some(owner), multi_queue };
            create(world, &name, kind, [2; 6], 1500);
        }
        Step::SetMac { name, mac } => link(world, &name, &|link| link.mac = mac.octets()),
        Step::SetMtu { name, mtu } => link(world, &name, &|link| link.mtu = mtu),
        Step::SetAlias { name, alias } => {
            link(world, &name, &|link| link.alias = Some(alias.clone()));
        }
        Step::SetUp { name } => {
            link(world, &name, &|link| link.up = true);
            let own = world.addresses.iter().filter(|(bridge, _)| *bridge == name);
            world.routing.leaked.extend(own.map(|(bridge, address)| (bridge.clone(), address.addr())));
        }
        Step::AddAddress { bridge, address } => {
            assert!(world.links.contains_key(&bridge));
            // Where the link is up, the kernel makes a local route in its own table.
            if world.links[&bridge].up {
                world.routing.leaked.insert((bridge.clone(), address.addr()));
            }
            assert!(world.addresses.insert((bridge, address)), "added twice");
        }
        Step::RemoveAddress { bridge, address } => {
            world.routing.leaked.remove(&(bridge.clone(), address.addr()));
            assert!(world.addresses.remove(&(bridge, address)));
        }
        Step::SetNeighbour { bridge, ip, mac } => {
            assert!(world.links.contains_key(&bridge));
            world.neighbours.insert((bridge, ip), mac);
        }
        Step::RemoveNeighbour { bridge, ip } => {
            assert!(world.neighbours.remove(&(bridge, ip)).is_some());
        }
        Step::CreateTrunkPort { name, wire, lower, mtu } => {
            let taken = |link: &Link| matches!(link.kind, LinkKind::Trunk { wire: other, .. } if other == wire);
            assert!(!world.links.values().any(taken), "{wire:?} is there already");
            create(world, &name, LinkKind::Trunk { wire, lower }, [2; 6], mtu);
        }
        Step::Attach { port, bridge, hairpin, isolated } => {
            assert!(world.links.contains_key(&bridge));
            world.forwarding.retain(|(name, _)| *name != port);
            link(world, &port, &|link| {
                link.port = Some(PortOf { bridge: bridge.clone(), pinned: true, hairpin, isolated });
            });
        }
        Step::AddForwarding { port, mac } => {
            assert!(world.forwarding.insert((port, mac)), "added twice");
        }
        Step::RemoveForwarding { port, mac } => {
            assert!(world.forwarding.remove(&(port, mac)));
        }
        Step::SetTunnel { port, mac, node } => {
            assert!(is_vxlan(world, &port));
            world.tunnels.insert((port, mac), node);
        }
        Step::RemoveTunnel { port, mac } => assert!(world.tunnels.remove(&(port, mac)).is_some()),
        Step::AddFlood { port, node } => {
            assert!(is_vxlan(world, &port));
            assert!(world.floods.insert((port, node)), "added twice");
        }
        Step::RemoveFlood { port, node } => assert!(world.floods.remove(&(port, node))),
        Step::AddVpcRule { vpc } => assert!(world.routing.rules.insert(vpc), "added twice"),
        Step::RemoveVpcRule { vpc } => assert!(world.routing.rules.remove(&vpc)),
        Step::AddBridgeRule { bridge, vpc } => assert!(world.routing.by_bridge.insert((bridge, vpc)), "added twice"),
        Step::RemoveBridgeRule { bridge, vpc } => assert!(world.routing.by_bridge.remove(&(bridge, vpc))),
        Step::SetVpcRoute { route, bridge } => {
            assert!(world.links[&bridge].up);
            if let Way::Segment { gateway } = route.way {
                let source = VpcRoute { way: Way::Local, network: gateway.into(), ..route };
                assert!(world.routing.routes.contains_key(&source), "its source is not local");
            }
            world.routing.routes.insert(route, bridge);
        }
        Step::RemoveVpcRoute { route, .. } => assert!(world.routing.routes.remove(&route).is_some()),
        Step::RemoveLeaked { bridge, address } => drop(world.routing.leaked.remove(&(bridge, address))),
        Step::SetRoute { ip, bridge, source } => {
            assert!(world.links.contains_key(&bridge));
            world.routes.insert(ip, (bridge, source));
        }
        Step::RemoveRoute { ip, .. } => drop(world.routes.remove(&ip)),
        Step::AddProxy { index, ip } => assert!(world.proxies.insert((index, ip))),
        Step::RemoveProxy { index, ip } => assert!(world.proxies.remove(&(index, ip))),
    }
}

fn is_vxlan(world: &Observed, port: &LinkName) -> bool {
    matches!(world.links[port].kind, LinkKind::Trunk { wire: Wire::Vxlan { .. }, .. })
}

fn create(world: &mut Observed, name: &LinkName, kind: LinkKind, mac: [u8; 6], mtu: u32) {
    let link = Link {
        index: 10 + world.links.len() as u32,
        kind,
        port: None,
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
    world.routes.retain(|_, (bridge, _)| bridge != name);
    world.routing.routes.retain(|_, bridge| bridge != name);
    world.routing.leaked.retain(|(bridge, _)| bridge != name);
    world.forwarding.retain(|(tap, _)| tap != name);
    world.tunnels.retain(|(port, _), _| port != name);
    world.floods.retain(|(port, _)| port != name);
    for link in world.links.values_mut() {
        if link.port.as_ref().is_some_and(|port| port.bridge == *name) {
            link.port = None;
        }
    }
    let links = &world.links;
    world.forwarding.retain(|(port, _)| links[port].port.is_some());
}

/// The tap that a step makes.
fn made_by(step: &Step) -> Option<&LinkName> {
    match step {
        Step::CreateTap { name, .. } => Some(name),
        _ => None,
    }
}

/// The link that a step makes or changes without opening it, if it does only that.
fn prepared_by(step: &Step) -> Option<&LinkName> {
    match step {
        Step::CreateTap { name, .. } | Step::SetMtu { name, .. } | Step::SetAlias { name, .. } => Some(name),
        Step::Attach { port, .. } | Step::AddForwarding { port, .. } => Some(port),
        _ => None,
    }
}

fn perform_all(world: &mut Observed, plan: &Plan) {
    for step in plan.steps() {
        perform(world, step);
    }
}

/// One of a few ways for the first segment to reach other nodes, with the instances there.
fn any_trunk() -> impl Strategy<Value = (Option<Kind>, Vec<api::RemoteInterface>)> {
    let remotes = proptest::collection::btree_map(1_u8..5, (0_u8..2, 2_u8..5), 0..4);
    (0_u8..3, 0_u32..2, remotes, proptest::collection::btree_set(5_u8..8, 0..3)).prop_map(
        |(kind, number, remotes, more_peers)| {
            let peers = (2_u8..5).chain(more_peers).map(|n| format!("10.9.0.{n}")).collect();
            let kind = match kind {
                0 => return (Some(Kind::Local(api::LocalSegment {})), vec![]),
                1 => Kind::Vlan(api::VlanSegment { vid: 100 + number }),
                _ => Kind::Vxlan(api::VxlanSegment { vni: 5000 + number, peers }),
            };
            let remote = |(n, (mac, node)): (u8, (u8, u8))| api::RemoteInterface {
                id: format!("eni-9{n}"),
                segment: "subnet-1".into(),
                mac: format!("02:00:00:00:09:{:02x}", 16 * mac + n),
                ipv4: format!("172.31.0.{}", 200 + n),
                node: format!("10.9.0.{node}"),
                ..Default::default()
            };
            (Some(kind), remotes.into_iter().map(remote).collect())
        },
    )
}

/// One of a few networks: which interfaces, owners, queues, elastic IPs, MTU and gateway MAC, which trunk.
fn any_network() -> impl Strategy<Value = Network> {
    let interfaces = proptest::collection::btree_map(1_u8..5, (0_u32..2, 1_u32..3, 0_u8..4), 0..5);
    (interfaces, 0_u32..2, 1_u8..3, 0_u8..3, any_trunk()).prop_map(|(interfaces, mtu, mac, second, (kind, remotes))| {
        let mut message = testing::message();
        let template = message.interfaces[0].clone();
        (message.interfaces, message.elastic_ips) = (vec![], vec![]);
        message.segments[0].mtu = 1400 + mtu * 50;
        message.segments[0].gateway_mac = format!("02:00:00:00:00:{mac:02x}");
        if second > 0 {
            let mut segment = message.segments[0].clone();
            segment.id = "subnet-2".into();
            match second {
                1 => (segment.cidr, segment.gateway) = ("10.0.0.0/24".into(), "10.0.0.1".into()),
                // The same network in another VPC.
                _ => segment.vpc = "vpc-2".into(),
            }
            message.segments.push(segment);
        }
        (message.segments[0].kind, message.remotes) = (kind, remotes);
        for (n, (owner_uid, queue_pairs, public)) in interfaces {
            let on_second = second > 0 && n > 2;
            let ipv4 =
                if on_second && second == 1 { format!("10.0.0.{}", 3 + n) } else { format!("172.31.0.{}", 3 + n) };
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
        Network::parse(&message, &testing::surroundings()).unwrap()
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
            let first = plan(network, &world, GROUND).unwrap();
            let steps: Vec<Step> = first.steps().cloned().collect();
            for step in &steps[..cut.index(steps.len() + 1)] {
                perform(&mut world, step);
            }
            let rest = plan(network, &world, GROUND).unwrap();
            perform_all(&mut world, &rest);
            prop_assert_eq!(plan(network, &world, GROUND).unwrap(), Plan::default());
            let ports = network.interfaces.len() + network.trunks().count();
            prop_assert_eq!(world.links.len(), network.segments.len() + ports);
            prop_assert_eq!(world.forwarding.len(), network.interfaces.len() + network.remotes.len());
            prop_assert_eq!(world.proxies.len(), network.elastic_ips.len());
        }
        let nothing = Network::default();
        let last = plan(&nothing, &world, GROUND).unwrap();
        perform_all(&mut world, &last);
        prop_assert_eq!(world, Observed::default());
    }

    #[test]
    fn ports_close_before_the_rules_change_and_open_after(
        from in any_network(), to in any_network(),
    ) {
        let mut world = Observed::default();
        let first = plan(&from, &world, GROUND).unwrap();
        perform_all(&mut world, &first);
        let plan = plan(&to, &world, GROUND).unwrap();
        let closes = |step: &Step| matches!(step, Step::DeleteLink { .. } | Step::RemoveProxy { .. });
        let opens = |step: &Step| {
            use Step::{AddProxy, Attach, CreateTap, CreateTrunkPort};
            matches!(step, CreateTap { .. } | CreateTrunkPort { .. } | Attach { .. } | AddProxy { .. })
        };
        prop_assert!(!plan.before_rules.iter().any(opens));
        prop_assert!(!plan.after_rules.iter().any(closes));
        // What is done beside the rules is of taps that are made there, and leaves them down.
        let made: BTreeSet<&LinkName> = plan.beside_rules.iter().filter_map(made_by).collect();
        prop_assert!(plan.beside_rules.iter().all(|step| prepared_by(step).is_some_and(|tap| made.contains(tap))));
    }
}

#[test]
fn a_name_that_somebody_else_has_is_refused() {
    let world = Observed { foreign: ["tpeni1".to_owned()].into(), ..Observed::default() };
    let error = plan(&testing::network(), &world, GROUND).unwrap_err();
    assert!(error.to_string().contains("tpeni1"));
}

#[test]
fn another_way_to_judge_neighbours_changes_bridges_and_ports_in_place() {
    let network = testing::network();
    let mut world = Observed::default();
    let first = plan(&network, &world, GROUND).unwrap();
    perform_all(&mut world, &first);
    for bridging in [Bridging::Conntrack, Bridging::Routed, Bridging::IpRules, Bridging::Routed] {
        let ground = Ground { bridging, ..GROUND };
        let change = plan(&network, &world, ground).unwrap();
        let breaks = |step: &Step| matches!(step, Step::DeleteLink { .. } | Step::CreateTap { .. });
        assert!(!change.is_empty() && !change.steps().any(breaks), "{change:?}");
        perform_all(&mut world, &change);
        assert_eq!(plan(&network, &world, ground).unwrap(), Plan::default());
    }
    let last = plan(&Network::default(), &world, GROUND).unwrap();
    perform_all(&mut world, &last);
    assert_eq!(world, Observed::default());
}
