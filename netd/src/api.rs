//! What other parts may use of netd: its messages, its client, the names it derives.
//!
//! A caller hands over the whole desired network of the node ([`NodeNetwork`]) over gRPC on a Unix
//! socket. Nothing here touches the kernel; nothing outside of this module is seen by another crate.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

tonic::include_proto!("mallee.netd.v1");

/// What `mallee-netd check` finds in the network namespace that it is started in, without changing anything; as JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Check {
    pub drop_policies: Vec<DropPolicy>,
    /// Tables of the old iptables whose policies could not be read: its programs are not here.
    pub legacy_tables: Vec<String>,
}

/// A base chain of somebody else's that drops what none of its rules accepts.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DropPolicy {
    /// `ip`, `inet` or `bridge`.
    pub family: String,
    pub table: String,
    pub chain: String,
    pub hook: String,
}

impl std::fmt::Display for DropPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "table {} {}, chain {} (hook {})", self.family, self.table, self.chain, self.hook)
    }
}

/// Where netd listens when it is told nothing else.
pub const DEFAULT_SOCKET: &str = "/run/mallee/netd.sock";

/// The address of the metadata service on every segment. netd puts it on each segment's gateway
/// interface; the agent listens on it. (EC2 User Guide, "Access instance metadata".)
pub const METADATA_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 169, 254);

/// The address of the resolver on every segment, beside the one behind its gateway's. (EC2 User Guide, "Amazon DNS server".)
pub const DNS_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 169, 253);

/// Bytes by which a VXLAN segment's MTU is below its underlay's: the outer IPv4, UDP and VXLAN headers, and the inner Ethernet
/// header (RFC 7348, section 5).
pub const VXLAN_OVERHEAD: u32 = 20 + 8 + 8 + 14;

/// Name of the tap behind an interface.
///
/// A Linux interface name has at most 15 bytes (`IFNAMSIZ` less the NUL), an interface id is
/// `eni-` and 17 hex digits: the name is `tp` and the last 13 of them.
pub fn tap_name(interface_id: &str) -> String {
    derived_name("tp", interface_id)
}

/// Name of the bridge (and gateway interface) of a segment: `br` and the id's last 13 characters.
pub fn bridge_name(segment_id: &str) -> String {
    derived_name("br", segment_id)
}

/// Name of the port by which a segment reaches other nodes: `tk` and the id's last 13 characters. Not `NIC.VID`, which
/// may be longer than a name can be, and which a tunnel has no use for.
pub fn trunk_port_name(segment_id: &str) -> String {
    derived_name("tk", segment_id)
}

fn derived_name(prefix: &str, id: &str) -> String {
    let digits: Vec<char> = id.chars().filter(char::is_ascii_alphanumeric).collect();
    let tail = digits.len().saturating_sub(13);
    prefix.chars().chain(digits[tail..].iter().copied()).collect()
}

/// A client of the netd that listens on `socket`.
///
/// Connects at the first call and again after netd was restarted, so a client may be made before
/// netd is there.
pub fn client(socket: &Path) -> network_client::NetworkClient<Channel> {
    let socket: PathBuf = socket.to_owned();
    // The URI is never resolved: the connector below goes to the socket.
    let endpoint = Endpoint::from_static("http://netd.local");
    let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) }
    }));
    network_client::NetworkClient::new(channel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_differ() {
        let a = tap_name("eni-0123456789abcdef0");
        let b = tap_name("eni-0123456789abcdef1");
        assert_eq!(a, "tp456789abcdef0");
        assert!(a.len() <= 15 && b.len() <= 15);
        assert_ne!(a, b);
        assert_eq!(bridge_name("subnet-1"), "brsubnet1");
        assert_eq!(trunk_port_name("subnet-1"), "tksubnet1");
    }
}
