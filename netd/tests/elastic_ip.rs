//! Elastic IPs: reached from outside, moved, seen from inside.

mod common;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{GATEWAY, Lab, NODE, OUTSIDE, PATIENCE, ask, guest, network, private, public, run};

fn an_instance_is_reached_from_outside_and_speaks_as_its_address() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 2, &[(1, 1)]));
    let (one, two) = (guest(1), guest(2));

    let who = ask(&lab.outside_socket(), public(1), "who are you");
    assert_eq!(who, format!("i-1 asked by {OUTSIDE}"));
    lab.outside.run("ping -c 1 -W 10 198.51.100.130");

    // Outbound: with an elastic IP as that, without one as the node.
    let listener = lab.outside_socket();
    let port = listener.local_addr().unwrap().port();
    let mut buffer = [0; 64];
    one.send_udp(OUTSIDE, port, b"one");
    let (length, from) = listener.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.ip()), (&b"one"[..], public(1).into()));
    two.send_udp(OUTSIDE, port, b"two");
    let (length, from) = listener.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.ip()), (&b"two"[..], NODE.into()));
    // And the answer finds its way back.
    listener.send_to(b"back", from).unwrap();
    assert_eq!(two.receive_udp().payload, b"back");

    let show = lab.netd.show();
    let counted = &show.elastic_ips[0];
    assert!(counted.in_packets >= 2 && counted.out_packets >= 2, "{counted:?}");
    let state = show.interfaces.iter().find(|state| state.id == "eni-1").unwrap();
    assert!(state.carrier && state.tx_packets > 0 && state.rx_packets > 0, "{state:?}");
}

fn a_move_ends_the_flows_of_the_address_and_no_others() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 3, &[(1, 1), (3, 3)]));
    let _guests = [guest(1), guest(2), guest(3)];

    // One flow to the address that moves, one that the instance began as that address.
    let moving = lab.outside_socket();
    assert!(ask(&moving, public(1), "before").starts_with("i-1 "));

    // Meanwhile somebody asks the third instance again and again, in one flow, and misses nothing.
    let steady = lab.outside_socket();
    let ended = Arc::new(AtomicBool::new(false));
    let end = ended.clone();
    let other = thread::spawn(move || {
        let mut asked = 0_u32;
        while !end.load(Ordering::Relaxed) {
            let who = ask(&steady, public(3), &asked.to_string());
            assert_eq!(who, format!("i-3 asked by {OUTSIDE}"));
            asked += 1;
        }
        asked
    });

    let mut generation = 1;
    for round in 0..20 {
        let owner = 1 + (round + 1) % 2;
        generation += 1;
        let reply = lab.netd.apply(&network(generation, 3, &[(1, owner), (3, 3)]));
        assert!(reply.changed);
        // The same flow, from the same port, with the call just back: no wait, no second try.
        let who = ask(&moving, public(1), &format!("round {round}"));
        assert_eq!(who, format!("i-{owner} asked by {OUTSIDE}"));
    }
    ended.store(true, Ordering::Relaxed);
    assert!(other.join().unwrap() > 0);
}

fn conntrack_forgets_a_moved_address_in_both_directions() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 3, &[(1, 1), (3, 3)]));
    let guests = [guest(1), guest(2), guest(3)];
    let listener = lab.outside_socket();
    let port = listener.local_addr().unwrap().port();
    let mut buffer = [0; 64];
    for n in [0, 2] {
        guests[n].send_udp(OUTSIDE, port, b"out");
        listener.recv_from(&mut buffer).unwrap();
        ask(&listener, public(n as u8 + 1), "in");
    }
    let entries_of =
        |address: Ipv4Addr| run("conntrack -L").lines().filter(|line| line.contains(&format!("={address} "))).count();
    assert_eq!((entries_of(public(1)), entries_of(public(3))), (2, 2));
    lab.netd.apply(&network(2, 3, &[(1, 2), (3, 3)]));
    assert_eq!((entries_of(public(1)), entries_of(public(3))), (0, 2));
}

