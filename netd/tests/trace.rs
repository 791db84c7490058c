//! `mallee-netd trace`: what it says of a packet is what becomes of one that an instance sends.

mod common;

use std::net::Ipv4Addr;

use common::guest::udp;
use common::{
    ALL_TRAFFIC, EGRESS, GATEWAY, GATEWAY_MAC, Guest, INGRESS, Lab, OUTSIDE, elastic, everywhere, group, guest,
    guest_at, interface, mac, network, private, public, run, segment,
};
use mallee_netd::api::NodeNetwork;
use serde_json::Value;

const UDP: i32 = 17;
const OPEN_PORT: u16 = 9;

/// What the program says of a packet.
fn trace(lab: &Lab, from: &str, to: &str, traffic: &str) -> Value {
    let program = env!("CARGO_BIN_EXE_mallee-netd");
    let socket = lab.netd.socket();
    let text = run(&format!("{program} trace --json --socket {} {from} {to} {traffic}", socket.display()));
    serde_json::from_str(&text).unwrap()
}

fn rules(said: &Value) -> Vec<&str> {
    said["steps"].as_array().unwrap().iter().map(|step| step["rule"].as_str().unwrap()).collect()
}

fn rules_of<'a>(said: &'a Value, chain: &str) -> Vec<&'a str> {
    let steps = said["steps"].as_array().unwrap().iter();
    steps.filter(|step| step["chain"] == chain).map(|step| step["rule"].as_str().unwrap()).collect()
}

/// Instance 1 lets in nothing but [`OPEN_PORT`] and has a public address; 2 is its neighbour, with another; 3 is on another subnet of
/// the VPC, 4 in another VPC.
fn desired() -> NodeNetwork {
    let mut desired = network(1, 2, &[]);
    desired.elastic_ips = vec![elastic(1, 1), elastic(2, 2)];
    desired.interfaces[0].security_groups = vec!["sg-1".into()];
    let open = (INGRESS, (UDP, OPEN_PORT.into(), OPEN_PORT.into()), everywhere());
    desired.security_groups.push(group("sg-1", &[open, (EGRESS, ALL_TRAFFIC, everywhere())]));
    desired.segments.push(segment("subnet-2", "vpc-1", "172.31.16.0/20", "172.31.16.1"));
    desired.segments.push(segment("subnet-3", "vpc-2", "10.1.0.0/20", "10.1.0.1"));
    for (n, subnet, ipv4) in [(3, "subnet-2", "172.31.16.9"), (4, "subnet-3", "10.1.0.9")] {
        let mut other = interface(n);
        (other.segment, other.ipv4) = (subnet.into(), ipv4.into());
        desired.interfaces.push(other);
    }
    desired
}

fn came(guest: &Guest, text: &str) -> bool {
    guest.frames().iter().any(|frame| frame.windows(text.len()).any(|window| window == text.as_bytes()))
}

#[test]
fn what_is_said_of_a_packet_is_what_becomes_of_one() {
    let lab = Lab::new();
    lab.netd.apply(&desired());
    let far = Ipv4Addr::new(172, 31, 16, 9);
    let guests = [guest(1), guest(2), guest_at(3, far), guest_at(4, Ipv4Addr::new(10, 1, 0, 9))];
    let own = |n: u8| if n == 3 { far } else { private(n) };
    // From an instance, to an address, by its MAC or the gateway's, to a port; whose it is, and by which rule it goes or not.
    let cases = [
        (2, private(1), mac(1), OPEN_PORT, 1, "sgr-10: udp 9 from 0.0.0.0/0"),
        (2, private(1), mac(1), 80, 1, "no group allows it"),
        (1, private(2), mac(2), 80, 2, "sgr-open0: all traffic from 0.0.0.0/0"),
        (3, private(1), GATEWAY_MAC, OPEN_PORT, 1, "from a segment of the same VPC"),
        (3, private(1), GATEWAY_MAC, 80, 1, "no group allows it"),
        (1, far, GATEWAY_MAC, 80, 3, "from a segment of the same VPC"),
        // By elastic IPs, and the own one.
        (2, public(1), GATEWAY_MAC, OPEN_PORT, 1, "through an elastic IP"),
        (2, public(1), GATEWAY_MAC, 80, 1, "no group allows it"),
        (1, public(1), GATEWAY_MAC, OPEN_PORT, 1, "through an elastic IP"),
    ];
    for (n, (from, to, to_mac, port, receiver, rule)) in cases.into_iter().enumerate() {
        let text = format!("packet {n}");
        guests[from as usize - 1].send(&udp(
            mac(from),
            to_mac,
            own(from),
            to,
            (40_000 + n as u16, port),
            text.as_bytes(),
        ));
        // What it sends afterwards comes after it: both pass the kernel in the order in which they were sent.
        guests[from as usize - 1].ping(if from == 3 { Ipv4Addr::new(172, 31, 16, 1) } else { GATEWAY }, n as u16);
        let said = trace(&lab, &format!("i-{from}"), &to.to_string(), &format!("udp {port}"));
        println!("{from} to {to}:{port}: {}", said["outcome"]);
        let arrived = said["outcome"] == "arrived";
        if arrived {
            // The receiver reads in its own time.
            common::eventually("the packet", || came(&guests[receiver - 1], &text).then_some(()));
        }
        assert_eq!(came(&guests[receiver - 1], &text), arrived, "{said:#}");
        assert!(rules(&said).contains(&rule), "{rule}: {said:#}");
        assert_eq!(said["kernel_was_as_desired"], true);
        if arrived {
            assert!(said["at"].as_str().unwrap().starts_with(&format!("i-{receiver} ")), "{said:#}");
        } else {
            assert_eq!(said["outcome"], "dropped");
            assert_eq!(rules(&said).last(), Some(&rule));
        }
    }
}

