//! A public side for a machine that gives us none: a bridge that is the outside world, and the node's
//! network namespace joined to it. `mallee-netd` makes both; here it is only called.

use std::net::Ipv4Addr;
use std::process::Stdio;

use ipnet::Ipv4Net;
use tokio::process::Command;

use super::{CliError, Result, program, said};

/// Name that `mallee-netd outside` gives to the node's uplink.
pub const UPLINK: &str = "pub0";

/// Addresses on the public side: the bridge has the first, the node on this machine the second, and
/// the upper half is for elastic IPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicSide {
    network: Ipv4Net,
}

impl PublicSide {
    pub fn new(network: Ipv4Net) -> std::result::Result<PublicSide, String> {
        if network.prefix_len() > 28 {
            return Err(format!("the public network {network} is too small: give a /28 or a larger one"));
        }
        Ok(PublicSide { network: network.trunc() })
    }

    fn host(&self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network.network()) + number)
    }

    /// The outside's own address.
    pub fn bridge(&self) -> Ipv4Addr {
        self.host(1)
    }

    fn with_prefix(&self, address: Ipv4Addr) -> String {
        format!("{address}/{}", self.network.prefix_len())
    }

    /// The addresses that may be elastic IPs when none are named.
    pub fn elastic(&self) -> Ipv4Net {
        let half = self.network.prefix_len() + 1;
        let upper = u32::from(self.network.network()) + (1 << (32 - half));
        Ipv4Net::new(Ipv4Addr::from(upper), half).unwrap_or(self.network)
    }
}

/// Makes the bridge, and the namespace when one is named. Does nothing where they are there.
pub async fn up(side: &PublicSide, bridge: &str, namespace: Option<&str>) -> Result<()> {
    let address = side.with_prefix(side.bridge());
    let mut words = vec!["outside", "up", "--bridge", bridge, "--address", &address];
    let node = side.with_prefix(side.host(2));
    if let Some(namespace) = namespace {
        words.extend(["--namespace", namespace, "--namespace-address", &node, "--uplink-name", UPLINK]);
    }
    netd(&words).await
}

/// Removes what [`up`] made.
pub async fn down(bridge: &str, namespace: Option<&str>) -> Result<()> {
    let mut words = vec!["outside", "down", "--bridge", bridge];
    if let Some(namespace) = namespace {
        words.extend(["--namespace", namespace]);
    }
    netd(&words).await
}

/// Removes netd's rules and links where the node shares this machine's own network.
pub async fn clean() -> Result<()> {
    netd(&["clean"]).await
}

async fn netd(words: &[&str]) -> Result<()> {
    let path = program("mallee-netd")?;
    let done = Command::new(&path).args(words).stdin(Stdio::null()).output().await;
    let done = done.map_err(|source| CliError::File { what: "cannot execute", path, source })?;
    if done.status.success() {
        return Ok(());
    }
    let words = words.join(" ");
    said(format!("mallee-netd {words}: {}", String::from_utf8_lossy(&done.stderr).trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_is_divided() {
        let side = PublicSide::new("198.51.100.77/24".parse().unwrap()).unwrap();
        assert_eq!(side.with_prefix(side.bridge()), "198.51.100.1/24");
        assert_eq!(side.host(2), Ipv4Addr::new(198, 51, 100, 2));
        assert_eq!(side.elastic().to_string(), "198.51.100.128/25");
        assert!(PublicSide::new("10.0.0.0/29".parse().unwrap()).is_err());
    }
}
