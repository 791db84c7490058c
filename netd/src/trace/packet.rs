//! Who speaks to whom, and the packet that asks for both.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use serde::Serialize;

use crate::api::{Interface, NodeNetwork, RemoteInterface};

/// The port that the packet comes from: one that clients use.
const CLIENT_PORT: u16 = 49_152;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    Tcp(u16),
    Udp(u16),
    /// An echo request.
    Icmp,
}

impl FromStr for Traffic {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.parse().map_err(|_| format!("`{text}` is no port: 0 to 65535"));
        match text.split_whitespace().collect::<Vec<_>>()[..] {
            ["icmp"] => Ok(Self::Icmp),
            ["tcp", number] | [number] => port(number).map(Self::Tcp),
            ["udp", number] => port(number).map(Self::Udp),
            _ => Err(format!("`{text}` is no traffic: give a port, `tcp PORT`, `udp PORT` or `icmp`")),
        }
    }
}

/// One end of the packet's way.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// An instance of this node, by one of its private addresses.
    Instance { interface: Box<Interface>, address: String },
    /// Any other address.
    Address(Ipv4Addr),
}

impl End {
    pub fn name(&self) -> String {
        match self {
            Self::Instance { interface, .. } => format!("{} ({})", interface.instance, interface.id),
            Self::Address(address) => address.to_string(),
        }
    }

