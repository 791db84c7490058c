//! The stack: takes frames and time, answers, and runs the guest's own errands (DHCP, metadata).

use core::net::Ipv4Addr;

use super::arp::{self, Neighbours, Operation};
use super::services::{self, Service};
use super::tcp_segment::{self, Segment};
use super::{Address, Counters, Event, Host, Mac, Peer};
use super::{dhcp, dhcp_message, eth, icmp, ipv4, metadata, tcp, udp};
use crate::options::Options;
use crate::random::Random;
use crate::time::Instant;

/// How often an unanswered question for a neighbour's address is asked again.
const ARP_WAIT: core::time::Duration = core::time::Duration::from_millis(200);

#[derive(Debug)]
pub struct Stack {
    mac: Mac,
    options: Options,
    random: Random,
    address: Option<Address>,
    /// `None` with a fixed address.
    dhcp: Option<dhcp::Client>,
    neighbours: Neighbours,
    /// `None` until there is an address, and if it is switched off.
    metadata: Option<metadata::Reader>,
    /// When the metadata's next hop is asked for (again).
    ask_at: Instant,
    counters: Counters,
}

impl Stack {
    /// A stack that begins to work when it is polled first.
    pub fn new(mac: Mac, options: Options, mut random: Random, now: Instant) -> Self {
        let dhcp = options.address.is_none().then(|| dhcp::Client::new(mac, now, &mut random));
        Stack {
            mac,
            options,
            random,
            address: None,
            dhcp,
            neighbours: Neighbours::default(),
            metadata: None,
            ask_at: Instant::NEVER,
            counters: Counters::default(),
        }
    }

    /// When [`Stack::poll`] has something to do if nothing arrives.
    pub fn deadline(&self) -> Instant {
        let dhcp = match &self.dhcp {
            Some(client) => client.deadline(),
            None if self.address.is_none() => Instant::BEGIN,
            None => Instant::NEVER,
        };
        dhcp.min(self.metadata_deadline())
    }

    /// While its next hop is unknown, the reader waits for ARP.
    fn metadata_deadline(&self) -> Instant {
        match (&self.metadata, self.metadata_hop()) {
            (Some(reader), Some((_, Some(_)))) => reader.deadline(),
            (Some(reader), Some((_, None))) => reader.deadline().max(self.ask_at),
            _ => Instant::NEVER,
        }
    }

    /// The next hop to the metadata service, and its hardware address if that is known.
    fn metadata_hop(&self) -> Option<(Ipv4Addr, Option<Mac>)> {
        let hop = self.address?.next_hop(self.metadata.as_ref()?.server());
        Some((hop, self.neighbours.find(hop)))
    }

    /// Does what the time asks for.
    pub fn poll(&mut self, now: Instant, host: &mut impl Host) {
        match &mut self.dhcp {
            Some(client) => {
                let (outgoing, change) = client.poll(now, &mut self.random);
                if let Some(change) = change {
                    self.dhcp_changed(now, change, host);
                }
                if let Some(outgoing) = outgoing {
                    self.send_dhcp(&outgoing, host);
                }
            }
            None => {
                if let (None, Some(address)) = (self.address, self.options.address) {
                    self.set_address(now, address, host);
                    host.report(Event::Address { address, server: None, lease: None });
                }
            }
        }
        self.poll_metadata(now, host);
    }

    fn poll_metadata(&mut self, now: Instant, host: &mut impl Host) {
        if now < self.metadata_deadline() {
            return;
        }
        let (Some((hop, mac)), Some(address)) = (self.metadata_hop(), self.address) else { return };
        let Some(mac) = mac else {
            self.ask_at = now + ARP_WAIT;
            return self.send_arp_request(address.ip, hop, host);
        };
        let Some(reader) = &mut self.metadata else { return };
        let to = Peer { mac, ip: reader.server() };
        let from = Peer { mac: self.mac, ip: address.ip };
        let outcome = reader.poll(now, &mut self.random, |segment| send_tcp([from, to], segment, host));
        if let Some(outcome) = outcome {
            report_metadata(outcome, host);
        }
    }

    fn set_address(&mut self, now: Instant, address: Address, host: &mut impl Host) {
        self.address = Some(address);
        // An announcement (RFC 5227, section 3): whoever remembers another station at this address forgets it.
        self.send_arp_request(address.ip, address.ip, host);
        if self.metadata.is_none() {
            self.metadata = self.options.metadata.map(|server| metadata::Reader::new(server, now));
            self.ask_at = now;
        }
    }

    fn dhcp_changed(&mut self, now: Instant, change: dhcp::Change, host: &mut impl Host) {
        match change {
            dhcp::Change::Bound(lease) => {
                let is_new = self.address != Some(lease.address);
                if is_new {
                    self.set_address(now, lease.address, host);
                    let (address, server) = (lease.address, Some(lease.server));
                    host.report(Event::Address { address, server, lease: lease.time });
                }
            }
            dhcp::Change::Lost => {
                self.address = None;
                host.report(Event::AddressLost);
            }
        }
    }

