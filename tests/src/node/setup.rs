//! What the host tells a node about itself, in a file of its initial RAM file system.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    pub name: String,
    /// The uplink's address with prefix length, for example `198.51.100.3/24`.
    pub uplink_address: ipnet::Ipv4Net,
    /// Where packets for other networks go: the host's end of the public side.
    pub gateway: std::net::Ipv4Addr,
    /// Programs to keep running, started in this order.
    pub services: Vec<Service>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    pub name: String,
    pub argv: Vec<String>,
    /// Values added to the environment.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
}

impl Service {
    /// Name of the port that carries what it logs to a file on the host.
    pub fn log_port(&self) -> String {
        format!("mallee.log.{}", self.name)
    }
}

/// The uplink's name in a node: the kernel's own for the first NIC.
pub const UPLINK: &str = "eth0";
/// The trunk's name, where a node has a second NIC.
pub const TRUNK: &str = "eth1";
/// Where the disk that outlives reboots is mounted.
pub const STATE: &str = "/state";
