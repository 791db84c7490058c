//! The command line, and the agent's start from its first line to its last.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::api::NodeFacts;
use crate::cgroup::Cgroups;
use crate::credentials::Credentials;
use crate::error::{AtPath, Error, Result};
use crate::images::{ControllerBlobs, ImageCache};
use crate::instance::confine::LOWEST_UID;
use crate::instance::{Services, Settings};
use crate::metadata::{Directory, Tokens, server};
use crate::node::{Node, found_on_disk};
use crate::session::Session;
use crate::store::StateDir;
use crate::{board, facts, network, show, spans};

/// The agent of a Mallee node: makes the machine equal to what the controller wants of it.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Option<RunArgs>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what the state folder holds: instances, their processes, images.
    Show {
        /// The agent's state folder.
        #[arg(long)]
        state: PathBuf,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Folder that `mallee node add` wrote: node.json, ca.pem, node.pem, node.key.
    #[arg(long)]
    credentials: PathBuf,
    /// Folder for instances, images and the last desired state. Made if it is missing.
    #[arg(long)]
    state: PathBuf,
    /// Unix socket of this node's mallee-netd.
    #[arg(long, default_value = mallee_netd::api::DEFAULT_SOCKET)]
    netd_socket: PathBuf,
    /// The program mallee-vmm; without it, the one in the same folder as this program.
    #[arg(long)]
    vmm: Option<PathBuf>,
    /// Availability zone, instead of the one in node.json.
    #[arg(long)]
    zone: Option<String>,
    /// User ids to give to VMMs, one per instance.
    #[arg(long, default_value = "400000-409999", value_name = "FIRST-LAST")]
    uid_range: String,
    /// Seconds that a guest may take to stop or reboot when it is asked to; after that it is made to.
    #[arg(long, default_value_t = 20)]
    stop_grace: u64,
    /// MiB of image parts that are kept although no instance needs them.
    #[arg(long, default_value_t = 10 * 1024)]
    image_cache_mib: u64,
}

impl Cli {
    /// Does what the command line says; returns when the agent is told to end.
    pub fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
        match (self.command, self.run) {
            (Some(Command::Show { state }), _) => runtime.block_on(async { show::show(&state) }),
            (None, Some(run)) => {
                let result = runtime.block_on(run.attend());
                // VMMs live on: nothing is waited for, nothing is ended.
                runtime.shutdown_background();
                result
            }
            (None, None) => {
                let _ = <Self as clap::CommandFactory>::command().print_help();
                Ok(())
            }
        }
    }
}

impl RunArgs {
    /// Until the agent is told to end, or a part of it ends that none should be without.
    async fn attend(self) -> Result<()> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        let mut parts = JoinSet::new();
        self.start(&mut parts).await?;
        tokio::select! {
            ended = wait_for_end() => ended,
            ended = end_of_a_part(&mut parts) => Err(ended),
        }
    }

    async fn start(&self, parts: &mut JoinSet<()>) -> Result<()> {
        let uids = parse_uids(&self.uid_range)?;
        let credentials = Credentials::read(&self.credentials)?;
        let state = StateDir::take(&self.state)?;
        let stored = state.load_desired();
        let channel = credentials.channel();

        let (status_sender, status) = watch::channel(network::Status::default());
        let (facts_sender, facts) = watch::channel(None);
        let (network_sender, desired_network) = watch::channel(network::Desired::default());
        let (desired_sender, desired) = watch::channel(None);
        let (news_sender, news) = mpsc::channel(1024);
        let (back_sender, back) = watch::channel(0);
        let services =
            Arc::new(self.services(&state, &channel, desired_network.clone(), status.clone(), facts.clone())?);
        let directory = Arc::new(Directory::default());
        let tokens = Tokens::new(state.metadata_key()?);

        let zone = self.zone.clone().unwrap_or_else(|| credentials.node.zone.clone());
        tracing::info!(node = credentials.node.name, zone, controller = credentials.node.controller, state = %state.root().display(), "agent starts");
        let (settings, socket) = (Arc::clone(&services.settings), self.netd_socket.clone());
        parts.spawn(facts::watch(credentials.node.name.clone(), zone, settings, socket.clone(), facts_sender));
        parts.spawn(network::keep(socket.clone(), desired_network, back, status_sender));
        parts.spawn(network::follow(socket, back_sender, news_sender.clone()));
        parts.spawn(copy_network(status, Arc::clone(&services)));
        parts.spawn(server::serve(Arc::new(server::Service::new(Arc::clone(&directory), tokens, news_sender))));

        let owners =
            found_on_disk(&state.instances()).into_iter().filter_map(|(id, record)| Some((id, record?.uid))).collect();
        let node = Node {
            state,
            services: Arc::clone(&services),
            uids,
            directory,
            network: network_sender,
            tasks: Default::default(),
            owners,
        };
        // The node looks for its running VMMs before the controller hears of it (`Node::run` takes the
        // stored state up before its first wait): the first board that is sent is a whole one.
        let (ready_sender, ready) = tokio::sync::oneshot::channel();
        parts.spawn(node.run(desired, news, stored, ready_sender));
        let _ = ready.await;
        parts.spawn(Session { channel, services, facts, desired: desired_sender }.run());
        Ok(())
    }

    fn services(
        &self,
        state: &StateDir,
        channel: &Channel,
        desired_network: watch::Receiver<network::Desired>,
        network: watch::Receiver<network::Status>,
        facts: watch::Receiver<Option<NodeFacts>>,
    ) -> Result<Services> {
        let settings = Settings {
            vmm: self.vmm.clone().map_or_else(vmm_beside_us, Ok)?,
            stop_grace: Duration::from_secs(self.stop_grace),
            disk_root: state.root().to_owned(),
        };
        let blobs = Arc::new(ControllerBlobs(channel.clone()));
        Ok(Services {
            instances: state.instances(),
            settings: Arc::new(settings),
            images: ImageCache::new(state.images(), self.image_cache_mib << 20, blobs),
            desired_network,
            network,
            facts,
            cgroups: find_cgroups(),
            board: board::Board::default(),
            spans: spans::SpanBuffer::default(),
            boot_id: facts::boot_id(),
        })
    }
}

