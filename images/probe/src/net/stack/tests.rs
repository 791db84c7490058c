//! The stack against frames as they are on the wire, with a host that keeps what is sent.

use proptest::prelude::*;

use super::super::dhcp_message::{Kind, Request, tests::reply};
use super::super::tcp_segment::Flags;
use super::*;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);
const IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);
const PEER: Peer = Peer { mac: Mac([2, 0, 0, 0, 0, 1]), ip: Ipv4Addr::new(10, 0, 0, 1) };
const SERVICE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

#[derive(Default)]
struct Sent {
    frames: Vec<Vec<u8>>,
    told: Vec<String>,
}

impl Host for Sent {
    fn transmit(&mut self, build: impl FnOnce(&mut [u8]) -> Option<usize>) {
        let mut buffer = vec![0; eth::FRAME_MAX];
        if let Some(length) = build(&mut buffer) {
            buffer.truncate(length);
            self.frames.push(buffer);
        }
    }

    fn report(&mut self, event: Event<'_>) {
        self.told.push(format!("{event:?}"));
    }

    fn statistics(&mut self, out: &mut dyn std::fmt::Write) -> std::fmt::Result {
        writeln!(out, "machine 1")
    }
}

impl Sent {
    fn take(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.frames)
    }
}

fn stack(command_line: &str) -> (Stack, Sent) {
    let options = Options::parse(command_line, |word| panic!("{word}"));
    let mut stack = Stack::new(MAC, options, Random::new(7), Instant::BEGIN);
    let mut host = Sent::default();
    stack.poll(Instant::BEGIN, &mut host);
    (stack, host)
}

fn fixed(more: &str) -> (Stack, Sent) {
    let (stack, mut host) = stack(&format!("probe.ip=10.0.0.9/24 probe.gw=10.0.0.1 {more}"));
    host.take();
    (stack, host)
}

/// A frame from the peer.
fn frame(protocol: u8, to: Ipv4Addr, payload: impl FnOnce(&mut [u8]) -> Option<usize>) -> Vec<u8> {
    frame_from(PEER.ip, protocol, to, payload)
}

fn frame_from(from: Ipv4Addr, protocol: u8, to: Ipv4Addr, payload: impl FnOnce(&mut [u8]) -> Option<usize>) -> Vec<u8> {
    let mut host = Sent::default();
    send_ipv4([Peer { ip: from, ..PEER }, Peer { mac: MAC, ip: to }], protocol, &mut host, payload);
    host.frames.remove(0)
}

fn datagram(ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    frame(ipv4::UDP, IP, |out| {
        udp::build(out, [PEER.ip, IP], ports, |out| {
            out[..payload.len()].copy_from_slice(payload);
            Some(payload.len())
        })
    })
}

/// The payload of a datagram that was sent to the peer, with its ports.
fn payload_of(frame: &[u8]) -> ([u16; 2], Vec<u8>) {
    let frame = eth::parse(frame).unwrap();
    assert_eq!((frame.destination, frame.source), (PEER.mac, MAC));
    let packet = ipv4::parse(frame.payload).unwrap();
    assert_eq!((packet.source, packet.destination), (IP, PEER.ip));
    let datagram = udp::parse(&packet).unwrap();
    ([datagram.source_port, datagram.destination_port], datagram.payload.to_vec())
}

#[test]
fn udp_echo_comes_back_to_where_it_came_from() {
    let (mut stack, mut host) = fixed("probe.metadata=off");
    for payload in [&b""[..], b"x", &[7; 1472]] {
        stack.receive(Instant::BEGIN, &datagram([5000, 7], payload), &mut host);
        assert_eq!(payload_of(&host.take()[0]), ([7, 5000], payload.to_vec()));
    }
}

#[test]
fn the_services_do_not_answer_one_another() {
    let (mut stack, mut host) = fixed("probe.metadata=off");
    for source in [7, 9, 19, 0] {
        for destination in [7, 19] {
            stack.receive(Instant::BEGIN, &datagram([source, destination], b"x"), &mut host);
        }
    }
    assert!(host.frames.is_empty());
}

