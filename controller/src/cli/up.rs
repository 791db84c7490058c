//! `mallee up`: a whole cloud on this machine.
//!
//! Controller, netd and agent are processes of their own; the node's two share a network namespace
//! that is joined to the public side by an uplink (or, with `--uplink`, this machine's own network).
//! Every step can be repeated: what is there already is used as it is.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use ipnet::Ipv4Net;
use tokio::signal::unix::{SignalKind, signal};

use super::outside::{self, PublicSide};
use super::progress::Step;
use super::record::{self, Started, Surroundings};
use super::supervise::{Keeper, Program};
use super::{CliError, Result, State, namespace, program, routes, said};
use crate::admin::api;

/// How long a part may take until it answers.
const PATIENCE: Duration = Duration::from_secs(90);
/// Starts of a part that ended at once, after which the next one is not waited for.
const FUTILE_STARTS: u32 = 3;

#[derive(Debug, Clone, Args)]
pub struct Up {
    #[command(flatten)]
    state: State,
    /// Return when the cloud is up, and leave it running
    #[arg(long)]
    detach: bool,
    /// Terminate the instances too when this command is ended (they go on running otherwise)
    #[arg(long)]
    stop_instances: bool,
    /// Where EC2, S3 and STS are served
    #[arg(long, default_value = "127.0.0.1:8750", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Where nodes attend, with mutual TLS
    #[arg(long, default_value = "0.0.0.0:8751", value_name = "ADDRESS")]
    node_listen: SocketAddr,
    #[arg(long, default_value = "mallee-1", value_name = "NAME")]
    region: String,
    /// Start the controller alone: nodes are elsewhere
    #[arg(long)]
    no_node: bool,
    /// Name of the node on this machine
    #[arg(long, default_value = "host", value_name = "NAME")]
    node_name: String,
    /// Availability zone of the node on this machine; unset: the region's first
    #[arg(long, value_name = "ZONE")]
    zone: Option<String>,
    /// Interface on the public side; it has an address there. Without it, a public side of our own
    /// is made: a bridge, with the node in a network namespace joined to it
    #[arg(long, value_name = "INTERFACE", conflicts_with_all = ["bridge", "namespace"])]
    uplink: Option<String>,
    /// Name of our own public side's bridge [default: mallee0]
    #[arg(long, value_name = "NAME")]
    bridge: Option<String>,
    /// Name of the node's network namespace [default: mallee-host]
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Interface whose other end is a switch's trunk port, for VLAN segments
    #[arg(long, value_name = "INTERFACE", requires = "uplink")]
    trunk: Option<String>,
    /// How subnets reach more than one node: `local` (not at all), `vlan:FIRST-LAST` or `vxlan:FIRST-LAST`
    #[arg(long, default_value = "local", value_name = "KIND")]
    segments: crate::nodes::segments::Segments,
    /// The public side's network: the bridge has its first address, the node its second
    #[arg(long, default_value = "198.51.100.0/24", value_name = "CIDR")]
    public_network: Ipv4Net,
    /// Public addresses that may be elastic IPs; may be given again [default: the public network's
    /// upper half; with --uplink there is none]
    #[arg(long = "public-pool", value_name = "CIDR")]
    public_pools: Vec<Ipv4Net>,
    /// Name servers told to instances instead of their subnet's own resolver; may be given again
    #[arg(long = "dns-server", value_name = "ADDRESS")]
    dns_servers: Vec<std::net::Ipv4Addr>,
    /// Time servers told to instances; may be given again
    #[arg(long = "ntp-server", value_name = "ADDRESS")]
    ntp_servers: Vec<std::net::Ipv4Addr>,
}

impl Up {
    pub async fn run(mut self) -> Result<ExitCode> {
        record::make_folders(&self.state.dir)?;
        let given = self.state.dir.clone();
        self.state.dir = std::fs::canonicalize(&given).map_err(|source| CliError::File {
            what: "cannot open",
            path: given,
            source,
        })?;
        let side = PublicSide::new(self.public_network).map_err(CliError::Said)?;
        if self.detach { self.detached().await } else { self.foreground(side).await }
    }

    fn dir(&self) -> &Path {
        &self.state.dir
    }

    /// Whether the public side is of our own making, and its names.
    fn own_side(&self) -> Option<(String, Option<String>)> {
        if self.uplink.is_some() || (self.no_node && self.bridge.is_none()) {
            return None;
        }
        let bridge = self.bridge.clone().unwrap_or_else(|| "mallee0".to_owned());
        let namespace = (!self.no_node).then(|| self.namespace.clone().unwrap_or_else(|| "mallee-host".to_owned()));
        Some((bridge, namespace))
    }

