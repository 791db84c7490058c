//! Security groups: what reaches an instance and what leaves it, from outside and between neighbours.
//!
//! That something does *not* arrive is told by what arrives after it: both are sent over the same way, one after the other, and
//! the way keeps their order.

mod common;

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use common::guest::{ECHO_PORT, udp};
use common::{
    ALL_TRAFFIC, EGRESS, GATEWAY, GATEWAY_MAC, Guest, INGRESS, Lab, METADATA, OPEN, OUTSIDE, ask, everywhere, group,
    guest, is_same_packet, mac, neighbour_mac, network, private, public, run,
};
use etherparse::PacketBuilder;
use mallee_netd::api::{self, NodeNetwork, security_group_rule::Peer};

const TCP: i32 = 6;
const UDP: i32 = 17;
/// The port to which a packet may always go that says that all before it have had their time.
const LAST: u16 = 9;

fn cidr(text: &str) -> Peer {
    Peer::Cidr(text.into())
}

fn of_group(id: &str) -> Peer {
    Peer::SecurityGroup(id.into())
}

/// Puts instance `n` into the groups alone.
fn put(desired: &mut NodeNetwork, n: u8, groups: &[&str]) {
    let interface = desired.interfaces.iter_mut().find(|found| found.id == format!("eni-{n}")).unwrap();
    interface.security_groups = groups.iter().map(|id| (*id).to_owned()).collect();
}

/// `count` instances, of which the first is in the group alone.
fn guarded(count: u8, group: api::SecurityGroup) -> NodeNetwork {
    let mut desired = network(1, count, &[(1, 1)]);
    put(&mut desired, 1, &[&group.id]);
    desired.security_groups.push(group);
    desired
}

fn has(frames: &[Vec<u8>], text: &[u8]) -> bool {
    frames.iter().any(|frame| frame.windows(text.len()).any(|window| window == text))
}

/// Sends each frame, then one that may pass; returns which of them arrived.
fn arrived(from: &Guest, n: u8, to: &Guest, frames: &[Vec<u8>]) -> Vec<bool> {
    let seen = to.frames().len();
    frames.iter().for_each(|frame| from.send(frame));
    let last = format!("last {seen}");
    from.send(&udp(mac(n), neighbour_mac(1), private(n), private(1), (5000, LAST), last.as_bytes()));
    to.await_frame("the last frame", |frame| has(&[frame.to_vec()], last.as_bytes()).then_some(()));
    let came = to.frames();
    frames.iter().map(|frame| came[seen..].iter().any(|found| is_same_packet(found, frame))).collect()
}

fn tcp_syn(n: u8, port: u16) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(n), neighbour_mac(1))
        .ipv4(private(n).octets(), private(1).octets(), 64)
        .tcp(6000, port, 7, 1024)
        .syn();
    let mut frame = Vec::new();
    builder.write(&mut frame, &[]).unwrap();
    frame
}

fn icmp(n: u8, kind: u8, code: u8) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(n), neighbour_mac(1))
        .ipv4(private(n).octets(), private(1).octets(), 64)
        .icmpv4_raw(kind, code, [0, 1, 0, kind ^ code]);
    let mut frame = Vec::new();
    builder.write(&mut frame, b"icmp").unwrap();
    frame
}

/// A packet of a protocol that has no ports.
fn ip(n: u8, protocol: u8) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(n), neighbour_mac(1)).ipv4(private(n).octets(), private(1).octets(), 64);
    let mut frame = Vec::new();
    builder.write(&mut frame, etherparse::IpNumber(protocol), b"some protocol").unwrap();
    frame
}

fn to_port(n: u8, port: u16) -> Vec<u8> {
    udp(mac(n), neighbour_mac(1), private(n), private(1), (5000, port), format!("to {port}").as_bytes())
}

fn last() -> (bool, (i32, i32, i32), Peer) {
    (INGRESS, (UDP, LAST.into(), LAST.into()), everywhere())
}