#[test]
fn what_is_discarded_is_counted_and_told() {
    let (mut stack, mut host) = fixed("probe.metadata=off");
    for _ in 0..3 {
        stack.receive(Instant::BEGIN, &datagram([5000, 9], &[0; 100]), &mut host);
    }
    stack.receive(Instant::from_micros(42), &datagram([5000, 19], b""), &mut host);
    let (ports, text) = payload_of(&host.take()[0]);
    let text = String::from_utf8(text).unwrap();
    assert_eq!(ports, [19, 5000]);
    for line in ["address 10.0.0.9", "uptime_us 42", "udp_discarded 3", "udp_discarded_bytes 300", "machine 1"] {
        assert!(text.lines().any(|found| found == line), "{line} in {text}");
    }
}

#[test]
fn it_is_turned_off_only_where_that_is_allowed() {
    for (option, off) in [("", false), ("probe.poweroff=allow", true)] {
        let (mut stack, mut host) = fixed(&format!("probe.metadata=off {option}"));
        stack.receive(Instant::BEGIN, &datagram([5000, 19], b"poweroff\n"), &mut host);
        assert_eq!(host.told.iter().any(|event| event.starts_with("PowerOff")), off);
    }
}

#[test]
fn only_questions_for_our_own_address_are_answered() {
    let (mut stack, mut host) = fixed("probe.metadata=off");
    for (target, replies) in [(IP, 1), (Ipv4Addr::new(10, 0, 0, 8), 0)] {
        let target = Peer { mac: Mac([0; 6]), ip: target };
        let packet = arp::Packet { operation: Operation::Request, sender: PEER, target };
        let mut question = vec![0; 60];
        eth::build(&mut question, [Mac::BROADCAST, PEER.mac], eth::ARP, |out| arp::build(out, &packet)).unwrap();
        stack.receive(Instant::BEGIN, &question, &mut host);
        let sent = host.take();
        assert_eq!(sent.len(), replies);
        for reply in sent {
            let reply = arp::parse(eth::parse(&reply).unwrap().payload).unwrap();
            assert_eq!((reply.sender, reply.target), (Peer { mac: MAC, ip: IP }, PEER));
        }
    }
}

#[test]
fn dhcp_gives_the_address_and_the_first_question_is_for_the_metadata() {
    let (mut stack, mut host) = stack("");
    let dhcp = |host: &mut Sent| {
        let frame = host.take().remove(0);
        let packet = ipv4::parse(eth::parse(&frame).unwrap().payload).unwrap();
        let message = udp::parse(&packet).unwrap().payload.to_vec();
        Request {
            kind: Kind::Discover,
            transaction: u32::from_be_bytes(message[4..8].try_into().unwrap()),
            seconds: 0,
            client: MAC,
            address: None,
            requested: None,
            server: None,
        }
    };
    // /24, router and server 10.0.0.1, 3600 s.
    let options = [1, 4, 255, 255, 255, 0, 3, 4, 10, 0, 0, 1, 54, 4, 10, 0, 0, 1, 51, 4, 0, 0, 14, 16];
    for kind in [Kind::Offer, Kind::Ack] {
        let message = reply(kind, &dhcp(&mut host), IP, &options);
        let frame = frame(ipv4::UDP, IP, |out| {
            udp::build(out, [PEER.ip, IP], [67, 68], |out| {
                out[..message.len()].copy_from_slice(&message);
                Some(message.len())
            })
        });
        stack.receive(Instant::BEGIN, &frame, &mut host);
    }
    assert!(host.told[0].starts_with("Address"), "{:?}", host.told);
    // The announcement, and the SYN to the gateway that gave the lease.
    let sent = host.take();
    assert_eq!(eth::parse(&sent[0]).unwrap().kind, eth::ARP);
    let syn = eth::parse(&sent[1]).unwrap();
    assert_eq!(syn.destination, PEER.mac);
    let packet = ipv4::parse(syn.payload).unwrap();
    assert_eq!(packet.destination, SERVICE);
    assert_eq!(tcp_segment::parse(&packet).unwrap().flags, Flags::SYN);
}

