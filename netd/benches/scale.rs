//! The network of a node as it grows: what a new flow through an elastic IP costs, moving one, and handing over the whole network.
//!
//! `cargo bench -p mallee-netd`, as root; a part of `make bench`. Node and outside are network namespaces, an instance is a host in user
//! space behind its real tap, netd is the real program (`tests/common`). With `iptables-legacy-restore` on `PATH`, the same flows are sent
//! through as many rules of its kind. The first argument that is a folder gets the figures as JSON; one that is not chooses among
//! `addresses`, `iptables`, `losses` and `reconcile`.

#[path = "../tests/common/mod.rs"]
mod common;
mod report;

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::backend::{self, Backend};
use common::{ALL_TRAFFIC, EGRESS, Guest, INGRESS, Lab, OPEN, everywhere, group, run, segment};
use mallee_netd::api::{self, security_group_rule::Peer};
use report::{Report, arguments};

/// Addresses, each with an elastic IP.
const SIZES: [u32; 5] = [10, 100, 1000, 10_000, 50_000];
/// By iptables, where a packet passes a rule for each interface of its segment.
const SIZES_OF_IPTABLES: [u32; 3] = [10, 100, 1000];
/// A bridge has at most 1023 ports. Beyond these, interfaces have secondary addresses.
const MOST_INSTANCES: u32 = 1000;
/// Of the network that is handed over whole.
const ADDRESSES: u32 = 10_000;
const GROUPS: usize = 1000;
const RULES: u16 = 50;
const COLD: usize = 3;
const FLOWS: usize = 1000;
const MOVES: usize = 100;
const CHANGES: usize = 1000;
/// Nothing is repeated for longer, so that slow machines end too.
const LONGEST: Duration = Duration::from_secs(5);

const PARTS: [&str; 4] = ["addresses", "iptables", "losses", "reconcile"];

fn main() {
    // As on a node: what netd tells while it is looked at takes time.
    common::QUIET.store(true, Ordering::Relaxed);
    let mut report = Report::default();
    if is_asked("addresses") {
        on_backend(Backend::Nftables, &SIZES, &mut report, "netd");
    }
    if is_asked("iptables") {
        on_backend(Backend::Iptables, &SIZES_OF_IPTABLES, &mut report, "netd by iptables");
        backend::of_thread(Backend::Nftables);
        for size in SIZES_OF_IPTABLES.into_iter().chain([10_000]) {
            match iptables(size) {
                Some(took) => report.add(&format!("new flow through an elastic IP, {size} addresses, iptables"), took),
                None => println!("iptables is not here"),
            }
        }
    }
    if is_asked("losses") {
        losses(&mut report);
    }
    if is_asked("reconcile") {
        reconcile(&mut report);
    }
    report.write("network.json");
}

/// Whether the command line names this part, or none. A word that is neither a part nor a folder that is there for the report would be a run of nothing.
fn is_asked(part: &str) -> bool {
    let named: Vec<_> =
        arguments().filter(|argument| !argument.starts_with('-') && !PathBuf::from(argument).is_dir()).collect();
    if let Some(unknown) = named.iter().find(|name| !PARTS.contains(&name.as_str())) {
        panic!("{unknown} is neither a folder that is there nor one of {PARTS:?}");
    }
    named.is_empty() || named.iter().any(|name| name == part)
}

/// New flows through netd's own rules, and moves of an address of the larger networks.
fn on_backend(backend: Backend, sizes: &[u32], report: &mut Report, who: &str) {
    backend::of_thread(backend);
    for size in sizes.iter().copied() {
        let lab = Lab::new();
        let mut desired = network(size, &[]);
        lab.netd.apply(&desired);
        // Among the last of all rules that name one: interfaces are in the order of their ids' letters.
        let last = size - 1;
        let _guest = answering(last);
        report.add(&format!("new flow through an elastic IP, {size} addresses, {who}"), flows(&lab, public(last)));
        if size >= 1000 {
            let what = format!("move of one address of {size}, {who}");
            report.add(&format!("{what}, the whole network handed over"), moves(&lab, &mut desired));
            // By iptables that is the same.
            if backend == Backend::Nftables {
                report.add(&format!("{what}, as a change"), changes(&lab, &desired, Duration::ZERO));
            }
        }
    }
}

/// What it measures each time, so many times or for so long.
fn repeated(times: usize, mut once: impl FnMut() -> f64) -> Vec<f64> {
    let begun = Instant::now();
    (0..times).take_while(|_| begun.elapsed() < LONGEST).map(|_| once()).collect()
}

fn private(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(172, 31, 0, 3).to_bits() + n)
}

