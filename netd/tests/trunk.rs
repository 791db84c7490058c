//! Two nodes of one cloud, joined by VXLAN segments over their public side.
//!
//! A VLAN's frames take the same ways through the same rules; where the kernel has 802.1Q, `tests/e2e/test_trunk.py` shows
//! it.

mod common;

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use common::guest::{ECHO_PORT, arp, udp};
use common::{
    GATEWAY, GATEWAY_MAC, Guest, Host, Netd, OUTSIDE, PATIENCE, ask, guest_at, interface, private, public, segment,
};
use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use mallee_netd::api::{self, segment::Kind};

const VXLAN: u16 = 4789;
const NODES: [Ipv4Addr; 2] = [Ipv4Addr::new(198, 51, 100, 2), Ipv4Addr::new(198, 51, 100, 3)];
/// The first address for instances of the second subnet, of the same VPC.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(172, 31, 16, 4);

struct Node {
    netd: Netd,
    host: Host,
}

/// Two nodes and the outside, each a port of a bridge in the outside.
struct Cluster {
    nodes: [Node; 2],
    outside: Host,
}

impl Cluster {
    fn new() -> Self {
        let outside = Host::new();
        outside.run("ip link add public type bridge forward_delay 0");
        outside.run("ip addr add 198.51.100.1/24 dev public");
        outside.run("ip link set public up");
        let nodes = NODES.map(|address| {
            let host = Host::new();
            let (tid, last) = (host.tid, address.octets()[3]);
            outside.within(move || {
                common::run(&format!("ip link add node{last} type veth peer name pub0 netns {tid}"));
                common::run(&format!("ip link set node{last} master public up"));
            });
            host.within(move || {
                common::run("ip link set lo up");
                common::run(&format!("ip addr add {address}/24 dev pub0"));
                common::run("ip link set pub0 up");
                common::run("ip route add default via 198.51.100.1");
            });
            Node { netd: host.within(Netd::new), host }
        });
        Self { nodes, outside }
    }

    fn apply(&self, networks: [api::NodeNetwork; 2]) -> [bool; 2] {
        let mut changed = networks.iter().zip(&self.nodes).map(|(network, node)| node.netd.apply(network).changed);
        [changed.next().unwrap(), changed.next().unwrap()]
    }

    /// Opens the tap of instance `n` on the node.
    fn guest(&self, node: usize, n: u8, address: Ipv4Addr) -> Guest {
        self.nodes[node].host.within(move || guest_at(n, address))
    }

    fn strange(&self, node: usize) -> u64 {
        self.nodes[node].netd.show().trunks.iter().map(|trunk| trunk.strange_packets).sum()
    }

    /// A UDP socket on a machine of the public side.
    fn socket_at(&self, node: Option<usize>) -> UdpSocket {
        let (host, address) = match node {
            Some(node) => (&self.nodes[node].host, NODES[node]),
            None => (&self.outside, OUTSIDE),
        };
        host.within(move || {
            let socket = UdpSocket::bind((address, 0)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        })
    }
}

/// What a node's gateway has on the wire.
fn router_mac(node: usize) -> String {
    format!("02:6e:00:00:00:0{node}")
}

fn vxlan(vni: u32, peer: usize) -> Option<Kind> {
    Some(Kind::Vxlan(api::VxlanSegment { vni, peers: vec![NODES[peer].to_string()] }))
}

fn remote(of: &api::Interface, node: usize) -> api::RemoteInterface {
    api::RemoteInterface {
        id: of.id.clone(),
        segment: of.segment.clone(),
        mac: of.mac.clone(),
        ipv4: of.ipv4.clone(),
        secondary_ipv4: of.secondary_ipv4.clone(),
        node: NODES[node].to_string(),
        ..Default::default()
    }
}

/// Both nodes' networks: two subnets of one VPC and one of another, with these instances on the one and on the other.
fn networks(generation: u64, here: &[api::Interface], there: &[api::Interface]) -> [api::NodeNetwork; 2] {
    let segments = |peer: usize| {
        let mut segments = vec![
            api::Segment { kind: vxlan(5001, peer), ..segment("subnet-1", "vpc-1", "172.31.0.0/20", "172.31.0.1") },
            api::Segment { kind: vxlan(5002, peer), ..segment("subnet-2", "vpc-1", "172.31.16.0/20", "172.31.16.1") },
            api::Segment { kind: vxlan(5003, peer), ..segment("subnet-3", "vpc-2", "10.0.0.0/16", "10.0.0.1") },
        ];
        for segment in &mut segments {
            (segment.router_mac, segment.peer_router_macs) = (router_mac(1 - peer), vec![router_mac(peer)]);
        }
        segments
    };
    [(here, there, 1), (there, here, 0)].map(|(own, others, peer)| api::NodeNetwork {
        generation,
        segments: segments(peer),
        interfaces: own.to_vec(),
        public_pools: vec!["198.51.100.128/25".into()],
        remotes: others.iter().map(|interface| remote(interface, peer)).collect(),
        ..common::empty_network()
    })
}

fn at(n: u8, segment: &str, address: Ipv4Addr) -> api::Interface {
    api::Interface { segment: segment.into(), ipv4: address.to_string(), ..interface(n) }
}

/// The first elastic IP, with instance `n` of the first subnet.
fn elastic(n: u8) -> api::ElasticIp {
    api::ElasticIp { public_ip: public(1).to_string(), private_ip: private(n).to_string(), segment: "subnet-1".into() }
}

fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, n]
}

