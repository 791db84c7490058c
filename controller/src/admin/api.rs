//! What goes over the operator's socket: paths and JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::nodes::NodeSummary;

pub const HEALTH: &str = "/v1/health";
pub const STATUS: &str = "/v1/status";
pub const ENVIRONMENT: &str = "/v1/environment";
pub const ACCOUNTS: &str = "/v1/accounts";
pub const KEYS: &str = "/v1/keys";
pub const NODES: &str = "/v1/nodes";
pub const TRACES: &str = "/v1/traces";
pub const END_INSTANCES: &str = "/v1/instances/end";

/// Body of every refusal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fault {
    pub message: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Health {
    pub pid: u32,
    pub version: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// URL of EC2, S3 and STS.
    pub endpoint: String,
    pub region: String,
    pub nodes: Vec<NodeSummary>,
    /// Of all accounts, without terminated ones.
    pub instances: Vec<InstanceSummary>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InstanceSummary {
    pub id: String,
    pub account_id: String,
    pub node: String,
    pub instance_type: String,
    pub state: String,
    pub private_ip: String,
    /// Empty when there is none.
    pub public_ip: String,
}

/// What a client of EC2 and S3 has to know.
#[derive(Clone, Serialize, Deserialize)]
pub struct Environment {
    pub endpoint: String,
    pub region: String,
    pub access_key: String,
    pub secret_key: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AddAccount {
    pub name: String,
}

#[derive(Clone, Serialize, Deserialize)]
pub struct AddedAccount {
    pub account_id: String,
    pub name: String,
    pub access_key: String,
    pub secret_key: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AddKey {
    /// Name or number.
    pub account: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AddNode {
    pub name: String,
    pub zone: String,
    /// URL that the node dials, `https://…:8751`.
    pub controller: String,
    /// Absolute path of the credentials folder on the controller's machine.
    pub out: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AddedNode {
    pub name: String,
    pub zone: String,
    pub out: PathBuf,
    /// Of its certificate, lower-case hexadecimal.
    pub serial: String,
}

/// How a node is removed, in the query.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct RemoveNode {
    /// Its machine is off for good: its instances end with it.
    #[serde(default)]
    pub lost: bool,
}

/// Ids of instances whose termination was begun, and of those that could not be.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct EndedInstances {
    pub terminated: Vec<String>,
    pub refused: Vec<String>,
}