fn a_released_address_is_answered_for_by_nobody() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[(1, 1)]));
    let _guest = guest(1);
    let socket = lab.outside_socket();
    ask(&socket, public(1), "here");
    lab.netd.apply(&network(2, 1, &[]));
    lab.outside.run("ip neigh flush dev out0");
    let arping = lab.outside.within(|| {
        common::try_run("ping -c 1 -W 1 198.51.100.130");
        run("ip neigh show 198.51.100.130")
    });
    assert!(!arping.contains("lladdr"), "somebody answers ARP: {arping}");
}

fn an_address_that_comes_here_is_announced() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[]));
    // The outside believes the address elsewhere.
    lab.outside.run("ip neigh add 198.51.100.130 lladdr 02:de:ad:00:00:01 dev out0 nud stale");
    lab.netd.apply(&network(2, 1, &[(1, 1)]));
    common::eventually("the outside to learn the new place", || {
        let neighbour = lab.outside.run("ip neigh show 198.51.100.130");
        (!neighbour.contains("02:de:ad:00:00:01")).then_some(())
    });
}

fn hairpin_reaches_a_neighbour_and_oneself_by_elastic_ip() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 3, &[(1, 1), (2, 2)]));
    let guests = [guest(1), guest(2), guest(3)];
    let asked = |n: usize, to: u8| {
        guests[n - 1].send_udp(public(to), common::guest::ECHO_PORT, b"?");
        let answer = guests[n - 1].receive_udp();
        assert_eq!(answer.from, public(to), "the answer comes from the address that was asked");
        String::from_utf8(answer.payload).unwrap()
    };
    // As its own elastic IP; as the node when it has none; and itself.
    assert_eq!(asked(1, 2), format!("i-2 asked by {} ?", public(1)));
    assert_eq!(asked(3, 2), format!("i-2 asked by {NODE} ?"));
    assert_eq!(asked(1, 1), format!("i-1 asked by {} ?", public(1)));
    // The node itself reaches it too.
    let socket = std::net::UdpSocket::bind((NODE, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(ask(&socket, public(2), "node").starts_with("i-2 "));
}

fn private_addresses_and_the_node_stay_closed() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 2, &[(1, 1)]));
    let (one, two) = (guest(1), guest(2));
    // The outside routes the private network to the node and tries.
    lab.outside.run("ip route add 172.31.0.0/16 via 198.51.100.2");
    lab.outside.run("ip route add 169.254.169.254/32 via 198.51.100.2");
    let socket = lab.outside_socket();
    let node = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 4242)).unwrap();
    for (to, port) in [(private(2), 9), (GATEWAY, 4242), (common::METADATA, 4242)] {
        socket.send_to(b"closed", SocketAddrV4::new(to, port)).unwrap();
    }
    // The instance tries the node, on each of its addresses.
    for to in [GATEWAY, NODE, common::METADATA] {
        one.send_udp(to, 4242, b"closed");
    }
    // What is allowed arrives after what was not, over the same ways.
    socket.send_to(b"open", SocketAddrV4::new(public(1), 9)).unwrap();
    assert_eq!(one.receive_udp().payload, b"open");
    one.ping(GATEWAY, 1);
    one.ping(OUTSIDE, 2);
    two.ping(OUTSIDE, 3);
    let arrived = |frames: Vec<Vec<u8>>| frames.iter().any(|f| f.windows(6).any(|w| w == b"closed"));
    assert!(!arrived(two.frames()));
    node.set_nonblocking(true).unwrap();
    let refused = node.recv(&mut [0; 16]).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
}

on_each_backend! {
    an_instance_is_reached_from_outside_and_speaks_as_its_address,
    a_move_ends_the_flows_of_the_address_and_no_others,
    conntrack_forgets_a_moved_address_in_both_directions,
    a_released_address_is_answered_for_by_nobody,
    an_address_that_comes_here_is_announced,
    hairpin_reaches_a_neighbour_and_oneself_by_elastic_ip,
    private_addresses_and_the_node_stay_closed,
}
