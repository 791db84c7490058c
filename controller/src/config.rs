//! What an operator can choose about a cloud.

use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::Ipv4Net;

use crate::nodes::segments::Segments;

/// The command line of `mallee-controller`.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "mallee-controller", version, about = "The controller of a Mallee cloud: EC2, S3 and STS")]
pub struct Config {
    /// Folder that holds everything the cloud has to remember.
    #[arg(long = "state", env = "MALLEE_STATE", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Where EC2, S3 and STS are served.
    #[arg(long, default_value = "127.0.0.1:8750", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// Where agents attend, with mutual TLS.
    #[arg(long, default_value = "0.0.0.0:8751", value_name = "ADDRESS")]
    pub node_listen: SocketAddr,
    /// Name of the one region.
    #[arg(long, default_value = "mallee-1", value_name = "NAME")]
    pub region: String,
    /// Public addresses that may be elastic IPs, in CIDR form; may be given again. Changing it
    /// takes no address away from who holds it.
    #[arg(long = "public-pool", value_name = "CIDR")]
    pub public_pools: Vec<Ipv4Net>,
    /// The default VPC's network; each zone's default subnet is a /20 in it.
    #[arg(long, default_value = "172.31.0.0/16", value_name = "CIDR")]
    pub vpc_cidr: Ipv4Net,
    /// How subnets reach more than one node: not at all (`local`), as VLANs with ids out of a range (`vlan:100-199`), or as
    /// VXLANs with numbers out of a range (`vxlan:5000-5999`). A node that cannot carry that kind takes no instances.
    #[arg(long, default_value = "local", value_name = "KIND")]
    pub segments: Segments,
    /// Virtual CPUs promised for each CPU of a node. (16 is what OpenStack has promised for years:
    /// most instances idle most of the time.)
    #[arg(long, default_value_t = 16.0, value_name = "FACTOR")]
    pub cpu_overcommit: f64,
    /// Memory of each node that is kept for the node itself, in MiB.
    #[arg(long, default_value_t = 192, value_name = "MIB")]
    pub memory_reserve_mib: u64,
    /// Elastic IPs that one account may hold.
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub address_limit: u32,
    /// Name servers told to instances by DHCP. Without any, they are told of their subnet's own resolver, which knows their private
    /// names and asks the node's name servers for all others.
    #[arg(long = "dns-server", value_name = "ADDRESS")]
    pub dns_servers: Vec<std::net::Ipv4Addr>,
    /// Time servers told to instances by DHCP.
    #[arg(long = "ntp-server", value_name = "ADDRESS")]
    pub ntp_servers: Vec<std::net::Ipv4Addr>,
}

impl Config {
    /// The domain of the instances' private names, for example `mallee-1.compute.internal`.
    pub fn private_domain(&self) -> String {
        format!("{}.compute.internal", self.region)
    }
}
