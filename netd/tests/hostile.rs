//! Hostile instances: whatever one sends, and however much, its neighbours and the outside keep their service.
//!
//! The attacker is instance 1. While it floods, instance 2 renews its lease, asks for names, speaks to its neighbour, to the outside and is spoken to,
//! each with connections and fragments that the node has not seen before. That the attack was there at all is told by its counter.

mod common;

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::backend::run_on;
use common::guest::{BROADCAST_MAC, ECHO_PORT, arp, fragments, frame, tagged, udp};
use common::{
    ALL_TRAFFIC, Backend, EGRESS, GATEWAY, GATEWAY_MAC, Guest, INGRESS, Lab, OUTSIDE, ask, eventually, everywhere,
    group, guest, mac, neighbour_mac, network, private, public, run,
};
use dhcproto::v4::MessageType;
use mallee_netd::api::InterfaceState;

const RESOLVER: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 2);
/// The private name of instance 2, asked for by a query with the identifier 0x1234.
const QUESTION: &[u8] =
    b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x0fip-172-31-0-005\x08mallee-1\x07compute\x08internal\0\0\x01\0\x01";

/// What a neighbour and the outside do all the time.
struct Service<'a> {
    lab: &'a Lab,
    one: &'a Guest,
    two: &'a Guest,
}

impl Service<'_> {
    /// Everything once, each as something new.
    fn goes_on(&self) {
        assert_eq!(self.one.dhcp(false).yiaddr(), private(2));
        self.one.ping(GATEWAY, 1);
        self.one.send_udp(RESOLVER, 53, QUESTION);
        while self.one.receive_udp().from != RESOLVER {}
        // In by the elastic IP, out as it, and beside.
        assert!(ask(&self.lab.outside_socket(), public(2), "from outside").starts_with("i-2 "));
        let outside = self.lab.outside_socket();
        let port = outside.local_addr().unwrap().port();
        self.one.send_udp(OUTSIDE, port, b"to the outside");
        assert_eq!(received(&outside), b"to the outside");
        self.two.send(&udp(mac(3), mac(2), private(3), private(2), (port, ECHO_PORT), b"beside"));
        while !self.two.receive_udp().payload.ends_with(b"beside") {}
        // Again in parts, which must come together on the way.
        let long = vec![b'x'; 3000];
        let whole = udp(mac(2), GATEWAY_MAC, private(2), OUTSIDE, (port, port), &long);
        fragments(&whole, port, 1480).iter().for_each(|part| self.one.send(part));
        assert_eq!(received(&outside), long);
    }
}

fn received(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 65_536];
    let (length, _) = socket.recv_from(&mut buffer).expect("nothing came");
    buffer.truncate(length);
    buffer
}

/// Does `work` while the attacker sends what `nth` makes, a hundred frames at a time, at least twenty times.
fn under_attack(attacker: &Guest, nth: &(dyn Fn(u32) -> Vec<u8> + Sync), work: impl FnOnce()) {
    struct End<'a>(&'a AtomicBool);
    // Also when the work fails.
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0_u32.. {
                if round > 20 && ended.load(Ordering::Relaxed) {
                    return;
                }
                (round * 100..).take(100).for_each(|n| attacker.send(&nth(n)));
                thread::sleep(Duration::from_millis(5));
            }
        });
        let _end = End(&ended);
        work();
    });
}

fn low(n: u32) -> u16 {
    (n & 0xffff) as u16
}

/// A port from 1024 on.
fn port(n: u32) -> u16 {
    low(n) | 1024
}

type Attack<'a> = (&'a str, Box<dyn Fn(u32) -> Vec<u8> + Sync + 'a>, fn(&InterfaceState) -> u64);

