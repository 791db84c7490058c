//! A node: a network namespace of the test's own, and in it netd, the agent and whatever the agent
//! starts. Everything ends with the value, also when the test fails.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mallee_agent::api::{DesiredInstance, InstancePhase, ObservedInstance};
use mallee_netd::api::{Interface, LocalSegment, NodeNetwork, Segment, segment};
use nix::sched::{CloneFlags, unshare};
use tokio::net::TcpListener;

use super::controller::Controller;

/// Longer than anything takes on a busy machine: a bound for what will not happen, no expectation.
const BOUND: Duration = Duration::from_secs(120);

pub const SEGMENT: &str = "subnet-0000000000000000a";
pub const GATEWAY_MAC: &str = "02:00:00:ff:ff:01";

/// Each machine has its own user ids, so that its VMMs are told from another's.
static NEXT_UIDS: AtomicU32 = AtomicU32::new(0);

pub struct Machine {
    pub folder: tempfile::TempDir,
    pub controller: Controller,
    port: u16,
    server: Option<tokio::task::JoinHandle<()>>,
    agent: Option<Child>,
    netd: Option<Child>,
    uids: (u32, u32),
}

/// Runs `test` on a thread with a network namespace of its own. The runtime's threads and the programs
/// that it starts inherit it.
pub fn on_a_machine(test: impl AsyncFnOnce(&mut Machine) + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root, for a network namespace of their own");
        // netd's uplink, with an outside that nobody listens on.
        for command in [
            "link set lo up",
            "link add pub0 type veth peer name outside",
            "addr add 198.51.100.2/24 dev pub0",
            "link set pub0 up",
            "link set outside up",
        ] {
            let status = Command::new("ip").args(command.split(' ')).status().unwrap();
            assert!(status.success(), "ip {command}");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut machine = Machine::start().await;
            test(&mut machine).await;
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Machine {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let controller = Controller::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        std::fs::create_dir(folder.path().join("credentials")).unwrap();
        controller.write_credentials(&folder.path().join("credentials"), port);
        let first = 1_900_000_000 + std::process::id() * 100 % 1_000_000 + NEXT_UIDS.fetch_add(100, Ordering::SeqCst);
        let mut machine = Self {
            server: Some(controller.serve(listener)),
            folder,
            controller,
            port,
            agent: None,
            netd: None,
            uids: (first, first + 99),
        };
        machine.controller.want(|desired| {
            desired.region = "mallee-1".into();
            desired.network = Some(network());
        });
        machine.start_netd();
        machine.start_agent();
        machine
    }

    pub fn start_netd(&mut self) {
        let child = Command::new(program("mallee-netd"))
            .arg("--socket")
            .arg(self.path("netd.sock"))
            .arg("--state")
            .arg(self.path("netd"))
            .args(["--uplink", "pub0"])
            .env("NO_COLOR", "1")
            .stdout(self.log("netd.log"))
            .stderr(self.log("netd.log"))
            .spawn();
        self.netd = Some(child.unwrap());
    }

    pub fn start_agent(&mut self) {
        let child = Command::new(env!("CARGO_BIN_EXE_mallee-agent"))
            .arg("--credentials")
            .arg(self.path("credentials"))
            .arg("--state")
            .arg(self.path("state"))
            .arg("--netd-socket")
            .arg(self.path("netd.sock"))
            .arg("--vmm")
            .arg(program("mallee-vmm"))
            .arg("--uid-range")
            .arg(format!("{}-{}", self.uids.0, self.uids.1))
            .args(["--stop-grace", "2"])
            .env("RUST_LOG", "debug,h2=info,hyper=info,tower=info,rustls=info")
            .stdout(self.log("agent.log"))
            .stderr(self.log("agent.log"))
            .spawn();
        self.agent = Some(child.unwrap());
    }

    /// SIGKILL.
    pub fn kill_agent(&mut self) {
        kill(self.agent.take());
    }

    pub fn kill_netd(&mut self) {
        kill(self.netd.take());
    }

    /// SIGSTOP or SIGCONT: netd hangs, or goes on.
    pub fn signal_netd(&self, signal: nix::sys::signal::Signal) {
        let pid = self.netd.as_ref().unwrap().id() as i32;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    }

    pub fn stop_controller(&mut self) {
        self.server.take().unwrap().abort();
    }

    pub async fn start_controller(&mut self) {
        // The old server's connections end with their tasks; its port is free at once.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(([127, 0, 0, 1], self.port).into()).unwrap();
        self.server = Some(self.controller.serve(socket.listen(16).unwrap()));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self, name: &str) -> Stdio {
        std::fs::OpenOptions::new().create(true).append(true).open(self.path(name)).unwrap().into()
    }

    /// Waits until the agent has seen what `check` looks for in the instance with this id.
    pub async fn until(&self, id: &str, what: &str, check: impl Fn(&ObservedInstance) -> bool) -> ObservedInstance {
        let mut observed = self.controller.observed.subscribe();
        let seen = observed.wait_for(|node| node.instances.iter().any(|instance| instance.id == id && check(instance)));
        match tokio::time::timeout(BOUND, seen).await {
            Ok(node) => node.unwrap().instances.iter().find(|instance| instance.id == id).unwrap().clone(),
            Err(_) => panic!(
                "{id}: waited in vain for {what}; last seen: {:?}\n{}",
                self.controller.observed.borrow(),
                self.logs()
            ),
        }
    }

    pub async fn until_phase(&self, id: &str, phase: InstancePhase) -> ObservedInstance {
        self.until(id, phase.as_str_name(), |instance| instance.phase() == phase).await
    }

    /// Waits for anything else.
    pub async fn until_true(&self, what: &str, check: impl Fn() -> bool) {
        let wait = async {
            while !check() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(BOUND, wait).await.is_err() {
            panic!("waited in vain for {what}; last seen: {:?}\n{}", self.controller.observed.borrow(), self.logs());
        }
    }

    /// Waits until no instance is left, and nothing of one.
    pub async fn until_empty(&self) {
        self.until_none_is_reported().await;
        assert_eq!(self.processes(), Vec::<u32>::new(), "processes are left");
        let folders: Vec<_> = std::fs::read_dir(self.path("state/instances")).unwrap().flatten().collect();
        assert!(folders.is_empty(), "{folders:?} are left");
        self.until_true("the taps to go", || !links().contains("tp")).await;
    }

    pub async fn until_none_is_reported(&self) {
        self.until_true("the node to report no instance", || {
            let observed = self.controller.observed.borrow();
            observed.instances.is_empty() && observed.generation == self.controller.desired.borrow().generation
        })
        .await;
    }

    /// Process ids that run under this machine's VMMs' user ids.
    pub fn processes(&self) -> Vec<u32> {
        use std::os::unix::fs::MetadataExt;
        let owned = |entry: std::fs::DirEntry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let uid = entry.metadata().ok()?.uid();
            // One that ended may wait for init to take notice.
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            if stat.rsplit(") ").next()?.starts_with('Z') {
                return None;
            }
            (self.uids.0..=self.uids.1).contains(&uid).then_some(pid)
        };
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(owned).collect()
    }

    /// Whether somebody has the tap open.
    pub fn has_carrier(&self, tap: &str) -> bool {
        let shown = Command::new("ip").args(["-o", "link", "show", tap]).output().unwrap();
        String::from_utf8_lossy(&shown.stdout).contains("LOWER_UP")
    }

    fn logs(&self) -> String {
        let read = |name: &str| {
            let text = std::fs::read_to_string(self.path(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("--- {name}\n{}\n", lines[lines.len().saturating_sub(60)..].join("\n"))
        };
        read("agent.log") + &read("netd.log")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        kill(self.agent.take());
        kill(self.netd.take());
        for pid in self.processes() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn kill(child: Option<Child>) {
    if let Some(mut child) = child {
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn links() -> String {
    let output = Command::new("ip").args(["-o", "link"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(|line| line.split(": ").nth(1)).collect::<Vec<_>>().join(" ")
}

/// A program of another part: in `MALLEE_BIN`, else beside the agent that is tested.
fn program(name: &str) -> PathBuf {
    let beside = Path::new(env!("CARGO_BIN_EXE_mallee-agent")).parent().unwrap().to_owned();
    let path = std::env::var_os("MALLEE_BIN").map_or(beside, PathBuf::from).join(name);
    assert!(
        path.exists(),
        "{} is missing: `cargo build -p {name}`, or say with MALLEE_BIN where it is",
        path.display()
    );
    path
}

fn network() -> NodeNetwork {
    let segment = Segment {
        id: SEGMENT.into(),
        cidr: "172.31.0.0/20".into(),
        gateway: "172.31.0.1".into(),
        gateway_mac: GATEWAY_MAC.into(),
        domain: "mallee-1.compute.internal".into(),
        vpc: "vpc-1".into(),
        kind: Some(segment::Kind::Local(LocalSegment {})),
        ..Default::default()
    };
    NodeNetwork { segments: vec![segment], ..Default::default() }
}

/// The interface of the `n`-th instance.
pub fn interface(n: u8, instance: &DesiredInstance) -> Interface {
    Interface {
        id: instance.interface.clone(),
        segment: SEGMENT.into(),
        mac: format!("02:00:00:00:00:{n:02x}"),
        ipv4: format!("172.31.0.{}", 4 + n),
        hostname: format!("ip-172-31-0-{}", 4 + n),
        instance: instance.id.clone(),
        ..Default::default()
    }
}
