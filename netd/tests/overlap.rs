//! Two VPCs of one node with the same network, and instances with the same addresses in it: each works as if the other were not there.
//!
//! | VPC | segment | instance | address | elastic IP |
//! |---|---|---|---|---|
//! | vpc-1 | subnet-1 | i-1 | 172.31.0.4 | number 1 |
//! | | | i-3 | 172.31.0.5 | |
//! | vpc-2 | subnet-2 | i-2 | 172.31.0.4 | number 2 |
//! | | | i-4 | 172.31.0.5 | |
//! | | subnet-3 | i-5 | 172.31.16.4 | |
//!
//! A guest always sends from the same port, so whatever two of them do at once has the same addresses and ports at both ends.

mod common;

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use common::guest::{ECHO_PORT, udp};
use common::{
    ALL_TRAFFIC, Backend, EGRESS, GATEWAY, GATEWAY_MAC, Guest, INGRESS, Lab, METADATA, NODE, OUTSIDE, PATIENCE, ask,
    backend, elastic, everywhere, group, guest_at, interface, mac, metadata_service, network, private, public, run,
    segment,
};
use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::rdata::PTR;
use hickory_proto::rr::{Name, RData, RecordType};
use mallee_netd::api::{self, security_group_rule::Peer};

const FAR: Ipv4Addr = Ipv4Addr::new(172, 31, 16, 4);
/// The port that guests send from.
const PORT: u16 = 40_000;

fn address(n: u8) -> Ipv4Addr {
    match n {
        1 | 2 => private(1),
        3 | 4 => private(2),
        _ => FAR,
    }
}

fn overlapping(generation: u64) -> api::NodeNetwork {
    let mut desired = network(generation, 5, &[]);
    desired.segments.push(segment("subnet-2", "vpc-2", "172.31.0.0/20", "172.31.0.1"));
    desired.segments.push(segment("subnet-3", "vpc-2", "172.31.16.0/20", "172.31.16.1"));
    for (n, interface) in (1..).zip(&mut desired.interfaces) {
        interface.ipv4 = address(n).to_string();
        interface.hostname.clear();
        interface.segment = format!("subnet-{}", [1, 2, 1, 2, 3][usize::from(n) - 1]);
    }
    for (n, segment) in (1..).zip(&mut desired.segments) {
        segment.domain = format!("vpc{}.internal", if n == 1 { 1 } else { 2 });
    }
    desired.elastic_ips = [1, 2].map(|n| api::ElasticIp { segment: format!("subnet-{n}"), ..elastic(n, 1) }).into();
    desired
}

/// The second VPC comes to a node that has the first.
fn start() -> (Lab, [Guest; 5]) {
    let lab = Lab::new();
    let mut first = overlapping(0);
    first.segments.truncate(1);
    first.interfaces.retain(|interface| interface.segment == "subnet-1");
    first.elastic_ips.truncate(1);
    lab.netd.apply(&first);
    lab.netd.apply(&overlapping(1));
    (lab, guests())
}

fn guests() -> [Guest; 5] {
    [1, 2, 3, 4, 5].map(|n| guest_at(n, address(n)))
}

/// What the guest is told when it asks who is there.
fn answer(guest: &Guest, from: Ipv4Addr) -> String {
    let datagram = guest.receive_udp();
    assert_eq!((datagram.from, datagram.from_port), (from, ECHO_PORT), "the answer must come from where it was asked");
    String::from_utf8(datagram.payload).unwrap()
}

fn has(frames: &[Vec<u8>], text: &[u8]) -> bool {
    frames.iter().any(|frame| frame.windows(text.len()).any(|window| window == text))
}

fn what_is_for_another_vpcs_address_does_not_leave_by_the_public_side() {
    let (lab, guests) = start();
    // Somebody outside has an address that is within a segment of the other VPC.
    lab.outside.run("ip addr add 172.31.16.9/32 dev out0");
    let elsewhere = lab.outside.within(|| UdpSocket::bind(("172.31.16.9", 0)).unwrap());
    elsewhere.set_nonblocking(true).unwrap();
    let outside = lab.outside_socket();
    let port = |socket: &UdpSocket| socket.local_addr().unwrap().port();
    guests[0].send_udp(Ipv4Addr::new(172, 31, 16, 9), port(&elsewhere), b"astray");
    // This goes the same way afterwards, and leaves.
    guests[0].send_udp(OUTSIDE, port(&outside), b"out");
    let mut buffer = [0; 64];
    let (length, _) = outside.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"out");
    assert!(elsewhere.recv_from(&mut buffer).is_err(), "it left by the public side");
}