/// From a pool that nothing else is in.
fn public(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 0).to_bits() + n)
}

fn mac(n: u32) -> [u8; 6] {
    let n = n.to_be_bytes();
    [2, 0, 1, n[1], n[2], n[3]]
}

/// One segment with `size` addresses, an elastic IP each. The first instances have them in turns.
fn network(size: u32, groups: &[api::SecurityGroup]) -> api::NodeNetwork {
    let open = group(OPEN, &[(INGRESS, ALL_TRAFFIC, everywhere()), (EGRESS, ALL_TRAFFIC, everywhere())]);
    let instances = size.min(MOST_INSTANCES);
    let interface = |n: u32| api::Interface {
        id: format!("eni-{n}"),
        segment: "subnet-1".into(),
        mac: mac(n).map(|byte| format!("{byte:02x}")).join(":"),
        ipv4: private(n).to_string(),
        secondary_ipv4: (n + instances..=size).step_by(instances as usize).map(|n| private(n).to_string()).collect(),
        hostname: format!("host-{n}"),
        instance: format!("i-{n}"),
        security_groups: std::iter::once(OPEN.to_owned())
            .chain(groups.get(n as usize - 1).map(|group| group.id.clone()))
            .collect(),
        ..Default::default()
    };
    api::NodeNetwork {
        generation: 1,
        segments: vec![segment("subnet-1", "vpc-1", "172.31.0.0/16", "172.31.0.1")],
        public_pools: vec!["100.64.0.0/10".into()],
        security_groups: std::iter::once(open).chain(groups.iter().cloned()).collect(),
        interfaces: (1..=instances).map(interface).collect(),
        elastic_ips: (1..=size)
            .map(|n| api::ElasticIp {
                public_ip: public(n).to_string(),
                private_ip: private(n).to_string(),
                segment: "subnet-1".into(),
            })
            .collect(),
        ..Default::default()
    }
}

/// The instance that has address `n`, which answers by it.
fn answering(n: u32) -> Guest {
    let instance = (n - 1) % MOST_INSTANCES + 1;
    let guest = Guest::open(&api::tap_name(&format!("eni-{instance}")), mac(instance), private(n));
    guest.name(&format!("i-{instance}"));
    guest.is_heard();
    guest
}

/// Each from a port of its own, one after the other: question and answer, in microseconds.
fn flows(lab: &Lab, to: Ipv4Addr) -> Vec<f64> {
    lab.outside.run("ip route replace 100.64.0.0/10 via 198.51.100.2");
    lab.outside.within(move || {
        let ask = || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let begun = Instant::now();
            socket.send_to(b"?", SocketAddrV4::new(to, common::guest::ECHO_PORT)).unwrap();
            socket.recv(&mut [0; 256]).unwrap();
            begun.elapsed().as_secs_f64() * 1e6
        };
        // The first ones find caches cold and neighbours unknown.
        (0..FLOWS + 50).map(|_| ask()).skip(50).collect()
    })
}

/// The first address goes from one instance to the next and back: the whole call, in milliseconds.
fn moves(lab: &Lab, desired: &mut api::NodeNetwork) -> Vec<f64> {
    repeated(MOVES, || {
        desired.generation += 1;
        let (first, second) = (desired.elastic_ips[0].private_ip.clone(), desired.elastic_ips[1].private_ip.clone());
        desired.elastic_ips[0].private_ip = second;
        desired.elastic_ips[1].private_ip = first;
        let begun = Instant::now();
        assert!(lab.netd.apply(desired).changed);
        millis(begun)
    })
}

/// The same by saying what changes, no two sooner than `apart` after each other: question to answer, in milliseconds. It is one address alone that moves: the second
/// instance's own is taken away before.
fn changes(lab: &Lab, desired: &api::NodeNetwork, apart: Duration) -> Vec<f64> {
    let mut change = lab.netd.changes();
    let [moved, gone] = &desired.elastic_ips[..2] else { panic!("two addresses") };
    let mut generation = desired.generation;
    let mut ask = |associate, release| {
        let base = generation;
        generation += 1;
        assert!(change(api::ElasticIpChange { base, generation, associate, release }).unwrap().changed);
    };
    ask(vec![], vec![gone.public_ip.clone()]);
    let mut places = [&gone.private_ip, &moved.private_ip].into_iter().cycle();
    let mut next = Instant::now();
    repeated(CHANGES, || {
        let private_ip = places.next().expect("a cycle has no end").clone();
        let elastic = api::ElasticIp { private_ip, ..moved.clone() };
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        next += apart;
        let begun = Instant::now();
        ask(vec![elastic], vec![]);
        millis(begun)
    })
}

