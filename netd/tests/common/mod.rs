//! A node and its outside, made of network namespaces.
//!
//! Every test runs in a fresh network namespace (the node): its own thread leaves the host's, so
//! nothing of the host is touched, and everything that the kernel made for the test goes when the
//! thread and its netd end, however they end. Another thread is in another namespace, the outside,
//! and is joined to the node by a veth. Instances are hosts in user space behind real taps
//! (`guest.rs`). netd is the real program.
//!
//! Needs root.

// Each test program uses its own part of this.
#![allow(dead_code)]

pub mod backend;
pub mod guest;

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mallee_netd::api::{self, security_group_rule::Peer, segment::Kind};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket, sockopt,
};

#[allow(unused_imports)]
pub use backend::{Backend, backend, is_same_packet, neighbour_mac};
pub use guest::Guest;

/// How long a test waits for what must come before it fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// netd tells no more than it does on a node. A benchmark sets it.
pub static QUIET: AtomicBool = AtomicBool::new(false);

pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub const NODE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 1);
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Runs a program in this thread's namespace; fails with what it printed.
pub fn run(command: &str) -> String {
    let output = try_run(command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "`{command}`: {}{text}", String::from_utf8_lossy(&output.stderr));
    text
}

pub fn try_run(command: &str) -> Output {
    let mut words = command.split_whitespace();
    Command::new(words.next().unwrap()).args(words).output().unwrap()
}

/// Waits until `found` has something.
pub fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own, which does what it is given.
pub struct Host {
    work: Option<mpsc::Sender<Work>>,
    thread: Option<JoinHandle<()>>,
    pub tid: i32,
}