fn each_goes_out_to_the_same_place_from_the_same_port_at_once() {
    let (lab, [one, two, three, four, _]) = start();
    let server = lab.outside_socket();
    let port = server.local_addr().unwrap().port();
    let guests = [("1", &one), ("2", &two), ("3", &three), ("4", &four)];
    // All have asked before one is answered.
    for (name, guest) in guests {
        guest.send_udp(OUTSIDE, port, name.as_bytes());
    }
    let mut buffer = [0; 16];
    let mut asked: Vec<(String, SocketAddr)> = (0..4)
        .map(|_| {
            let (length, from) = server.recv_from(&mut buffer).unwrap();
            (String::from_utf8_lossy(&buffer[..length]).into_owned(), from)
        })
        .collect();
    asked.sort_unstable();
    let from = |n: usize| asked[n - 1].1;
    assert_eq!([from(1), from(2)], [public(1), public(2)].map(|ip| SocketAddr::from((ip, PORT))));
    assert_eq!([from(3).ip(), from(4).ip()], [NODE; 2]);
    assert_ne!(from(3), from(4), "two connections of the node");
    for (name, from) in &asked {
        server.send_to(name.as_bytes(), from).unwrap();
    }
    for (name, guest) in guests {
        let datagram = guest.receive_udp();
        assert_eq!((datagram.from, datagram.to_port), (OUTSIDE, PORT));
        assert_eq!(datagram.payload, name.as_bytes());
    }
    // A port that speaks for whoever has it outside speaks for an elastic IP, and not for the node.
    for (n, guest) in [(1, &one), (3, &three)] {
        guest.send(&udp(mac(n), GATEWAY_MAC, address(n), OUTSIDE, (123, port), b"?"));
    }
    let from = [(); 2].map(|()| server.recv_from(&mut buffer).unwrap().1);
    assert!(from.contains(&SocketAddr::from((public(1), 123))), "{from:?}");
    assert!(from.iter().any(|from| from.ip() == NODE && from.port() >= 1024), "{from:?}");
    // Echo requests too, with one number and one sequence.
    for (_, guest) in guests {
        guest.send_ping(OUTSIDE, GATEWAY_MAC, 1);
    }
    guests.iter().for_each(|(_, guest)| guest.await_pong(OUTSIDE, 1));
}

fn each_is_reached_by_its_elastic_ip_from_one_port() {
    let (lab, [one, two, ..]) = start();
    let client = lab.outside_socket();
    for round in 0..3 {
        for n in [1, 2] {
            assert_eq!(ask(&client, public(n), &round.to_string()), format!("i-{n} asked by {OUTSIDE}"));
        }
    }
    // Each sees the port that the client has, although its own address and port are the other's too.
    let port = client.local_addr().unwrap().port();
    for (n, guest) in [(1, &one), (2, &two)] {
        client.send_to(b"port", (public(n), 9)).unwrap();
        assert_eq!(guest.receive_udp().from_port, port);
    }
}

fn they_reach_each_other_by_elastic_ip_and_no_other_way() {
    let (_lab, [one, two, three, four, five]) = start();
    for (guest, to, who) in [
        (&one, 2, format!("i-2 asked by {} ?", public(1))),
        (&two, 1, format!("i-1 asked by {} ?", public(2))),
        (&one, 1, format!("i-1 asked by {} ?", public(1))),
    ] {
        guest.send_udp(public(to), ECHO_PORT, b"?");
        assert_eq!(answer(guest, public(to)), who);
    }
    // One of the same VPC and one of the other ask as the node, from one address and port.
    three.send_udp(public(1), ECHO_PORT, b"3");
    four.send_udp(public(1), ECHO_PORT, b"4");
    assert_eq!(answer(&three, public(1)), format!("i-1 asked by {NODE} 3"));
    assert_eq!(answer(&four, public(1)), format!("i-1 asked by {NODE} 4"));
    four.ping(public(1), 1);
    // To a segment that only the other VPC has there is a way within that, and none for this one.
    three.send_udp(FAR, ECHO_PORT, b"closed");
    four.send_udp(FAR, ECHO_PORT, b"open");
    assert_eq!(answer(&four, FAR), format!("i-5 asked by {} open", address(4)));
    assert!(!has(&five.frames(), b"closed"));
    // What is for a neighbour's address is for the neighbour.
    three.send_udp(address(1), ECHO_PORT, b"?");
    assert_eq!(answer(&three, address(1)), format!("i-1 asked by {} ?", address(3)));
}

