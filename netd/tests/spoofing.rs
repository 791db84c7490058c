//! What an instance sends in another's name goes nowhere, and is counted.

mod common;

use std::net::Ipv4Addr;

use common::backend::run_on;
use common::guest::{BROADCAST_MAC, arp, fragments, frame, tagged, udp};
use common::{
    Backend, GATEWAY, GATEWAY_MAC, Guest, Lab, NODE, OUTSIDE, backend, guest, is_same_packet, neighbour_mac, network,
    private,
};
use dhcproto::v4::MessageType;

const OWN: [u8; 6] = [2, 0, 0, 0, 1, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 1, 2];
/// The types of tags: 802.1Q's and 802.1ad's.
const Q: u16 = 0x8100;
const AD: u16 = 0x88a8;

/// Sends what must not pass, then what must; by then the first would have come.
fn nothing_passes(lab: &Lab, from: &Guest, to: &Guest, forbidden: &[(&str, Vec<u8>)]) {
    for (what, frame) in forbidden {
        let counted = || {
            let state = lab.netd.state_of("eni-1");
            state.spoofed_packets + state.foreign_packets
        };
        let before = counted();
        let seen = to.frames().len();
        from.send(frame);
        from.send_ping(private(2), neighbour_mac(2), 1);
        from.await_pong(private(2), 1);
        let arrived = to.frames()[seen..].iter().any(|found| is_same_packet(found, frame));
        assert!(!arrived, "{what} reached the neighbour");
        // By iptables, the port itself drops what is not from its MAC, no other port gets what is not IPv4, and a part alone never comes to a rule.
        let whole = frame[12..14] == [8, 0] && (frame[20] & 0x3f, frame[21]) == (0, 0);
        let seen_by_rules = backend() == Backend::Nftables || (frame[6..12] == OWN && whole);
        assert_eq!(counted(), before + u64::from(seen_by_rules), "{what} was not counted");
    }
}

fn frames_in_anothers_name_are_dropped_and_counted() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 2, &[]));
    let (one, two) = (guest(1), guest(2));
    one.ping(GATEWAY, 9);
    let (own_ip, other_ip, there) = (private(1), private(2), neighbour_mac(2));
    let stranger = Ipv4Addr::new(172, 31, 0, 77);
    let good = udp(OWN, there, own_ip, other_ip, (5000, 5000), b"good");
    let unspecified = Ipv4Addr::UNSPECIFIED;
    let ipv6 = [&[0x60, 0, 0, 0, 0, 0, 59, 64][..], &[0xfe; 32]].concat();
    let in_parts = |from| fragments(&udp(OWN, there, from, other_ip, (5000, 5000), &[7; 64]), 7, 16);
    // In its own name where rules look, in another's where they do not.
    let request = udp(OWN, GATEWAY_MAC, own_ip, GATEWAY, (68, 67), &[0; 300]);
    nothing_passes(
        &lab,
        &one,
        &two,
        &[
            ("another's MAC", udp(OTHER, OTHER, own_ip, other_ip, (5000, 5000), b"mac")),
            ("the gateway's MAC", udp(GATEWAY_MAC, OTHER, own_ip, other_ip, (5000, 5000), b"gw")),
            ("a stranger's address", udp(OWN, there, stranger, other_ip, (5000, 5000), b"ip")),
            ("the gateway's address", udp(OWN, there, GATEWAY, other_ip, (5000, 5000), b"gwip")),
            ("no address at all", udp(OWN, there, unspecified, other_ip, (5000, 5000), b"zero")),
            ("no address, towards DHCP's port", udp(OWN, there, unspecified, other_ip, (68, 67), b"zero")),
            ("a DHCP server's answer", udp(OWN, there, own_ip, other_ip, (67, 68), b"dhcp")),
            ("a tagged frame", tagged(&good, Q, 7)),
            ("a frame tagged twice", tagged(&tagged(&good, Q, 7), Q, 8)),
            ("a frame with a provider's tag", tagged(&tagged(&good, Q, 7), AD, 8)),
            ("a priority-tagged frame", tagged(&good, Q, 0)),
            ("IPv6", frame(OWN, OTHER, 0x86dd, &ipv6)),
            ("a frame of an unknown type", frame(OWN, OTHER, 0x1234, b"?")),
            ("ARP as another", arp(OWN, OTHER, 2, (OWN, GATEWAY), (OTHER, other_ip))),
            ("ARP with another's MAC inside", arp(OWN, OTHER, 2, (GATEWAY_MAC, own_ip), (OTHER, other_ip))),
            ("a gratuitous ARP as the gateway", arp(OWN, BROADCAST_MAC, 1, (OWN, GATEWAY), ([0; 6], GATEWAY))),
            ("a part of a stranger's packet", in_parts(stranger)[1].clone()),
            ("the first part of a DHCP request", fragments(&request, 7, 16)[0].clone()),
            ("a DHCP request in another's name", one.dhcp_frame(OTHER, MessageType::Discover, vec![], false, 5)),
            ("a frame to the bridge's own group", frame(OWN, [1, 0x80, 0xc2, 0, 0, 3], 0x888e, b"eapol")),
        ],
    );
    // What is its own passes: a datagram, and the probe for a free address.
    one.send(&good);
    assert_eq!(two.receive_udp().payload, b"good");
    if backend() == Backend::Iptables {
        return;
    }
    let probe = arp(OWN, BROADCAST_MAC, 1, (OWN, unspecified), ([0; 6], stranger));
    one.send(&probe);
    two.await_frame("the ARP probe", |found| (found[..] == probe[..]).then_some(()));
}