fn nothing_comes_in_unless_a_rule_allows_it() {
    let lab = Lab::new();
    lab.netd.apply(&guarded(2, group("sg-1", &[last()])));
    let (one, two) = (guest(1), guest(2));
    // From outside, through the elastic IP; then from the neighbour, over the bridge and through the gateway.
    let socket = lab.outside_socket();
    socket.send_to(b"closed", (public(1), ECHO_PORT)).unwrap();
    socket.send_to(b"open", (public(1), LAST)).unwrap();
    assert_eq!(one.receive_udp().payload, b"open");
    let through_gateway = udp(mac(2), GATEWAY_MAC, private(2), private(1), (5000, ECHO_PORT), b"closed");
    assert_eq!(arrived(&two, 2, &one, &[to_port(2, ECHO_PORT), through_gateway]), [false, false]);
    // From the node itself.
    let node = UdpSocket::bind((common::NODE, 0)).unwrap();
    // Who is refused on its own machine is told so.
    assert!(node.send_to(b"closed", (public(1), ECHO_PORT)).is_err());
    node.send_to(b"node", (public(1), LAST)).unwrap();
    one.await_frame("the node's", |frame| has(&[frame.to_vec()], b"node").then_some(()));
    assert!(!has(&one.frames(), b"closed"));
    // Each was counted: four that were refused, three first packets that were let in.
    let show = lab.netd.show();
    let state = show.interfaces.iter().find(|state| state.id == "eni-1").unwrap();
    assert_eq!((state.denied_in_packets, state.denied_out_packets), (4, 0));
    let rule = show.security_group_rules.iter().find(|rule| rule.security_group == "sg-1").unwrap();
    assert_eq!((rule.rule.as_str(), rule.packets), ("sgr-10", 3));
}

fn what_an_instance_asks_is_answered_and_only_that() {
    let lab = Lab::new();
    lab.netd.apply(&guarded(2, group("sg-1", &[last(), (EGRESS, ALL_TRAFFIC, everywhere())])));
    let (one, two) = (guest(1), guest(2));
    // Outside, by ping and datagram; the neighbour, over the bridge.
    one.ping(OUTSIDE, 1);
    let server = lab.outside_socket();
    one.send_udp(OUTSIDE, server.local_addr().unwrap().port(), b"question");
    let (_, from) = server.recv_from(&mut [0; 64]).unwrap();
    server.send_to(b"answer", from).unwrap();
    assert_eq!(one.receive_udp().payload, b"answer");
    one.send(&udp(mac(1), neighbour_mac(2), private(1), private(2), (5000, ECHO_PORT), b"?"));
    assert_eq!(one.receive_udp().payload, format!("i-2 asked by {} ?", private(1)).as_bytes());
    // The neighbour is not let in by that on another port.
    assert_eq!(arrived(&two, 2, &one, &[to_port(2, 5001)]), [false]);
}

fn each_kind_of_rule_lets_in_what_it_says() {
    let lab = Lab::new();
    let (one_port, range) = ((UDP, 53, 53), (UDP, 100, 200));
    let of_second = format!("{}/32", private(2));
    let cases = [
        ("one port", vec![(INGRESS, one_port, everywhere())], vec![(to_port(2, 53), true), (to_port(2, 54), false)]),
        (
            "a range of ports, ends included",
            vec![(INGRESS, range, everywhere())],
            vec![(to_port(2, 99), false), (to_port(2, 100), true), (to_port(2, 200), true), (to_port(2, 201), false)],
        ),
        (
            "all ports",
            vec![(INGRESS, (UDP, 0, 65_535), everywhere())],
            vec![(to_port(2, 1), true), (tcp_syn(2, 1), false)],
        ),
        ("TCP", vec![(INGRESS, (TCP, 53, 53), everywhere())], vec![(tcp_syn(2, 53), true), (to_port(2, 53), false)]),
        (
            "a type and code of ICMP",
            vec![(INGRESS, (1, 13, 0), everywhere())],
            vec![(icmp(2, 13, 0), true), (icmp(2, 13, 1), false), (icmp(2, 8, 0), false)],
        ),
        (
            "all of ICMP",
            vec![(INGRESS, (1, -1, -1), everywhere())],
            vec![(icmp(2, 8, 0), true), (tcp_syn(2, 1), false)],
        ),
        ("a protocol", vec![(INGRESS, (50, 0, 0), everywhere())], vec![(ip(2, 50), true), (ip(2, 51), false)]),
        (
            "one address",
            vec![(INGRESS, ALL_TRAFFIC, cidr(&of_second))],
            vec![(to_port(2, 1), true), (to_port(3, 1), false)],
        ),
        (
            "a network",
            vec![(INGRESS, ALL_TRAFFIC, cidr("172.31.0.0/29"))],
            vec![(to_port(3, 1), true), (to_port(5, 1), false)],
        ),
        (
            "a group",
            vec![(INGRESS, ALL_TRAFFIC, of_group("sg-2"))],
            vec![(to_port(2, 1), true), (to_port(3, 1), false)],
        ),
        (
            "a prefix list",
            vec![(INGRESS, one_port, Peer::PrefixList("pl-1".into()))],
            vec![(to_port(2, 53), true), (to_port(3, 53), false), (to_port(5, 53), true), (to_port(5, 54), false)],
        ),
    ];
    let mut desired = guarded(5, group("sg-1", &[]));
    let mut second = group("sg-2", &[]);
    second.members = vec![private(2).to_string()];
    desired.security_groups.push(second);
    let cidrs = vec![of_second.clone(), "172.31.0.8/30".into()];
    desired.prefix_lists = vec![api::PrefixList { id: "pl-1".into(), cidrs }];
    lab.netd.apply(&desired);
    let guests: Vec<Guest> = (1..=5).map(guest).collect();
    for (what, mut rules, packets) in cases {
        rules.push(last());
        desired.generation += 1;
        desired.security_groups[1] = group("sg-1", &rules);
        lab.netd.apply(&desired);
        // What the last case let in is a connection still.
        run("conntrack -F");
        for (frame, expected) in packets {
            let n = frame[11];
            let found = arrived(&guests[usize::from(n) - 1], n, &guests[0], &[frame]);
            assert_eq!(found, [expected], "{what}: a packet of instance {n}\n{}", run("nft list ruleset"));
        }
    }
}

