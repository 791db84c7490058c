//! The fast path: which connections take it, that they are counted and end as others do, and that what it is made of is mended.
//!
//! A kernel without flow tables has one test here: that netd says so. The virtual lab's nodes have them, where `tests/e2e/test_trunk.py` sees it in any case.

mod common;

use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use common::guest::ECHO_PORT;
use common::{Lab, OUTSIDE, ask, change, elastic, eventually, guest, guest_at, network, private, public, run, segment};
use mallee_netd::api::{ElasticIp, NodeNetwork};
use nix::sys::socket::{setsockopt, sockopt};

const NAME: &str = "fast-path";
const FAR: Ipv4Addr = Ipv4Addr::new(172, 31, 16, 4);

/// A node whose kernel has flow tables, which it must say; where there are none, it must say that.
fn lab() -> Option<Lab> {
    let lab = Lab::new();
    let problem = &lab.netd.capabilities().capabilities[NAME];
    let has_flow_tables = Path::new("/proc/sys/net/netfilter/nf_flowtable_udp_timeout").exists();
    assert_eq!(problem.is_empty(), has_flow_tables && lab.netd.backend == common::Backend::Nftables, "{problem}");
    problem.is_empty().then_some(lab)
}

/// How many connections of an address are in the flow table.
fn taken(address: Ipv4Addr) -> usize {
    let address = format!("={address} ");
    run("conntrack -L").lines().filter(|line| line.contains("[OFFLOAD]") && line.contains(&address)).count()
}

/// Asks until so many connections of an address are in the flow table.
fn until_taken(address: Ipv4Addr, count: usize, mut ask: impl FnMut()) {
    eventually("the flow table to take the connection", || {
        ask();
        std::thread::sleep(Duration::from_millis(100));
        (taken(address) == count).then_some(())
    });
}

/// Packets and bytes to the elastic IP, and from it.
fn counted(lab: &Lab, n: u8) -> [u64; 4] {
    let shown = lab.netd.show();
    let state = shown.elastic_ips.iter().find(|state| state.public_ip == public(n).to_string()).unwrap();
    [state.in_packets, state.in_bytes, state.out_packets, state.out_bytes]
}

#[test]
fn a_connection_takes_it_is_counted_and_ends_when_its_address_moves() {
    let Some(lab) = lab() else { return };
    lab.netd.apply(&network(1, 3, &[(1, 1), (3, 3)]));
    let _guests = [guest(1), guest(2), guest(3)];
    let outside = lab.outside_socket();
    until_taken(public(1), 1, || drop(ask(&outside, public(1), "1")));
    until_taken(public(3), 1, || drop(ask(&outside, public(3), "3")));

    let before = counted(&lab, 1);
    // Long enough for the receiver's kernel to believe a sum that came with it, if one did.
    let question = &"count me, ".repeat(20);
    let answer = format!("i-1 asked by {OUTSIDE} {question}");
    (0..50).for_each(|_| assert_eq!(ask(&outside, public(1), question), format!("i-1 asked by {OUTSIDE}")));
    // One that the flow table does not know is counted once too.
    ask(&lab.outside_socket(), public(1), question);
    let headers = 20 + 8;
    let of_each = [1, headers + question.len(), 1, headers + answer.len()];
    let after = counted(&lab, 1);
    assert_eq!([0, 1, 2, 3].map(|at| after[at] - before[at]), of_each.map(|one| 51 * one as u64));

    let mut make = lab.netd.changes();
    make(change(1, &[(1, 2)], &[])).unwrap();
    assert_eq!((taken(public(1)), taken(public(3))), (0, 1));
    assert_eq!(ask(&outside, public(1), "moved"), format!("i-2 asked by {OUTSIDE}"));
    until_taken(public(1), 1, || drop(ask(&outside, public(1), "again")));

    make(change(2, &[], &[1])).unwrap();
    assert_eq!((taken(public(1)), taken(public(3))), (0, 1));
    assert!(ask(&outside, public(3), "others go on").starts_with("i-3"));
    // The network as a whole, too.
    lab.netd.apply(&network(4, 3, &[(3, 1)]));
    assert_eq!(taken(public(3)), 0);
    assert!(ask(&outside, public(3), "moved").starts_with("i-1"));
}

#[test]
fn what_it_does_not_take_is_left_to_the_rules() {
    let Some(lab) = lab() else { return };
    lab.netd.apply(&network(1, 2, &[(1, 1), (2, 2)]));
    let guests = [guest(1), guest(2)];
    let outside = lab.outside_socket();
    until_taken(public(1), 1, || drop(ask(&outside, public(1), "1")));
    // Its time to live ends here, which is told.
    let told = lab.outside.within(move || {
        let again: UdpSocket = outside;
        again.connect((public(1), ECHO_PORT)).unwrap();
        // Else the socket keeps to itself what may be over in a moment.
        setsockopt(&again, sockopt::Ipv4RecvErr, &true).unwrap();
        again.set_ttl(1).unwrap();
        again.send(b"too far").unwrap();
        again.recv(&mut [0; 64]).unwrap_err()
    });
    assert_eq!(told.raw_os_error(), Some(nix::errno::Errno::EHOSTUNREACH as i32), "{told}");
    // From one instance to another by its elastic IP, which is translated twice: for longer than the kernel takes to call it assured.
    eventually("the connection to be assured", || {
        guests[0].send_udp(public(2), ECHO_PORT, b"hairpin");
        guests[0].receive_udp();
        std::thread::sleep(Duration::from_millis(100));
        let listed = run(&format!("conntrack -L -s {}", private(1)));
        assert!(!listed.contains("[OFFLOAD]"), "{listed}");
        listed.contains("[ASSURED]").then_some(())
    });
}

