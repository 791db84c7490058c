//! Rules for segments that reach other nodes: what may come from the trunk, and what may go there.
//!
//! A frame from a trunk port was let through by the sender's own node. It is judged again here all the same, by what the
//! controller says is on that wire: a switch that is set up wrong, or a stranger on the wire, is not believed.
//!
//! Each node has the segment's gateway, with the same MAC and the same address. So nothing that comes from a trunk may
//! reach this node itself, or an instance's DHCP, ARP and metadata requests would be answered once by each node; and a
//! flow between two subnets passes one node's gateway on its way there and another's on its way back. Both nodes see the whole of it all
//! the same, one half routed and the other on a bridge, since what passes between ports is tracked too ([`Bridging`](crate::bridging::Bridging)).
//!
//! What an instance sends is judged by its groups on its own node, and what it gets likewise: packets for instances of other
//! nodes are marked with nobody, as those that come from them are.

use nftnl::{ChainType, Hook, ProtoFamily};

use super::bridge::{DHCP_CLIENT, ETHER_ARP, FIRST, arp_of_the_bound};
use super::vpcs::on_bridge;
use super::{BINDINGS, DHCP_SERVER, ETHER_IPV4, MACS, ROUTERS, SPOOFED, base, chain, map, set};
use crate::desired::{Network, Segment, Trunk, Wire};
use crate::links::VXLAN_PORT;
use crate::nft::contents::{Contents, address, number, with_mac};
use crate::nft::layout::{Chain, Set, Table, Type};
use crate::nft::rule::Field::{EtherSource, InputName, Ipv4Destination, Ipv4Source, Number, OutputName};
use crate::nft::rule::Rule;

// --- sets of the table `ip` ---

/// The private addresses of instances on other nodes, each with the bridge that leads there.
pub const REMOTES: Set = set("remotes", 40, &[Type::LinkName, Type::Ipv4]);
/// This node's addresses that tunnels end at.
pub const TUNNEL_ENDS: Set = set("tunnel_ends", 41, &[Type::Ipv4]);
/// The other ends.
pub const TUNNEL_PEERS: Set = set("tunnel_peers", 42, &[Type::Ipv4]);

// --- sets and map of the table `bridge` ---

/// The trunk ports. What is behind each is in the sets that say it of taps.
pub const TRUNKS: Set = set("trunks", 40, &[Type::LinkName]);

/// Trunk port with the gateway's MAC, as instances see it: the same on every node.
pub const GATEWAY_FRAMES: Set = set("gateway_frames", 41, &[Type::LinkName, Type::Ether]);
/// Trunk port to that MAC.
pub const GATEWAY_MACS: Set = map("gateway_macs", 42, &[Type::LinkName], Type::Ether);
/// Trunk port to the MAC that this node's gateway has on the wire.
pub const ROUTER_MACS: Set = map("router_macs", 43, &[Type::LinkName], Type::Ether);
/// Trunk port with the MACs that other nodes' gateways have on the wire.
pub const PEER_ROUTERS: Set = set("peer_routers", 44, &[Type::LinkName, Type::Ether]);

/// The chain for what comes from other nodes.
const FROM_TRUNK: &str = "from_trunk";

/// Adds the chains at hooks of bridges where there is a trunk: each costs every packet that has nothing to do with it. In which order their rules are means nothing.
pub fn grow(table: &mut Table, network: &Network) {
    if table.family == ProtoFamily::Bridge && network.trunks().next().is_some() {
        table.chains.extend([trunk_to_node(), trunk_out()]);
    }
}

/// What is for an instance elsewhere is for nobody here.
pub fn for_nobody_here() -> Rule {
    Rule::new("another node judges it").found(&[OutputName, Ipv4Destination], &REMOTES).mark_with(Number(0))
}

/// The kernel takes a VXLAN's packets from anybody.
pub fn to_tunnel() -> Rule {
    Rule::new("tunnels are for peers")
        .found(&[Ipv4Destination], &TUNNEL_ENDS)
        .udp_to(VXLAN_PORT)
        .not_found(&[Ipv4Source], &TUNNEL_PEERS)
        .drop()
}

/// An instance without an elastic IP goes out as this node, which a peer would believe. That its first packet is looked at is enough: a
/// connection would have to be answered from a tunnel's port, which answers nobody.
pub fn from_tunnel() -> Rule {
    Rule::new("instances have no tunnels").found(&[Ipv4Destination], &TUNNEL_PEERS).udp_to(VXLAN_PORT).drop()
}