impl Host {
    pub fn new() -> Self {
        let (work, todo) = mpsc::channel::<Work>();
        let (started, tid) = mpsc::channel();
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            started.send(nix::unistd::gettid().as_raw()).unwrap();
            for work in todo {
                work();
            }
        });
        Self { work: Some(work), thread: Some(thread), tid: tid.recv().unwrap() }
    }

    /// Does `work` in the host's namespace. Sockets made there stay there.
    pub fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let work: Work = Box::new(move || done.send(work()).unwrap());
        self.work.as_ref().unwrap().send(work).unwrap();
        result.recv().expect("the work in the other namespace failed")
    }

    pub fn run(&self, command: &'static str) -> String {
        self.within(move || run(command))
    }

    /// Starts a netd that was killed, in the host's namespace.
    pub fn start(&self, netd: &mut Netd) {
        let mut program = netd.program();
        netd.listens(self.within(move || program.spawn().unwrap()));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.work.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The node's namespace is the thread's own; the outside is a host beside it.
pub struct Lab {
    pub outside: Host,
    pub netd: Netd,
}

impl Lab {
    /// A node with its uplink and a netd that has not been told anything yet.
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// The same with more flags for netd.
    pub fn with(flags: &[&str]) -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        let outside = Host::new();
        run("ip link set lo up");
        run(&format!("ip link add pub0 type veth peer name out0 netns {}", outside.tid));
        run("ip addr add 198.51.100.2/24 dev pub0");
        run("ip link set pub0 up");
        outside.run("ip link set lo up");
        outside.run("ip addr add 198.51.100.1/24 dev out0");
        outside.run("ip link set out0 up");
        run("ip route add default via 198.51.100.1");
        let netd = Netd::with(flags);
        Self { outside, netd }
    }

    /// A UDP socket outside, with the patience of the tests.
    pub fn outside_socket(&self) -> UdpSocket {
        self.outside.within(|| {
            let socket = UdpSocket::bind((OUTSIDE, 0)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        })
    }
}

/// The real netd, as a process of its own.
pub struct Netd {
    child: Option<Child>,
    folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    pub backend: Backend,
    pub flags: Vec<String>,
}

impl Netd {
    /// In the network namespace of the calling thread, whose uplink is `pub0`.
    pub fn new() -> Self {
        Self::with(&[])
    }

    fn with(flags: &[&str]) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut netd = Self {
            child: None,
            folder: tempfile::tempdir().unwrap(),
            runtime,
            backend: backend(),
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
        };
        netd.start();
        netd
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("netd.sock")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub fn state_file(&self) -> PathBuf {
        self.folder.path().join("state/desired.pb")
    }

    pub fn start(&mut self) {
        let child = self.program().spawn().unwrap();
        self.listens(child);
    }

    fn listens(&mut self, child: Child) {
        self.child = Some(child);
        // That somebody takes the call is not enough: the socket of a netd that was killed lives on for a moment in a program that it was just starting.
        let asked = || async { self.client().capabilities(api::CapabilitiesRequest {}).await };
        eventually("netd to answer", || self.runtime.block_on(asked()).ok());
    }

    fn program(&self) -> Command {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("log")).unwrap();
        let mut program = Command::new(env!("CARGO_BIN_EXE_mallee-netd"));
        program
            .arg("--socket")
            .arg(self.socket())
            .arg("--state")
            .arg(self.folder.path().join("state"))
            // Mending is tested by what it leads to, so that it must not hide what a call does.
            .args(["--uplink", "pub0", "--mend-every", "3600"])
            .arg(format!("--dns-upstream={OUTSIDE}"))
            .args(["--backend", self.backend.name()])
            .args(&self.flags)
            .env("MALLEE_LOG", if QUIET.load(Ordering::Relaxed) { "info" } else { "debug,h2=info" })
            .stderr(log)
            .stdin(Stdio::null());
        program
    }

    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.as_ref().unwrap().id() as i32)
    }

    /// SIGKILL: netd gets no chance to tidy up.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn client(&self) -> api::network_client::NetworkClient<tonic::transport::Channel> {
        api::client(&self.socket())
    }

    pub fn try_apply(&self, desired: &api::NodeNetwork) -> Result<api::ApplyReply, tonic::Status> {
        let request = api::ApplyRequest { desired: Some(desired.clone()) };
        self.runtime.block_on(async { Ok(self.client().apply(request).await?.into_inner()) })
    }

    pub fn apply(&self, desired: &api::NodeNetwork) -> api::ApplyReply {
        match self.try_apply(desired) {
            Ok(reply) => reply,
            Err(status) => panic!("{status}\n{}", self.log()),
        }
    }

    /// Makes changes of elastic IPs over one connection, as a caller does that stays.
    pub fn changes(&self) -> impl FnMut(api::ElasticIpChange) -> Result<api::ApplyReply, tonic::Status> + '_ {
        let mut client = self.runtime.block_on(async { self.client() });
        move |change| self.runtime.block_on(async { Ok(client.change_elastic_ips(change).await?.into_inner()) })
    }

    pub fn show(&self) -> api::ShowReply {
        self.runtime.block_on(async { self.client().show(api::ShowRequest {}).await }).unwrap().into_inner()
    }

    pub fn capabilities(&self) -> api::CapabilitiesReply {
        self.runtime
            .block_on(async { self.client().capabilities(api::CapabilitiesRequest {}).await })
            .unwrap()
            .into_inner()
    }

    /// Runs `act` while watching and returns the first event.
    pub fn first_event(&self, act: impl FnOnce()) -> api::NetworkEvent {
        self.runtime.block_on(async {
            let mut events = self.client().watch(api::WatchRequest {}).await.unwrap().into_inner();
            act();
            tokio::time::timeout(PATIENCE, events.message()).await.unwrap().unwrap().unwrap()
        })
    }

    /// What is told of an interface.
    pub fn state_of(&self, interface: &str) -> api::InterfaceState {
        let show = self.show();
        show.interfaces.into_iter().find(|found| found.id == interface).unwrap()
    }

    /// Frames of an interface that anti-spoofing dropped.
    pub fn spoofed(&self, interface: &str) -> u64 {
        self.state_of(interface).spoofed_packets
    }

    /// What of an interface's was beyond a limit.
    pub fn limited(&self, interface: &str) -> api::Limited {
        self.state_of(interface).limited.unwrap()
    }
}

impl Drop for Netd {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- netd's log ---\n{}", self.log());
        }
        self.kill();
    }
}

/// The group that every instance is in unless its test says otherwise: all may come, all may go.
pub const OPEN: &str = "sg-open";

/// A group of rules that each let in, or out (`egress`).
pub fn group(id: &str, rules: &[(bool, (i32, i32, i32), Peer)]) -> api::SecurityGroup {
    let mut group = api::SecurityGroup { id: id.into(), ..Default::default() };
    for (n, (egress, (protocol, from_port, to_port), peer)) in rules.iter().enumerate() {
        group.rules.push(api::SecurityGroupRule {
            id: format!("sgr-{}{n}", id.trim_start_matches("sg-")),
            egress: *egress,
            protocol: *protocol,
            from_port: *from_port,
            to_port: *to_port,
            peer: Some(peer.clone()),
        });
    }
    group
}

pub const EGRESS: bool = true;
pub const INGRESS: bool = false;
pub const ALL_TRAFFIC: (i32, i32, i32) = (-1, 0, 0);

pub fn everywhere() -> Peer {
    Peer::Cidr("0.0.0.0/0".into())
}