    fn send_dhcp(&self, (request, to): &dhcp::Outgoing, host: &mut impl Host) {
        let source = request.address.unwrap_or(Ipv4Addr::UNSPECIFIED);
        // A server whose hardware address is not known gets it by broadcast.
        let hop = to.zip(self.address).map(|(server, address)| (server, address.next_hop(server)));
        let known = hop.and_then(|(server, hop)| Some(Peer { mac: self.neighbours.find(hop)?, ip: server }));
        let to = known.unwrap_or(Peer { mac: Mac::BROADCAST, ip: Ipv4Addr::BROADCAST });
        let ports = [dhcp_message::CLIENT_PORT, dhcp_message::SERVER_PORT];
        send_udp([Peer { mac: self.mac, ip: source }, to], ports, host, |out| request.build(out));
    }

    fn send_arp_request(&self, from: Ipv4Addr, whom: Ipv4Addr, host: &mut impl Host) {
        let sender = Peer { mac: self.mac, ip: from };
        let target = Peer { mac: Mac([0; 6]), ip: whom };
        self.send_arp(Mac::BROADCAST, &arp::Packet { operation: Operation::Request, sender, target }, host);
    }

    fn send_arp(&self, to: Mac, packet: &arp::Packet, host: &mut impl Host) {
        host.transmit(|out| eth::build(out, [to, self.mac], eth::ARP, |out| arp::build(out, packet)));
    }

    /// Takes a frame that arrived.
    pub fn receive(&mut self, now: Instant, frame: &[u8], host: &mut impl Host) {
        let Some(frame) = eth::parse(frame) else {
            self.counters.malformed += 1;
            return;
        };
        let for_us = frame.destination == self.mac || frame.destination.is_group();
        if !for_us || frame.source.is_group() {
            self.counters.ignored += 1;
            return;
        }
        match frame.kind {
            eth::IPV4 => self.receive_ipv4(now, frame.source, frame.payload, host),
            eth::ARP => self.receive_arp(now, frame.payload, host),
            _ => self.counters.ignored += 1,
        }
    }

    fn receive_arp(&mut self, now: Instant, bytes: &[u8], host: &mut impl Host) {
        let Some(packet) = arp::parse(bytes) else {
            self.counters.malformed += 1;
            return;
        };
        self.neighbours.correct(packet.sender);
        let Some(address) = self.address.filter(|address| address.ip == packet.target.ip) else {
            self.counters.ignored += 1;
            return;
        };
        match packet.operation {
            Operation::Request => {
                self.counters.arp_replies += 1;
                let sender = Peer { mac: self.mac, ip: address.ip };
                let reply = arp::Packet { operation: Operation::Reply, sender, target: packet.sender };
                self.send_arp(packet.sender.mac, &reply, host);
            }
            Operation::Reply => {
                self.neighbours.learn(packet.sender);
                self.poll_metadata(now, host);
            }
        }
    }

    fn receive_ipv4(&mut self, now: Instant, source_mac: Mac, bytes: &[u8], host: &mut impl Host) {
        let packet = match ipv4::parse(bytes) {
            Ok(packet) => packet,
            Err(ipv4::Refusal::Malformed) => return self.counters.malformed += 1,
            Err(ipv4::Refusal::Fragment) => return self.counters.ignored += 1,
        };
        let address = self.address.filter(|address| address.ip == packet.destination);
        let from = Peer { mac: source_mac, ip: packet.source };
        match (packet.protocol, address) {
            (ipv4::UDP, _) => self.receive_udp(now, from, &packet, host),
            (ipv4::ICMP, Some(address)) => self.receive_icmp(address.ip, from, &packet, host),
            (ipv4::TCP, Some(address)) => self.receive_tcp(now, address.ip, from, &packet, host),
            _ => self.counters.ignored += 1,
        }
    }

    fn receive_icmp(&mut self, ip: Ipv4Addr, from: Peer, packet: &ipv4::Packet<'_>, host: &mut impl Host) {
        match icmp::parse(packet.payload) {
            Ok(Some(request)) if ipv4::is_station(from.ip) => {
                self.counters.icmp_echoes += 1;
                let us = Peer { mac: self.mac, ip };
                send_ipv4([us, from], ipv4::ICMP, host, |out| icmp::build_reply(out, &request));
            }
            Ok(_) => self.counters.ignored += 1,
            Err(icmp::Damaged) => self.counters.malformed += 1,
        }
    }

