//! Secondary private addresses: each is its instance's as the primary one is, and nobody else's.

mod common;

use std::net::Ipv4Addr;

use common::guest::{BROADCAST_MAC, arp, udp};
use common::{
    Backend, EGRESS, GATEWAY, GATEWAY_MAC, Guest, INGRESS, Lab, NODE, OPEN, OUTSIDE, ask, backend, everywhere, group,
    guest, interface, mac, neighbour_mac, network, private, public, run,
};
use mallee_netd::api::{self, NodeNetwork, security_group_rule::Peer};

const UDP: i32 = 17;
/// Two that instance 1 holds beside its primary one, and one that nobody has.
const SECOND: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 101);
const THIRD: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 102);
const NOBODYS: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 103);

/// Instance `holder` of two holds the secondary addresses, and a public address stands for the second.
fn desired(generation: u64, holder: usize) -> NodeNetwork {
    let mut desired = network(generation, 2, &[]);
    desired.interfaces[holder - 1].secondary_ipv4 = vec![SECOND.to_string(), THIRD.to_string()];
    desired.elastic_ips = vec![api::ElasticIp {
        public_ip: public(1).to_string(),
        private_ip: SECOND.to_string(),
        segment: "subnet-1".into(),
    }];
    desired
}

fn guest_with_secondaries(n: u8) -> Guest {
    let guest = guest(n);
    guest.add_address(SECOND);
    guest.add_address(THIRD);
    guest
}

fn an_instance_speaks_and_is_reached_by_each_of_its_addresses() {
    let lab = Lab::new();
    lab.netd.apply(&desired(1, 1));
    assert!(!lab.netd.apply(&desired(2, 1)).changed, "what is there is as it should be");
    let (one, two) = (guest_with_secondaries(1), guest(2));
    for (sequence, held) in [(1, private(1)), (2, SECOND), (3, THIRD)] {
        assert_eq!(two.resolve(held), neighbour_mac(1), "a neighbour asks for {held}");
        two.send_ping(held, neighbour_mac(1), sequence);
        two.await_pong(held, sequence);
        one.send(&udp(mac(1), neighbour_mac(2), held, private(2), (5000, 5000), b"mine"));
        assert_eq!(two.receive_udp().from, held);
    }
    assert_eq!(lab.netd.spoofed("eni-1"), 0);
    // DHCP knows the primary one alone.
    assert_eq!(one.dhcp(true).yiaddr(), private(1));

    // What is not its own passes no more than before, and not as another's either.
    let passed_off = udp(mac(1), neighbour_mac(2), NOBODYS, private(2), (5000, 5000), b"not mine");
    one.send(&passed_off);
    one.ping(GATEWAY, 50);
    assert_eq!(lab.netd.spoofed("eni-1"), 1);
    if backend() == Backend::Nftables {
        one.send(&arp(mac(1), BROADCAST_MAC, 1, (mac(1), NOBODYS), ([0; 6], NOBODYS)));
        one.ping(GATEWAY, 51);
        assert_eq!(lab.netd.spoofed("eni-1"), 2);
    }
    two.send(&udp(mac(2), neighbour_mac(1), SECOND, private(1), (5000, 5000), b"as its neighbour"));
    two.ping(GATEWAY, 60);
    assert_eq!(lab.netd.spoofed("eni-2"), 1);
}

fn a_public_address_stands_for_a_secondary_one_and_moves_with_it() {
    let lab = Lab::new();
    lab.netd.apply(&desired(1, 1));
    let (one, two) = (guest_with_secondaries(1), guest_with_secondaries(2));
    let outside = lab.outside_socket();
    assert_eq!(ask(&outside, public(1), "who"), format!("i-1 asked by {OUTSIDE}"));

    // Outbound each address is what stands for it: its own public one, or the node's.
    let listener = lab.outside_socket();
    let port = listener.local_addr().unwrap().port();
    let mut buffer = [0; 64];
    for (own, seen) in [(SECOND, public(1)), (private(1), NODE), (THIRD, NODE)] {
        one.send_udp_from(own, OUTSIDE, port, b"hello");
        let (_, from) = listener.recv_from(&mut buffer).unwrap();
        assert_eq!(from.ip(), seen, "as what {own} is seen");
        listener.send_to(b"back", from).unwrap();
        assert_eq!(one.receive_udp().to, own);
    }
    // A neighbour reaches it by its public address as well.
    two.send(&udp(mac(2), GATEWAY_MAC, private(2), public(1), (5001, 7), b"hairpin"));
    let answer = two.receive_udp();
    assert_eq!((answer.from, answer.payload.starts_with(b"i-1 asked by")), (public(1), true));

    // The address goes to the other instance: the flow under way is answered by that one, and the first has it no more.
    lab.netd.apply(&desired(2, 2));
    assert_eq!(ask(&outside, public(1), "and now"), format!("i-2 asked by {OUTSIDE}"));
    assert_eq!(lab.netd.spoofed("eni-1"), 0);
    one.send_udp_from(SECOND, OUTSIDE, port, b"still mine?");
    one.ping(GATEWAY, 1);
    assert_eq!(lab.netd.spoofed("eni-1"), 1);

    // Nobody holds it any more, and what it was translated to ends.
    let mut without = network(3, 2, &[]);
    without.interfaces[0].secondary_ipv4 = vec![THIRD.to_string()];
    lab.netd.apply(&without);
    let flows = run("conntrack -L");
    assert!(!flows.contains(&public(1).to_string()), "{flows}");
}