pub fn from_trunk() -> Chain {
    let [arp_own, arp_probe] = arp_of_the_bound("ARP from the address of an instance there");
    let ipv4 = |purpose| Rule::new(purpose).ether_type(ETHER_IPV4);
    chain(
        FROM_TRUNK,
        None,
        vec![
            arp_own.accept(),
            arp_probe.accept(),
            ipv4("DHCP is served by the own node").udp_from(DHCP_SERVER).found(&[InputName], &SPOOFED).drop(),
            ipv4("IPv4 from the address of an instance there")
                .known(&[InputName, EtherSource, Ipv4Source], &BINDINGS)
                .accept(),
            ipv4("IPv4 from an instance without source check").known(&[InputName, EtherSource], &ROUTERS).accept(),
            ipv4("IPv4 by way of the gateway there, which is the gateway here to an instance")
                .found(&[InputName, EtherSource], &PEER_ROUTERS)
                .ether_source_by(InputName, &GATEWAY_MACS)
                .accept(),
            Rule::new("count what is dropped").found(&[InputName], &SPOOFED).drop(),
            Rule::new("drop what could not be counted").drop(),
        ],
    )
}

fn trunk_to_node() -> Chain {
    chain(
        "trunk_to_node",
        base(ChainType::Filter, Hook::In, FIRST),
        vec![Rule::new("instances of other nodes have their gateway there").found(&[InputName], &TRUNKS).drop()],
    )
}

fn trunk_out() -> Chain {
    let to_trunk = |purpose, kind| Rule::new(purpose).found(&[OutputName], &TRUNKS).ether_type(kind);
    chain(
        "trunk_out",
        base(ChainType::Filter, Hook::PostRouting, FIRST),
        vec![
            to_trunk("the gateway asks no other node", ETHER_ARP)
                .found(&[OutputName, EtherSource], &GATEWAY_FRAMES)
                .drop(),
            to_trunk("DHCP is answered here", ETHER_IPV4).udp_ports(DHCP_CLIENT, DHCP_SERVER).drop(),
            to_trunk("to those who are here", ETHER_IPV4).udp_ports(DHCP_SERVER, DHCP_CLIENT).drop(),
            // Not its ARP, which the rule above is about.
            to_trunk("the gateway has a MAC of its own on the wire", ETHER_IPV4)
                .found(&[OutputName, EtherSource], &GATEWAY_FRAMES)
                .ether_source_by(OutputName, &ROUTER_MACS),
        ],
    )
}

impl Contents {
    pub(in crate::nft) fn add_trunks(&mut self, network: &Network) {
        for (segment, trunk) in network.trunks() {
            self.add_trunk(network, segment, trunk);
        }
    }

    fn add_trunk(&mut self, network: &Network, segment: &Segment, trunk: &Trunk) {
        let name = trunk.port.padded().to_vec();
        self.put_bridge(&TRUNKS, name.clone());
        self.put_sender(&trunk.port, FROM_TRUNK);
        self.put_bridge(&SPOOFED, name);
        let gateway = segment.gateway_mac;
        self.put_bridge(&GATEWAY_FRAMES, with_mac(&trunk.port, gateway));
        for (map, mac) in [(&GATEWAY_MACS, gateway), (&ROUTER_MACS, trunk.router)] {
            self.put(ProtoFamily::Bridge, map, trunk.port.padded().to_vec(), mac.octets().to_vec());
        }
        for router in &trunk.peer_routers {
            self.put_bridge(&PEER_ROUTERS, with_mac(&trunk.port, *router));
        }
        for remote in network.remotes_of(&segment.id) {
            let port_and_mac = with_mac(&trunk.port, remote.mac);
            self.put_bridge(&MACS, port_and_mac.clone());
            // Their own node has judged what they send.
            let judged = number(0);
            if !remote.source_check {
                self.put(ProtoFamily::Bridge, &ROUTERS, port_and_mac.clone(), judged.clone());
            }
            for held in remote.addresses() {
                self.put_ip(&REMOTES, on_bridge(segment, held));
                let bound = [port_and_mac.as_slice(), &address(held)].concat();
                self.put(ProtoFamily::Bridge, &BINDINGS, bound, judged.clone());
            }
        }
        if let Wire::Vxlan { local, .. } = trunk.wire {
            self.put_ip(&TUNNEL_ENDS, address(local));
            for peer in &trunk.peers {
                self.put_ip(&TUNNEL_PEERS, address(*peer));
            }
        }
    }
}

/// netd's sets of the family that serve trunks.
pub fn sets(family: ProtoFamily) -> Vec<Set> {
    match family {
        ProtoFamily::Bridge => vec![TRUNKS, GATEWAY_FRAMES, GATEWAY_MACS, ROUTER_MACS, PEER_ROUTERS],
        _ => vec![REMOTES, TUNNEL_ENDS, TUNNEL_PEERS],
    }
}
