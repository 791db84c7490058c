//! Firecracker's REST API on a Unix socket.
//!
//! A thread of its own reads requests, so that a slow or malicious client never holds up the VM. It
//! parses them to a [`Call`] completely (`routes`), and only then asks the monitor, which
//! owns all state. One connection is served at a time, as in Firecracker; requests are bounded in
//! size and a silent client is cut off.

mod routes;
mod server;

use crate::api::{Action, Fault, VmConfig};

pub use server::Server;

/// A request that was understood.
pub enum Call {
    /// `GET /`.
    DescribeInstance,
    /// A `GET` of a part of the configuration.
    Configuration(Box<dyn FnOnce(&VmConfig) -> Reply + Send>),
    /// A `PUT` or `PATCH` of a part of it.
    Configure(Box<dyn FnOnce(&mut VmConfig) -> Reply + Send>),
    /// `PUT /actions`.
    Act(Action),
}

/// Status and body of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub body: Option<String>,
}

impl Reply {
    /// 204, as Firecracker answers all that succeeds without a body.
    pub fn done() -> Self {
        Reply { status: 204, body: None }
    }

    pub fn json<T: serde::Serialize>(value: &T) -> Self {
        match serde_json::to_string(value) {
            Ok(body) => Reply { status: 200, body: Some(body) },
            Err(error) => Reply::refused(error.to_string()),
        }
    }

    /// 400 with Firecracker's body.
    pub fn refused(message: impl Into<String>) -> Self {
        Reply::fault(400, message)
    }

    pub fn fault(status: u16, message: impl Into<String>) -> Self {
        let fault = Fault { fault_message: message.into() };
        Reply { status, body: serde_json::to_string(&fault).ok() }
    }
}
