//! The rules: what happens to a packet.
//!
//! ```text
//!  instance ──tap──▶ [bridge: from_instance]  is it who it says it is?
//!                        │
//!                        ├─ to a neighbour on the segment ──▶ its tap
//!                        └─ to the gateway's MAC
//!                              │ [elastic_in]      public destination → private
//!                              │ [node_input]      to the node: metadata, DHCP, ping; nothing else
//!                              │ [forward]         to_instance, from_instance
//!                              └ [elastic_out]     private source → public, or masquerade
//!  other nodes ─trunk▶ [bridge: from_trunk]     is it of an instance that is there? (`trunk.rs`)
//! ```
//!
//! Rules name sets and maps and never an instance, so they are the same on every node but for the
//! uplink's name. What is in the sets is in `contents.rs`.
//!
//! Traffic that is not of netd's bridges or taps falls through every chain untouched: a host's other
//! networks are none of netd's business.

use nftnl::{ChainType, Hook, ProtoFamily};

use super::TABLE;
use super::expr::Header;
use super::layout::{Base, Chain, Set, Table, Type};
use super::rule::Field::{
    ArpSenderIp, ArpSenderMac, DhcpClientMac, EtherSource, InputName, Ipv4Destination, Ipv4Source, OutputName,
};
use super::rule::{Rule, State};
use super::trunk;
use crate::api::METADATA_ADDRESS;

// --- sets and maps of the table `ip` ---

pub(super) const fn set(name: &'static str, id: u32, key: &'static [Type]) -> Set {
    Set { name, id, key, value: None, counting: false }
}

pub(super) const fn map(name: &'static str, id: u32, key: &'static [Type], value: Type) -> Set {
    Set { name, id, key, value: Some(value), counting: false }
}

const fn counting(name: &'static str, id: u32, key: &'static [Type]) -> Set {
    Set { name, id, key, value: None, counting: true }
}

/// Public address to the private one that it stands for.
pub const EIP_IN: Set = map("eip_in", 1, &[Type::Ipv4], Type::Ipv4);
/// Private address to the public one that it appears as.
pub const EIP_OUT: Set = map("eip_out", 2, &[Type::Ipv4], Type::Ipv4);
/// Counts packets to each public address.
pub const EIP_IN_COUNT: Set = counting("eip_in_count", 3, &[Type::Ipv4]);
/// Counts packets from each public address.
pub const EIP_OUT_COUNT: Set = counting("eip_out_count", 4, &[Type::Ipv4]);
/// The bridges, each of which is a segment.
pub const BRIDGES: Set = set("bridges", 5, &[Type::LinkName]);
/// The private addresses that instances hold.
pub const INSTANCES: Set = set("instances", 6, &[Type::Ipv4]);
/// The addresses of the gateways, the resolvers and the metadata service: the node itself, as instances see it.
pub const GATEWAYS: Set = set("gateways", 7, &[Type::Ipv4]);
/// Pairs of bridges that are routed to one another: segments of one VPC.
pub const ROUTED: Set = set("routed", 8, &[Type::LinkName, Type::LinkName]);

// --- sets of the table `bridge` ---

/// The taps.
pub const TAPS: Set = set("taps", 1, &[Type::LinkName]);
/// Tap with the MAC behind it.
pub const MACS: Set = set("macs", 2, &[Type::LinkName, Type::Ether]);
/// Tap with the MAC and the address behind it.
pub const BINDINGS: Set = set("bindings", 3, &[Type::LinkName, Type::Ether, Type::Ipv4]);
/// Tap with the MAC of an instance that may send for others (no source check).
pub const ROUTERS: Set = set("routers", 4, &[Type::LinkName, Type::Ether]);
/// Counts what was dropped, by tap.
pub const SPOOFED: Set = counting("spoofed", 5, &[Type::LinkName]);

// Priorities of hooks (`include/uapi/linux/netfilter_ipv4.h`, `netfilter_bridge.h`).
const MANGLE: i32 = -150;
const NAT_DESTINATION: i32 = -100;
pub(super) const FILTER: i32 = 0;
const NAT_SOURCE: i32 = 100;
/// After the source was translated.
const AFTER_NAT_SOURCE: i32 = 150;
/// Before anything else that a bridge does (`NF_BR_PRI_FIRST` is the lowest there is).
pub(super) const BRIDGE_FIRST: i32 = -300;

pub(super) const ETHER_IPV4: u16 = 0x0800;
pub(super) const ETHER_ARP: u16 = 0x0806;
pub(super) const DHCP_SERVER: u16 = 67;
pub(super) const DHCP_CLIENT: u16 = 68;
const DNS: u16 = 53;
const HTTP: u16 = 80;

/// netd's two tables: that of IPv4, then that of bridges.
pub fn tables(uplink: &str) -> [Table; 2] {
    [ipv4_table(uplink), bridge_table()]
}

