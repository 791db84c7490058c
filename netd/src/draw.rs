//! `mallee-netd show`: the node's network as a person would draw it, from the public side to the taps, each with what it has counted.

use std::path::Path;

use crate::api::{
    self, CapabilitiesReply, CapabilitiesRequest, Interface, InterfaceState, NodeNetwork, Segment, ShowReply,
    ShowRequest, segment::Kind,
};
use crate::cli::ShowOptions;
use crate::error::{Error, Result};

/// Prints what the netd at the socket has.
pub async fn show(options: &ShowOptions) -> Result<()> {
    let refused = |status: tonic::Status| refused(&options.socket, &status);
    let mut client = api::client(&options.socket);
    let node = client.capabilities(CapabilitiesRequest {}).await.map_err(refused)?.into_inner();
    let shown = client.show(ShowRequest {}).await.map_err(refused)?.into_inner();
    print!("{}", draw(&node, &shown));
    Ok(())
}

/// Why netd gave no answer.
pub fn refused(socket: &Path, status: &tonic::Status) -> Error {
    Error::Asking { socket: socket.to_owned(), problem: status.message().into() }
}

/// A line with what hangs on it.
struct Branch {
    text: String,
    twigs: Vec<Branch>,
}

impl Branch {
    fn new(text: String, twigs: Vec<Branch>) -> Self {
        Self { text, twigs }
    }

    fn leaf(text: String) -> Self {
        Self::new(text, Vec::new())
    }

    fn write(&self, text: &mut String, before: &str) {
        for (n, twig) in self.twigs.iter().enumerate() {
            let (joint, under) = if n + 1 == self.twigs.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            *text += &format!("{before}{joint}{}\n", twig.text);
            twig.write(text, &format!("{before}{under}"));
        }
    }
}

fn draw(node: &CapabilitiesReply, shown: &ShowReply) -> String {
    let Some(network) = &shown.applied else { return "netd has no network yet\n".to_owned() };
    let mut twigs = vec![public_side(node, shown)];
    let mut vpcs: Vec<&str> = network.segments.iter().map(|segment| segment.vpc.as_str()).collect();
    vpcs.sort_unstable();
    vpcs.dedup();
    for vpc in vpcs {
        let segments = network.segments.iter().filter(|segment| segment.vpc == vpc);
        let branches = segments.map(|segment| segment_branch(segment, network, shown)).collect();
        twigs.push(Branch::new(vpc.to_owned(), branches));
    }
    let missing: Vec<String> = node
        .capabilities
        .iter()
        .filter(|(_, reason)| !reason.is_empty())
        .map(|(name, reason)| format!("no {name}: {reason}"))
        .collect();
    let root = Branch::new(format!("this node, generation {}, by {}", network.generation, node.backend), twigs);
    let mut text = format!("{}\n", root.text);
    root.write(&mut text, "");
    missing.iter().for_each(|line| text += &format!("{line}\n"));
    text
}

fn public_side(node: &CapabilitiesReply, shown: &ShowReply) -> Branch {
    let elastic = shown.elastic_ips.iter().map(|elastic| {
        Branch::leaf(format!(
            "{} ⇄ {}   {} packets in, {} out",
            elastic.public_ip, elastic.private_ip, elastic.in_packets, elastic.out_packets
        ))
    });
    Branch::new(format!("public side: {} {}", node.uplink, node.uplink_address), elastic.collect())
}

fn segment_branch(segment: &Segment, network: &NodeNetwork, shown: &ShowReply) -> Branch {
    let kind = match &segment.kind {
        Some(Kind::Vlan(vlan)) => format!("VLAN {}", vlan.vid),
        Some(Kind::Vxlan(vxlan)) => format!("VXLAN {}", vxlan.vni),
        _ => "local".to_owned(),
    };
    let mut twigs = Vec::new();
    let trunk = shown.trunks.iter().find(|trunk| trunk.segment == segment.id);
    let elsewhere = network.remotes.iter().filter(|remote| remote.segment == segment.id);
    if let Some(trunk) = trunk {
        let instances = elsewhere.map(|remote| Branch::leaf(format!("{} {} {}", remote.ipv4, remote.id, remote.mac)));
        let text = format!(
            "other nodes: {}, {}   {} packets from there, {} to there{}",
            trunk.link,
            up(trunk.carrier),
            trunk.rx_packets,
            trunk.tx_packets,
            refusals(&[(trunk.strange_packets, "of nobody known there")]),
        );
        twigs.push(Branch::new(text, instances.collect()));
    }
    let here = network.interfaces.iter().filter(|interface| interface.segment == segment.id);
    twigs.extend(here.map(|interface| {
        let state = shown.interfaces.iter().find(|state| state.id == interface.id);
        interface_branch(interface, network, state)
    }));
    let bridge = api::bridge_name(&segment.id);
    Branch::new(format!("{} {} {kind}, gateway {} on {bridge}", segment.id, segment.cidr, segment.gateway), twigs)
}