#[test]
fn one_instance_floods_and_the_others_keep_their_service() {
    // The neighbour takes a lease several times a second here, as no client does.
    let lab = Lab::with(&["--dhcp-rate", "50", "--gateway-rate", "200"]);
    lab.netd.apply(&network(1, 3, &[(1, 1), (2, 2)]));
    let (attacker, one, two) = (guest(1), guest(2), guest(3));
    let service = Service { lab: &lab, one: &one, two: &two };
    service.goes_on();

    let (own, own_ip) = (mac(1), private(1));
    let own_udp = move |to_mac, to, ports, payload: &[u8]| udp(own, to_mac, own_ip, to, ports, payload);
    let good = own_udp(mac(2), private(2), (5000, 5000), b"good");
    let request = attacker.dhcp_frame(own, MessageType::Discover, vec![], true, 7);
    // From the options' place on (RFC 2131, section 2), any bytes.
    let malformed = |n: u32| {
        let mut frame = request.clone();
        let options = 14 + 20 + 8 + 240;
        frame[options..].iter_mut().enumerate().for_each(|(at, byte)| *byte = (n as usize * 31 + at * 7) as u8);
        // No checksum (RFC 768).
        frame[40..42].fill(0);
        frame
    };
    let router_advertisement =
        [&[0x60, 0, 0, 0, 0, 16, 58, 255][..], &[0xfe; 32], &[134, 0, 0, 0, 64, 0, 7, 8], &[0; 8]].concat();
    let unfinished =
        |n: u32, to_mac, to| fragments(&own_udp(to_mac, to, (port(n), 9), &[b'f'; 1480]), low(n), 1472).remove(0);
    let attacks: Vec<Attack> = vec![
        (
            "questions by ARP to all",
            Box::new(move |n| {
                arp(own, BROADCAST_MAC, 1, (own, own_ip), ([0; 6], Ipv4Addr::from(0xac1f_0000 | n & 0xfff)))
            }),
            |state| state.limited.unwrap().arp_packets,
        ),
        (
            "ARP as the gateway",
            Box::new(move |_| arp(own, BROADCAST_MAC, 2, (own, GATEWAY), (mac(2), private(2)))),
            |state| state.spoofed_packets,
        ),
        ("requests for a lease", Box::new(|_| request.clone()), |state| state.limited.unwrap().dhcp_packets),
        ("malformed requests for a lease", Box::new(malformed), |state| state.limited.unwrap().dhcp_packets),
        ("questions for names", Box::new(move |n| own_udp(GATEWAY_MAC, RESOLVER, (port(n), 53), QUESTION)), |state| {
            state.limited.unwrap().gateway_packets
        }),
        (
            "malformed questions for names",
            Box::new(move |n| own_udp(GATEWAY_MAC, RESOLVER, (port(n), 53), &n.to_be_bytes().repeat(5))),
            |state| state.limited.unwrap().gateway_packets,
        ),
        (
            "all MACs that there are",
            Box::new(|n| match n % 3 {
                0 => udp(mac(2), mac(3), private(2), private(3), (5000, 5000), b"mac"),
                1 => udp(GATEWAY_MAC, mac(3), GATEWAY, private(3), (5000, 5000), b"mac"),
                // Never its own.
                _ => [&good[..8], &(n | 1 << 31).to_be_bytes(), &good[12..]].concat(),
            }),
            |state| state.spoofed_packets,
        ),
        (
            "all addresses that there are",
            Box::new(|n| {
                udp(own, mac(2), Ipv4Addr::from(n.wrapping_mul(0x9e37_79b9)), private(2), (5000, 5000), b"ip")
            }),
            |state| state.spoofed_packets,
        ),
        (
            "tagged frames",
            Box::new(|n| match n % 2 {
                0 => tagged(&good, 0x8100, low(n) & 0xfff),
                _ => tagged(&tagged(&good, 0x8100, 1), 0x88a8, low(n) & 0xfff),
            }),
            |state| state.foreign_packets,
        ),
        (
            "IPv6 router advertisements",
            Box::new(|_| frame(own, [0x33, 0x33, 0, 0, 0, 1], 0x86dd, &router_advertisement)),
            |state| state.foreign_packets,
        ),
        (
            "broadcasts",
            Box::new(move |n| own_udp(BROADCAST_MAC, Ipv4Addr::BROADCAST, (port(n), 5353), b"to all")),
            |state| state.limited.unwrap().broadcast_packets,
        ),
        (
            "packets of which the rest never comes, to the outside",
            Box::new(|n| unfinished(n, GATEWAY_MAC, OUTSIDE)),
            |state| state.limited.unwrap().fragments,
        ),
        (
            "packets of which the rest never comes, to a neighbour",
            Box::new(|n| unfinished(n, mac(2), private(2))),
            |state| state.limited.unwrap().fragments,
        ),
    ];
    for (what, nth, counter) in &attacks {
        println!("{what}");
        let before = counter(&lab.netd.state_of("eni-1"));
        under_attack(&attacker, nth, || (0..3).for_each(|_| service.goes_on()));
        let counted = counter(&lab.netd.state_of("eni-1")) - before;
        assert!(counted > 0, "{what} passed");
        println!("{what}: {counted} were dropped");
    }
    for neighbour in ["eni-2", "eni-3"] {
        let state = lab.netd.state_of(neighbour);
        assert_eq!(state.limited.unwrap(), Default::default(), "{neighbour} was taken for an attacker");
        assert_eq!((state.spoofed_packets, state.foreign_packets), (0, 0));
    }
    // And the attacker is itself again when it stops.
    assert!(ask(&lab.outside_socket(), public(1), "still there?").starts_with("i-1 "));
}