fn an_error_goes_back_to_the_vpc_that_it_is_about() {
    let (_lab, [_, _, three, four, _]) = start();
    let builder = PacketBuilder::ethernet2(mac(3), GATEWAY_MAC)
        .ipv4(address(3).octets(), public(2).octets(), 1)
        .udp(PORT, ECHO_PORT);
    let mut frame = Vec::new();
    builder.write(&mut frame, b"too far").unwrap();
    three.send(&frame);
    let is_error = |frame: &[u8]| match SlicedPacket::from_ethernet(frame).unwrap().transport {
        Some(TransportSlice::Icmpv4(icmp)) => (icmp.slice()[0] == 11).then_some(()),
        _ => None,
    };
    three.await_frame("a time exceeded", is_error);
    // It was sent before this, and would have arrived before.
    four.ping(GATEWAY, 1);
    assert!(four.frames().iter().all(|frame| is_error(frame).is_none()));
}

fn each_has_its_gateway_with_its_services() {
    let (lab, [_, _, three, four, five]) = start();
    for guest in [&three, &four] {
        guest.send_ping(GATEWAY, GATEWAY_MAC, 7);
    }
    three.await_pong(GATEWAY, 7);
    four.await_pong(GATEWAY, 7);
    five.ping("172.31.16.1".parse().unwrap(), 7);
    for guest in [&three, &four] {
        assert_eq!(guest.resolve(GATEWAY), GATEWAY_MAC);
    }
    for (guest, n) in [(&three, 3), (&four, 4)] {
        let event = lab.netd.first_event(|| assert_eq!(guest.dhcp(false).yiaddr(), address(n)));
        let Some(api::network_event::Event::LeaseGiven(lease)) = event.event else { panic!("{event:?}") };
        assert_eq!(lease.interface, format!("eni-{n}"));
    }
    // The resolver knows the address by the name that it has in the VPC of who asks.
    for guest in [&three, &four] {
        guest.send_udp(RESOLVER, 53, &question());
    }
    for (guest, vpc) in [(&three, 1), (&four, 2)] {
        let answer = Message::from_vec(&guest.receive_udp().payload).unwrap();
        let name = Name::from_ascii(format!("ip-172-31-0-4.vpc{vpc}.internal.")).unwrap();
        assert_eq!(answer.answers[0].data, RData::PTR(PTR(name)));
    }
}

const RESOLVER: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 2);

fn question() -> Vec<u8> {
    let mut message = Message::query();
    message.add_query(Query::query(Name::from_ascii("4.0.31.172.in-addr.arpa.").unwrap(), RecordType::PTR));
    message.to_vec().unwrap()
}

/// A segment of the guest's half of a connection to the metadata service.
fn tcp(n: u8, sequence: u32, acknowledged: Option<u32>, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(n), GATEWAY_MAC)
        .ipv4(address(n).octets(), METADATA.octets(), 64)
        .tcp(PORT, 80, sequence, 1024);
    let builder = match acknowledged {
        Some(number) => builder.ack(number),
        None => builder.syn(),
    };
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).unwrap();
    frame
}