fn interface_branch(interface: &Interface, network: &NodeNetwork, state: Option<&InterfaceState>) -> Branch {
    let with_public = |held: &String| {
        let stands_for_it = |found: &&api::ElasticIp| found.private_ip == *held && found.segment == interface.segment;
        let public = network.elastic_ips.iter().find(stands_for_it);
        public.map_or(held.clone(), |found| format!("{held} ⇄ {}", found.public_ip))
    };
    let held: Vec<String> =
        std::iter::once(&interface.ipv4).chain(&interface.secondary_ipv4).map(with_public).collect();
    let groups = match interface.security_groups.as_slice() {
        [] => "in no group".to_owned(),
        groups => groups.join(", "),
    };
    let head = format!("{} {}   {}, {}, {groups}", interface.instance, held.join(", "), interface.id, interface.mac);
    let Some(state) = state else { return Branch::leaf(head) };
    let traffic = format!(
        "{}, {}   {} packets sent, {} received{}",
        state.tap,
        up(state.carrier),
        state.tx_packets,
        state.rx_packets,
        refusals(&reasons(state))
    );
    Branch::new(head, vec![Branch::leaf(traffic)])
}

fn up(carrier: bool) -> &'static str {
    if carrier { "up" } else { "nobody has it open" }
}

/// Why something of an interface's was dropped, and how much.
fn reasons(state: &InterfaceState) -> Vec<(u64, &'static str)> {
    let limited = state.limited.unwrap_or_default();
    vec![
        (state.denied_in_packets, "let in by no group"),
        (state.denied_out_packets, "let out by no group"),
        (state.spoofed_packets, "in another's name"),
        (state.foreign_packets, "neither IPv4 nor ARP"),
        (limited.arp_packets, "too much ARP"),
        (limited.dhcp_packets, "too much DHCP"),
        (limited.gateway_packets, "too much to the gateway"),
        (limited.broadcast_packets, "too many broadcasts"),
        (limited.fragments, "too many fragments"),
        (limited.opened_too_fast, "connections opened too fast"),
        (limited.opened_too_many, "connections opened too many"),
        (limited.taken_too_fast, "connections to it too fast"),
        (limited.taken_too_many, "connections to it too many"),
    ]
}

fn refusals(reasons: &[(u64, &str)]) -> String {
    let counted = reasons.iter().filter(|(packets, _)| *packets > 0);
    let words: Vec<String> = counted.map(|(packets, why)| format!("{packets} {why}")).collect();
    if words.is_empty() { String::new() } else { format!("; dropped: {}", words.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_drawn_from_the_public_side_to_the_taps() {
        let interface = Interface {
            id: "eni-1".into(),
            segment: "subnet-1".into(),
            ipv4: "10.0.0.4".into(),
            mac: "02:00:00:00:00:04".into(),
            instance: "i-1".into(),
            security_groups: vec!["sg-1".into()],
            ..Default::default()
        };
        let segment = Segment {
            id: "subnet-1".into(),
            vpc: "vpc-1".into(),
            cidr: "10.0.0.0/24".into(),
            gateway: "10.0.0.1".into(),
            kind: Some(Kind::Vxlan(api::VxlanSegment { vni: 7, peers: vec![] })),
            ..Default::default()
        };
        let elastic =
            api::ElasticIp { public_ip: "192.0.2.1".into(), private_ip: "10.0.0.4".into(), segment: "subnet-1".into() };
        let shown = ShowReply {
            applied: Some(NodeNetwork {
                generation: 3,
                segments: vec![segment],
                interfaces: vec![interface],
                elastic_ips: vec![elastic],
                ..Default::default()
            }),
            interfaces: vec![InterfaceState {
                id: "eni-1".into(),
                tap: "tpeni1".into(),
                carrier: true,
                tx_packets: 5,
                spoofed_packets: 2,
                limited: Some(api::Limited { arp_packets: 9, ..Default::default() }),
                ..Default::default()
            }],
            trunks: vec![api::TrunkState {
                segment: "subnet-1".into(),
                link: "tksubnet1".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let node = CapabilitiesReply {
            uplink: "eth1".into(),
            uplink_address: "192.0.2.9/24".into(),
            backend: "nftables".into(),
            ..Default::default()
        };
        let expected = "\
this node, generation 3, by nftables
├─ public side: eth1 192.0.2.9/24
└─ vpc-1
   └─ subnet-1 10.0.0.0/24 VXLAN 7, gateway 10.0.0.1 on brsubnet1
      ├─ other nodes: tksubnet1, nobody has it open   0 packets from there, 0 to there
      └─ i-1 10.0.0.4 ⇄ 192.0.2.1   eni-1, 02:00:00:00:00:04, sg-1
         └─ tpeni1, up   5 packets sent, 0 received; dropped: 2 in another's name, 9 too much ARP
";
        assert_eq!(draw(&node, &shown), expected);
    }
}