#[test]
fn of_many_rules_the_one_that_lets_it_pass_is_named() {
    let lab = Lab::new();
    let mut desired = desired();
    let rules: Vec<_> = (0..20).map(|n| (INGRESS, (UDP, 100 + n, 100 + n), everywhere())).collect();
    desired.security_groups.last_mut().unwrap().rules.extend(group("sg-2", &rules).rules);
    lab.netd.apply(&desired);
    for (port, rule) in [(100, "sgr-20: udp 100 from 0.0.0.0/0"), (119, "sgr-219: udp 119 from 0.0.0.0/0")] {
        let said = trace(&lab, "i-2", &private(1).to_string(), &format!("udp {port}"));
        assert!(rules_of(&said, "inbound_sg-1").contains(&rule), "{said:#}");
    }
    let said = trace(&lab, "i-2", &private(1).to_string(), "tcp 119");
    assert_eq!(rules_of(&said, "inbound_sg-1"), [""; 0], "{said:#}");
}

#[test]
fn the_outside_and_the_gateway_are_ends_too() {
    let lab = Lab::new();
    lab.netd.apply(&desired());
    let outside = OUTSIDE.to_string();
    let said = trace(&lab, "i-1", &outside, "tcp 443");
    assert_eq!(said["outcome"], "arrived");
    assert_eq!(said["seen"]["from"], public(1).to_string());
    assert!(rules(&said).contains(&"instance out as its elastic IP"));
    // Without a public address, as the node.
    let said = trace(&lab, "172.31.16.9", &outside, "icmp");
    assert_eq!(said["seen"]["from"], common::NODE.to_string());

    let said = trace(&lab, &outside, &public(1).to_string(), &format!("udp {OPEN_PORT}"));
    assert_eq!((&said["outcome"], &said["seen"]["to"]), (&"arrived".into(), &private(1).to_string().into()));
    assert_eq!(trace(&lab, &outside, &public(1).to_string(), "80")["outcome"], "dropped");
    let said = trace(&lab, &outside, &private(1).to_string(), &format!("udp {OPEN_PORT}"));
    assert_eq!(said["at"], "the public side (pub0)", "the node has no way to a private address");
    // What another VPC has means nothing in this one, and nothing outside.
    let said = trace(&lab, "i-1", "10.1.0.9", "80");
    assert_eq!((&said["outcome"], rules(&said).last()), (&"dropped".into(), Some(&"within 10.1.0.0/20")));

    let said = trace(&lab, "eni-1", &GATEWAY.to_string(), "udp 53");
    assert_eq!(said["outcome"], "taken_by_node");
    let said = trace(&lab, "eni-1", &GATEWAY.to_string(), "22");
    assert_eq!(rules(&said).last(), Some(&"the node is not the instances' to reach"));
}

/// The links, but for whether they have a carrier: of that the kernel takes note up to a second later (`net/core/link_watch.c`).
fn links() -> Vec<Vec<String>> {
    let told = run("ip -o link");
    let words = |line: &str| {
        let words =
            line.split_whitespace().filter(|word| !word.starts_with('<') && !["UNKNOWN", "DOWN", "UP"].contains(word));
        words.map(str::to_owned).collect()
    };
    told.lines().map(words).collect()
}

#[test]
fn a_trace_leaves_nothing_and_mends_what_it_finds_broken() {
    let lab = Lab::new();
    lab.netd.apply(&desired());
    let before = (links(), run("nft -s list ruleset"), lab.netd.show());
    trace(&lab, "i-1", "i-2", "80");
    let after = (links(), run("nft -s list ruleset"), lab.netd.show());
    assert_eq!(before, after);
    run("nft flush table ip mallee");
    assert_eq!(trace(&lab, "i-1", "i-2", "80")["kernel_was_as_desired"], false);
    assert_eq!(trace(&lab, "i-1", "i-2", "80")["kernel_was_as_desired"], true);
}

#[test]
fn what_cannot_be_asked_is_refused_with_its_reason() {
    let lab = Lab::new();
    lab.netd.apply(&desired());
    let socket = lab.netd.socket();
    let program = env!("CARGO_BIN_EXE_mallee-netd");
    for (question, reason) in [
        ("i-77 i-1 80", "`i-77` is neither"),
        ("i-1 i-2 sctp 80", "is no traffic"),
        ("i-1 172.31.0.200 80", "nobody has 172.31.0.200"),
    ] {
        let done = common::try_run(&format!("{program} trace --socket {} {question}", socket.display()));
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success() && said.contains(reason), "{question}: {said}");
    }
    let drawn = run(&format!("{program} show --socket {}", socket.display()));
    assert!(
        drawn.contains("i-1 172.31.0.4 ⇄ 198.51.100.130") && drawn.contains("subnet-3 10.1.0.0/20 local"),
        "{drawn}"
    );
}