#[test]
fn a_member_that_comes_or_goes_changes_one_element() {
    let lab = Lab::new();
    let mut desired = guarded(2, group("sg-1", &[last(), (INGRESS, ALL_TRAFFIC, of_group("sg-1"))]));
    lab.netd.apply(&desired);
    let (one, two) = (guest(1), guest(2));
    assert_eq!(arrived(&two, 2, &one, &[to_port(2, 80)]), [false]);
    // Without counters, with the kernel's own number of each rule.
    let handles = || run("nft -s -a list chain ip mallee inbound_sg-1");
    let before = handles();
    desired.generation += 1;
    // A member on another node, whose address no interface here has, and the neighbour.
    desired.security_groups[1].members = vec![private(2).to_string(), private(200).to_string()];
    lab.netd.apply(&desired);
    assert_eq!(arrived(&two, 2, &one, &[to_port(2, 81)]), [true]);
    assert_eq!(handles(), before, "the rules are those that there were");
}

/// EC2 User Guide, "Security group connection tracking": a change does not interrupt connections that are tracked.
fn a_rule_that_goes_closes_to_new_connections_and_lets_old_ones_be() {
    let lab = Lab::new();
    let echo = (INGRESS, (UDP, ECHO_PORT.into(), ECHO_PORT.into()), everywhere());
    let mut desired = guarded(2, group("sg-1", &[last(), echo.clone()]));
    lab.netd.apply(&desired);
    let (one, two) = (guest(1), guest(2));
    let old = lab.outside_socket();
    ask(&old, public(1), "before");
    let ask_beside = |text: &str| {
        two.send(&udp(mac(2), neighbour_mac(1), private(2), private(1), (5000, ECHO_PORT), text.as_bytes()));
        two.receive_udp()
    };
    ask_beside("before");

    desired.generation += 1;
    desired.security_groups[1].rules.pop();
    lab.netd.apply(&desired);
    lab.outside_socket().send_to(b"closed", (public(1), ECHO_PORT)).unwrap();
    two.send(&udp(mac(2), neighbour_mac(1), private(2), private(1), (5001, ECHO_PORT), b"closed"));
    // The old connections live, also after netd was killed and has started again.
    ask(&old, public(1), "after");
    ask_beside("after");
    assert!(!has(&one.frames(), b"closed"));
    desired.generation += 1;
    desired.security_groups[1] = group("sg-1", &[last(), echo]);
    lab.netd.apply(&desired);
    ask(&lab.outside_socket(), public(1), "open again");
}

