//! What netd's rules cost a packet on its way through an elastic IP: beside a plain ruleset that a person would write for the same, and beside a bare bridge.
//!
//! `cargo bench -p mallee-netd --bench nat`, as root; a part of `make bench`. Nodes, instances and outsides are network namespaces, so that the kernel is at
//! both ends of each flow and nothing is measured of a VMM: behind netd's bridge the tap's place is taken by a veth of the same name, which its rules
//! judge as they would the tap. Where the kernel has flow tables (`src/nft/rules/fast_path.rs`), netd is measured with and without its own, and the plain ruleset too.
//! The ways are measured in turns, many times each, and what counts is the ratio of neighbours in time. The
//! first argument that is a folder gets the figures as JSON. With the name of a way, packets go that way alone, for a profiler to look at.

#[path = "../tests/common/mod.rs"]
mod common;
mod report;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use common::{Host, Lab, OUTSIDE, network, private, public, run};
use report::{Report, arguments};

const ROUNDS: usize = 40;
/// There where the kernel has flow tables.
const FLOW_TABLES: &str = "/proc/sys/net/netfilter/nf_flowtable_udp_timeout";
/// For a profiler.
const LOOK: Duration = Duration::from_secs(20);
const SLICE: Duration = Duration::from_millis(200);
const TCP_PORT: u16 = 5001;
const UDP_PORT: u16 = 5002;
/// The datagram that is answered.
const QUESTION: &[u8] = b"?";

/// A flow that was never answered is "new" to the kernel for ever, so that rules judge each of its packets as a first one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Answered,
    OneWay,
}

/// A client outside, and an instance that it reaches by `to`.
struct Way {
    name: &'static str,
    outside: Host,
    instance: Host,
    to: Ipv4Addr,
    /// The client's socket of the flow that is answered.
    answered: Arc<OnceLock<UdpSocket>>,
    /// What is between them.
    _node: Box<dyn std::any::Any>,
}

fn main() {
    let mut ways = vec![by_netd("netd", &[])];
    if Path::new(FLOW_TABLES).exists() {
        ways.push(by_netd("netd without its fast path", &["--fast-path", "off"]));
        ways.push(by_plain_rules("a plain ruleset with a flow table", PLAIN_FLOW_TABLE));
    }
    ways.extend([by_plain_rules("a plain ruleset", ""), by_bridge()]);
    for way in &ways {
        way.listen();
        // Neighbours get to know one another.
        way.throughput();
    }
    if let Some(way) = ways.iter().find(|way| arguments().any(|argument| argument == way.name)) {
        let begun = Instant::now();
        while begun.elapsed() < LOOK {
            println!("{}: {:.2} µs of the sender's processor for a packet", way.name, way.cost(Flow::Answered));
        }
        return;
    }
    let mut report = Report::default();
    compare(&mut report, "TCP throughput, Gbit/s", &ways, Way::throughput);
    for (flow, what) in [(Flow::Answered, "an answered"), (Flow::OneWay, "a one-way")] {
        let name = |unit| format!("64-byte packets of {what} UDP flow, {unit}");
        compare(&mut report, &name("thousands a second"), &ways, |way| way.packets(flow));
        compare(&mut report, &name("µs of processor each"), &ways, |way| way.cost(flow));
    }
    report.write("nat.json");
}

/// Measures each way in turns; reports what each reached, and the first as a part of the others.
fn compare(report: &mut Report, what: &str, ways: &[Way], measure: impl Fn(&Way) -> f64) {
    let rounds: Vec<Vec<f64>> = (0..ROUNDS).map(|_| ways.iter().map(&measure).collect()).collect();
    for (at, way) in ways.iter().enumerate() {
        report.add(&format!("{what}, {}", way.name), rounds.iter().map(|round| round[at]).collect());
    }
    for at in 1..ways.len() {
        let ratios = rounds.iter().map(|round| round[0] / round[at]).collect();
        report.add(&format!("{what}, {} as a part of {}", ways[0].name, ways[at].name), ratios);
    }
}