/// Bytes that wait for the rest of their packets (`Documentation/filesystems/proc.rst`, sockstat).
fn fragments_waiting() -> u64 {
    // Of this thread's network namespace.
    let stats = std::fs::read_to_string("/proc/thread-self/net/sockstat").unwrap();
    let line = stats.lines().find(|line| line.starts_with("FRAG:")).unwrap();
    line.split_whitespace().last().unwrap().parse().unwrap()
}

#[test]
fn what_never_comes_together_uses_up_a_small_part_of_the_memory_for_it() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 3, &[(2, 2)]));
    let (attacker, one, two) = (guest(1), guest(2), guest(3));
    // 5000 of them are 12 MB.
    let whole = |n: u32| udp(mac(1), GATEWAY_MAC, private(1), OUTSIDE, (port(n), 9), &[b'f'; 1480]);
    for n in 0..5000 {
        attacker.send(&fragments(&whole(n), low(n), 1472)[0]);
    }
    let waiting = fragments_waiting();
    let most: u64 = run("sysctl -n net.ipv4.ipfrag_high_thresh").trim().parse().unwrap();
    println!("{waiting} of {most} bytes wait");
    assert!(waiting > 0 && waiting < most / 8);
    Service { lab: &lab, one: &one, two: &two }.goes_on();
}

#[test]
fn connections_have_a_bound_and_those_that_are_there_go_on() {
    let lab = Lab::with(&["--connections", "100", "--connection-rate", "1000000"]);
    lab.netd.apply(&network(1, 3, &[(1, 1), (2, 2)]));
    let (attacker, one, two) = (guest(1), guest(2), guest(3));
    let service = Service { lab: &lab, one: &one, two: &two };
    let old = lab.outside_socket();
    let old_port = old.local_addr().unwrap().port();
    attacker.send_udp(OUTSIDE, old_port, b"before");
    assert_eq!(received(&old), b"before");

    let to_outside = |n: u32| udp(mac(1), GATEWAY_MAC, private(1), OUTSIDE, (port(n), 9), b"endless");
    let to_neighbour = |n: u32| udp(mac(1), mac(2), private(1), private(2), (port(n), 9), b"endless");
    under_attack(&attacker, &to_outside, || service.goes_on());
    let refused = lab.netd.limited("eni-1").opened_too_many;
    assert!(refused > 1000, "{refused}");
    // The kernel's own count, which netd has no part in.
    let of_attacker = || run("conntrack -L --orig-src 172.31.0.4").lines().count();
    assert_eq!(of_attacker(), 100);
    // Over the bridge it can have no more, so that the neighbour's own bound is never reached.
    under_attack(&attacker, &to_neighbour, || service.goes_on());
    assert!(lab.netd.limited("eni-1").opened_too_many > refused);
    assert_eq!(lab.netd.limited("eni-2"), Default::default());
    attacker.send_udp(OUTSIDE, old_port, b"after");
    assert_eq!(received(&old), b"after", "a connection that was there goes on");
    // When they have ended, others may come.
    run("conntrack -F");
    let new = lab.outside_socket();
    let new_port = new.local_addr().unwrap().port();
    eventually("a new connection", || {
        attacker.send_udp(OUTSIDE, new_port, b"new");
        new.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        new.recv_from(&mut [0; 16]).ok()
    });
}

#[test]
fn strangers_fill_neither_the_table_nor_what_an_instance_may_open() {
    let lab = Lab::with(&["--connections", "100", "--connection-rate", "1000000"]);
    lab.netd.apply(&network(1, 3, &[(1, 1), (2, 2)]));
    let (one, _two, _three) = (guest(1), guest(2), guest(3));
    lab.outside.within(|| {
        for n in 0..2000 {
            UdpSocket::bind((OUTSIDE, 10_000 + n)).unwrap().send_to(b"endless", (public(1), 9)).unwrap();
        }
    });
    eventually("the strangers to be refused", || (lab.netd.limited("eni-1").taken_too_many > 1000).then_some(()));
    assert_eq!(lab.netd.limited("eni-1").opened_too_many, 0);
    let outside = lab.outside_socket();
    one.send_udp(OUTSIDE, outside.local_addr().unwrap().port(), b"mine");
    assert_eq!(received(&outside), b"mine");
    assert!(ask(&lab.outside_socket(), public(2), "the neighbour").starts_with("i-2 "));
}

