//! What the agent must remember of an instance when it is killed: one small file, replaced whole.
//!
//! Whether a VMM runs is *not* in here: that is asked of the kernel (`vmm_process`).

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use super::folder::Folder;
use crate::store;

/// `record.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// User and group id of the instance's VMM.
    pub uid: u32,
    /// When the agent first heard of the instance, seconds since 1970.
    pub created_unix_s: u64,
    /// Reboots carried out.
    #[serde(default)]
    pub reboots: u64,
    /// Starts of a VMM so far; names the events file of the latest one.
    #[serde(default)]
    pub starts: u64,
    /// The latest start, as long as its end was not looked into.
    #[serde(default)]
    pub run: Option<Run>,
    /// The instance rests of its own accord.
    #[serde(default)]
    pub rest: Option<Rest>,
    /// Ends of a VMM that nobody asked for, seconds since 1970, the recent ones.
    #[serde(default)]
    pub crashes: Vec<u64>,
}

/// One life of a VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Boot id of the node's kernel: another one means that the VMM went with the machine.
    pub boot_id: String,
    /// Trace that its measurements belong to.
    pub trace: String,
    pub started_unix_ns: u64,
    /// It was asked to stop: however it ends, that is what was wanted.
    #[serde(default)]
    pub ending: bool,
    #[serde(default)]
    pub leased: bool,
    #[serde(default)]
    pub fetched_metadata: bool,
}

/// Why a VM that should be on is not, until it is asked for anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rest {
    pub kind: RestKind,
    pub reason: String,
    /// What was wanted when it came to rest: a start under another trace, or one more reboot, ends it.
    pub trace: String,
    pub reboots: u64,
    /// `Power::Off` was wanted since: the next `Power::On` starts it.
    #[serde(default)]
    pub released: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestKind {
    /// The guest powered itself off.
    Stopped,
    /// It cannot be run.
    Failed,
}

impl Record {
    pub fn new(uid: u32) -> Self {
        Self {
            uid,
            created_unix_s: crate::clock::unix_ns() / 1_000_000_000,
            reboots: 0,
            starts: 0,
            run: None,
            rest: None,
            crashes: Vec::new(),
        }
    }

    /// `None` when there is none.
    pub fn load(folder: &Folder) -> io::Result<Option<Self>> {
        match fs::read(folder.record()) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).map_err(io::Error::other)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn save(&self, folder: &Folder) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        store::replace(&folder.record(), &bytes, 0o600)
    }
}