/// Waits for the first of `parts` to end, which none does of itself; why it did.
async fn end_of_a_part(parts: &mut JoinSet<()>) -> Error {
    Error::PartEnded(match parts.join_next().await {
        Some(Err(error)) => error.to_string(),
        Some(Ok(())) | None => "what it serves is gone".to_owned(),
    })
}

fn vmm_beside_us() -> Result<PathBuf> {
    let us = std::env::current_exe().at("/proc/self/exe")?;
    Ok(us.with_file_name("mallee-vmm"))
}

fn find_cgroups() -> Option<Cgroups> {
    Cgroups::find()
        .inspect_err(|why| {
            tracing::warn!(why, "instances run without a cgroup: CPU shares and memory are not enforced by the kernel")
        })
        .ok()
}

/// What netd has applied, and what it refuses, is told to the controller with the board.
async fn copy_network(mut status: watch::Receiver<network::Status>, services: Arc<Services>) {
    while status.changed().await.is_ok() {
        let now = status.borrow_and_update().clone();
        services.board.set_network(now.applied.map_or(0, |applied| applied.network.generation), now.error);
    }
}

async fn wait_for_end() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Runtime)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("agent ends; its VMMs run on");
    Ok(())
}

fn parse_uids(text: &str) -> Result<RangeInclusive<u32>> {
    let range = text.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    match range {
        // The highest two ids mean "nobody" and "no change" to the kernel.
        Some((first, last)) if first >= LOWEST_UID && first <= last && last <= u32::MAX - 2 => Ok(first..=last),
        _ => Err(Error::UidRange(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
        let cli = Cli::try_parse_from(["mallee-agent", "--credentials", "c", "--state", "s", "--vmm", "v"]).unwrap();
        assert!(cli.run.is_some() && cli.command.is_none());
        assert!(Cli::try_parse_from(["mallee-agent", "show", "--state", "s"]).unwrap().command.is_some());
    }

    #[tokio::test]
    async fn a_part_that_panics_ends_the_agent_with_an_error() {
        let mut parts = JoinSet::new();
        parts.spawn(std::future::pending());
        parts.spawn(async { panic!("as a test wants it") });
        let error = end_of_a_part(&mut parts).await.to_string();
        assert!(error.contains("panicked") && error.contains("as a test wants it"), "{error}");
    }

    #[test]
    fn ranges_that_reach_the_machines_own_users_are_refused() {
        assert_eq!(parse_uids("400000-400009").unwrap(), 400_000..=400_009);
        for bad in ["0-10", "999-2000", "5000-4000", "4000", "a-b", "4000-4294967294"] {
            assert!(parse_uids(bad).is_err(), "{bad}");
        }
    }
}