fn ipv4_table(uplink: &str) -> Table {
    let mut table = Table {
        family: ProtoFamily::Ipv4,
        name: TABLE,
        sets: vec![EIP_IN, EIP_OUT, EIP_IN_COUNT, EIP_OUT_COUNT, BRIDGES, INSTANCES, GATEWAYS, ROUTED],
        chains: vec![
            count_in(),
            elastic_in("elastic_in", Hook::PreRouting),
            // So that a program on the node itself reaches an elastic IP too.
            elastic_in("elastic_local", Hook::Out),
            node_from_instance(),
            node_input(uplink),
            inbound_allowed(),
            to_instance(),
            from_instance_routed(uplink),
            forward(),
            elastic_out(uplink),
            count_out(),
        ],
    };
    table.sets.extend(trunk::sets(table.family));
    table.chains.extend(trunk::ipv4_chains());
    table
}

pub(super) fn base(kind: ChainType, hook: Hook, priority: i32) -> Option<Base> {
    Some(Base { kind, hook, priority })
}

/// Counts before translation, where the destination is still the public address.
fn count_in() -> Chain {
    Chain {
        name: "count_in",
        base: base(ChainType::Filter, Hook::PreRouting, MANGLE),
        rules: vec![Rule::new("count packets to an elastic IP").found(&[Ipv4Destination], &EIP_IN_COUNT)],
    }
}

fn count_out() -> Chain {
    Chain {
        name: "count_out",
        base: base(ChainType::Filter, Hook::PostRouting, AFTER_NAT_SOURCE),
        rules: vec![Rule::new("count packets from an elastic IP").found(&[Ipv4Source], &EIP_OUT_COUNT)],
    }
}

fn elastic_in(name: &'static str, hook: Hook) -> Chain {
    Chain {
        name,
        base: base(ChainType::Nat, hook, NAT_DESTINATION),
        rules: vec![Rule::new("elastic IP to its instance").dnat_by(&EIP_IN)],
    }
}

/// What instances may ask of the node: nothing but what a subnet's gateway answers.
fn node_from_instance() -> Chain {
    Chain {
        name: "node_from_instance",
        base: None,
        rules: vec![
            Rule::new("answers").state(State::EstablishedOrRelated).accept(),
            Rule::new("metadata service").destination_is(METADATA_ADDRESS).tcp_to(HTTP).accept(),
            Rule::new("DHCP").udp_to(DHCP_SERVER).accept(),
            Rule::new("DNS").found(&[Ipv4Destination], &GATEWAYS).udp_to(DNS).accept(),
            Rule::new("DNS over TCP").found(&[Ipv4Destination], &GATEWAYS).tcp_to(DNS).accept(),
            Rule::new("ping the gateway")
                .found(&[Ipv4Destination], &GATEWAYS)
                .protocol(libc::IPPROTO_ICMP)
                .bytes_are(Header::Transport, 0, &[8])
                .accept(),
            Rule::new("the node is not the instances' to reach").drop(),
        ],
    }
}

fn node_input(uplink: &str) -> Chain {
    Chain {
        name: "node_input",
        base: base(ChainType::Filter, Hook::In, FILTER),
        rules: vec![
            Rule::new("from an instance").found(&[InputName], &BRIDGES).jump("node_from_instance"),
            Rule::new("gateways are not for the public side")
                .input_is(uplink)
                .found(&[Ipv4Destination], &GATEWAYS)
                .drop(),
        ],
    }
}

/// The place of security groups: decides on a new connection to an instance.
fn inbound_allowed() -> Chain {
    Chain {
        name: "inbound_allowed",
        base: None,
        rules: vec![Rule::new("no security groups yet: all inbound is allowed").accept()],
    }
}

fn to_instance() -> Chain {
    Chain {
        name: "to_instance",
        base: None,
        rules: vec![
            trunk::to_remote(),
            Rule::new("answers").state(State::EstablishedOrRelated).accept(),
            Rule::new("no part of any connection").state(State::Invalid).drop(),
            Rule::new("through an elastic IP").through_elastic_ip().jump("inbound_allowed"),
            Rule::new("from a segment of the same VPC")
                .found(&[InputName, OutputName], &ROUTED)
                .jump("inbound_allowed"),
            Rule::new("private addresses are not for the public side").drop(),
        ],
    }
}

fn from_instance_routed(uplink: &str) -> Chain {
    Chain {
        name: "from_instance",
        base: None,
        rules: vec![
            Rule::new("answers").state(State::EstablishedOrRelated).accept(),
            Rule::new("no part of any connection").state(State::Invalid).drop(),
            Rule::new("a source that would not be translated stays here").not_found(&[Ipv4Source], &INSTANCES).drop(),
            Rule::new("out to the public side").output_is(uplink).accept(),
            Rule::new("the node's other networks are not the instances'").drop(),
        ],
    }
}