fn connections_come_no_faster_than_they_may() {
    let lab = Lab::with(&["--connection-rate", "50"]);
    lab.netd.apply(&network(1, 2, &[(1, 1)]));
    let (one, two) = (guest(1), guest(2));
    // One flow that goes one way, however fast, is one connection.
    for _ in 0..500 {
        two.send_udp(OUTSIDE, 9, b"a stream");
    }
    for n in 0..500 {
        one.send(&udp(mac(1), GATEWAY_MAC, private(1), OUTSIDE, (port(n), 9), b"endless"));
    }
    assert!(lab.netd.limited("eni-1").opened_too_fast > 100);
    assert_eq!(lab.netd.limited("eni-2"), Default::default());
    assert!(ask(&lab.outside_socket(), public(1), "what comes in is counted apart").starts_with("i-1 "));
}

fn fragments_are_judged_as_what_they_come_together_to() {
    let lab = Lab::new();
    let mut desired = network(1, 3, &[(1, 1)]);
    desired.interfaces[0].security_groups = vec!["sg-1".into()];
    let open = (INGRESS, (17, 9, 9), everywhere());
    desired.security_groups.push(group("sg-1", &[open, (EGRESS, ALL_TRAFFIC, everywhere())]));
    lab.netd.apply(&desired);
    let (one, two) = (guest(1), guest(2));
    let to_port = |port, mark: u8| udp(mac(2), neighbour_mac(1), private(2), private(1), (5000, port), &[mark; 2000]);
    let arrived = |mark: u8| one.frames().iter().any(|found| found.windows(64).any(|window| window == [mark; 64]));
    // A closed port; the later parts alone; an open port in the smallest parts that the beginning of a datagram fits in, the last one first.
    fragments(&to_port(80, b'a'), 1, 1480).iter().for_each(|part| two.send(part));
    fragments(&to_port(9, b'b'), 2, 800)[1..].iter().for_each(|part| two.send(part));
    fragments(&to_port(9, b'c'), 3, 80).iter().rev().for_each(|part| two.send(part));
    eventually("what may come", || arrived(b'c').then_some(()));
    assert!(!arrived(b'a') && !arrived(b'b'));
    // From outside, through the elastic IP.
    let outside = lab.outside_socket();
    outside.send_to(&[b'd'; 4000], (public(1), 80)).unwrap();
    outside.send_to(&[b'e'; 4000], (public(1), 9)).unwrap();
    eventually("what may come from outside", || arrived(b'e').then_some(()));
    assert!(!arrived(b'd'));
    let state = lab.netd.state_of("eni-1");
    assert_eq!(state.denied_in_packets, 2);
}

#[test]
fn limits_that_change_take_effect_and_limits_that_do_not_change_nothing() {
    let mut lab = Lab::with(&["--arp-rate", "1000000"]);
    let desired = network(1, 1, &[]);
    lab.netd.apply(&desired);
    let one = guest(1);
    let flood =
        || (0..500).for_each(|_| one.send(&arp(mac(1), BROADCAST_MAC, 1, (mac(1), private(1)), ([0; 6], GATEWAY))));
    flood();
    assert_eq!(lab.netd.limited("eni-1").arp_packets, 0);
    assert!(!lab.netd.apply(&desired).changed);
    lab.netd.kill();
    lab.netd.flags = vec!["--arp-rate".into(), "10".into()];
    lab.netd.start();
    lab.netd.apply(&desired);
    flood();
    let limited = lab.netd.limited("eni-1").arp_packets;
    assert!(limited > 100);
    assert!(!lab.netd.apply(&desired).changed);
    assert!(lab.netd.limited("eni-1").arp_packets >= limited, "a call that changes nothing forgets nothing");
}

/// What else there is of limits by iptables.
#[test]
fn by_iptables_leases_and_the_gateway_are_asked_no_more_than_they_may() {
    run_on(Backend::Iptables, || {
        let lab = Lab::with(&["--gateway-rate", "200"]);
        lab.netd.apply(&network(1, 2, &[]));
        let (one, two) = (guest(1), guest(2));
        let request = one.dhcp_frame(mac(1), MessageType::Discover, vec![], true, 7);
        for n in 0..2000 {
            one.send(&request);
            one.send(&udp(mac(1), GATEWAY_MAC, private(1), RESOLVER, (port(n), 53), QUESTION));
        }
        assert_eq!(two.dhcp(false).yiaddr(), private(2));
        two.ping(GATEWAY, 1);
        let limited = lab.netd.limited("eni-1");
        assert!(limited.dhcp_packets > 1000 && limited.gateway_packets > 500, "{limited:?}");
        assert_eq!(lab.netd.limited("eni-2"), Default::default());
        assert_eq!(lab.netd.spoofed("eni-1"), 0);
    });
}

on_each_backend! {
    connections_come_no_faster_than_they_may,
    fragments_are_judged_as_what_they_come_together_to,
}