/// Two VPCs with the same addresses; the second has another segment.
fn overlapping(generation: u64) -> NodeNetwork {
    let mut desired = network(generation, 3, &[]);
    desired.segments.push(segment("subnet-2", "vpc-2", "172.31.0.0/20", "172.31.0.1"));
    desired.segments.push(segment("subnet-3", "vpc-2", "172.31.16.0/20", "172.31.16.1"));
    for (interface, (ip, subnet)) in desired.interfaces.iter_mut().zip([(private(1), 1), (private(1), 2), (FAR, 3)]) {
        (interface.ipv4, interface.segment) = (ip.to_string(), format!("subnet-{subnet}"));
        interface.hostname.clear();
    }
    desired.elastic_ips = [1, 2].map(|n| ElasticIp { segment: format!("subnet-{n}"), ..elastic(n, 1) }).into();
    desired
}

#[test]
fn vpcs_with_the_same_addresses_and_segments_of_one_have_it_at_once() {
    let Some(lab) = lab() else { return };
    lab.netd.apply(&overlapping(1));
    let guests = [guest_at(1, private(1)), guest_at(2, private(1)), guest_at(3, FAR)];
    let outside = lab.outside_socket();
    let port = outside.local_addr().unwrap().port();
    // Both instances speak to the same outside, from the same address and port.
    until_taken(private(1), 5, || {
        for n in [1, 2] {
            assert_eq!(ask(&outside, public(n), "in"), format!("i-{n} asked by {OUTSIDE}"));
            guests[usize::from(n) - 1].send_udp(OUTSIDE, port, format!("out {n}").as_bytes());
            let mut said = [0; 64];
            let (length, from) = outside.recv_from(&mut said).unwrap();
            assert_eq!((&said[..length], from.ip()), (format!("out {n}").as_bytes(), public(n).into()));
            outside.send_to(b"heard", from).unwrap();
            assert_eq!(guests[usize::from(n) - 1].receive_udp().payload, b"heard");
        }
        guests[1].send_udp(FAR, ECHO_PORT, b"across");
        let answer = guests[1].receive_udp();
        assert_eq!(answer.from, FAR);
    });
    assert_eq!(taken(FAR), 1);
    guests[1].send_udp(FAR, ECHO_PORT, b"across");
    assert_eq!(guests[1].receive_udp().from, FAR);
}

/// What the kernel says of the flow table.
fn devices() -> Vec<String> {
    let listed = run("nft list flowtables");
    let list = listed.split_once("devices = {").map_or("", |(_, rest)| rest.split_once('}').unwrap().0);
    let mut names: Vec<String> = list.split(',').map(|name| name.trim().trim_matches('"').to_owned()).collect();
    names.sort();
    names
}

#[test]
fn bridges_come_and_go_and_damage_is_mended() {
    let Some(lab) = lab() else { return };
    let desired = network(1, 1, &[(1, 1)]);
    lab.netd.apply(&desired);
    assert_eq!(devices(), ["brsubnet1", "pub0"]);
    assert!(!lab.netd.apply(&desired).changed);
    lab.netd.apply(&overlapping(2));
    assert_eq!(devices(), ["brsubnet1", "brsubnet2", "brsubnet3", "pub0"]);
    assert!(!lab.netd.apply(&overlapping(2)).changed);
    for damage in [
        "ip link del brsubnet2",
        "nft delete flowtable ip mallee fast { devices = { brsubnet3 }; }",
        "nft flush ruleset",
        "nft delete table netdev mallee",
    ] {
        run(damage);
        assert!(lab.netd.apply(&overlapping(2)).changed, "{damage}");
        assert_eq!(devices(), ["brsubnet1", "brsubnet2", "brsubnet3", "pub0"], "{damage}");
        assert!(run("nft list table netdev mallee").contains("counted_out"), "{damage}");
        assert!(!lab.netd.apply(&overlapping(2)).changed, "{damage}");
    }
    lab.netd.apply(&network(3, 1, &[(1, 1)]));
    assert_eq!(devices(), ["brsubnet1", "pub0"]);
    let _guest = guest(1);
    let outside = lab.outside_socket();
    until_taken(public(1), 1, || drop(ask(&outside, public(1), "mended")));
}

#[test]
fn it_can_be_turned_off() {
    let Some(mut lab) = lab() else { return };
    let desired = network(1, 1, &[(1, 1)]);
    lab.netd.apply(&desired);
    lab.netd.kill();
    lab.netd.flags.extend(["--fast-path", "off"].map(String::from));
    lab.netd.start();
    lab.netd.apply(&desired);
    assert!(lab.netd.capabilities().capabilities[NAME].contains("--fast-path off"));
    let tables = run("nft list ruleset");
    assert!(!tables.contains("table netdev mallee") && !tables.contains("flowtable"), "{tables}");
    let _guest = guest(1);
    let outside = lab.outside_socket();
    let before = counted(&lab, 1);
    ask(&outside, public(1), "slow");
    assert_eq!(counted(&lab, 1)[0], before[0] + 1);
}