/// One address goes to and fro, at most a thousand times a second, while somebody sends to another a packet every 200 µs and is answered.
fn losses(report: &mut Report) {
    let lab = Lab::new();
    let desired = network(3, &[]);
    lab.netd.apply(&desired);
    let _guests = [1, 2, 3].map(answering);
    lab.outside.run("ip route replace 100.64.0.0/10 via 198.51.100.2");
    let ended = Arc::new(AtomicBool::new(false));
    let end = ended.clone();
    let socket = lab.outside.within(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let answers = socket.try_clone().unwrap();
    let asking = std::thread::spawn(move || {
        let mut asked = 0_u64;
        let begun = Instant::now();
        while !end.load(Ordering::Relaxed) {
            socket.send_to(b"?", SocketAddrV4::new(public(3), common::guest::ECHO_PORT)).unwrap();
            asked += 1;
            std::thread::sleep(
                (begun + asked as u32 * Duration::from_micros(200)).saturating_duration_since(Instant::now()),
            );
        }
        asked
    });
    let counting = std::thread::spawn(move || {
        let mut answered = 0_u64;
        while answers.recv(&mut [0; 256]).is_ok() {
            answered += 1;
        }
        answered
    });
    let begun = Instant::now();
    let took = changes(&lab, &desired, Duration::from_millis(1));
    let rate = took.len() as f64 / begun.elapsed().as_secs_f64();
    ended.store(true, Ordering::Relaxed);
    let (asked, answered) = (asking.join().unwrap(), counting.join().unwrap());
    report.add("moves a second", vec![rate]);
    report.add("each of them, as a change", took);
    report.add(&format!("packets of another flow lost meanwhile, of {asked}"), vec![(asked - answered) as f64]);
}

/// The whole network, cold, unchanged and with another rule, in milliseconds.
fn reconcile(report: &mut Report) {
    let rules: Vec<_> = (0..RULES).map(|n| (INGRESS, (6, 1000 + i32::from(n), 1000 + i32::from(n)), from(n))).collect();
    let groups: Vec<_> = (0..GROUPS).map(|n| group(&format!("sg-{n}"), &rules)).collect();
    let mut desired = network(ADDRESSES, &groups);
    let mut labs: Vec<Lab> = Vec::new();
    let cold = repeated(COLD, || {
        // The one before stays, or the kernel would be taking it down meanwhile.
        let lab = Lab::new();
        let begun = Instant::now();
        lab.netd.apply(&desired);
        let took = millis(begun);
        labs.push(lab);
        took
    });
    report.add("cold: 1,000 instances, 10,000 addresses, 1,000 groups of 50 rules", cold);
    let lab = labs.last().unwrap();
    let unchanged = repeated(10, || {
        desired.generation += 1;
        let begun = Instant::now();
        assert!(!lab.netd.apply(&desired).changed);
        millis(begun)
    });
    report.add("the same network again", unchanged);
    let last = desired.security_groups.len() - 1;
    let one_rule = repeated(10, || {
        desired.generation += 1;
        let rule = &mut desired.security_groups[last].rules[0];
        (rule.from_port, rule.to_port) = (rule.from_port ^ 1 << 14, rule.to_port ^ 1 << 14);
        let begun = Instant::now();
        assert!(lab.netd.apply(&desired).changed);
        millis(begun)
    });
    report.add("the same network with one rule of one group changed", one_rule);
}

fn from(n: u16) -> Peer {
    Peer::Cidr(format!("10.{}.0.0/16", n))
}

fn millis(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

/// The same flow through as many rules of iptables, the last of which it is for: netd makes the link alone.
fn iptables(size: u32) -> Option<Vec<f64>> {
    let lab = Lab::new();
    let mut desired = network(1, &[]);
    desired.elastic_ips.clear();
    lab.netd.apply(&desired);
    // Without netd's rules and tables: a node that knows where its instances are.
    run("nft flush ruleset");
    run(&format!("ip route add 172.31.0.0/16 dev {}", api::bridge_name("subnet-1")));
    let mut rules = "*nat\n".to_owned();
    for n in (1..=size).rev() {
        rules += &format!("-A PREROUTING -d {}/32 -j DNAT --to-destination {}\n", public(n), private(n));
    }
    rules += "COMMIT\n";
    let mut restore = Command::new("iptables-legacy-restore").stdin(Stdio::piped()).spawn().ok()?;
    restore.stdin.take()?.write_all(rules.as_bytes()).ok()?;
    assert!(restore.wait().ok()?.success(), "iptables-legacy-restore");
    let _guest = answering(1);
    Some(flows(&lab, public(1)))
}