fn callers_of_the_metadata_service_are_told_apart() {
    let (_lab, guests) = start();
    let services = ["brsubnet1", "brsubnet2"].map(metadata_service);
    let callers = [(3_u8, &guests[2]), (4, &guests[3])];
    for (n, guest) in callers {
        guest.send(&tcp(n, 100, None, &[]));
    }
    for (n, guest) in callers {
        let theirs = guest.await_frame("the service's half", |frame| {
            match SlicedPacket::from_ethernet(frame).ok()?.transport? {
                TransportSlice::Tcp(tcp) if tcp.syn() && tcp.ack() => Some(tcp.sequence_number()),
                _ => None,
            }
        });
        guest.send(&tcp(n, 101, Some(theirs.wrapping_add(1)), format!("i-{n}").as_bytes()));
    }
    for (service, (n, _)) in services.iter().zip(callers) {
        let (mut connection, caller) = service.accept().unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut said = [0; 3];
        connection.read_exact(&mut said).unwrap();
        assert_eq!((caller, &said[..]), (SocketAddr::from((address(n), PORT)), format!("i-{n}").as_bytes()));
    }
}

/// A group that lets in the VPC's own network lets in nobody from outside who has such an address.
fn an_address_of_the_vpcs_is_nobodys_outside() {
    let lab = Lab::new();
    let mut desired = overlapping(1);
    let own = Peer::Cidr("172.31.0.0/16".into());
    desired.security_groups.push(group("sg-own", &[(INGRESS, ALL_TRAFFIC, own), (EGRESS, ALL_TRAFFIC, everywhere())]));
    desired.interfaces[0].security_groups = vec!["sg-own".into()];
    lab.netd.apply(&desired);
    let [one, _, three, ..] = guests();
    lab.outside.run("ip addr add 172.31.0.77/32 dev lo");
    let stranger = lab.outside.within(|| UdpSocket::bind("172.31.0.77:0").unwrap());
    stranger.send_to(b"closed", (public(1), 9)).unwrap();
    three.send_udp(address(1), 9, b"open");
    assert_eq!(one.receive_udp().payload, b"open");
    assert!(!has(&one.frames(), b"closed"));
    assert_eq!(lab.netd.show().interfaces[0].denied_in_packets, 1);
}

fn a_group_is_of_its_own_vpc() {
    let lab = Lab::new();
    let mut desired = overlapping(1);
    // i-1 takes from members only; i-3 is one, and i-4 has i-3's address.
    let mut guarded = group(
        "sg-guarded",
        &[(INGRESS, ALL_TRAFFIC, Peer::SecurityGroup("sg-members".into())), (EGRESS, ALL_TRAFFIC, everywhere())],
    );
    guarded.members = vec![address(1).to_string()];
    let mut members = group("sg-members", &[(EGRESS, ALL_TRAFFIC, everywhere())]);
    members.members = vec![address(3).to_string()];
    desired.security_groups.extend([guarded, members]);
    desired.interfaces[0].security_groups = vec!["sg-guarded".into()];
    desired.interfaces[2].security_groups = vec!["sg-members".into()];
    lab.netd.apply(&desired);
    let [one, two, three, four, _] = guests();
    four.send_udp(public(1), 9, b"closed");
    lab.outside.run("ip addr add 172.31.0.5/32 dev lo");
    // From outside, in a member's name.
    let stranger = lab.outside.within(|| UdpSocket::bind("172.31.0.5:0").unwrap());
    stranger.send_to(b"closed", (public(1), 9)).unwrap();
    three.send_udp(address(1), 9, b"open");
    assert_eq!(one.receive_udp().payload, b"open");
    assert!(!has(&one.frames(), b"closed"));
    // The other VPC's instance of that address is in another group, and open.
    four.send_udp(address(2), 9, b"open");
    assert_eq!(two.receive_udp().payload, b"open");
    let show = lab.netd.show();
    let denied = |n: usize| show.interfaces[n - 1].denied_in_packets;
    assert_eq!([denied(1), denied(2)], [2, 0]);
}