/// A network of one segment (172.31.0.0/20) without instances.
pub fn empty_network() -> api::NodeNetwork {
    api::NodeNetwork {
        generation: 1,
        segments: vec![segment("subnet-1", "vpc-1", "172.31.0.0/20", "172.31.0.1")],
        public_pools: vec!["198.51.100.128/25".into()],
        security_groups: vec![group(
            OPEN,
            &[(INGRESS, ALL_TRAFFIC, everywhere()), (EGRESS, ALL_TRAFFIC, everywhere())],
        )],
        ..Default::default()
    }
}

pub fn segment(id: &str, vpc: &str, cidr: &str, gateway: &str) -> api::Segment {
    api::Segment {
        id: id.into(),
        vpc: vpc.into(),
        cidr: cidr.into(),
        gateway: gateway.into(),
        gateway_mac: "02:00:00:00:00:01".into(),
        kind: Some(Kind::Local(api::LocalSegment {})),
        dns_servers: vec!["172.31.0.2".into()],
        domain: "mallee-1.compute.internal".into(),
        ..Default::default()
    }
}

/// The instance number `n` on the first segment: `eni-n`, MAC ending in `n`, 172.31.0.(3 + n).
pub fn interface(n: u8) -> api::Interface {
    api::Interface {
        id: format!("eni-{n}"),
        segment: "subnet-1".into(),
        mac: format!("02:00:00:00:01:{n:02x}"),
        ipv4: private(n).to_string(),
        hostname: format!("ip-172-31-0-{}", 3 + n),
        instance: format!("i-{n}"),
        security_groups: vec![OPEN.into()],
        ..Default::default()
    }
}

/// The MAC of instance number `n`.
pub fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, n]
}

pub fn private(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 31, 0, 3 + n)
}

/// The public address number `n`.
pub fn public(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, 129 + n)
}

/// From a generation to the next, addresses that stand for instances from then on, and addresses that stand for nothing.
pub fn change(base: u64, associate: &[(u8, u8)], release: &[u8]) -> api::ElasticIpChange {
    api::ElasticIpChange {
        base,
        generation: base + 1,
        associate: associate.iter().map(|(p, n)| elastic(*p, *n)).collect(),
        release: release.iter().map(|p| public(*p).to_string()).collect(),
    }
}

/// Public address `p` stands for instance `n`.
pub fn elastic(p: u8, n: u8) -> api::ElasticIp {
    api::ElasticIp { public_ip: public(p).to_string(), private_ip: private(n).to_string(), segment: "subnet-1".into() }
}

/// A network with `count` instances, and elastic IPs given as pairs of public number and instance.
pub fn network(generation: u64, count: u8, elastic_ips: &[(u8, u8)]) -> api::NodeNetwork {
    api::NodeNetwork {
        generation,
        interfaces: (1..=count).map(interface).collect(),
        elastic_ips: elastic_ips.iter().map(|(p, n)| elastic(*p, *n)).collect(),
        ..empty_network()
    }
}

/// Opens the tap of instance `n` of [`network`] as that instance.
pub fn guest(n: u8) -> Guest {
    guest_at(n, private(n))
}

/// The same on another address. Returns when the bridge forwards what it sends, which it begins a
/// moment after the tap is opened.
pub fn guest_at(n: u8, ip: Ipv4Addr) -> Guest {
    let tap = format!("tpeni{n}");
    let guest = Guest::open(&tap, mac(n), ip);
    guest.name(&format!("i-{n}"));
    guest.is_heard();
    guest
}

/// Asks the echo service at `to`; returns who answered (see `guest.rs`).
pub fn ask(socket: &UdpSocket, to: Ipv4Addr, question: &str) -> String {
    socket.send_to(question.as_bytes(), SocketAddrV4::new(to, guest::ECHO_PORT)).unwrap();
    let mut answer = [0; 2048];
    loop {
        let (length, from) = socket
            .recv_from(&mut answer)
            .unwrap_or_else(|error| panic!("no answer from {to} to `{question}`: {error}"));
        let text = String::from_utf8_lossy(&answer[..length]).into_owned();
        // An answer to an earlier question may still come.
        if let Some(who) = text.strip_suffix(&format!(" {question}")) {
            assert_eq!(from.ip(), to, "the answer must come from the address that was asked");
            return who.to_owned();
        }
    }
}

/// A socket as the agent's metadata service has for a segment: bound to its bridge. The metadata address is the node's on bridges alone.
pub fn metadata_service(bridge: &str) -> TcpListener {
    let fd: OwnedFd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&fd, sockopt::BindToDevice, &bridge.to_owned().into()).unwrap();
    setsockopt(&fd, sockopt::IpFreebind, &true).unwrap();
    bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(METADATA, 80))).unwrap();
    listen(&fd, Backlog::new(4).unwrap()).unwrap();
    fd.into()
}