/// A VXLAN packet's payload: its header (RFC 7348, section 5), then the frame.
fn encapsulated(vni: u32, frame: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0][..], &(vni << 8).to_be_bytes(), frame].concat()
}

fn arrived(guest: &Guest, words: &[u8]) -> bool {
    guest.frames().iter().any(|frame| frame.windows(words.len()).any(|window| window == words))
}

#[test]
fn a_subnet_spans_nodes_and_each_answers_for_its_own() {
    let cluster = Cluster::new();
    let second = Ipv4Addr::new(172, 31, 0, 102);
    let there = api::Interface { secondary_ipv4: vec![second.to_string()], ..interface(2) };
    cluster.apply(networks(1, &[interface(1)], &[there]));
    let (one, two) = (cluster.guest(0, 1, private(1)), cluster.guest(1, 2, private(2)));
    two.add_address(second);
    for held in [private(2), second] {
        assert_eq!(one.resolve(held), mac(2));
        one.send_ping(held, mac(2), 1);
        one.await_pong(held, 1);
    }
    // The gateway, DHCP and whatever else is the node's is answered once, by the own node.
    assert_eq!(one.resolve(GATEWAY), GATEWAY_MAC);
    let lease = one.dhcp(true);
    assert_eq!(lease.yiaddr(), private(1));
    let mtu = lease.opts().get(dhcproto::v4::OptionCode::InterfaceMtu);
    assert_eq!(mtu, Some(&dhcproto::v4::DhcpOption::InterfaceMtu(1450)));
    two.ping(GATEWAY, 2);
    // What would come over the wire would be here by now: this took the same way.
    one.send_ping(private(2), mac(2), 3);
    one.await_pong(private(2), 3);
    let replies = |guest: &Guest, of: Ipv4Addr| {
        let is_reply = |frame: &&Vec<u8>| frame[12..14] == [8, 6] && frame[21] == 2 && frame[28..32] == of.octets();
        guest.frames().iter().filter(is_reply).count()
    };
    assert_eq!(replies(&one, GATEWAY), 1);
    let is_dhcp = |frame: &Vec<u8>| frame.len() > 36 && frame[23] == 17 && [67, 68].contains(&frame[37]);
    assert!(!two.frames().iter().any(is_dhcp), "DHCP went to another node");
    assert_eq!((cluster.strange(0), cluster.strange(1)), (0, 0));
}