fn what_leaves_is_judged_too_and_the_gateways_services_are_not() {
    let lab = Lab::new();
    let to_second = cidr(&format!("{}/32", private(2)));
    lab.netd
        .apply(&guarded(3, group("sg-1", &[last(), (EGRESS, (UDP, ECHO_PORT.into(), ECHO_PORT.into()), to_second)])));
    let guests = [guest(1), guest(2), guest(3)];
    let one = &guests[0];
    // What the subnet offers: an address, a ping of the gateway.
    assert_eq!(one.dhcp(false).yiaddr(), private(1));
    one.ping(GATEWAY, 1);
    // Outside is closed, and so is the neighbour but for one port; answers to those who were let in leave.
    let server = lab.outside_socket();
    one.send_udp(OUTSIDE, server.local_addr().unwrap().port(), b"closed");
    for (n, port) in [(3, ECHO_PORT), (2, 80)] {
        one.send(&udp(mac(1), neighbour_mac(n), private(1), private(n), (5000, port), b"closed"));
    }
    one.send(&udp(mac(1), neighbour_mac(2), private(1), private(2), (5000, ECHO_PORT), b"open"));
    assert_eq!(one.receive_udp().payload, format!("i-2 asked by {} open", private(1)).as_bytes());
    assert!(!has(&guests[1].frames(), b"closed") && !has(&guests[2].frames(), b"closed"));
    server.send_to(b"knock", (public(1), LAST)).unwrap();
    let knock = one.receive_udp();
    one.send(&udp(mac(1), GATEWAY_MAC, private(1), knock.from, (LAST, knock.from_port), b"answer"));
    let mut buffer = [0; 16];
    let (length, _) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"answer", "what was sent before it came out");
}

fn an_interface_in_no_group_has_its_gateway_and_nothing_else() {
    let lab = Lab::new();
    let mut desired = network(1, 2, &[(1, 1)]);
    put(&mut desired, 1, &[]);
    lab.netd.apply(&desired);
    let (one, two) = (guest(1), guest(2));
    assert_eq!(one.dhcp(false).yiaddr(), private(1));
    let server = lab.outside_socket();
    one.send_udp(OUTSIDE, server.local_addr().unwrap().port(), b"closed");
    one.send(&udp(mac(1), neighbour_mac(2), private(1), private(2), (5000, 80), b"closed"));
    two.send(&to_port(2, 80));
    server.send_to(b"to 80", (public(1), 80)).unwrap();
    // Its gateway answers after all that, and another instance gets out.
    one.ping(GATEWAY, 1);
    two.send_udp(OUTSIDE, server.local_addr().unwrap().port(), b"open");
    let mut buffer = [0; 16];
    let (length, _) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"open");
    assert!(!has(&one.frames(), b"to 80") && !has(&two.frames(), b"closed"));
    // And the metadata service is there: the node itself says that nobody listens.
    let syn = PacketBuilder::ethernet2(mac(1), GATEWAY_MAC)
        .ipv4(private(1).octets(), METADATA.octets(), 64)
        .tcp(6000, 80, 7, 1024)
        .syn();
    let mut frame = Vec::new();
    syn.write(&mut frame, &[]).unwrap();
    one.send(&frame);
    one.await_frame("a refusal", |found| (found.get(26..30) == Some(&METADATA.octets()[..])).then_some(()));
}

fn an_elastic_ip_is_seen_from_as_the_instance_sees_it() {
    let lab = Lab::new();
    // Members are known by their private addresses; who comes by way of elastic IPs comes from outside, as in EC2.
    let mut sg = group("sg-1", &[last(), (INGRESS, (UDP, ECHO_PORT.into(), ECHO_PORT.into()), of_group("sg-1"))]);
    sg.members = vec![private(2).to_string()];
    let mut desired = guarded(2, sg);
    desired.elastic_ips = vec![common::elastic(1, 1), common::elastic(2, 2)];
    lab.netd.apply(&desired);
    let (one, two) = (guest(1), guest(2));
    two.send_udp(public(1), ECHO_PORT, b"closed");
    two.send_udp(public(1), LAST, b"open");
    let datagram = one.receive_udp();
    assert_eq!((datagram.from, &datagram.payload[..]), (public(2), &b"open"[..]));
    assert!(!has(&one.frames(), b"closed"));
    assert_eq!(arrived(&two, 2, &one, &[to_port(2, ECHO_PORT)]), [true]);
}