#[test]
fn the_gateway_is_asked_for_until_it_answers() {
    let (mut stack, mut host) = fixed("");
    for _ in 0..3 {
        let deadline = stack.deadline();
        stack.poll(deadline, &mut host);
        let sent = host.take();
        assert_eq!(sent.len(), 1);
        let question = arp::parse(eth::parse(&sent[0]).unwrap().payload).unwrap();
        assert_eq!(question.target.ip, PEER.ip);
    }
    let packet = arp::Packet { operation: Operation::Reply, sender: PEER, target: Peer { mac: MAC, ip: IP } };
    let mut answer = vec![0; 60];
    eth::build(&mut answer, [MAC, PEER.mac], eth::ARP, |out| arp::build(out, &packet)).unwrap();
    stack.receive(stack.deadline(), &answer, &mut host);
    assert_eq!(eth::parse(&host.take()[0]).unwrap().kind, eth::IPV4);
}

#[test]
fn the_metadata_is_read_document_by_document() {
    let (mut stack, mut host) = fixed("");
    stack.neighbours.learn(PEER);
    let mut now = Instant::BEGIN;
    let mut requests = Vec::new();
    let mut steps = 0;
    while !host.told.iter().any(|event| event.starts_with("MetadataRead")) {
        steps += 1;
        assert!(steps < 100, "{:?}", host.told);
        if host.frames.is_empty() {
            now = now.max(stack.deadline());
            stack.poll(now, &mut host);
        }
        for frame in host.take() {
            if let Some(answer) = serve_metadata(&frame, &mut requests) {
                stack.receive(now, &answer, &mut host);
            }
        }
    }
    assert_eq!(requests.len(), 4);
    assert!(requests[0].starts_with("GET /latest/meta-data/instance-id HTTP/1.0\r\n"));
    assert_eq!(host.told.iter().filter(|event| event.contains("body: Some")).count(), 3, "{:?}", host.told);
    assert_eq!(host.told.iter().filter(|event| event.contains("body: None")).count(), 1, "{:?}", host.told);
}

/// A server that knows everything but the public address.
fn serve_metadata(frame: &[u8], requests: &mut Vec<String>) -> Option<Vec<u8>> {
    let packet = ipv4::parse(eth::parse(frame)?.payload).ok()?;
    let segment = tcp_segment::parse(&packet)?;
    let answer = if segment.payload.is_empty() {
        ""
    } else {
        requests.push(String::from_utf8(segment.payload.to_vec()).unwrap());
        if requests.last()?.contains("public-ipv4") { "HTTP/1.1 404 no\r\n\r\n" } else { "HTTP/1.1 200 OK\r\n\r\nyes" }
    };
    let flags = match (segment.flags.has(Flags::SYN), answer) {
        (true, _) => Flags::SYN.with(Flags::ACK),
        (false, "") => Flags::ACK,
        (false, _) => Flags::ACK.with(Flags::FIN),
    };
    let reply = Segment {
        source_port: segment.destination_port,
        destination_port: segment.source_port,
        sequence: if segment.flags.has(Flags::SYN) { 99 } else { segment.acknowledgment },
        acknowledgment: segment.sequence.wrapping_add(segment.length()),
        flags,
        payload: answer.as_bytes(),
    };
    Some(frame_from(SERVICE, ipv4::TCP, IP, |out| tcp_segment::build(out, [SERVICE, IP], 1000, &reply)))
}

proptest! {
    #[test]
    fn any_frame_is_survived_and_answered_with_one_at_most(mut frame in proptest::collection::vec(any::<u8>(), 0..200), kind in 0usize..3) {
        let (mut stack, mut host) = fixed("probe.metadata=off");
        // Most random bytes would end at the first check; let some come further.
        if let Some(head) = frame.first_chunk_mut::<14>() {
            head[..6].copy_from_slice(&MAC.0);
            head[6] &= !1;
            head[12..].copy_from_slice(&[eth::IPV4, eth::ARP, 0x86dd][kind].to_be_bytes());
        }
        stack.receive(Instant::BEGIN, &frame, &mut host);
        prop_assert!(host.frames.len() <= 1);
    }

    #[test]
    fn any_payload_in_a_sound_packet_is_survived(protocol: u8, payload in proptest::collection::vec(any::<u8>(), 0..100)) {
        let (mut stack, mut host) = fixed("probe.metadata=off");
        for protocol in [protocol, ipv4::ICMP, ipv4::TCP, ipv4::UDP] {
            let frame = frame(protocol, IP, |out| {
                out[..payload.len()].copy_from_slice(&payload);
                Some(payload.len())
            });
            stack.receive(Instant::BEGIN, &frame, &mut host);
        }
        prop_assert!(host.frames.len() <= 4);
    }
}