impl Way {
    fn listen(&self) {
        self.instance.within(|| {
            let listener = TcpListener::bind(("0.0.0.0", TCP_PORT)).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut buffer = vec![0; 1 << 18];
                    let mut stream = stream.unwrap();
                    while stream.read(&mut buffer).is_ok_and(|length| length > 0) {}
                }
            });
            let socket = UdpSocket::bind(("0.0.0.0", UDP_PORT)).unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                loop {
                    if let Ok((length, from)) = socket.recv_from(&mut buffer)
                        && buffer[..length] == *QUESTION
                    {
                        let _ = socket.send_to(QUESTION, from);
                    }
                }
            });
        });
    }

    /// Of one connection from outside to the instance.
    fn throughput(&self) -> f64 {
        let to = SocketAddrV4::new(self.to, TCP_PORT);
        self.outside.within(move || {
            let mut stream = TcpStream::connect(to).unwrap();
            let block = vec![0; 1 << 17];
            let begun = Instant::now();
            let mut sent = 0;
            while begun.elapsed() < SLICE {
                sent += stream.write(&block).unwrap();
            }
            sent as f64 * 8.0 / begun.elapsed().as_secs_f64() / 1e9
        })
    }

    /// Of one flow from outside, as many as reach the instance's interface.
    fn packets(&self, flow: Flow) -> f64 {
        let (received, took, _) = self.send(flow);
        received / took.as_secs_f64() / 1e3
    }

    /// What the sender's thread spends on a packet. The kernel brings it on its way in the sender's time, so this says what a packet costs also where others
    /// want the processor.
    fn cost(&self, flow: Flow) -> f64 {
        let (received, _, spent) = self.send(flow);
        spent.as_secs_f64() * 1e6 / received
    }

    /// Packets that arrived, how long they were sent for, and the sender's processor time.
    fn send(&self, flow: Flow) -> (f64, Duration, Duration) {
        let before = self.received();
        let to = SocketAddrV4::new(self.to, UDP_PORT);
        let kept = self.answered.clone();
        let (took, spent) = self.outside.within(move || {
            let open = || {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.connect(to).unwrap();
                socket
            };
            let mut of_one_way = None;
            let socket = match flow {
                Flow::Answered => kept.get_or_init(open),
                Flow::OneWay => of_one_way.insert(open()),
            };
            if flow == Flow::Answered {
                // A question may be lost among what was sent before.
                socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
                common::eventually("an answer", || {
                    socket.send(QUESTION).unwrap();
                    socket.recv(&mut [0; 64]).ok()
                });
            }
            let (begun, spent) = (Instant::now(), on_processor());
            while begun.elapsed() < SLICE {
                for _ in 0..64 {
                    let _ = socket.send(&[0; 64]);
                }
            }
            (begun.elapsed(), on_processor() - spent)
        });
        ((self.received() - before) as f64, took, spent)
    }

    fn received(&self) -> u64 {
        self.instance.within(|| {
            let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            let line = devices.lines().find_map(|line| line.trim().strip_prefix("eth0:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        })
    }
}

/// Processor time of this thread (`Documentation/scheduler/sched-stats.rst`).
fn on_processor() -> Duration {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(told.split_whitespace().next().unwrap().parse().unwrap())
}

/// An instance at the other end of `port`, a link of this thread's namespace that is made.
fn instance(port: &str, address: Ipv4Addr, prefix: u8, gateway: Option<Ipv4Addr>) -> Host {
    let instance = Host::new();
    run(&format!("ip link add {port} type veth peer name eth0 netns {}", instance.tid));
    let mac = common::mac(1).map(|byte| format!("{byte:02x}")).join(":");
    instance.within(move || {
        run(&format!("ip link set eth0 address {mac}"));
        run(&format!("ip addr add {address}/{prefix} dev eth0"));
        run("ip link set eth0 up");
        if let Some(gateway) = gateway {
            run(&format!("ip route add default via {gateway}"));
        }
    });
    run(&format!("ip link set {port} up"));
    instance
}

fn by_netd(name: &'static str, flags: &[&str]) -> Way {
    let lab = Lab::with(flags);
    lab.netd.apply(&network(1, 1, &[(1, 1)]));
    run("ip link del tpeni1");
    let instance = instance("tpeni1", private(1), 20, Some(common::GATEWAY));
    run("ip link set tpeni1 master brsubnet1");
    run("bridge link set dev tpeni1 learning off flood off");
    run("bridge fdb replace 02:00:00:00:01:01 dev tpeni1 master static");
    let Lab { outside, netd } = lab;
    Way { name, outside, instance, to: public(1), answered: Arc::default(), _node: Box::new(netd) }
}

/// NAT for one address, and a firewall that lets connections in to it.
const PLAIN: &str = "
table ip plain {
    chain prerouting { type nat hook prerouting priority dstnat; ip daddr 198.51.100.130 dnat to 172.31.0.4; }
    chain postrouting { type nat hook postrouting priority srcnat; ip saddr 172.31.0.4 oifname pub0 snat to 198.51.100.130; }
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        ip daddr 172.31.0.4 meta l4proto { tcp, udp } accept
        ip saddr 172.31.0.4 accept
    }
}";

/// What a person would add for flows that there are.
const PLAIN_FLOW_TABLE: &str = "
table ip plain {
    flowtable fast { hook ingress priority filter; devices = { pub0, br0 }; }
    chain fast { type filter hook forward priority filter - 1; meta l4proto { tcp, udp } flow add @fast; }
}";

fn by_plain_rules(name: &'static str, more: &'static str) -> Way {
    let node = Host::new();
    let tid = node.tid;
    let (outside, instance) = node.within(move || {
        let outside = Host::new();
        run(&format!("ip link add pub0 type veth peer name out0 netns {}", outside.tid));
        run("ip addr add 198.51.100.2/24 dev pub0");
        run("ip link set pub0 up");
        run("ip link add br0 type bridge forward_delay 0 mcast_snooping 0");
        run("ip addr add 172.31.0.1/20 dev br0");
        run("ip link set br0 up");
        outside.run("ip addr add 198.51.100.1/24 dev out0");
        outside.run("ip link set out0 up");
        outside.run("ip route add 198.51.100.130 via 198.51.100.2");
        let instance = instance("port0", private(1), 20, Some(common::GATEWAY));
        run("ip link set port0 master br0");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        let rules = std::env::temp_dir().join(format!("mallee-nat-{tid}.nft"));
        std::fs::write(&rules, format!("{PLAIN}{more}")).unwrap();
        run(&format!("nft -f {}", rules.display()));
        std::fs::remove_file(rules).unwrap();
        (outside, instance)
    });
    Way { name, outside, instance, to: public(1), answered: Arc::default(), _node: Box::new(node) }
}

fn by_bridge() -> Way {
    let node = Host::new();
    let (outside, instance) = node.within(|| {
        let outside = Host::new();
        run(&format!("ip link add pub0 type veth peer name out0 netns {}", outside.tid));
        run("ip link set pub0 up");
        run("ip link add br0 type bridge forward_delay 0 mcast_snooping 0");
        run("ip link set br0 up");
        run("ip link set pub0 master br0");
        outside.within(|| {
            run(&format!("ip addr add {OUTSIDE}/24 dev out0"));
            run("ip link set out0 up");
        });
        let instance = instance("port0", public(1), 24, None);
        run("ip link set port0 master br0");
        (outside, instance)
    });
    Way { name: "a bare bridge", outside, instance, to: public(1), answered: Arc::default(), _node: Box::new(node) }
}