fn a_caller_on_the_same_node_is_judged_by_the_address_that_it_appears_with() {
    let lab = Lab::new();
    let of_second = cidr(&format!("{}/32", public(2)));
    let of_node = cidr(&format!("{}/32", common::NODE));
    let rules = [last(), (INGRESS, (UDP, 80, 80), of_second), (INGRESS, (UDP, 81, 81), of_node)];
    let mut desired = guarded(3, group("sg-1", &rules));
    desired.elastic_ips = vec![common::elastic(1, 1), common::elastic(2, 2)];
    lab.netd.apply(&desired);
    let (one, two, three) = (guest(1), guest(2), guest(3));
    for (caller, open, closed) in [(&two, 80, 81), (&three, 81, 80)] {
        caller.send_udp(public(1), closed, b"closed");
        caller.send_udp(public(1), open, b"open");
        caller.send_udp(public(1), LAST, b"last");
        assert_eq!([one.receive_udp().payload, one.receive_udp().payload], [&b"open"[..], b"last"]);
    }
    assert!(!has(&one.frames(), b"closed"));
}

fn broadcasts_reach_no_neighbour_but_arp_does() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 2, &[]));
    let (one, two) = (guest(1), guest(2));
    for (to_mac, to) in [
        ([0xff; 6], Ipv4Addr::BROADCAST),
        ([0xff; 6], Ipv4Addr::new(172, 31, 15, 255)),
        ([1, 0, 0x5e, 0, 0, 0xfb], Ipv4Addr::new(224, 0, 0, 251)),
    ] {
        one.send(&udp(mac(1), to_mac, private(1), to, (5000, 5353), b"to all"));
    }
    assert_eq!(one.resolve(private(2)), neighbour_mac(2));
    one.send(&udp(mac(1), neighbour_mac(2), private(1), private(2), (5000, LAST), b"to one"));
    assert_eq!(two.receive_udp().payload, b"to one");
    assert!(!has(&two.frames(), b"to all"));
    // Nor does anybody hear itself: an address is probed for by asking who has it.
    let asked = |frame: &Vec<u8>| frame[12..14] == [8, 6] && frame[6..12] == mac(1);
    assert!(!one.frames().iter().any(asked));
}

#[test]
fn a_group_that_is_gone_leaves_nothing_and_rules_that_somebody_broke_come_back() {
    let mut lab = Lab::new();
    lab.netd.apply(&network(1, 1, &[(1, 1)]));
    let before = run("nft list ruleset");
    let rules = [last(), (INGRESS, ALL_TRAFFIC, of_group("sg-1")), (EGRESS, ALL_TRAFFIC, everywhere())];
    let mut desired = guarded(1, group("sg-1", &rules));
    desired.generation = 2;
    desired.security_groups[1].members = vec![private(1).to_string()];
    lab.netd.apply(&desired);
    let one = guest(1);
    let grown = run("nft -s list ruleset");
    for damage in [
        "nft flush chain ip mallee inbound_sg-1",
        "nft flush map ip mallee inbound1",
        "nft flush set ip mallee members_sg-1",
        "nft add chain ip mallee inbound_sg-2",
        "nft add rule ip mallee inbound_sg-1 accept",
        "nft insert rule ip mallee judge_inbound accept",
        "nft delete table bridge mallee",
        "nft flush ruleset",
    ] {
        run(damage);
        assert!(lab.netd.apply(&desired).changed, "{damage} was not noticed");
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&run("nft -s list ruleset")), sorted(&grown), "after {damage}");
        assert!(!lab.netd.apply(&desired).changed, "after {damage}");
    }
    let socket = lab.outside_socket();
    socket.send_to(b"closed", SocketAddrV4::new(public(1), ECHO_PORT)).unwrap();
    socket.send_to(b"open", SocketAddrV4::new(public(1), LAST)).unwrap();
    assert_eq!(one.receive_udp().payload, b"open");
    // netd was killed between the two.
    lab.netd.kill();
    lab.netd.start();
    lab.netd.apply(&network(3, 1, &[(1, 1)]));
    assert!(!run("nft list ruleset").contains("sg-1"), "{before}");
}