    pub fn address(&self) -> Result<Ipv4Addr, String> {
        match self {
            Self::Instance { interface, address } => {
                address.parse().map_err(|_| format!("{} has no address", interface.id))
            }
            Self::Address(address) => Ok(*address),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Endpoints {
    pub from: End,
    pub to: End,
    /// Who may get it: the other end, or the instance that its elastic IP stands for.
    pub receiver: Option<Interface>,
    /// The MAC that an instance sends it to: its neighbour's, or its gateway's. None from outside.
    pub to_mac: Option<String>,
}

impl Endpoints {
    pub fn find(network: &NodeNetwork, from: &str, to: &str) -> Result<Self, String> {
        let from = sender(network, from)?;
        // An address is that of an instance of the sender's VPC before it is anybody else's.
        let vpc = match &from {
            End::Instance { interface, .. } => vpc_of(network, &interface.segment),
            End::Address(_) => None,
        };
        let to = receiver(network, to, vpc)?;
        let address = to.address()?;
        let standing_for = network.elastic_ips.iter().find(|elastic| elastic.public_ip == address.to_string());
        let behind = match (&to, standing_for) {
            (End::Instance { interface, .. }, _) => Some((**interface).clone()),
            (_, Some(elastic)) => network
                .interfaces
                .iter()
                .find(|interface| holds(interface, &elastic.private_ip) && interface.segment == elastic.segment)
                .cloned(),
            _ => None,
        };
        let to_mac = match &from {
            End::Instance { interface, .. } => Some(next_hop(network, interface, address)?),
            End::Address(_) => None,
        };
        Ok(Self { from, to, receiver: behind, to_mac })
    }
}

fn vpc_of<'a>(network: &'a NodeNetwork, segment: &str) -> Option<&'a str> {
    network.segments.iter().find(|found| found.id == segment).map(|found| found.vpc.as_str())
}

/// Who it is from: an instance or interface by its id, by its private address, or by its elastic IP; or somebody outside.
fn sender(network: &NodeNetwork, text: &str) -> Result<End, String> {
    let private = network.elastic_ips.iter().find(|elastic| elastic.public_ip == text);
    let private = private.map_or(text, |elastic| elastic.private_ip.as_str());
    if network.remotes.iter().any(|remote| remote.id == text || addresses_there(remote).any(|held| held == private)) {
        return Err(format!("{text} is on another node: ask there, where its packets come from"));
    }
    let named: Vec<&Interface> =
        network.interfaces.iter().filter(|found| is(found, text) || holds(found, private)).collect();
    match named[..] {
        [interface] => Ok(as_named(interface, private)),
        [] => outsider(text),
        _ => Err(format!("{text} is of several VPCs here; give the instance's or the interface's id")),
    }
}

/// Who it is to: an elastic IP stays one, and is translated by the kernel.
fn receiver(network: &NodeNetwork, text: &str, vpc: Option<&str>) -> Result<End, String> {
    let in_reach = |found: &&Interface| vpc.is_none() || vpc_of(network, &found.segment) == vpc;
    let by_address = |found: &&Interface| holds(found, text) && in_reach(found);
    let found =
        network.interfaces.iter().find(|found| is(found, text)).or_else(|| network.interfaces.iter().find(by_address));
    if let Some(interface) = found {
        return Ok(as_named(interface, text));
    }
    match network.remotes.iter().find(|remote| remote.id == text) {
        Some(remote) => outsider(&remote.ipv4),
        None => outsider(text),
    }
}

/// An instance that was named by one of its addresses speaks with that one, any other with its primary one.
fn as_named(interface: &Interface, text: &str) -> End {
    let address = addresses(interface).find(|held| *held == text).unwrap_or(&interface.ipv4).clone();
    End::Instance { interface: Box::new(interface.clone()), address }
}

fn addresses(interface: &Interface) -> impl Iterator<Item = &String> {
    std::iter::once(&interface.ipv4).chain(&interface.secondary_ipv4)
}

fn addresses_there(remote: &RemoteInterface) -> impl Iterator<Item = &String> {
    std::iter::once(&remote.ipv4).chain(&remote.secondary_ipv4)
}

fn holds(interface: &Interface, text: &str) -> bool {
    addresses(interface).any(|held| held == text)
}

fn is(interface: &Interface, text: &str) -> bool {
    interface.id == text || interface.instance == text
}

fn outsider(text: &str) -> Result<End, String> {
    text.parse()
        .map(End::Address)
        .map_err(|_| format!("`{text}` is neither an instance or interface of this node nor an address"))
}

/// What the sender's own routes and ARP would say.
fn next_hop(network: &NodeNetwork, sender: &Interface, to: Ipv4Addr) -> Result<String, String> {
    let segment = network.segments.iter().find(|found| found.id == sender.segment);
    let segment = segment.ok_or_else(|| format!("{} has no segment", sender.id))?;
    let cidr: ipnet::Ipv4Net = segment.cidr.parse().map_err(|_| format!("{} has no network", segment.id))?;
    let to_text = to.to_string();
    let here = network.interfaces.iter().filter(|found| found.segment == segment.id && holds(found, &to_text));
    let there = network
        .remotes
        .iter()
        .filter(|found| found.segment == segment.id && addresses_there(found).any(|held| *held == to_text));
    let neighbour = here.map(|found| &found.mac).chain(there.map(|found| &found.mac)).next();
    match neighbour {
        Some(mac) => Ok(mac.clone()),
        // What the gateway does not have, it is not asked for on its own network.
        None if cidr.contains(&to)
            && to_text != segment.gateway
            && to != Ipv4Addr::from(u32::from(cidr.network()) + 2) =>
        {
            Err(format!("nobody has {to} in {}: the sender hears no answer to its ARP request", segment.id))
        }
        None => Ok(segment.gateway_mac.clone()),
    }
}

/// A packet by its addresses and ports, as it was sent or seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Seen {
    pub protocol: &'static str,
    pub from: Ipv4Addr,
    pub to: Ipv4Addr,
    /// Source and destination; none of ICMP.
    pub ports: Option<(u16, u16)>,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ports {
            Some((from, to)) => write!(f, "{} {}:{from} → {}:{to}", self.protocol, self.from, self.to),
            None => write!(f, "{} {} → {}", self.protocol, self.from, self.to),
        }
    }
}

/// The packet that is sent.
pub struct Packet {
    pub frame: Vec<u8>,
    pub seen: Seen,
    /// What it is known by wherever it comes out.
    mark: [u8; 16],
}