fn forward() -> Chain {
    Chain {
        name: "forward",
        base: base(ChainType::Filter, Hook::Forward, FILTER),
        rules: vec![
            Rule::new("to an instance").found(&[OutputName], &BRIDGES).jump("to_instance"),
            Rule::new("from an instance").found(&[InputName], &BRIDGES).jump("from_instance"),
        ],
    }
}

/// An instance appears outside as its elastic IP, or as the node when it has none. The same holds
/// for a packet that turns round on this node ("hairpin": an instance calls another, or itself, by
/// an elastic IP): untranslated, the answer would go straight to the caller, from an address that it
/// never called. Masquerading there gives the caller its segment's gateway as address.
fn elastic_out(uplink: &str) -> Chain {
    Chain {
        name: "elastic_out",
        base: base(ChainType::Nat, Hook::PostRouting, NAT_SOURCE),
        rules: vec![
            Rule::new("instance out as its elastic IP").output_is(uplink).snat_by(&EIP_OUT),
            Rule::new("instance out as the node").output_is(uplink).found(&[Ipv4Source], &INSTANCES).masquerade(),
            Rule::new("hairpin as its elastic IP").through_elastic_ip().snat_by(&EIP_OUT),
            Rule::new("hairpin as the gateway").through_elastic_ip().found(&[Ipv4Source], &INSTANCES).masquerade(),
        ],
    }
}

fn bridge_table() -> Table {
    let mut table = Table {
        family: ProtoFamily::Bridge,
        name: TABLE,
        sets: vec![TAPS, MACS, BINDINGS, ROUTERS, SPOOFED],
        chains: vec![from_instance_frames(), frames_in(), frames_to_node()],
    };
    table.sets.extend(trunk::sets(table.family));
    table.chains.extend(trunk::bridge_chains());
    table
}

fn frames_in() -> Chain {
    Chain {
        name: "frames_in",
        base: base(ChainType::Filter, Hook::PreRouting, BRIDGE_FIRST),
        rules: vec![Rule::new("from an instance").found(&[InputName], &TAPS).jump("from_instance")],
    }
}

/// Frames to the addresses that bridges keep to themselves (spanning tree, 802.1X) do not pass the
/// hook above; they reach the node's protocol handlers through this one. LLDP passes neither, and
/// ends with handlers that netd does not have; no port learns from it.
fn frames_to_node() -> Chain {
    Chain {
        name: "frames_to_node",
        base: base(ChainType::Filter, Hook::In, BRIDGE_FIRST),
        rules: vec![
            Rule::new("instances do not speak to the bridge")
                .found(&[InputName], &TAPS)
                .for_link_local_group()
                .found(&[InputName], &SPOOFED)
                .drop(),
        ],
    }
}

/// Anti-spoofing. Everything that is not provably the instance's own falls to the last rules.
/// Frames are told by the type field as it is on the wire, so a tagged frame matches nothing; nor
/// does IPv6, which segments do not have.
fn from_instance_frames() -> Chain {
    // Ethernet, IPv4, lengths 6 and 4 (RFC 826): what the offsets below count on.
    let arp = |purpose| Rule::new(purpose).ether_type(ETHER_ARP).bytes_are(Header::Network, 0, &[0, 1, 8, 0, 6, 4]);
    let ipv4 = |purpose| Rule::new(purpose).ether_type(ETHER_IPV4);
    Chain {
        name: "from_instance",
        base: None,
        rules: vec![
            arp("ARP from its own address")
                .found(&[InputName, EtherSource, ArpSenderIp], &BINDINGS)
                .found(&[InputName, ArpSenderMac, ArpSenderIp], &BINDINGS)
                .accept(),
            arp("ARP probe for a free address (RFC 5227)")
                .bytes_are(Header::Network, 14, &[0; 4])
                .found(&[InputName, EtherSource], &MACS)
                .found(&[InputName, ArpSenderMac], &MACS)
                .accept(),
            ipv4("DHCP request in its own name")
                .udp_ports(DHCP_CLIENT, DHCP_SERVER)
                .source_is(std::net::Ipv4Addr::UNSPECIFIED)
                .destination_is(std::net::Ipv4Addr::BROADCAST)
                .found(&[InputName, EtherSource], &MACS)
                .found(&[InputName, DhcpClientMac], &MACS)
                .accept(),
            ipv4("instances do not serve DHCP").udp_from(DHCP_SERVER).found(&[InputName], &SPOOFED).drop(),
            ipv4("DHCP request in another's name")
                .udp_to(DHCP_SERVER)
                .not_found(&[InputName, DhcpClientMac], &MACS)
                .found(&[InputName], &SPOOFED)
                .drop(),
            ipv4("IPv4 from its own address").found(&[InputName, EtherSource, Ipv4Source], &BINDINGS).accept(),
            ipv4("IPv4 from an instance without source check").found(&[InputName, EtherSource], &ROUTERS).accept(),
            Rule::new("count what is dropped").found(&[InputName], &SPOOFED).drop(),
            Rule::new("drop what could not be counted").drop(),
        ],
    }
}