/// An instance that may send in any name cannot answer in another VPC's connections.
#[test]
fn nobody_answers_for_another_vpc() {
    let lab = Lab::new();
    let mut desired = overlapping(1);
    desired.interfaces[3].source_dest_check_off = true;
    lab.netd.apply(&desired);
    let [one, _, three, four, _] = guests();
    let server = lab.outside_socket();
    let server_port = server.local_addr().unwrap().port();
    three.send_udp(OUTSIDE, server_port, b"?");
    let (_, asked_by) = server.recv_from(&mut [0; 16]).unwrap();
    let forge = |from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)| {
        four.send(&udp(mac(4), GATEWAY_MAC, from.0, to.0, (from.1, to.1), b"forged"));
    };
    forge((OUTSIDE, server_port), (NODE, asked_by.port()));
    // As the answer to what i-3 asks of i-1 by way of its elastic IP.
    three.send_udp(public(1), 9, b"?");
    let heard = one.receive_udp();
    assert_eq!(heard.from, NODE);
    forge((address(1), 9), (NODE, heard.from_port));
    // What is true arrives, after what was not.
    four.ping(GATEWAY, 1);
    server.send_to(b"true", asked_by).unwrap();
    assert_eq!(three.receive_udp().payload, b"true");
    assert!(!has(&three.frames(), b"forged"));
}

