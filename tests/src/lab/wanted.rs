//! Which nodes there shall be: a lab of N alike, joined to a cloud.

use std::{fs, net::Ipv4Addr, path::PathBuf, process::Command};

use ipnet::Ipv4Net;

use super::{
    error::{LabError, OnPath, output_of},
    folder::{Lab, Node},
    initrd,
    machine::{self, Acceleration, Machine},
    packages,
    programs::Places,
};
use crate::node::setup::{STATE, Service, Setup, TRUNK, UPLINK};

/// The lab that is wanted.
#[derive(Debug, Clone, clap::Args)]
pub struct Wanted {
    /// How many nodes: lab1, lab2, ….
    #[arg(long, default_value_t = 1)]
    pub nodes: u32,
    /// State folder of the cloud that they join; without it `mallee`'s own default.
    #[arg(long, conflicts_with = "bare")]
    pub cloud: Option<PathBuf>,
    /// Join no cloud and start no services.
    #[arg(long)]
    pub bare: bool,
    /// Port of the controller's that agents attend, on the host's address on the public side.
    #[arg(long, default_value_t = 8751)]
    pub node_port: u16,
    /// Bridge of the host that is the public side.
    #[arg(long, default_value = "mallee0")]
    pub bridge: String,
    /// A second bridge, for the nodes' VLAN trunk.
    #[arg(long)]
    pub trunk: Option<String>,
    /// The public side's network; the host has its first address, node n its n+2nd.
    #[arg(long, default_value = "198.51.100.0/24")]
    pub public_network: Ipv4Net,
    /// Availability zones are this and a letter; the host's own node has `a`, the lab's nodes go on.
    #[arg(long, default_value = "mallee-1")]
    pub region: String,
    /// Nodes that share a zone.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub nodes_per_zone: u32,
    /// Processors of a node; by default two, and one where they are emulated (`-smp` of QEMU without KVM).
    #[arg(long)]
    pub cpus: Option<u32>,
    #[arg(long, default_value_t = 2048)]
    pub memory_mib: u64,
    /// Size of a node's disk; it takes what is written.
    #[arg(long, default_value_t = 8192)]
    pub disk_mib: u64,
    /// More words for the nodes' kernel command line.
    #[arg(long, default_value = "")]
    pub kernel_arguments: String,
}

impl Wanted {
    /// Starts every wanted node that does not run, and returns all that are wanted. They boot on
    /// while this returns: see [`machine::wait_booted`].
    pub fn start(&self, lab: &Lab, places: &Places, progress: &dyn Fn(&str)) -> Result<Vec<Node>, LabError> {
        let packages = packages::fetch(progress)?;
        let lock = lab.lock()?;
        let mut nodes = Vec::new();
        for number in 1..=self.nodes {
            let node = lab.node(&format!("lab{number}"));
            if !node.is_running() {
                let machine = self.machine(&node, number, packages.kernel())?;
                let credentials = self.join(&node, number, places)?;
                machine::start(lab, &lock, &node, &machine, &packages, places, credentials.as_deref())?;
            }
            nodes.push(node);
        }
        Ok(nodes)
    }

    fn machine(&self, node: &Node, number: u32, kernel: PathBuf) -> Result<Machine, LabError> {
        let mut bridges = vec![self.bridge.clone()];
        bridges.extend(self.trunk.clone());
        let acceleration = Acceleration::best();
        Ok(Machine {
            acceleration,
            cpus: self.cpus.unwrap_or(acceleration.dependable_cpus()),
            memory_mib: self.memory_mib,
            disk_mib: self.disk_mib,
            bridges,
            kernel,
            kernel_arguments: self.kernel_arguments.clone(),
            setup: Setup {
                name: node.name.clone(),
                uplink_address: self.address(2 + number)?,
                gateway: self.address(1)?.addr(),
                services: if self.bare { Vec::new() } else { services(self.trunk.is_some()) },
            },
        })
    }