fn nobody_draws_anothers_frames_to_itself() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 3, &[]));
    let (one, two, three) = (guest(1), guest(2), guest(3));
    // The first claims the third's MAC in every way that a bridge might learn from.
    let third = [2, 0, 0, 0, 1, 3];
    one.send(&udp(third, OTHER, private(3), private(2), (1, 1), b"learn"));
    one.send(&frame(third, [1, 0x80, 0xc2, 0, 0, 0x0e], 0x88cc, b"learn"));
    one.send(&frame(third, BROADCAST_MAC, 0x1234, b"learn"));
    one.ping(GATEWAY, 1);
    two.send(&udp(OTHER, neighbour_mac(3), private(2), private(3), (5000, 5000), b"for the third"));
    assert_eq!(three.receive_udp().payload, b"for the third");
    let overheard = |guest: &Guest| guest.frames().iter().any(|f| f.windows(13).any(|w| w == b"for the third"));
    assert!(!overheard(&one));
}

#[test]
fn an_instance_without_source_check_may_send_for_others() {
    let lab = Lab::new();
    let mut desired = network(1, 2, &[]);
    desired.interfaces[0].source_dest_check_off = true;
    lab.netd.apply(&desired);
    let (one, two) = (guest(1), guest(2));
    let far = Ipv4Addr::new(10, 9, 8, 7);
    one.send(&udp(OTHER, OTHER, far, private(2), (5000, 5000), b"another's MAC"));
    one.send(&udp(OWN, OTHER, far, private(2), (5000, 5000), b"routed"));
    let datagram = two.receive_udp();
    assert_eq!((datagram.from, &datagram.payload[..]), (far, &b"routed"[..]));
    assert_eq!(lab.netd.spoofed("eni-1"), 1);
}

#[test]
fn an_instance_without_source_check_may_not_send_as_another_instance() {
    let lab = Lab::new();
    let mut desired = network(1, 3, &[(1, 3)]);
    desired.interfaces[0].source_dest_check_off = true;
    desired.interfaces[1].secondary_ipv4 = vec![private(20).to_string()];
    lab.netd.apply(&desired);
    let (one, two) = (guest(1), guest(2));
    let outside = lab.outside_socket();
    let port = outside.local_addr().unwrap().port();
    // To a neighbour, whose group may know the other; outside, as the other's elastic IP; by a secondary address.
    one.send(&udp(OWN, OTHER, private(3), private(2), (5000, 5000), b"as another"));
    one.send(&udp(OWN, GATEWAY_MAC, private(3), OUTSIDE, (5000, port), b"as another"));
    one.send(&udp(OWN, GATEWAY_MAC, private(20), OUTSIDE, (5000, port), b"as another"));
    one.send_udp(private(2), 5000, b"as itself");
    assert_eq!(two.receive_udp().payload, b"as itself");
    one.send_udp(OUTSIDE, port, b"as itself");
    let mut buffer = [0; 64];
    let (length, from) = outside.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.ip()), (&b"as itself"[..], NODE.into()));
    assert_eq!(lab.netd.spoofed("eni-1"), 3);
}

#[test]
fn by_iptables_an_instance_without_source_check_is_refused() {
    run_on(Backend::Iptables, || {
        let lab = Lab::new();
        let mut desired = network(1, 2, &[]);
        desired.interfaces[0].source_dest_check_off = true;
        let status = lab.netd.try_apply(&desired).unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(status.message().contains("eni-1") && status.message().contains("nftables"), "{status}");
    });
}

on_each_backend! {
    frames_in_anothers_name_are_dropped_and_counted,
    nobody_draws_anothers_frames_to_itself,
}
