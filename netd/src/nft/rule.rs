//! A vocabulary for writing rules, so that `rules/` reads as sentences.
//!
//! Every condition loads what it looks at into registers from the first on and compares or looks it
//! up there; conditions do not share registers, so they can be put one after the other freely.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use ipnet::Ipv4Net;

use super::expr::{Conntrack, Direction, Expr, Found, Header, Meta, Nat, Register, Verdict};
use super::layout::{Name, Set};
use crate::desired::{MAX_LINK_NAME, VpcNumber};
use crate::links::GROUP;

/// A part of a packet, or of what the kernel knows of it, that can be looked up in a set.
#[derive(Debug, Clone, Copy)]
pub enum Field {
    InputName,
    OutputName,
    EtherDestination,
    EtherSource,
    Ipv4Source,
    Ipv4Destination,
    Layer4Protocol,
    /// Of TCP and UDP.
    DestinationPort,
    ArpSenderMac,
    ArpSenderIp,
    /// `chaddr` of a DHCP message (RFC 2131, section 2), counted from the UDP header.
    DhcpClientMac,
    /// The number that the packet is marked with.
    Mark,
    /// The number of the VPC that the packet's connection was opened from; 0 for the public side and the node itself.
    ConnectionVpc,
    /// The zone of the connection's answers.
    AnswersZone,
    ConnectionMark,
    /// A number that is the same for every packet.
    Number(u32),
}

impl Field {
    fn load(self, to: Register) -> Expr {
        let payload = |header, offset, length| Expr::Payload { header, offset, length, to };
        match self {
            Self::InputName => Expr::Meta { key: Meta::InputName, to },
            Self::OutputName => Expr::Meta { key: Meta::OutputName, to },
            Self::EtherDestination => payload(Header::Link, 0, 6),
            Self::EtherSource => payload(Header::Link, 6, 6),
            Self::Ipv4Source => payload(Header::Network, 12, 4),
            Self::Ipv4Destination => payload(Header::Network, 16, 4),
            Self::Layer4Protocol => Expr::Meta { key: Meta::Layer4Protocol, to },
            Self::DestinationPort => payload(Header::Transport, 2, 2),
            Self::ArpSenderMac => payload(Header::Network, 8, 6),
            Self::ArpSenderIp => payload(Header::Network, 14, 4),
            Self::DhcpClientMac => payload(Header::Transport, 8 + 28, 6),
            Self::Mark => Expr::Meta { key: Meta::Mark, to },
            Self::ConnectionVpc => Expr::Conntrack { key: Conntrack::Zone(Direction::Original), to },
            Self::AnswersZone => Expr::Conntrack { key: Conntrack::Zone(Direction::Reply), to },
            Self::ConnectionMark => Expr::Conntrack { key: Conntrack::Mark, to },
            Self::Number(number) => Expr::Immediate { value: number.to_ne_bytes().to_vec(), to },
        }
    }

    /// How many 4-byte registers the field takes.
    fn registers(self) -> u8 {
        match self {
            Self::InputName | Self::OutputName => 4,
            Self::EtherDestination | Self::EtherSource | Self::ArpSenderMac | Self::DhcpClientMac => 2,
            Self::Ipv4Source | Self::Ipv4Destination | Self::ArpSenderIp => 1,
            Self::Layer4Protocol | Self::DestinationPort => 1,
            Self::Mark | Self::ConnectionVpc | Self::AnswersZone | Self::ConnectionMark | Self::Number(_) => 1,
        }
    }
}

/// Bits of `ct state` (`include/uapi/linux/netfilter/nf_conntrack_common.h`, as nftables shifts them).
#[derive(Debug, Clone, Copy)]
pub enum State {
    Invalid = 1,
    Established = 2,
    /// The packet is an error about a connection that there is, or opens one that such a one has announced.
    Related = 4,
    EstablishedOrRelated = 2 | 4,
}