#[test]
fn applying_twice_changes_nothing_and_damage_is_mended() {
    let mut cluster = Cluster::new();
    let desired = networks(1, &[interface(1)], &[interface(2)]);
    assert_eq!(cluster.apply(desired.clone()), [true, true]);
    assert_eq!(cluster.apply(desired.clone()), [false, false], "{}", cluster.nodes[0].netd.log());
    let (one, _two) = (cluster.guest(0, 1, private(1)), cluster.guest(1, 2, private(2)));
    for damage in [
        "ip link del tksubnet1",
        "ip link set tksubnet1 nomaster",
        "ip link set tksubnet1 down",
        "ip link set tksubnet1 type bridge_slave learning on",
        "ip link set tksubnet1 mtu 1400",
        "bridge fdb del 02:00:00:00:01:02 dev tksubnet1 master",
        "bridge fdb del 02:00:00:00:01:02 dev tksubnet1 self",
        "bridge fdb replace 02:00:00:00:01:02 dev tksubnet1 self dst 198.51.100.77",
        "bridge fdb append 00:00:00:00:00:00 dev tksubnet1 dst 198.51.100.77",
        "bridge fdb del 00:00:00:00:00:00 dev tksubnet1 dst 198.51.100.3",
        "bridge fdb append 02:00:00:00:01:77 dev tksubnet1 self dst 198.51.100.3",
        "ip neigh del 172.31.0.5 dev brsubnet1",
        "nft flush set bridge mallee trunks",
        "nft flush map bridge mallee router_macs",
        "nft flush set bridge mallee peer_routers",
        "nft flush set ip mallee tunnel_peers",
    ] {
        cluster.nodes[0].host.run(damage);
        assert_eq!(cluster.apply(desired.clone()), [true, false], "`{damage}`");
        assert_eq!(cluster.apply(desired.clone()), [false, false], "after `{damage}`");
        assert_eq!(one.resolve(private(2)), mac(2), "after `{damage}`");
        one.send_ping(private(2), mac(2), 1);
        one.await_pong(private(2), 1);
    }
    cluster.nodes[0].netd.kill();
    let netd = &mut cluster.nodes[0].netd;
    cluster.nodes[0].host.start(netd);
    assert_eq!(cluster.apply(desired), [false, false], "after a kill");
}

#[test]
fn an_instance_that_moves_is_found_and_one_that_ends_is_not() {
    let cluster = Cluster::new();
    cluster.apply(networks(1, &[interface(1), interface(2)], &[]));
    cluster.apply(networks(2, &[interface(1)], &[interface(2)]));
    let (one, two) = (cluster.guest(0, 1, private(1)), cluster.guest(1, 2, private(2)));
    one.send_ping(private(2), mac(2), 1);
    one.await_pong(private(2), 1);
    cluster.apply(networks(3, &[interface(1)], &[]));
    drop(two);
    let entries = cluster.nodes[0].host.run("bridge fdb show");
    assert!(!entries.contains("02:00:00:00:01:02"), "{entries}");
    let neighbours = cluster.nodes[0].host.run("ip neigh");
    assert!(!neighbours.contains("172.31.0.5"), "{neighbours}");
}