/// The rules that a packet passes on its way are those of the fixed chains, of which there are always as many, and those of its own
/// interface's groups.
#[test]
fn a_hundred_groups_add_nothing_to_what_others_packets_pass() {
    let lab = Lab::new();
    let mut desired = network(1, 3, &[(1, 1)]);
    let fixed = |ruleset: String| -> Vec<String> {
        let mut in_grown = false;
        let keep = |line: &&str| {
            let name = line.trim_start();
            if let Some(name) = name.strip_prefix("chain ") {
                in_grown = name.starts_with("inbound_sg-") || name.starts_with("outbound_sg-");
            }
            !in_grown && !name.contains("elements")
        };
        ruleset.lines().filter(keep).map(str::to_owned).collect()
    };
    lab.netd.apply(&desired);
    let chains = |text: Vec<String>| text.into_iter().filter(|line| !line.contains("sg-")).collect::<Vec<_>>();
    let with_one = chains(fixed(run("nft -s list ruleset")));
    for n in 0..100 {
        let id = format!("sg-{n}");
        desired.security_groups.push(group(&id, &[(INGRESS, (TCP, n, n), of_group(&id)), last()]));
    }
    put(&mut desired, 2, &["sg-0", "sg-1", "sg-2", "sg-3", OPEN]);
    put(&mut desired, 3, &["sg-99"]);
    desired.generation += 1;
    lab.netd.apply(&desired);
    let with_hundred = chains(fixed(run("nft -s list ruleset")));
    let rules = |lines: &[String]| lines.iter().filter(|line| line.contains("comment")).cloned().collect::<Vec<_>>();
    assert_eq!(rules(&with_hundred), rules(&with_one));
    // Each of an interface's groups is asked, the last of five too.
    let guests = [guest(1), guest(2), guest(3)];
    assert!(ask(&lab.outside_socket(), public(1), "one").starts_with("i-1 "));
    guests[2].send(&udp(
        mac(3),
        neighbour_mac(2),
        private(3),
        private(2),
        (5000, 4000),
        b"refused: nothing leaves the third",
    ));
    guests[0].send(&udp(mac(1), neighbour_mac(2), private(1), private(2), (5000, 4000), b"by the fifth"));
    assert_eq!(guests[1].receive_udp().payload, b"by the fifth");
}

/// More rules of a kind than are worth a set, of both prefixes, and others that overlap with them.
fn a_group_of_many_rules_lets_in_what_each_of_them_says_and_counts_it() {
    let lab = Lab::new();
    let ports = |n: u16| (UDP, i32::from(n), i32::from(n));
    let networks = ["172.31.0.0/16", "0.0.0.0/0"];
    let rules = |ports_of: &dyn Fn(usize) -> Vec<u16>| -> Vec<_> {
        let of = |(n, network): (usize, &&str)| {
            ports_of(n).into_iter().map(|port| (INGRESS, ports(port), cidr(network))).collect::<Vec<_>>()
        };
        let mut rules: Vec<_> = networks.iter().enumerate().flat_map(of).collect();
        rules.extend([
            (INGRESS, (UDP, 140, 150), cidr("172.0.0.0/8")),
            (INGRESS, (TCP, 101, 101), cidr("172.31.0.0/16")),
            last(),
        ]);
        rules
    };
    let first = rules(&|n| if n == 0 { (100..112).collect() } else { (200..212).collect() });
    let mut desired = guarded(2, group("sg-1", &first));
    lab.netd.apply(&desired);
    let (one, two) = (guest(1), guest(2));
    let open = |port: u16| (100..112).contains(&port) || (200..212).contains(&port) || (140..151).contains(&port);
    let asked = [99, 100, 101, 111, 112, 139, 140, 150, 151, 199, 200, 211, 212, 20_000];
    let frames: Vec<_> = asked.iter().map(|port| to_port(2, *port)).chain([tcp_syn(2, 100), tcp_syn(2, 101)]).collect();
    let expected: Vec<_> = asked.iter().map(|port| open(*port)).chain([false, true]).collect();
    assert_eq!(arrived(&two, 2, &one, &frames), expected);
    // From outside: what is for everybody, and nothing else.
    let socket = lab.outside_socket();
    for port in [100, 140, 205, LAST] {
        socket.send_to(format!("outside {port}").as_bytes(), (public(1), port)).unwrap();
    }
    one.await_frame("the last", |frame| has(&[frame.to_vec()], format!("outside {LAST}").as_bytes()).then_some(()));
    let came = |port: u16| has(&one.frames(), format!("outside {port}").as_bytes());
    assert_eq!([100, 140, 205].map(came), [false, false, true]);
    let counted = || -> Vec<u64> {
        lab.netd
            .show()
            .security_group_rules
            .iter()
            .filter(|rule| rule.security_group == "sg-1")
            .map(|rule| rule.packets)
            .collect()
    };
    // In the order of the rules: those of the first network, those of the second, the three others.
    let mut wanted = vec![0; first.len()];
    for rule in [0, 1, 11, 12, 17, 23, 25] {
        wanted[rule] = 1;
    }
    (wanted[24], wanted[26]) = (2, 2);
    assert_eq!(counted(), wanted);

    // One rule of a kind goes and another comes: those that stay keep what they counted.
    let second = rules(&|n| if n == 0 { (100..111).chain([300]).collect() } else { (200..212).collect() });
    desired.security_groups.last_mut().unwrap().rules = group("sg-1", &second).rules;
    desired.generation += 1;
    assert!(lab.netd.apply(&desired).changed);
    wanted[11] = 0;
    assert_eq!(counted(), wanted);
    assert_eq!(arrived(&two, 2, &one, &[to_port(2, 300), to_port(2, 106)]), [true, true]);
    desired.generation += 1;
    assert!(!lab.netd.apply(&desired).changed, "nothing differs");
    // Too few to be worth it, and then none.
    for few in [3, 0] {
        let third = rules(&|_| (100..100 + few).collect());
        desired.security_groups.last_mut().unwrap().rules = group("sg-1", &third).rules;
        desired.generation += 1;
        assert!(lab.netd.apply(&desired).changed);
        assert_eq!(
            arrived(&two, 2, &one, &[to_port(2, 102), to_port(2, 107), to_port(2, 145)]),
            [few > 0, false, true]
        );
    }
}