/// `IPS_ASSURED` of `ct status`: TCP that is established, or UDP that was answered for two seconds and more.
const STATUS_ASSURED: u32 = 1 << 2;
/// `IPS_CONFIRMED` of `ct status`: the kernel has the connection in its table.
const STATUS_CONFIRMED: u32 = 1 << 3;
/// `IPS_DST_NAT` of `ct status`: the destination was translated.
const STATUS_DESTINATION_NAT: u32 = 1 << 5;

#[derive(Debug, Clone)]
pub struct Rule {
    /// What the rule is for, as a person says it.
    pub purpose: Name,
    pub exprs: Vec<Expr>,
}

const FIRST: Register = Register(0);

impl Rule {
    pub fn new(purpose: impl Into<Name>) -> Self {
        Self { purpose: purpose.into(), exprs: Vec::new() }
    }

    fn with(mut self, exprs: impl IntoIterator<Item = Expr>) -> Self {
        self.exprs.extend(exprs);
        self
    }

    fn lookup(self, fields: &[Field], set: &Set, found: Found, inverted: bool) -> Self {
        let mut next = 0;
        let mut rule = self;
        for field in fields {
            rule.exprs.push(field.load(Register(next)));
            next += field.registers();
        }
        debug_assert_eq!(u32::from(next) * 4, set.key_length().next_multiple_of(4));
        rule.with([Expr::Lookup { set: set.name.clone(), set_id: set.id, from: FIRST, found, inverted }])
    }

    /// The fields, taken together, are in the set.
    pub fn found(self, fields: &[Field], set: &Set) -> Self {
        self.lookup(fields, set, Found::Nothing, false)
    }

    /// The fields, taken together, are not in the set.
    pub fn not_found(self, fields: &[Field], set: &Set) -> Self {
        self.lookup(fields, set, Found::Nothing, true)
    }

    /// Goes on in the chain that the map names for the fields; where the map has none, with the next rule.
    pub fn jump_by(self, fields: &[Field], map: &Set) -> Self {
        self.lookup(fields, map, Found::Verdict, false)
    }

    /// Marks the packet with the map's value for the fields; where the map has none, the rule ends.
    pub fn mark_by(self, fields: &[Field], map: &Set) -> Self {
        self.lookup(fields, map, Found::In(FIRST), false).with([Expr::SetMark { from: FIRST }])
    }

    /// The map has something for the fields.
    pub fn known(self, fields: &[Field], map: &Set) -> Self {
        self.lookup(fields, map, Found::In(FIRST), false)
    }

    /// The packet is marked with nobody.
    pub fn unmarked(self) -> Self {
        self.zero(Field::Mark)
    }

    pub fn zero(self, field: Field) -> Self {
        self.with([field.load(FIRST), Expr::Compare { from: FIRST, equal: true, value: vec![0; 4] }])
    }

    /// The packet came by one of netd's own links: where packets are routed, by a segment's bridge. To compare a number takes a tenth of what it takes to look a
    /// name up.
    pub fn comes_from_segment(self) -> Self {
        self.of_own_link(Meta::InputGroup)
    }

    /// The packet leaves by one of netd's own links.
    pub fn goes_to_segment(self) -> Self {
        self.of_own_link(Meta::OutputGroup)
    }

    fn of_own_link(self, key: Meta) -> Self {
        let value = GROUP.to_ne_bytes().to_vec();
        self.with([Expr::Meta { key, to: FIRST }, Expr::Compare { from: FIRST, equal: true, value }])
    }

    /// The field, which lies in the first register then, is the number of a VPC.
    pub fn vpc_in(self, field: Field) -> Self {
        let (mask, prefix) = VpcNumber::PREFIX;
        let masked = Register(FIRST.0 + 1);
        self.with([
            field.load(FIRST),
            Expr::Mask { from: FIRST, to: masked, mask: mask.to_ne_bytes().to_vec() },
            Expr::Compare { from: masked, equal: true, value: prefix.to_ne_bytes().to_vec() },
        ])
    }

    /// The field is the number of a VPC; marks the packet with it.
    pub fn mark_with_vpc(self, field: Field) -> Self {
        self.vpc_in(field).with([Expr::SetMark { from: FIRST }])
    }