    /// Starts this command again in a session of its own and waits until it is ready.
    async fn detached(self) -> Result<ExitCode> {
        if let Some(pid) = record::holder(self.dir()) {
            return said(already_runs(self.dir(), pid));
        }
        record::forget(self.dir(), "up");
        let own =
            std::env::current_exe().map_err(|error| CliError::System("cannot find this program's own path", error))?;
        let log_path = record::log_file(self.dir(), "up");
        let log_error = |source| CliError::File { what: "cannot write", path: log_path.clone(), source };
        let log = record::open_log(self.dir(), "up").map_err(log_error)?;
        let words = std::env::args_os().skip(1).filter(|word| word != "--detach");
        let mut command = std::process::Command::new(&own);
        command.args(words).stdin(Stdio::null()).stdout(log.try_clone().map_err(log_error)?).stderr(log);
        // SAFETY: between fork and exec only `setsid` is called, a bare system call.
        unsafe {
            command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(std::io::Error::from));
        }
        let mut child =
            command.spawn().map_err(|source| CliError::File { what: "cannot execute", path: own, source })?;
        let mut step: Option<(String, Step)> = None;
        loop {
            let now: Surroundings = record::read(self.dir(), "up").unwrap_or_default();
            if step.as_ref().map(|(phase, _)| phase) != Some(&now.phase) {
                if let Some((_, step)) = step.take() {
                    step.end("");
                }
                step = (!now.ready && !now.phase.is_empty()).then(|| (now.phase.clone(), Step::begin(&now.phase)));
            }
            if now.ready {
                return Ok(ExitCode::SUCCESS);
            }
            if let Ok(Some(status)) = child.try_wait() {
                if let Some((_, step)) = step {
                    step.fail();
                }
                return said(format!("the cloud did not come up ({status}):\n{}", last_lines(&log_path, 12)));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn foreground(self, side: PublicSide) -> Result<ExitCode> {
        let _lock = match record::lock(self.dir())? {
            Ok(lock) => lock,
            Err(pid) => return said(already_runs(self.dir(), pid)),
        };
        let mut terminate =
            signal(SignalKind::terminate()).map_err(|error| CliError::System("cannot wait for SIGTERM", error))?;
        let mut interrupt =
            signal(SignalKind::interrupt()).map_err(|error| CliError::System("cannot wait for SIGINT", error))?;
        let mut keepers = Vec::new();
        let outcome = tokio::select! {
            outcome = self.bring_up(side, &mut keepers) => outcome,
            _ = terminate.recv() => said("ended by SIGTERM before the cloud was up"),
            _ = interrupt.recv() => said("interrupted before the cloud was up"),
        };
        if outcome.is_ok() {
            eprintln!("the cloud is up: eval \"$(mallee env)\" points aws at it; Ctrl-C ends it");
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if self.stop_instances {
                super::down::end_instances(&self.state.admin(), Duration::from_secs(60)).await?;
            }
        }
        // In the order in which one depends on the next: nobody is left asking who is gone.
        while let Some(keeper) = keepers.pop() {
            let step = Step::begin(&format!("ending {}", keeper.name));
            keeper.stop().await;
            step.end("");
        }
        outcome.map(|()| ExitCode::SUCCESS)
    }

    /// Starts the parts one after another, each when the one before answers.
    async fn bring_up(&self, side: PublicSide, keepers: &mut Vec<Keeper>) -> Result<()> {
        let mut made = Surroundings { uplink: self.uplink.clone(), ..Surroundings::default() };
        if let Some((bridge, namespace)) = self.own_side() {
            if let Some((interface, route)) = routes::overlapping(self.public_network, &bridge) {
                return said(format!(
                    "the public network {} overlaps {route}, which this machine reaches through {interface}; choose \
                     another one with --public-network, or give that interface with --uplink",
                    self.public_network
                ));
            }
            // Noted before it is made: whatever comes of it, `mallee down` knows of it.
            made.bridge = Some(bridge.clone());
            made.namespace = namespace.clone();
            let step = self.begin(&mut made, "public side")?;
            outside::up(&side, &bridge, namespace.as_deref()).await?;
            step.end(&format!("{bridge}, {}", self.public_network));
        }
        let step = self.begin(&mut made, "controller")?;
        keepers.push(Keeper::start(self.controller(&side)?, self.dir())?);
        self.until_healthy().await?;
        step.end(&format!("http://{}", self.listen));
        if !self.no_node {
            let namespace = made.namespace.as_deref().map(namespace::path);
            let step = self.begin(&mut made, "netd")?;
            keepers.push(Keeper::start(self.netd(namespace.clone())?, self.dir())?);
            self.until_netd_answers().await?;
            step.end("");
            let step = self.begin(&mut made, "agent")?;
            self.add_node(&side).await?;
            keepers.push(Keeper::start(self.agent(namespace)?, self.dir())?);
            let kvm = self.until_attending().await?;
            step.end(&format!("node {}, KVM {kvm}", self.node_name));
        }
        made.ready = true;
        made.phase.clear();
        record::write(self.dir(), "up", &made)
    }

    fn begin(&self, made: &mut Surroundings, phase: &str) -> Result<Step> {
        made.phase = phase.to_owned();
        record::write(self.dir(), "up", made)?;
        Ok(Step::begin(phase))
    }

    fn controller(&self, side: &PublicSide) -> Result<Program> {
        let mut words: Vec<OsString> = vec!["--state".into(), self.dir().into()];
        words.extend(["--listen".into(), self.listen.to_string().into()]);
        words.extend(["--node-listen".into(), self.node_listen.to_string().into()]);
        words.extend(["--region".into(), self.region.clone().into()]);
        words.extend(["--segments".into(), self.segments.to_string().into()]);
        let default = [side.elastic()];
        let pools =
            if self.public_pools.is_empty() && self.uplink.is_none() { &default[..] } else { &self.public_pools };
        for pool in pools {
            words.extend(["--public-pool".into(), pool.to_string().into()]);
        }
        for server in &self.dns_servers {
            words.extend(["--dns-server".into(), server.to_string().into()]);
        }
        for server in &self.ntp_servers {
            words.extend(["--ntp-server".into(), server.to_string().into()]);
        }
        Ok(Program { name: "controller", path: program("mallee-controller")?, arguments: words, namespace: None })
    }

    fn netd_socket(&self) -> PathBuf {
        record::netd_socket(self.dir())
    }

    fn netd(&self, namespace: Option<PathBuf>) -> Result<Program> {
        let uplink = self.uplink.clone().unwrap_or_else(|| outside::UPLINK.to_owned());
        let mut words: Vec<OsString> = vec![
            "--socket".into(),
            self.netd_socket().into(),
            "--state".into(),
            self.dir().join("netd").into(),
            "--uplink".into(),
            uplink.into(),
        ];
        if let Some(trunk) = &self.trunk {
            words.extend(["--trunk".into(), trunk.into()]);
        }
        Ok(Program { name: "netd", path: program("mallee-netd")?, arguments: words, namespace })
    }

    fn credentials(&self) -> PathBuf {
        self.dir().join("credentials")
    }

    fn agent(&self, namespace: Option<PathBuf>) -> Result<Program> {
        let words: Vec<OsString> = vec![
            "--credentials".into(),
            self.credentials().into(),
            "--state".into(),
            self.dir().join("agent").into(),
            "--netd-socket".into(),
            self.netd_socket().into(),
            "--vmm".into(),
            program("mallee-vmm")?.into(),
        ];
        Ok(Program { name: "agent", path: program("mallee-agent")?, arguments: words, namespace })
    }

    /// Credentials for the node on this machine, unless it has those that it needs.
    async fn add_node(&self, side: &PublicSide) -> Result<()> {
        let address = if self.uplink.is_some() { std::net::Ipv4Addr::LOCALHOST } else { side.bridge() };
        let controller = format!("https://{address}:{}", self.node_listen.port());
        let zone = self.zone.clone().unwrap_or_else(|| format!("{}a", self.region));
        let file = self.credentials().join(mallee_agent::api::credentials::NODE_FILE);
        let known = std::fs::read(&file).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
        let has = |name: &str, value: &str| known.as_ref().is_some_and(|node| node[name] == value);
        if has("name", &self.node_name) && has("zone", &zone) && has("controller", &controller) {
            return Ok(());
        }
        let wanted = api::AddNode { name: self.node_name.clone(), zone, controller, out: self.credentials() };
        let _: api::AddedNode = self.state.admin().post(api::NODES, &wanted).await?;
        Ok(())
    }

    async fn until_healthy(&self) -> Result<()> {
        let admin = self.state.admin();
        self.wait_for("controller", async || {
            let health: api::Health = admin.get(api::HEALTH).await.ok()?;
            // The socket of a controller that is just ending would answer too.
            let own = record::read::<Started>(self.dir(), "controller")?.pid;
            (health.pid == own).then_some(())
        })
        .await
    }

    async fn until_netd_answers(&self) -> Result<()> {
        let socket = self.netd_socket();
        self.wait_for("netd", async || {
            let mut client = mallee_netd::api::client(&socket);
            client.capabilities(mallee_netd::api::CapabilitiesRequest {}).await.ok().map(drop)
        })
        .await
    }

    /// The KVM class of the node on this machine, once its agent attends.
    async fn until_attending(&self) -> Result<String> {
        let admin = self.state.admin();
        self.wait_for("agent", async || {
            let nodes: Vec<crate::nodes::NodeSummary> = admin.get(api::NODES).await.ok()?;
            nodes.into_iter().find(|node| node.name == self.node_name && node.connected).map(|node| node.kvm)
        })
        .await
    }

    async fn wait_for<T>(&self, name: &str, check: impl AsyncFn() -> Option<T>) -> Result<T> {
        let until = Instant::now() + PATIENCE;
        let log = record::log_file(self.dir(), name);
        let tail = || format!("the end of {}:\n{}", log.display(), last_lines(&log, 6));
        while Instant::now() < until {
            if let Some(found) = check().await {
                return Ok(found);
            }
            // Whoever ends again and again at the start will not be helped by patience.
            if record::read::<Started>(self.dir(), name).is_some_and(|started| started.restarts >= FUTILE_STARTS) {
                return said(format!("{name} ends as soon as it is started; {}", tail()));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        said(format!("{name} does not answer after {} s; {}", PATIENCE.as_secs(), tail()))
    }
}

fn already_runs(state: &Path, pid: u32) -> String {
    format!(
        "a cloud already runs here (process {pid}, state in {}); `mallee status` shows it, `mallee down` ends it",
        state.display()
    )
}

fn last_lines(path: &Path, count: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
