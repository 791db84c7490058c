//! The table for frames: anti-spoofing, and what passes between neighbours on a segment.

use nftnl::{ChainType, Hook, ProtoFamily};

use super::{
    BINDINGS, DHCP_SERVER, ETHER_IPV4, FOREIGN, FROM_INSTANCE, GATEWAYS_OF, HELD, MACS, MARK_OF, ROUTERS, SELVES,
    SENDERS, SPOOFED, TAPS, base, chain, groups, limits, trunk, vpcs,
};
use crate::bridging::Bridging;
use crate::limits::Limits;
use crate::nft::TABLE;
use crate::nft::expr::Header;
use crate::nft::layout::{Chain, Table};
use crate::nft::rule::Field::{
    self, ArpSenderIp, ArpSenderMac, DhcpClientMac, EtherSource, InputName, Ipv4Source, Mark, OutputName,
};
use crate::nft::rule::{Rule, State};

// Priorities of hooks (`include/uapi/linux/netfilter_bridge.h`).
/// Before anything else that a bridge does (`NF_BR_PRI_FIRST` is the lowest there is).
pub const FIRST: i32 = -300;
/// After `br_netfilter` took a frame through the rules for IPv4 (`NF_BR_PRI_BRNF` is 0).
pub const AFTER_IP_RULES: i32 = 10;

pub const ETHER_ARP: u16 = 0x0806;
pub const DHCP_CLIENT: u16 = 68;

pub fn table(bridging: Bridging, limits: &Limits) -> Table {
    let mut table = Table {
        family: ProtoFamily::Bridge,
        name: TABLE,
        sets: vec![
            TAPS,
            SENDERS,
            MACS,
            BINDINGS,
            ROUTERS,
            SPOOFED,
            FOREIGN,
            MARK_OF,
            GATEWAYS_OF,
            SELVES,
            HELD,
            vpcs::VPC_OF,
        ],
        chains: limits::frames().into(),
        flowtable: None,
    };
    table.chains.extend(from_instance());
    table.chains.extend([frames_in(), frames_to_node(), frames_between()]);
    table.sets.extend(limits::bridge_sets(limits));
    table.sets.extend(trunk::sets(table.family));
    table.chains.push(trunk::from_trunk());
    match bridging {
        Bridging::Conntrack => {
            table.sets.extend(groups::sets());
            table.sets.extend(limits::connection_sets(limits));
            table.chains.extend(limits::connections(limits, [Rule::accept, Rule::accept]));
            table.sets.extend(vpcs::bridge_sets());
            table.chains.extend(vpcs::bridge_chains());
            table.chains.extend([
                groups::judge_outbound(),
                groups_out(),
                groups::judge_inbound(),
                frames_for_whom(AFTER_IP_RULES + 2),
                groups_in(),
            ]);
        }
        Bridging::IpRules => table.chains.push(frames_for_whom(AFTER_IP_RULES)),
        Bridging::Apart | Bridging::Routed => table.chains.push(apart()),
    }
    table
}

fn frames_in() -> Chain {
    let rule = Rule::new("by whom it may be from").jump_by(&[InputName], &SENDERS);
    chain("frames_in", base(ChainType::Filter, Hook::PreRouting, FIRST), vec![rule])
}

/// What passes from tap to tap whatever the groups say, and what never does.
fn frames_between() -> Chain {
    chain(
        "frames_between",
        base(ChainType::Filter, Hook::Forward, FIRST),
        vec![
            Rule::new("not to an instance").not_found(&[OutputName], &TAPS).accept(),
            // A port may send a frame back where it came from (see `Bridging::IpRules`).
            Rule::new("nobody hears its own broadcasts").for_a_group().found(&[InputName, OutputName], &SELVES).drop(),
            Rule::new("IPv4 has no broadcast between instances, as in EC2").ether_type(ETHER_IPV4).for_a_group().drop(),
        ],
    )
}

/// Rules on IPv4 frames to or from taps.
fn on_frames(name: &'static str, priority: i32, side: Field, rest: Vec<Rule>) -> Chain {
    let mut rules = vec![
        Rule::new("on that side is no instance").not_found(&[side], &TAPS).accept(),
        Rule::new("ARP").ether_type(ETHER_ARP).accept(),
    ];
    rules.extend(rest);
    chain(name, base(ChainType::Filter, Hook::Forward, priority), rules)
}

fn by_groups(judge: &'static str) -> Vec<Rule> {
    vec![
        Rule::new("answers").state(State::EstablishedOrRelated).accept(),
        Rule::new("no part of any connection").state(State::Invalid).drop(),
        Rule::new("its groups decide").jump(judge),
    ]
}

/// The frame is marked with who sent it.
fn groups_out() -> Chain {
    on_frames("groups_out", AFTER_IP_RULES, InputName, by_groups("judge_outbound"))
}

/// Marks a frame with whom it is for, by the port that it leaves by: an instance that is a router for others gets what is for
/// other addresses.
fn frames_for_whom(priority: i32) -> Chain {
    let rule = Rule::new("it is for who is behind the tap").mark_by(&[OutputName], &MARK_OF);
    chain("frames_for_whom", base(ChainType::Filter, Hook::Forward, priority), vec![rule])
}

fn groups_in() -> Chain {
    on_frames("groups_in", AFTER_IP_RULES + 4, OutputName, by_groups("judge_inbound"))
}

/// Where nobody can judge by connection, nothing passes.
fn apart() -> Chain {
    let rule = Rule::new("this kernel cannot judge between neighbours").drop();
    on_frames("apart", AFTER_IP_RULES, OutputName, vec![rule])
}