/// An instance whose private address is that of a public server is not that server to the node.
fn nobody_answers_for_who_was_asked_by_the_node() {
    let server_address = Ipv4Addr::new(203, 0, 113, 10);
    let lab = Lab::new();
    let mut desired = network(1, 1, &[]);
    desired.segments[0] = segment("subnet-1", "vpc-1", "203.0.113.0/24", "203.0.113.1");
    desired.interfaces[0].ipv4 = server_address.to_string();
    desired.interfaces[0].hostname.clear();
    lab.netd.apply(&desired);
    let double = guest_at(1, server_address);
    lab.outside.run("ip addr add 203.0.113.10/32 dev lo");
    let server = lab.outside.within(move || UdpSocket::bind((server_address, 0)).unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let server_port = server.local_addr().unwrap().port();

    let node = UdpSocket::bind((NODE, 0)).unwrap();
    node.set_read_timeout(Some(PATIENCE)).unwrap();
    node.connect((server_address, server_port)).unwrap();
    node.send(b"?").unwrap();
    let (_, asked_by) = server.recv_from(&mut [0; 16]).unwrap();
    let forged = udp(mac(1), GATEWAY_MAC, server_address, NODE, (server_port, asked_by.port()), b"forged");
    double.send(&forged);
    double.ping("203.0.113.1".parse().unwrap(), 1);
    server.send_to(b"true", asked_by).unwrap();
    let mut answer = [0; 16];
    let length = node.recv(&mut answer).unwrap();
    assert_eq!(&answer[..length], b"true");
}

/// A datagram in two fragments.
fn fragments(n: u8, to_port: u16, payload: &[u8; 32]) -> [Vec<u8>; 2] {
    let whole = udp(mac(n), GATEWAY_MAC, address(n), OUTSIDE, (PORT, to_port), payload);
    let (head, body) = whole.split_at(14 + 20);
    let fragment = |offset: u16, more: bool, part: &[u8]| {
        let mut header = head.to_vec();
        header[16..18].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
        header[18..20].copy_from_slice(&77_u16.to_be_bytes());
        header[20..22].copy_from_slice(&((offset / 8) | if more { 0x2000 } else { 0 }).to_be_bytes());
        header[24..26].copy_from_slice(&[0; 2]);
        let sum =
            header[14..34].chunks(2).fold(0_u32, |sum, word| sum + u32::from(u16::from_be_bytes([word[0], word[1]])));
        let folded = (sum & 0xffff) + (sum >> 16);
        header[24..26].copy_from_slice(&(!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes());
        [&header, part].concat()
    };
    [fragment(0, true, &body[..24]), fragment(24, false, &body[24..])]
}

#[test]
fn fragments_of_two_vpcs_are_not_put_together() {
    let (lab, [_, _, three, four, _]) = start();
    let server = lab.outside_socket();
    let port = server.local_addr().unwrap().port();
    let of = |n: u8| fragments(n, port, &[b'0' + n; 32]);
    let ([first_3, last_3], [first_4, last_4]) = (of(3), of(4));
    // They would make a datagram, with the same addresses and number, if it were not for the VPC.
    three.send(&first_3);
    four.send(&last_4);
    four.send(&first_4);
    three.send(&last_3);
    let mut buffer = [0; 64];
    let mut came: Vec<Vec<u8>> = (0..2)
        .map(|_| {
            let (length, _) = server.recv_from(&mut buffer).unwrap();
            buffer[..length].to_vec()
        })
        .collect();
    came.sort_unstable();
    assert_eq!(came, [[b'3'; 32], [b'4'; 32]]);
}

fn an_elastic_ip_moves_from_one_vpc_to_the_other() {
    let (lab, guests) = start();
    let client = lab.outside_socket();
    assert!(ask(&client, public(1), "before").starts_with("i-1 "));
    // The other's flow has nothing to do with it.
    let steady = lab.outside_socket();
    assert!(ask(&steady, public(2), "before").starts_with("i-2 "));
    let mut moved = overlapping(2);
    moved.elastic_ips[0] = api::ElasticIp {
        private_ip: address(4).to_string(),
        segment: "subnet-2".into(),
        ..moved.elastic_ips[0].clone()
    };
    lab.netd.apply(&moved);
    assert_eq!(ask(&client, public(1), "after"), format!("i-4 asked by {OUTSIDE}"));
    assert!(ask(&steady, public(2), "after").starts_with("i-2 "));
    guests[3].send_udp(OUTSIDE, client.local_addr().unwrap().port(), b"as itself");
    let (_, from) = client.recv_from(&mut [0; 64]).unwrap();
    assert_eq!(from.ip(), public(1));
}

fn a_restart_keeps_what_is_there_and_nothing_is_left_of_what_goes() {
    let (mut lab, guests) = start();
    let server = lab.outside_socket();
    let port = server.local_addr().unwrap().port();
    // Connections of both, which only the other side goes on with: no new one could take their place.
    let asked_by = [2, 3].map(|n| {
        guests[n].send_udp(OUTSIDE, port, b"?");
        server.recv_from(&mut [0; 16]).unwrap().1
    });
    let still_there = |lab: &Lab| {
        for (guest, from) in guests[2..].iter().zip(asked_by) {
            let said = format!("{from} {}", lab.netd.pid());
            server.send_to(said.as_bytes(), from).unwrap();
            assert_eq!(guest.receive_udp().payload, said.as_bytes());
        }
    };
    assert!(!lab.netd.apply(&overlapping(1)).changed, "{}", lab.netd.log());
    lab.netd.kill();
    lab.netd.start();
    assert!(!lab.netd.apply(&overlapping(1)).changed, "{}", lab.netd.log());
    still_there(&lab);
    // Rules and sets that are made anew are the same.
    match backend() {
        Backend::Nftables => drop(run("nft flush ruleset")),
        Backend::Iptables => {
            ["raw", "mangle", "nat"].iter().for_each(|table| drop(run(&format!("iptables-legacy -t {table} -F"))))
        }
    }
    assert!(lab.netd.apply(&overlapping(1)).changed);
    still_there(&lab);
    // One VPC goes: with its connections, its table and its rule.
    let mut less = overlapping(2);
    less.segments.truncate(1);
    less.interfaces = vec![interface(3)];
    less.interfaces[0].ipv4 = address(3).to_string();
    less.elastic_ips.clear();
    lab.netd.apply(&less);
    let rules = run("ip rule");
    assert_eq!(rules.lines().filter(|line| line.contains("fwmark 0x")).count(), 1, "{rules}");
    let left = run("conntrack -L -s 172.31.0.5");
    assert_eq!(left.lines().filter(|line| line.contains("172.31.0.5")).count(), 1, "{left}");
    server.send_to(b"still", asked_by[0]).unwrap();
    assert_eq!(guests[2].receive_udp().payload, b"still");
}

on_each_backend! {
    what_is_for_another_vpcs_address_does_not_leave_by_the_public_side,
    each_goes_out_to_the_same_place_from_the_same_port_at_once,
    each_is_reached_by_its_elastic_ip_from_one_port,
    they_reach_each_other_by_elastic_ip_and_no_other_way,
    an_error_goes_back_to_the_vpc_that_it_is_about,
    each_has_its_gateway_with_its_services,
    callers_of_the_metadata_service_are_told_apart,
    an_address_of_the_vpcs_is_nobodys_outside,
    a_group_is_of_its_own_vpc,
    nobody_answers_for_who_was_asked_by_the_node,
    an_elastic_ip_moves_from_one_vpc_to_the_other,
    a_restart_keeps_what_is_there_and_nothing_is_left_of_what_goes,
}
