//! The command line of `mallee-netd`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ipnet::Ipv4Net;

use crate::api::DEFAULT_SOCKET;
use crate::backend::{BackendKind, FastPath};
use crate::desired::LinkName;
use crate::limits::Limits;

/// The network of a Mallee node.
///
/// Without a subcommand: serves gRPC on a Unix socket and makes this network namespace what the
/// caller asks for. Needs CAP_NET_ADMIN, CAP_NET_RAW (ARP announcements) and CAP_NET_BIND_SERVICE
/// (DHCP's port 67) in the namespace, and read and write access to /dev/net/tun.
#[derive(Debug, Parser)]
#[command(name = "mallee-netd", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub daemon: Option<Daemon>,
    #[command(flatten)]
    pub limits: Limits,
}

#[derive(Debug, Args)]
pub struct Daemon {
    /// Where to listen. The socket is made with mode 0600.
    #[arg(long, default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Folder that keeps the desired network over restarts.
    #[arg(long)]
    pub state: PathBuf,
    /// The interface on the public side; it has an address already.
    #[arg(long)]
    pub uplink: LinkName,
    /// The interface that carries VLAN segments: a switch's trunk port is at its other end. It is up and needs no address.
    #[arg(long)]
    pub trunk: Option<LinkName>,
    /// The interface whose first address VXLAN segments' tunnels end at; without it, the uplink.
    #[arg(long)]
    pub underlay: Option<LinkName>,
    /// A name server that instances' questions about others' names are asked of; may be given again. Without it, those in
    /// the file of --resolv-conf.
    #[arg(long = "dns-upstream", value_name = "ADDRESS")]
    pub dns_upstreams: Vec<IpAddr>,
    /// Where the node's own name servers are written.
    #[arg(long, default_value = "/etc/resolv.conf", value_name = "FILE")]
    pub resolv_conf: PathBuf,
    /// What judges and translates packets: nf_tables, or x_tables by `iptables-legacy-restore`. `auto` is nftables where the kernel has it.
    #[arg(long, value_enum, default_value_t = BackendKind::Auto)]
    pub backend: BackendKind,
    /// Whether packets of connections that there are pass by the rules for routed ones, the host's own among them, where the kernel can bring them on by
    /// itself (flow tables). `off` is for a host whose rules look at each packet.
    #[arg(long, value_enum, default_value_t = FastPath::Auto)]
    pub fast_path: FastPath,
    /// How often the kernel is compared with the desired network and mended, in seconds.
    #[arg(long, default_value = "10", value_parser = seconds)]
    pub mend_every: Duration,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes or removes a public side on a machine that has none of its own.
    #[command(subcommand)]
    Outside(Outside),
    /// Removes everything that netd owns in this network namespace.
    Clean,
    /// Says, as JSON, what of others' in this network namespace is in the way of instances. Changes nothing.
    Check,
    /// Draws the network that a running netd has applied, with what it has counted.
    Show(ShowOptions),
    /// Tells which rules a new connection's first packet passes, and what becomes of it.
    Trace(TraceOptions),
}

#[derive(Debug, Args)]
pub struct ShowOptions {
    /// Where netd listens.
    #[arg(long, default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
}

#[derive(Debug, Args)]
pub struct TraceOptions {
    /// Where netd listens.
    #[arg(long, default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Who sends it: an instance or interface of this node by its id, its private address or its elastic IP; or an address outside.
    #[arg(value_name = "SRC")]
    pub from: String,
    /// Who it is for: the same, of any node.
    #[arg(value_name = "DST")]
    pub to: String,
    /// `PORT` or `tcp PORT`, `udp PORT`, `icmp`.
    #[arg(value_name = "[PROTO] PORT", required = true, num_args = 1..=2)]
    pub traffic: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Outside {
    /// Makes a bridge, and a network namespace joined to it if one is named. Does nothing when they
    /// are there already.
    Up {
        /// Name of the bridge.
        #[arg(long)]
        bridge: LinkName,
        /// The bridge's address: the outside as the nodes see it.
        #[arg(long)]
        address: Ipv4Net,
        /// A network namespace for a node on this machine, as `ip netns` names it.
        #[arg(long, requires_all = ["namespace_address"])]
        namespace: Option<LinkName>,
        /// The address of the node in the namespace.
        #[arg(long)]
        namespace_address: Option<Ipv4Net>,
        /// Name of the node's uplink in the namespace.
        #[arg(long, default_value = "pub0")]
        uplink_name: LinkName,
    },
    /// Adds a tap as a port of the bridge, for a node in a virtual machine.
    Tap {
        #[arg(long)]
        bridge: LinkName,
        #[arg(long)]
        name: LinkName,
        /// The user that may open the tap.
        #[arg(long, default_value_t = 0)]
        owner: u32,
    },
    /// Removes the bridge with its taps, and the namespace if one is named. Only what `up` and `tap`
    /// made is removed.
    Down {
        #[arg(long)]
        bridge: LinkName,
        #[arg(long)]
        namespace: Option<LinkName>,
    },
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
        _ => Err("give a whole number of seconds above 0".into()),
    }
}
