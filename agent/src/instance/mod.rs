//! One instance: its decisions, its steps, its folder and its VMM.
//!
//! Each instance has a task of its own ([`task`]), so that one whose image does not come, whose disk
//! is full or whose guest does not stop keeps no other waiting. A step may be interrupted at any
//! point by a change of what is wanted, or by the end of the agent: each can be repeated.

pub mod confine;
pub mod disk;
pub mod events;
pub mod folder;
pub mod launch;
pub mod record;
pub mod state;
pub mod stop;
pub mod task;
mod vmm_api;
mod vmm_config;
pub mod vmm_process;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::api::NodeFacts;
use crate::board::Board;
use crate::cgroup::Cgroups;
use crate::images::ImageCache;
use crate::network;
use crate::news::News;
use crate::spans::SpanBuffer;
use crate::wanted::Wanted;

/// What was set on the command line.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The program `mallee-vmm`.
    pub vmm: PathBuf,
    /// How long a guest may take to stop or to reboot when it is asked.
    pub stop_grace: Duration,
    /// The folder on whose file system disks lie.
    pub disk_root: PathBuf,
}

/// What the tasks share.
pub struct Services {
    pub instances: PathBuf,
    pub settings: Arc<Settings>,
    pub images: ImageCache,
    pub desired_network: watch::Receiver<network::Desired>,
    pub network: watch::Receiver<network::Status>,
    pub facts: watch::Receiver<Option<NodeFacts>>,
    pub cgroups: Option<Cgroups>,
    pub board: Board,
    pub spans: SpanBuffer,
    /// Boot id of the running kernel.
    pub boot_id: String,
}

/// The node's end of an instance's task.
#[derive(Debug)]
pub struct Handle {
    pub wanted: watch::Sender<Option<Wanted>>,
    pub news: mpsc::Sender<News>,
}