#[test]
fn subnets_of_a_vpc_are_routed_over_nodes_and_another_vpc_is_not_reached() {
    let cluster = Cluster::new();
    let other: Ipv4Addr = "10.0.0.4".parse().unwrap();
    let there = [at(2, "subnet-2", ELSEWHERE), at(3, "subnet-3", other)];
    cluster.apply(networks(1, &[interface(1)], &there));
    let one = cluster.guest(0, 1, private(1));
    let (two, three) = (cluster.guest(1, 2, ELSEWHERE), cluster.guest(1, 3, other));
    one.send_udp(other, 9, b"closed");
    one.ping(ELSEWHERE, 1);
    one.send_udp(ELSEWHERE, ECHO_PORT, b"?");
    let answer = one.receive_udp();
    assert_eq!(answer.payload, format!("i-2 asked by {} ?", private(1)).as_bytes());
    // To the instance it comes from its gateway.
    let routed = |frame: &&Vec<u8>| frame.len() > 30 && frame[26..30] == ELSEWHERE.octets();
    assert!(one.frames().iter().filter(routed).all(|frame| frame[6..12] == GATEWAY_MAC));
    // A TCP connection, of which each node sees one half routed and the other on its bridge.
    let segment_of = |from: Ipv4Addr, to: Ipv4Addr, n: u8, flags: &str| {
        let builder = PacketBuilder::ethernet2(mac(n), GATEWAY_MAC).ipv4(from.octets(), to.octets(), 64);
        let sequence = match (n, flags) {
            (1, "S") => 100,
            (1, _) => 101,
            _ => 900,
        };
        let (source, destination) = if n == 1 { (4000, 5000) } else { (5000, 4000) };
        let mut tcp = builder.tcp(source, destination, sequence, 1000);
        for flag in flags.chars() {
            tcp = if flag == 'S' { tcp.syn() } else { tcp.ack(if n == 1 { 901 } else { 101 }) };
        }
        let mut frame = Vec::new();
        tcp.write(&mut frame, b"").unwrap();
        frame
    };
    let await_segment = |guest: &Guest, flags: (bool, bool)| {
        guest.await_frame("a TCP segment", |frame| match SlicedPacket::from_ethernet(frame).ok()?.transport? {
            TransportSlice::Tcp(tcp) if (tcp.syn(), tcp.ack()) == flags => Some(()),
            _ => None,
        });
    };
    one.send(&segment_of(private(1), ELSEWHERE, 1, "S"));
    await_segment(&two, (true, false));
    two.send(&segment_of(ELSEWHERE, private(1), 2, "SA"));
    await_segment(&one, (true, true));
    one.send(&segment_of(private(1), ELSEWHERE, 1, "A"));
    await_segment(&two, (false, true));
    for node in &cluster.nodes {
        let flows = node.host.run("conntrack -L");
        // Of one that the flow table has, no state is told.
        let established = |flow: &str| flow.contains("ESTABLISHED") || flow.contains("[OFFLOAD]");
        let known = flows.lines().any(|flow| established(flow) && flow.contains("dst=172.31.16.4"));
        assert!(known, "a node does not know the connection: {flows}");
    }
    assert!(!arrived(&three, b"closed"), "the other VPC was reached");
}