    /// The public side's address number `n`.
    fn address(&self, n: u32) -> Result<Ipv4Net, LabError> {
        let address = Ipv4Addr::from(u32::from(self.public_network.network()) + n);
        let fits = self.public_network.contains(&address) && address != self.public_network.broadcast();
        let net = Ipv4Net::new(address, self.public_network.prefix_len());
        net.ok().filter(|_| fits).ok_or_else(|| LabError::Invalid {
            what: format!("public network {}", self.public_network),
            reason: format!("it has no address number {n}; take a larger one or fewer nodes"),
        })
    }

    /// Has the cloud issue credentials for the node.
    fn join(&self, node: &Node, number: u32, places: &Places) -> Result<Option<PathBuf>, LabError> {
        if self.bare {
            return Ok(None);
        }
        let folder = node.credentials();
        if folder.exists() {
            fs::remove_dir_all(&folder).on("removing", &folder)?;
        }
        fs::create_dir_all(&node.folder).on("making", &node.folder)?;
        let mut command = Command::new(places.find("mallee")?);
        command.args(["node", "add", &node.name, "--zone", &self.zone(number)?]);
        command.args(["--controller", &format!("https://{}:{}", self.address(1)?.addr(), self.node_port)]);
        command.arg("--out").arg(&folder);
        if let Some(state) = &self.cloud {
            command.arg("--state").arg(state);
        }
        output_of(&mut command)?;
        Ok(Some(folder))
    }

    fn zone(&self, number: u32) -> Result<String, LabError> {
        let zone = 1 + (number - 1) / self.nodes_per_zone;
        let letter = u8::try_from(zone).ok().and_then(|n| b'a'.checked_add(n)).filter(u8::is_ascii_lowercase);
        letter.map(|letter| format!("{}{}", self.region, char::from(letter))).ok_or_else(|| LabError::Invalid {
            what: format!("{} nodes", self.nodes),
            reason: "a zone is named by one letter: there are 25 at most".into(),
        })
    }
}

/// What runs in a node: netd first, for the agent hands it the network.
fn services(has_trunk: bool) -> Vec<Service> {
    const NETD_SOCKET: &str = "/run/mallee/netd.sock";
    let netd_state = format!("{STATE}/netd");
    let agent_state = format!("{STATE}/agent");
    let credentials = format!("/{}", initrd::CREDENTIALS);
    let mut netd = vec!["/usr/bin/mallee-netd", "--socket", NETD_SOCKET, "--state", &netd_state, "--uplink", UPLINK];
    if has_trunk {
        netd.extend(["--trunk", TRUNK]);
    }
    let agent = [
        "/usr/bin/mallee-agent",
        "--credentials",
        &credentials,
        "--state",
        &agent_state,
        "--netd-socket",
        NETD_SOCKET,
        "--vmm",
        "/usr/bin/mallee-vmm",
    ];
    vec![service("netd", &netd), service("agent", &agent)]
}

fn service(name: &str, argv: &[&str]) -> Service {
    Service { name: name.to_owned(), argv: argv.iter().map(|&word| word.to_owned()).collect(), environment: Vec::new() }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        wanted: Wanted,
    }

    fn wanted(words: &[&str]) -> Wanted {
        Command::parse_from(["test"].iter().chain(words)).wanted
    }

    #[test]
    fn nodes_follow_the_host_in_address_and_zone() {
        let wanted = wanted(&[]);
        assert_eq!(wanted.address(1).unwrap().to_string(), "198.51.100.1/24");
        assert_eq!(wanted.address(3).unwrap().to_string(), "198.51.100.3/24");
        assert_eq!(wanted.zone(1).unwrap(), "mallee-1b");
        assert_eq!(wanted.zone(25).unwrap(), "mallee-1z");
        assert!(wanted.zone(26).is_err());
        let pairs = super::tests::wanted(&["--nodes-per-zone", "2"]);
        let zones: Vec<String> = (1..=3).map(|number| pairs.zone(number).unwrap()).collect();
        assert_eq!(zones, ["mallee-1b", "mallee-1b", "mallee-1c"]);
    }

    #[test]
    fn a_network_too_small_is_refused() {
        let wanted = wanted(&["--public-network", "198.51.100.0/30"]);
        assert!(wanted.address(2).is_ok());
        assert!(wanted.address(3).is_err(), "the broadcast address is nobody's");
        assert!(wanted.address(4).is_err());
    }
}
