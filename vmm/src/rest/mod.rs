//! Firecracker's REST API on a Unix socket.
//!
//! A thread of its own reads requests, so that a slow or malicious client never holds up the VM. It
//! parses them to a [`Call`] completely (`routes`), and only then asks the monitor, which
//! owns all state. One connection is served at a time, as in Firecracker; requests are bounded in
//! size and a silent client is cut off.

mod devices;
#[cfg(test)]
mod openapi;
mod routes;
mod server;
mod table;

use crate::api::{Action, Fault, Logger, Metrics, SnapshotCreate, SnapshotLoad, VmConfig, VmState};
use crate::vm::RunningVm;

pub use server::Server;
#[cfg(feature = "fuzzing")]
pub use server::parse;

/// What is done to a running VM; the configuration is to describe it afterwards too.
pub type RunningChange = Box<dyn FnOnce(&RunningVm, &mut VmConfig) -> Reply + Send>;

/// A request that was understood.
pub enum Call {
    /// `GET /`.
    DescribeInstance,
    /// A `GET` of a part of the configuration.
    Configuration(Box<dyn FnOnce(&VmConfig) -> Reply + Send>),
    /// A `PUT` or `PATCH` of a part of it.
    Configure(Box<dyn FnOnce(&mut VmConfig) -> Reply + Send>),
    /// A change of the running VM.
    Change(RunningChange),
    /// `PATCH /vm`.
    SetState(VmState),
    /// `PUT /snapshot/create`.
    Save(SnapshotCreate),
    /// `PUT /snapshot/load`.
    Load(SnapshotLoad),
    /// `PUT /actions`.
    Act(Action),
    /// `PUT /metrics`.
    ConfigureMetrics(Metrics),
    /// `PUT /logger`.
    ConfigureLogger(Logger),
}

/// Status and body of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub body: Option<String>,
    pub content_type: &'static str,
}

const JSON: &str = "application/json";

impl Reply {
    /// 204, as Firecracker answers all that succeeds without a body.
    pub fn done() -> Self {
        Reply { status: 204, body: None, content_type: JSON }
    }

    pub fn json<T: serde::Serialize>(value: &T) -> Self {
        match serde_json::to_string(value) {
            Ok(body) => Reply { status: 200, body: Some(body), content_type: JSON },
            Err(error) => Reply::refused(error.to_string()),
        }
    }

    /// 204, or 400 with the error.
    pub fn from_result<E: std::fmt::Display>(result: Result<(), E>) -> Self {
        match result {
            Ok(()) => Reply::done(),
            Err(error) => Reply::refused(error.to_string()),
        }
    }

    /// 200 with Prometheus' text format.
    pub fn prometheus(text: String) -> Self {
        Reply { status: 200, body: Some(text), content_type: "text/plain; version=0.0.4" }
    }

    /// 400 with Firecracker's body.
    pub fn refused(message: impl Into<String>) -> Self {
        Reply::fault(400, message)
    }

    pub fn fault(status: u16, message: impl Into<String>) -> Self {
        let fault = Fault { fault_message: message.into() };
        Reply { status, body: serde_json::to_string(&fault).ok(), content_type: JSON }
    }
}