/// What somebody took out of a group's set, or put into it, is mended; another netd finds the sets as they should be.
#[test]
fn the_set_of_a_groups_rules_is_mended() {
    let mut lab = Lab::new();
    let rules: Vec<_> = (100..112).map(|n| (INGRESS, (UDP, n, n), cidr("172.31.0.0/16"))).chain([last()]).collect();
    let mut desired = guarded(2, group("sg-1", &rules));
    lab.netd.apply(&desired);
    let set = || run("nft -s list set ip mallee inbound_sg-1/16");
    let whole = set();
    assert!(whole.contains("sgr-14: udp 104 from 172.31.0.0/16"), "{whole}");
    assert!(!run("nft list chain ip mallee inbound_sg-1").contains("sgr-14"));
    run("nft delete element ip mallee inbound_sg-1/16 { udp . 104 . 172.31.0.0 }");
    run("nft add element ip mallee inbound_sg-1/16 { tcp . 22 . 172.31.0.0 }");
    assert_ne!(set(), whole);
    desired.generation += 1;
    assert!(lab.netd.apply(&desired).changed);
    assert_eq!(set(), whole);
    lab.netd.kill();
    lab.netd.start();
    desired.generation += 1;
    assert!(!lab.netd.apply(&desired).changed, "nothing differs");
    desired.security_groups.pop();
    put(&mut desired, 1, &[OPEN]);
    desired.generation += 1;
    lab.netd.apply(&desired);
    assert!(!run("nft list ruleset").contains("sg-1"));
}

on_each_backend! {
    nothing_comes_in_unless_a_rule_allows_it,
    what_an_instance_asks_is_answered_and_only_that,
    each_kind_of_rule_lets_in_what_it_says,
    a_group_of_many_rules_lets_in_what_each_of_them_says_and_counts_it,
    a_rule_that_goes_closes_to_new_connections_and_lets_old_ones_be,
    what_leaves_is_judged_too_and_the_gateways_services_are_not,
    an_interface_in_no_group_has_its_gateway_and_nothing_else,
    an_elastic_ip_is_seen_from_as_the_instance_sees_it,
    a_caller_on_the_same_node_is_judged_by_the_address_that_it_appears_with,
    broadcasts_reach_no_neighbour_but_arp_does,
}