/// What the one that had the address let in goes no further than to the one that has it now.
fn an_address_with_a_new_holder_is_guarded_by_its_groups() {
    let lab = Lab::new();
    let mut desired = network(1, 3, &[]);
    desired.security_groups.push(group("sg-closed", &[(EGRESS, (-1, 0, 0), everywhere())]));
    desired.interfaces[0].secondary_ipv4 = vec![SECOND.to_string()];
    desired.interfaces[1].security_groups = vec!["sg-closed".into()];
    lab.netd.apply(&desired);
    let (one, two, three) = (guest_with_secondaries(1), guest(2), guest(3));
    three.send_udp(SECOND, 7, b"?");
    assert!(three.receive_udp().payload.starts_with(b"i-1 "));
    desired.generation = 2;
    desired.interfaces[0].secondary_ipv4.clear();
    desired.interfaces[1].secondary_ipv4 = vec![SECOND.to_string()];
    lab.netd.apply(&desired);
    three.send_udp(SECOND, 7, b"into an old flow");
    three.send_udp(private(1), 9, b"after it");
    assert_eq!(one.receive_udp().payload, b"after it");
    assert!(two.frames().iter().all(|frame| !frame.windows(8).any(|words| words == b"old flow")));
    assert_eq!(lab.netd.state_of("eni-2").denied_in_packets, 1);
}

fn groups_judge_each_address_and_know_a_member_by_each() {
    let lab = Lab::new();
    let mut desired = desired(1, 1);
    desired.elastic_ips.clear();
    desired.interfaces[1].secondary_ipv4 = vec!["172.31.0.120".into()];
    let second_of_two = Ipv4Addr::new(172, 31, 0, 120);
    let of_clients = Peer::SecurityGroup("sg-clients".into());
    desired.security_groups.push(group("sg-servers", &[(INGRESS, (UDP, 7, 7), of_clients)]));
    // Whoever keeps the members names each of their addresses.
    let members = vec![private(2).to_string(), second_of_two.to_string()];
    desired
        .security_groups
        .push(api::SecurityGroup { members, ..group("sg-clients", &[(EGRESS, (-1, 0, 0), everywhere())]) });
    desired.interfaces[0].security_groups = vec!["sg-servers".into()];
    desired.interfaces[1].security_groups = vec!["sg-clients".into()];
    desired.interfaces.push(api::Interface { security_groups: vec![OPEN.into()], ..interface(3) });
    lab.netd.apply(&desired);
    let (_one, two, three) = (guest_with_secondaries(1), guest(2), guest(3));
    two.add_address(second_of_two);
    for (port, (from, to)) in
        [(private(2), SECOND), (second_of_two, SECOND), (second_of_two, private(1))].into_iter().enumerate()
    {
        two.send(&udp(mac(2), neighbour_mac(1), from, to, (6000 + port as u16, 7), b"in"));
        let answer = two.receive_udp();
        assert_eq!((answer.from, answer.to), (to, from));
    }
    let denied = || lab.netd.state_of("eni-1").denied_in_packets;
    for (number, held) in [private(1), SECOND, THIRD].into_iter().enumerate() {
        three.send(&udp(mac(3), neighbour_mac(1), private(3), held, (6000, 7), b"out"));
        three.ping(GATEWAY, number as u16);
        assert_eq!(denied(), number as u64 + 1, "{held} is guarded");
    }
}

on_each_backend! {
    an_instance_speaks_and_is_reached_by_each_of_its_addresses,
    a_public_address_stands_for_a_secondary_one_and_moves_with_it,
    an_address_with_a_new_holder_is_guarded_by_its_groups,
    groups_judge_each_address_and_know_a_member_by_each,
}
