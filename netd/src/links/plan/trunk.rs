//! The steps for a segment's trunk port.
//!
//! A trunk port is planned as a tap is, with many MACs behind it in place of one. A VXLAN has a second table of its own,
//! below the bridge's: which node a MAC is on, and which nodes get what is for everybody.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use super::{Ground, Step, Steps, plan_alias_and_up, plan_attachment};
use crate::desired::{LinkName, MacAddress, Network, RemoteInterface, Segment, Trunk, Wire};
use crate::links::{Link, Observed, PortOf};

/// What the port lies on.
pub(super) fn lower(wire: Wire, ground: Ground) -> Option<u32> {
    match wire {
        Wire::Vlan { .. } => ground.trunk,
        Wire::Vxlan { .. } => None,
    }
}

pub(super) fn plan_port<'a>(
    desired: &Network,
    segment: &Segment,
    trunk: &Trunk,
    ground: Ground,
    observed: &Observed,
    kept: &impl Fn(&LinkName) -> Option<&'a Link>,
    steps: &mut Steps,
) {
    let (name, found) = (&trunk.port, kept(&trunk.port));
    if found.is_none() {
        let (wire, mtu) = (trunk.wire, segment.mtu);
        steps.push(Step::CreateTrunkPort { name: name.clone(), wire, lower: lower(wire, ground), mtu });
    }
    if found.is_some_and(|link| link.mtu != segment.mtu) {
        steps.push(Step::SetMtu { name: name.clone(), mtu: segment.mtu });
    }
    let remotes: Vec<&RemoteInterface> = desired.remotes_of(&segment.id).collect();
    let macs = remotes.iter().map(|remote| remote.mac).collect();
    let place = PortOf { bridge: segment.bridge.clone(), pinned: true, hairpin: false, isolated: false };
    plan_attachment(name, &place, found, &macs, observed, kept, steps);
    if matches!(trunk.wire, Wire::Vxlan { .. }) {
        plan_tunnels(trunk, &remotes, observed, found.is_some(), steps);
        plan_floods(trunk, observed, found.is_some(), steps);
    }
    plan_alias_and_up(name, &segment.id.to_string(), found, steps);
}

fn plan_tunnels(trunk: &Trunk, remotes: &[&RemoteInterface], observed: &Observed, is_kept: bool, steps: &mut Steps) {
    let port = || trunk.port.clone();
    let macs: BTreeSet<MacAddress> = remotes.iter().map(|remote| remote.mac).collect();
    for (of, mac) in observed.tunnels.keys() {
        if is_kept && *of == trunk.port && !macs.contains(mac) {
            steps.push(Step::RemoveTunnel { port: port(), mac: *mac });
        }
    }
    for remote in remotes {
        // Parsing made sure that a remote on a VXLAN has a node.
        let Some(node) = remote.node else { continue };
        if !is_kept || observed.tunnels.get(&(port(), remote.mac)) != Some(&node) {
            steps.push(Step::SetTunnel { port: port(), mac: remote.mac, node });
        }
    }
}

fn plan_floods(trunk: &Trunk, observed: &Observed, is_kept: bool, steps: &mut Steps) {
    let port = || trunk.port.clone();
    let found: BTreeSet<Ipv4Addr> = match is_kept {
        true => observed.floods.iter().filter(|(of, _)| *of == trunk.port).map(|(_, node)| *node).collect(),
        false => BTreeSet::new(),
    };
    for node in found.difference(&trunk.peers) {
        steps.push(Step::RemoveFlood { port: port(), node: *node });
    }
    for node in trunk.peers.difference(&found) {
        steps.push(Step::AddFlood { port: port(), node: *node });
    }
}