    /// Marks the packet with a field of it.
    pub fn mark_with(self, field: Field) -> Self {
        self.with([field.load(FIRST), Expr::SetMark { from: FIRST }])
    }

    /// Puts the connection into the zone that the field says: all of it, or what goes in one direction.
    pub fn zone(self, field: Field, direction: Option<Direction>) -> Self {
        self.with([field.load(FIRST), Expr::SetZone { direction, from: FIRST }])
    }

    /// The same, with the first that the map has for the fields.
    pub fn zone_by(self, fields: &[Field], map: &Set, direction: Option<Direction>) -> Self {
        self.known(fields, map).with([Expr::SetZone { direction, from: FIRST }])
    }

    /// The packet goes this way of its connection.
    pub fn goes(self, direction: Direction) -> Self {
        self.with([
            Expr::Conntrack { key: Conntrack::Direction, to: FIRST },
            Expr::Compare { from: FIRST, equal: true, value: vec![direction as u8] },
        ])
    }

    /// Has the kernel tell which rules the packet passes from here on.
    pub fn traced(self) -> Self {
        self.with([Expr::Immediate { value: vec![1], to: FIRST }, Expr::SetTrace { from: FIRST }])
    }

    pub fn output_is(self, link: &str) -> Self {
        self.link_is(Field::OutputName, link)
    }

    pub fn input_is(self, link: &str) -> Self {
        self.link_is(Field::InputName, link)
    }

    fn link_is(self, field: Field, link: &str) -> Self {
        let mut value = link.as_bytes().to_vec();
        value.resize(MAX_LINK_NAME + 1, 0);
        self.with([field.load(FIRST), Expr::Compare { from: FIRST, equal: true, value }])
    }

    /// The frame is not one that a device only overheard, which the node takes no further.
    pub fn not_for_others(self) -> Self {
        let value = u32::from(libc::PACKET_OTHERHOST).to_ne_bytes()[..1].to_vec();
        self.with([Expr::Meta { key: Meta::ForWhom, to: FIRST }, Expr::Compare { from: FIRST, equal: false, value }])
    }

    /// The packet is for `address`.
    pub fn destination_is(self, address: Ipv4Addr) -> Self {
        self.with([Field::Ipv4Destination.load(FIRST), Expr::compare_address(FIRST, address)])
    }

    /// The packet comes from `address`.
    pub fn source_is(self, address: Ipv4Addr) -> Self {
        self.with([Field::Ipv4Source.load(FIRST), Expr::compare_address(FIRST, address)])
    }

    /// The field, an address in the header of IPv4, is one of `network`.
    pub fn within(self, field: Field, network: Ipv4Net) -> Self {
        let mut load = field.load(FIRST);
        let mut value = network.network().octets().to_vec();
        let mask = match (network.prefix_len(), &mut load) {
            (0, _) => return self,
            (32, _) => None,
            // To load less is an expression less than to mask.
            (bits @ (8 | 16), Expr::Payload { length, .. }) => {
                *length = u32::from(bits / 8);
                value.truncate(usize::from(bits / 8));
                None
            }
            _ => Some(Expr::Mask { from: FIRST, to: FIRST, mask: network.netmask().octets().to_vec() }),
        };
        self.with([load]).with(mask).with([Expr::Compare { from: FIRST, equal: true, value }])
    }