impl Packet {
    pub fn new(macs: ([u8; 6], [u8; 6]), from: Ipv4Addr, to: Ipv4Addr, traffic: Traffic) -> std::io::Result<Self> {
        let mark: [u8; 16] = rand::random();
        let builder = PacketBuilder::ethernet2(macs.0, macs.1).ipv4(from.octets(), to.octets(), 64);
        let mut frame = Vec::new();
        let written = match traffic {
            Traffic::Udp(port) => builder.udp(CLIENT_PORT, port).write(&mut frame, &mark),
            Traffic::Tcp(port) => builder.tcp(CLIENT_PORT, port, 1, 65_535).syn().write(&mut frame, &mark),
            Traffic::Icmp => builder.icmpv4_echo_request(1, 1).write(&mut frame, &mark),
        };
        written.map_err(std::io::Error::other)?;
        let (protocol, ports) = match traffic {
            Traffic::Udp(port) => ("udp", Some((CLIENT_PORT, port))),
            Traffic::Tcp(port) => ("tcp", Some((CLIENT_PORT, port))),
            Traffic::Icmp => ("icmp", None),
        };
        Ok(Self { frame, seen: Seen { protocol, from, to, ports }, mark })
    }

    /// The packet as it is in a frame that came out; none if it is not in there. An ICMP error has it in its body, which is no arrival; nor is what is
    /// inside of a tunnel looked at but for its mark.
    pub fn in_frame(&self, frame: &[u8]) -> Option<Seen> {
        if !frame.windows(self.mark.len()).any(|window| window == self.mark) {
            return None;
        }
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        let NetSlice::Ipv4(ip) = packet.net? else { return None };
        let (from, to) = (ip.header().source_addr(), ip.header().destination_addr());
        let (protocol, ports) = match packet.transport? {
            // A tunnel to another node.
            TransportSlice::Udp(udp)
                if udp.destination_port() == crate::links::VXLAN_PORT && self.seen.protocol != "udp" =>
            {
                return Some(self.seen.clone());
            }
            TransportSlice::Udp(udp) => ("udp", Some((udp.source_port(), udp.destination_port()))),
            TransportSlice::Tcp(tcp) => ("tcp", Some((tcp.source_port(), tcp.destination_port()))),
            TransportSlice::Icmpv4(icmp) if icmp.type_u8() == 8 => ("icmp", None),
            _ => return None,
        };
        Some(Seen { protocol, from, to, ports })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_is_written_as_people_write_it() {
        assert_eq!("443".parse(), Ok(Traffic::Tcp(443)));
        assert_eq!("udp 53".parse(), Ok(Traffic::Udp(53)));
        assert_eq!("icmp".parse(), Ok(Traffic::Icmp));
        for odd in ["", "sctp 1", "tcp", "tcp 65536", "icmp 8 0"] {
            assert!(odd.parse::<Traffic>().is_err(), "{odd}");
        }
    }

    #[test]
    fn a_packet_is_known_again_and_an_error_about_it_is_not_taken_for_it() {
        let (a, b) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        for traffic in [Traffic::Tcp(1), Traffic::Udp(2), Traffic::Icmp] {
            let packet = Packet::new(([2; 6], [4; 6]), a, b, traffic).unwrap();
            assert_eq!(packet.in_frame(&packet.frame), Some(packet.seen.clone()));
            let other = Packet::new(([2; 6], [4; 6]), a, b, traffic).unwrap();
            assert_eq!(packet.in_frame(&other.frame), None);
            let mut error = Vec::new();
            let builder = PacketBuilder::ethernet2([4; 6], [2; 6]).ipv4(b.octets(), a.octets(), 64);
            builder.icmpv4_raw(3, 3, [0; 4]).write(&mut error, &packet.frame[14..]).unwrap();
            assert_eq!(packet.in_frame(&error), None);
        }
    }
}