#[test]
fn strangers_on_the_wire_are_not_believed() {
    let cluster = Cluster::new();
    cluster.apply(networks(1, &[interface(1)], &[interface(2)]));
    let (one, two) = (cluster.guest(0, 1, private(1)), cluster.guest(1, 2, private(2)));
    let to_node = SocketAddrV4::new(NODES[0], VXLAN);
    let good = |body: &[u8]| udp(mac(2), mac(1), private(2), private(1), (9, 9), body);
    // From a machine that is no peer; from an instance, which goes out as a peer.
    cluster.socket_at(None).send_to(&encapsulated(5001, &good(b"closed 1")), to_node).unwrap();
    two.send(&udp(mac(2), GATEWAY_MAC, private(2), NODES[0], (VXLAN, VXLAN), &encapsulated(5001, &good(b"closed 2"))));
    // From a peer, in the name of nobody there.
    let peer = cluster.socket_at(Some(1));
    let strange = cluster.strange(0);
    let unspecified = ([0; 6], private(1));
    let tagged = [&good(b"")[..12], &[0x81, 0, 0, 7], &good(b"closed 8")[12..]].concat();
    let frames = [
        udp(mac(9), mac(1), private(2), private(1), (9, 9), b"closed 3"),
        udp(mac(2), mac(1), private(9), private(1), (9, 9), b"closed 4"),
        udp(mac(1), mac(1), private(1), private(1), (9, 9), b"closed 5"),
        udp(GATEWAY_MAC, mac(1), ELSEWHERE, private(1), (9, 9), b"closed 6"),
        arp(mac(2), [0xff; 6], 1, (mac(2), GATEWAY), unspecified),
        arp(GATEWAY_MAC, [0xff; 6], 1, (GATEWAY_MAC, GATEWAY), unspecified),
        tagged,
        [&mac(1)[..], &mac(2), &[0x86, 0xdd], &[0x60; 40]].concat(),
    ];
    for frame in &frames {
        peer.send_to(&encapsulated(5001, frame), to_node).unwrap();
    }
    // And what is right, which comes after all of them.
    peer.send_to(&encapsulated(5001, &good(b"open")), to_node).unwrap();
    assert_eq!(one.receive_udp().payload, b"open");
    assert!(!arrived(&one, b"closed"), "{:?}", one.frames());
    assert_eq!(cluster.strange(0), strange + frames.len() as u64);
    // Nor does anything from there reach the node itself.
    let node = cluster.nodes[0].host.within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 4242)).unwrap());
    let to_gateway = udp(mac(2), GATEWAY_MAC, private(2), GATEWAY, (9, 4242), b"closed");
    peer.send_to(&encapsulated(5001, &to_gateway), to_node).unwrap();
    peer.send_to(&encapsulated(5001, &good(b"after")), to_node).unwrap();
    assert_eq!(one.receive_udp().payload, b"after");
    node.set_nonblocking(true).unwrap();
    assert_eq!(node.recv(&mut [0; 16]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn an_elastic_ip_moves_between_nodes() {
    let cluster = Cluster::new();
    let _guests = {
        cluster.apply(networks(1, &[interface(1)], &[interface(2)]));
        [cluster.guest(0, 1, private(1)), cluster.guest(1, 2, private(2))]
    };
    let client = cluster.socket_at(None);
    let asking = Asking::start(&cluster);
    for round in 0..6_u64 {
        let to = (round % 2) as usize;
        let mut desired = networks(2 + round, &[interface(1)], &[interface(2)]);
        desired[to].elastic_ips = vec![elastic(1 + to as u8)];
        // As the controller has it: the old node is told once the new one has the address.
        cluster.nodes[to].netd.apply(&desired[to]);
        cluster.nodes[1 - to].netd.apply(&desired[1 - to]);
        let who = ask(&client, public(1), &format!("round {round}"));
        assert_eq!(who, format!("i-{} asked by {OUTSIDE}", 1 + to));
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    let (answers, silence) = asking.end();
    println!("an elastic IP moved between nodes 5 times, in {answers} answers the longest silence was {silence:?}");
}

/// A client outside that asks at the elastic IP each millisecond, and when it was answered.
struct Asking {
    ended: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<Instant>>,
}

impl Asking {
    fn start(cluster: &Cluster) -> Self {
        let socket = cluster.socket_at(None);
        socket.connect((public(1), ECHO_PORT)).unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_millis(1))).unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let thread = std::thread::spawn(move || {
            let (mut answers, mut buffer) = (Vec::new(), [0; 64]);
            while !end.load(Ordering::Relaxed) {
                // Before the address is anywhere, this fails.
                let _ = socket.send(b"?");
                if socket.recv(&mut buffer).is_ok() {
                    answers.push(Instant::now());
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
            answers
        });
        Self { ended, thread }
    }

    /// How many answers came, and the longest time between two.
    fn end(self) -> (usize, std::time::Duration) {
        self.ended.store(true, Ordering::Relaxed);
        let answers = self.thread.join().unwrap();
        let longest = answers.windows(2).map(|pair| pair[1] - pair[0]).max();
        (answers.len(), longest.unwrap_or_default())
    }
}

#[test]
fn a_tunnel_that_somebody_else_has_keeps_no_other_segment_from_its_network() {
    let cluster = Cluster::new();
    let [mut desired, _] = networks(1, &[interface(1)], &[]);
    desired.elastic_ips = vec![elastic(1)];
    cluster.nodes[0].host.run("ip link add theirs type vxlan id 5002 dev pub0 dstport 4789");
    let status = cluster.nodes[0].netd.try_apply(&desired).unwrap_err();
    assert!(status.message().contains("VXLAN 5002"), "{status}");
    let _guest = cluster.guest(0, 1, private(1));
    assert_eq!(ask(&cluster.socket_at(None), public(1), "?"), format!("i-1 asked by {OUTSIDE}"));
}

#[test]
fn what_is_missing_for_vlans_is_told() {
    let cluster = Cluster::new();
    let reply = cluster.nodes[0].netd.capabilities();
    assert_eq!(reply.capabilities["vxlan"], "");
    assert_eq!(reply.underlay_address, NODES[0].to_string());
    assert!(reply.capabilities["vlan"].contains("--trunk"), "{}", reply.capabilities["vlan"]);
    let [mut desired, _] = networks(1, &[interface(1)], &[]);
    desired.segments[0].kind = Some(Kind::Vlan(api::VlanSegment { vid: 7 }));
    let status = cluster.nodes[0].netd.try_apply(&desired).unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().contains("segment subnet-1") && status.message().contains("--trunk"), "{status}");
}