    /// The packet's protocol, its destination port, and the network of this prefix that the address is in, are in the set. A packet of a protocol without ports has
    /// something else where the port would be, and is in no set of services for its protocol.
    pub fn service_found(self, address: Field, prefix: u8, set: &Set) -> Self {
        let network = Register(2);
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0).to_be_bytes().to_vec();
        self.with([
            Field::Layer4Protocol.load(FIRST),
            Field::DestinationPort.load(Register(1)),
            address.load(network),
            Expr::Mask { from: network, to: network, mask },
            Expr::Lookup { set: set.name.clone(), set_id: set.id, from: FIRST, found: Found::Nothing, inverted: false },
        ])
    }

    pub fn state(self, state: State) -> Self {
        self.conntrack_bits(Conntrack::State, state as u32, false)
    }

    pub fn not_state(self, state: State) -> Self {
        self.conntrack_bits(Conntrack::State, state as u32, true)
    }

    /// The connection's destination was translated: it goes through an elastic IP.
    pub fn through_elastic_ip(self) -> Self {
        self.conntrack_bits(Conntrack::Status, STATUS_DESTINATION_NAT, false)
    }

    /// The connection's destination was not translated.
    pub fn not_through_elastic_ip(self) -> Self {
        self.conntrack_bits(Conntrack::Status, STATUS_DESTINATION_NAT, true)
    }

    /// The connection has shown that it goes on: the kernel would not forget it for lack of room.
    pub fn assured(self) -> Self {
        self.conntrack_bits(Conntrack::Status, STATUS_ASSURED, false)
    }

    /// The packet is the first of its connection, which is not in the kernel's table yet.
    pub fn first_of_connection(self) -> Self {
        self.conntrack_bits(Conntrack::Status, STATUS_CONFIRMED, true)
    }

    /// Adds the packet's connection to one of the `lists` that `set` has for the field, chosen by a digest of its addresses and ports; goes on when
    /// there are more in that list than there may be.
    pub fn beyond_in_list(self, field: Field, lists: u32, set: &Set) -> Self {
        let [list, addresses, source_port, destination_port] = [1, 2, 4, 5].map(Register);
        self.with([
            field.load(FIRST),
            Expr::Payload { header: Header::Network, offset: 12, length: 8, to: addresses },
            Expr::Conntrack { key: Conntrack::SourcePort, to: source_port },
            Expr::Conntrack { key: Conntrack::DestinationPort, to: destination_port },
            Expr::Digest { from: addresses, length: 16, modulus: lists, to: list },
            Expr::Update { set: set.name.clone(), set_id: set.id, from: FIRST },
        ])
    }

    fn conntrack_bits(self, key: Conntrack, bits: u32, none: bool) -> Self {
        self.with([
            Expr::Conntrack { key, to: FIRST },
            Expr::Mask { from: FIRST, to: FIRST, mask: bits.to_ne_bytes().to_vec() },
            Expr::Compare { from: FIRST, equal: none, value: vec![0; 4] },
        ])
    }

    /// The frame's type field, as it is on the wire: a tagged frame has 0x8100 there.
    pub fn ether_type(self, number: u16) -> Self {
        self.bytes_are(Header::Link, 12, &number.to_be_bytes())
    }

    /// The bytes at `offset` of a header are `value`.
    pub fn bytes_are(self, header: Header, offset: u32, value: &[u8]) -> Self {
        let length = value.len() as u32;
        self.with([
            Expr::Payload { header, offset, length, to: FIRST },
            Expr::Compare { from: FIRST, equal: true, value: value.to_vec() },
        ])
    }

    /// The frame goes to one of the addresses that no bridge forwards (IEEE 802.1D, table 7-10).
    pub fn for_link_local_group(self) -> Self {
        self.with([
            Expr::Payload { header: Header::Link, offset: 0, length: 6, to: FIRST },
            Expr::Mask { from: FIRST, to: FIRST, mask: vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xf0] },
            Expr::Compare { from: FIRST, equal: true, value: vec![0x01, 0x80, 0xc2, 0, 0, 0] },
        ])
    }

    /// The frame goes to more than one.
    pub fn for_a_group(self) -> Self {
        self.with([
            Expr::Payload { header: Header::Link, offset: 0, length: 1, to: FIRST },
            Expr::Mask { from: FIRST, to: FIRST, mask: vec![1] },
            Expr::Compare { from: FIRST, equal: true, value: vec![1] },
        ])
    }

    /// The packet is a part of one: it is not the first part, or more follow (RFC 791, section 3.1).
    pub fn fragment(self) -> Self {
        self.with([
            Expr::Payload { header: Header::Network, offset: 6, length: 2, to: FIRST },
            Expr::Mask { from: FIRST, to: FIRST, mask: vec![0x3f, 0xff] },
            Expr::Compare { from: FIRST, equal: false, value: vec![0, 0] },
        ])
    }

    pub fn protocol(self, number: i32) -> Self {
        self.with([
            Expr::Meta { key: Meta::Layer4Protocol, to: FIRST },
            Expr::Compare { from: FIRST, equal: true, value: vec![number as u8] },
        ])
    }

    pub fn udp_ports(self, source: u16, destination: u16) -> Self {
        let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        self.protocol(libc::IPPROTO_UDP).bytes_are(Header::Transport, 0, &ports)
    }

    pub fn udp_from(self, port: u16) -> Self {
        self.protocol(libc::IPPROTO_UDP).bytes_are(Header::Transport, 0, &port.to_be_bytes())
    }

    pub fn udp_to(self, port: u16) -> Self {
        self.protocol(libc::IPPROTO_UDP).bytes_are(Header::Transport, 2, &port.to_be_bytes())
    }

    pub fn tcp_to(self, port: u16) -> Self {
        self.protocol(libc::IPPROTO_TCP).bytes_are(Header::Transport, 2, &port.to_be_bytes())
    }

    /// The destination port is between these two.
    pub fn port_from_to(self, from: u16, to: u16) -> Self {
        let load = Expr::Payload { header: Header::Transport, offset: 2, length: 2, to: FIRST };
        let (low, high) = (from.to_be_bytes().to_vec(), to.to_be_bytes().to_vec());
        match (from, to) {
            (0, u16::MAX) => self,
            (from, to) if from == to => self.with([load, Expr::Compare { from: FIRST, equal: true, value: low }]),
            _ => self.with([load, Expr::Range { from: FIRST, low, high }]),
        }
    }

    /// Counts what came so far.
    pub fn count(self) -> Self {
        self.with([Expr::Counter])
    }

    pub fn accept(self) -> Self {
        self.with([Expr::Verdict(Verdict::Accept)])
    }

    pub fn drop(self) -> Self {
        self.with([Expr::Verdict(Verdict::Drop)])
    }

    pub fn jump(self, chain: &'static str) -> Self {
        self.with([Expr::Verdict(Verdict::Jump(chain))])
    }

    /// On in another chain, and not back to this one.
    pub fn goto(self, chain: &'static str) -> Self {
        self.with([Expr::Verdict(Verdict::Goto(chain))])
    }

    /// Translates the destination to the place that the map has for it, and marks packet and connection with that place's VPC.
    pub fn dnat_by(self, map: &Set) -> Self {
        self.known(&[Field::Ipv4Destination], map).with([
            Expr::SetConnectionMark { from: FIRST },
            Expr::SetMark { from: FIRST },
            Expr::Nat { kind: Nat::Destination, address: Register(FIRST.0 + 1) },
        ])
    }

    /// Translates the source to the map's value for the fields.
    pub fn snat_by(self, fields: &[Field], map: &Set) -> Self {
        self.known(fields, map).with([Expr::Nat { kind: Nat::Source, address: FIRST }])
    }

    /// Gives the frame the source MAC that the map has for the field.
    pub fn ether_source_by(self, field: Field, map: &Set) -> Self {
        let set = Expr::SetPayload { header: Header::Link, offset: 6, length: 6, from: FIRST };
        self.lookup(&[field], map, Found::In(FIRST), false).with([set])
    }

    /// Puts the packet's connection into the table's flow table; the rule ends where it is there already, or cannot be.
    pub fn into_flowtable(self, name: &'static str) -> Self {
        self.with([Expr::IntoFlowtable { name }])
    }

    /// Translates the source to the address of the link that the packet leaves by, and its port to one of these.
    pub fn masquerade(self, ports: RangeInclusive<u16>) -> Self {
        let last = Register(FIRST.0 + 1);
        let port = |port: u16, to| Expr::Immediate { value: port.to_be_bytes().to_vec(), to };
        self.with([port(*ports.start(), FIRST), port(*ports.end(), last), Expr::Masquerade { from: FIRST, to: last }])
    }
}