    fn receive_udp(&mut self, now: Instant, from: Peer, packet: &ipv4::Packet<'_>, host: &mut impl Host) {
        let Some(datagram) = udp::parse(packet) else {
            self.counters.malformed += 1;
            return;
        };
        // A server may send to the address that it is about to give.
        if [datagram.source_port, datagram.destination_port] == [dhcp_message::SERVER_PORT, dhcp_message::CLIENT_PORT] {
            return self.receive_dhcp(now, from, datagram.payload, host);
        }
        let us = self.address.filter(|address| address.ip == packet.destination && ipv4::is_station(from.ip));
        let service = services::find(datagram.source_port, datagram.destination_port, datagram.payload, &self.options);
        match (us, service) {
            (Some(address), Some(service)) => self.serve(now, service, address.ip, from, &datagram, host),
            _ => self.counters.ignored += 1,
        }
    }

    fn serve(
        &mut self,
        now: Instant,
        service: Service,
        ip: Ipv4Addr,
        from: Peer,
        datagram: &udp::Datagram<'_>,
        host: &mut impl Host,
    ) {
        let peers = [Peer { mac: self.mac, ip }, from];
        let ports = [datagram.destination_port, datagram.source_port];
        match service {
            Service::Echo => {
                self.counters.udp_echoes += 1;
                send_udp(peers, ports, host, |out| {
                    out.get_mut(..datagram.payload.len())?.copy_from_slice(datagram.payload);
                    Some(datagram.payload.len())
                });
            }
            Service::Discard => {
                self.counters.discarded += 1;
                self.counters.discarded_bytes += datagram.payload.len() as u64;
            }
            Service::Stats => {
                self.counters.stats_replies += 1;
                let mut text = [0; STATS_MAX];
                let length = services::write_stats(&mut text, now, ip, &self.counters, host);
                let text = &text[..length.unwrap_or(0)];
                send_udp(peers, ports, host, |out| {
                    out.get_mut(..text.len())?.copy_from_slice(text);
                    Some(text.len())
                });
            }
            Service::PowerOff => host.report(Event::PowerOff { by: from.ip }),
        }
    }

    fn receive_dhcp(&mut self, now: Instant, from: Peer, payload: &[u8], host: &mut impl Host) {
        let (Some(client), Some(reply)) = (&mut self.dhcp, dhcp_message::parse(payload)) else {
            self.counters.ignored += 1;
            return;
        };
        if let Some(change) = client.receive(now, &reply, &mut self.random) {
            if let dhcp::Change::Bound(lease) = change
                && lease.server == from.ip
                && lease.address.next_hop(from.ip) == from.ip
            {
                // It is where this frame came from, and often the gateway too.
                self.neighbours.learn(from);
            }
            self.dhcp_changed(now, change, host);
        }
        self.poll(now, host);
    }

    fn receive_tcp(&mut self, now: Instant, ip: Ipv4Addr, from: Peer, packet: &ipv4::Packet<'_>, host: &mut impl Host) {
        let Some(segment) = tcp_segment::parse(packet) else {
            self.counters.malformed += 1;
            return;
        };
        let reader = self.metadata.as_mut().filter(|reader| reader.server() == from.ip);
        match reader.and_then(|reader| reader.receive(now, &segment)) {
            Some(outcome) => {
                if let Some(outcome) = outcome {
                    report_metadata(outcome, host);
                }
                self.poll_metadata(now, host);
            }
            None => {
                let refusal = tcp_segment::refusal(&segment).filter(|_| ipv4::is_station(from.ip));
                if let Some(refusal) = refusal {
                    self.counters.tcp_refusals += 1;
                    send_tcp([Peer { mac: self.mac, ip }, from], &refusal, host);
                }
            }
        }
    }
}

/// Longest answer of the stats service.
const STATS_MAX: usize = 1024;

fn report_metadata(outcome: metadata::Outcome<'_>, host: &mut impl Host) {
    match outcome {
        metadata::Outcome::Document { path, body, last } => {
            host.report(Event::Metadata { path, body });
            if last {
                host.report(Event::MetadataRead);
            }
        }
        metadata::Outcome::Failed { why, again_in } => host.report(Event::MetadataFailed { why, again_in }),
    }
}

/// Sends a packet from the first to the second, around what `payload` writes.
fn send_ipv4(
    [from, to]: [Peer; 2],
    protocol: u8,
    host: &mut impl Host,
    payload: impl FnOnce(&mut [u8]) -> Option<usize>,
) {
    host.transmit(|out| {
        eth::build(out, [to.mac, from.mac], eth::IPV4, |out| ipv4::build(out, from.ip, to.ip, protocol, payload))
    });
}

fn send_udp(peers: [Peer; 2], ports: [u16; 2], host: &mut impl Host, payload: impl FnOnce(&mut [u8]) -> Option<usize>) {
    send_ipv4(peers, ipv4::UDP, host, |out| udp::build(out, peers.map(|peer| peer.ip), ports, payload));
}

fn send_tcp(peers: [Peer; 2], segment: &Segment<'_>, host: &mut impl Host) {
    send_ipv4(peers, ipv4::TCP, host, |out| tcp_segment::build(out, peers.map(|peer| peer.ip), tcp::WINDOW, segment));
}

#[cfg(test)]
mod tests;