/// Frames to the addresses that bridges keep to themselves (spanning tree, 802.1X) do not pass the
/// hook above; they reach the node's protocol handlers through this one. LLDP passes neither, and
/// ends with handlers that netd does not have; no port learns from it.
fn frames_to_node() -> Chain {
    chain(
        "frames_to_node",
        base(ChainType::Filter, Hook::In, FIRST),
        vec![
            Rule::new("instances do not speak to the bridge")
                .for_link_local_group()
                .found(&[InputName], &TAPS)
                .found(&[InputName], &SPOOFED)
                .drop(),
            // The gateway's addresses are local in the VPC's routing table only, by which the kernel decides whether to answer.
            Rule::new("ARP is asked in its VPC").ether_type(ETHER_ARP).mark_by(&[InputName], &vpcs::VPC_OF),
        ],
    )
}

/// ARP may come from whom a port is bound to, in the frame's header and in the packet alike. What becomes of it is still to be said.
pub fn arp_of_the_bound(purpose: &'static str) -> [Rule; 2] {
    // Ethernet, IPv4, lengths 6 and 4 (RFC 826): what the offsets of the fields count on.
    let arp = |purpose| Rule::new(purpose).ether_type(ETHER_ARP).bytes_are(Header::Network, 0, &[0, 1, 8, 0, 6, 4]);
    [
        arp(purpose)
            .known(&[InputName, EtherSource, ArpSenderIp], &BINDINGS)
            .known(&[InputName, ArpSenderMac, ArpSenderIp], &BINDINGS),
        arp("ARP probe for a free address (RFC 5227)")
            .bytes_are(Header::Network, 14, &[0; 4])
            .found(&[InputName, EtherSource], &MACS)
            .found(&[InputName, ArpSenderMac], &MACS),
    ]
}

/// Anti-spoofing. Everything that is not provably the instance's own is dropped, and the rest marked with who it is of.
///
/// Frames are told by the type field as it is on the wire, so a tagged frame matches nothing; nor does IPv6, which segments do not have.
fn from_instance() -> [Chain; 4] {
    let [arp_own, arp_probe] = arp_of_the_bound("ARP from its own address");
    let spoofed = |rule: Rule| rule.found(&[InputName], &SPOOFED).drop();
    [
        dhcp_from_instance(),
        chain(
            "udp_from_instance",
            None,
            vec![
                spoofed(Rule::new("instances do not serve DHCP").bytes_are(
                    Header::Transport,
                    0,
                    &DHCP_SERVER.to_be_bytes(),
                )),
                Rule::new("to a DHCP server")
                    .bytes_are(Header::Transport, 2, &DHCP_SERVER.to_be_bytes())
                    .jump("dhcp_from_instance"),
            ],
        ),
        chain(
            "ipv4_from_instance",
            None,
            vec![
                Rule::new("UDP").protocol(libc::IPPROTO_UDP).jump("udp_from_instance"),
                Rule::new("IPv4 from its own address")
                    .mark_by(&[InputName, EtherSource, Ipv4Source], &BINDINGS)
                    .goto(limits::LIMIT_IPV4),
                spoofed(Rule::new("nobody speaks as the gateway").found(&[InputName, Ipv4Source], &GATEWAYS_OF)),
                // Who may send for others may do so for those outside of the VPC. Another instance's name leads to its groups' peers, and out as its elastic IP.
                spoofed(
                    Rule::new("nobody speaks as another instance of its VPC")
                        .mark_by(&[InputName], &vpcs::VPC_OF)
                        .found(&[Mark, Ipv4Source], &HELD),
                ),
                Rule::new("IPv4 from an instance without source check")
                    .mark_by(&[InputName, EtherSource], &ROUTERS)
                    .goto(limits::LIMIT_IPV4),
                spoofed(Rule::new("IPv4 in another's name")),
                Rule::new("drop what could not be counted").drop(),
            ],
        ),
        chain(
            FROM_INSTANCE,
            None,
            vec![
                Rule::new("IPv4").ether_type(ETHER_IPV4).goto("ipv4_from_instance"),
                arp_own.goto(limits::LIMIT_ARP),
                arp_probe.goto(limits::LIMIT_ARP),
                spoofed(Rule::new("ARP in another's name").ether_type(ETHER_ARP)),
                Rule::new("neither IPv4 nor ARP, or tagged").found(&[InputName], &FOREIGN).drop(),
                Rule::new("drop what could not be counted").drop(),
            ],
        ),
    ]
}

/// What comes back from this chain has the client's own MAC in it.
fn dhcp_from_instance() -> Chain {
    let spoofed = |rule: Rule| rule.found(&[InputName], &SPOOFED).drop();
    chain(
        "dhcp_from_instance",
        None,
        vec![
            Rule::new("DHCP request in its own name")
                .bytes_are(Header::Transport, 0, &DHCP_CLIENT.to_be_bytes())
                .source_is(std::net::Ipv4Addr::UNSPECIFIED)
                .destination_is(std::net::Ipv4Addr::BROADCAST)
                .found(&[InputName, EtherSource], &MACS)
                .found(&[InputName, DhcpClientMac], &MACS)
                .mark_by(&[InputName], &MARK_OF)
                .goto(limits::LIMIT_DHCP),
            // The client's name is in a later part, which no rule here could look at. A request is short.
            spoofed(Rule::new("DHCP requests come in one piece").fragment()),
            spoofed(Rule::new("DHCP request in another's name").not_found(&[InputName, DhcpClientMac], &MACS)),
        ],
    )
}
