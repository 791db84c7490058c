//! ARP (RFC 826) for IPv4 on Ethernet, and the few neighbours that the guest itself talks to.

use core::net::Ipv4Addr;

use super::{Mac, Peer};
use crate::wire::{Reader, Writer};

/// Hardware Ethernet, protocol IPv4, with their address lengths.
const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: u16 = 1;
const REPLY: u16 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Request,
    Reply,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub operation: Operation,
    pub sender: Peer,
    pub target: Peer,
}

/// `None` for what is not ARP of this kind, or whose sender cannot be a station.
pub fn parse(bytes: &[u8]) -> Option<Packet> {
    let mut reader = Reader::new(bytes);
    if reader.array()? != ETHERNET_IPV4 {
        return None;
    }
    let operation = match reader.u16()? {
        REQUEST => Operation::Request,
        REPLY => Operation::Reply,
        _ => return None,
    };
    let sender = peer(&mut reader)?;
    let target = peer(&mut reader)?;
    (!sender.mac.is_group()).then_some(Packet { operation, sender, target })
}

fn peer(reader: &mut Reader<'_>) -> Option<Peer> {
    Some(Peer { mac: Mac(reader.array()?), ip: Ipv4Addr::from(reader.array::<4>()?) })
}

pub fn build(buffer: &mut [u8], packet: &Packet) -> Option<usize> {
    let operation = match packet.operation {
        Operation::Request => REQUEST,
        Operation::Reply => REPLY,
    };
    let mut writer = Writer::new(buffer);
    writer.bytes(&ETHERNET_IPV4)?.u16(operation)?;
    for peer in [packet.sender, packet.target] {
        writer.bytes(&peer.mac.0)?.bytes(&peer.ip.octets())?;
    }
    Some(writer.len())
}

/// How many neighbours are remembered: gateway, DHCP server, name server and some more.
const NEIGHBOURS: usize = 8;

/// Hardware addresses of the stations that the guest itself talks to. The oldest one makes room.
#[derive(Debug, Default)]
pub struct Neighbours {
    peers: [Option<Peer>; NEIGHBOURS],
    next: usize,
}

impl Neighbours {
    pub fn find(&self, ip: Ipv4Addr) -> Option<Mac> {
        self.peers.iter().flatten().find(|peer| peer.ip == ip).map(|peer| peer.mac)
    }

    /// Takes note of an answer. RFC 826 merges what is known and adds what was asked for.
    pub fn learn(&mut self, peer: Peer) {
        match self.peers.iter_mut().flatten().find(|known| known.ip == peer.ip) {
            Some(known) => known.mac = peer.mac,
            None => {
                self.peers[self.next] = Some(peer);
                self.next = (self.next + 1) % NEIGHBOURS;
            }
        }
    }

    /// Corrects what is known; adds nothing.
    pub fn correct(&mut self, peer: Peer) {
        if let Some(known) = self.peers.iter_mut().flatten().find(|known| known.ip == peer.ip) {
            known.mac = peer.mac;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> Peer {
        Peer { mac: Mac([2, 0, 0, 0, 0, n]), ip: Ipv4Addr::new(10, 0, 0, n) }
    }

    #[test]
    fn what_is_built_is_parsed_the_same_and_a_short_one_not_at_all() {
        let packet = Packet { operation: Operation::Reply, sender: peer(1), target: peer(2) };
        let mut buffer = [0; 28];
        assert_eq!(build(&mut buffer, &packet), Some(28));
        assert_eq!(parse(&buffer), Some(packet));
        assert_eq!(parse(&buffer[..27]), None);
    }

    #[test]
    fn a_group_address_is_no_sender() {
        let sender = Peer { mac: Mac::BROADCAST, ..peer(1) };
        let mut buffer = [0; 28];
        build(&mut buffer, &Packet { operation: Operation::Request, sender, target: peer(2) }).unwrap();
        assert_eq!(parse(&buffer), None);
    }

    #[test]
    fn neighbours_are_few_and_corrected() {
        let mut neighbours = Neighbours::default();
        for n in 0..20 {
            neighbours.learn(peer(n));
        }
        assert_eq!(neighbours.find(peer(19).ip), Some(peer(19).mac));
        assert_eq!(neighbours.find(peer(0).ip), None);
        neighbours.correct(Peer { mac: Mac([4; 6]), ..peer(19) });
        neighbours.correct(Peer { mac: Mac([4; 6]), ..peer(0) });
        assert_eq!(neighbours.find(peer(19).ip), Some(Mac([4; 6])));
        assert_eq!(neighbours.find(peer(0).ip), None);
    }
}
