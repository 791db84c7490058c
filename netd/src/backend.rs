//! Who judges and translates packets: one trait, and what its implementations tell in common.
//!
//! netd hands a [`Backend`] the whole parsed network. The backend reads what the kernel has of its rules, and writes what differs, each change in as few
//! steps as its kernel interface knows; what is written is complete whenever it is cut off and run again. Links, addresses, routes and connections are not
//! its business.
//!
//! * [`Nftables`]: tables of nf_tables by netlink; one transaction.
//! * [`Iptables`]: chains of x_tables by `iptables-restore`, for hosts without nf_tables; one transaction for each table.
//!
//! What may not happen here: touching a rule, chain or table that is not netd's own; a network being taken in part, because a backend lacks
//! something. What it lacks it refuses or tells ([`Backend::check`], [`Backend::missing`]).

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::bridging::Bridging;
use crate::desired::{ElasticChange, InvalidNetwork, LinkName, Network};
use crate::error::{Error, Result};
use crate::iptables::{self, Iptables};
use crate::limits::Limits;
use crate::nft::{self, Nftables};

/// Ports that instances without an elastic IP have outside, where they appear as the node: never one of those that speak for the node itself to whoever trusts
/// them (`ip_unprivileged_port_start`). A port of the range is kept where it is free.
pub const PORTS_OF_INSTANCES: RangeInclusive<u16> = 1024..=65535;

/// Which backend a caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendKind {
    /// The first of them that this machine has.
    Auto,
    Nftables,
    Iptables,
}

/// Whether packets of connections that there are may pass by the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum FastPath {
    /// Where the kernel and the backend can.
    Auto,
    Off,
}

/// The backend that was asked for.
pub fn choose(kind: BackendKind, fast_path: FastPath, uplink: LinkName, limits: Limits) -> Result<Arc<dyn Backend>> {
    match kind {
        BackendKind::Nftables => Ok(Arc::new(Nftables::new(uplink, limits, fast_path)?)),
        BackendKind::Iptables => Ok(Arc::new(Iptables::new(uplink, limits)?)),
        BackendKind::Auto => match nft::probe() {
            Ok(()) => choose(BackendKind::Nftables, fast_path, uplink, limits),
            Err(missing) => {
                tracing::warn!(%missing, "no nftables here; taking iptables");
                choose(BackendKind::Iptables, fast_path, uplink, limits)
                    .map_err(|error| Error::Backend(format!("there is no backend: {missing}; {error}")))
            }
        },
    }
}

/// Removes the rules of every backend but `kept`, which another netd may have left. Returns whether there were any.
pub fn remove_all_but(kept: Option<&dyn Backend>) -> Result<bool> {
    let is_kept = |name| kept.is_some_and(|kept| kept.name() == name);
    let tables = !is_kept("nftables") && nft::probe().is_ok() && nft::clean()?;
    let chains = !is_kept("iptables") && iptables::clean()?;
    Ok(tables || chains)
}

/// What makes the kernel judge and translate packets as a network says.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Its name, as a capability is named.
    fn name(&self) -> &'static str;

    /// How it judges what passes between two instances on one bridge. The bridges and their ports are made for that.
    fn bridging(&self) -> Bridging;

    /// Whether packets of connections that there are pass by its rules.
    fn has_fast_path(&self) -> bool {
        false
    }

    /// Refuses what this backend cannot serve in whole. It serves any elastic IPs, which may change without its being asked.
    fn check(&self, network: &Network) -> Result<(), InvalidNetwork>;

    /// Makes the rules in the kernel those of `network`; returns whether anything was written. May block for a moment. Networks of one `version` are the
    /// same, but for elastic IPs that [`Backend::change_elastic_ips`] was told of.
    fn apply(&self, network: &Network, version: u64) -> Result<bool>;

    /// The same where `network` differs from what was applied last by this change alone. An error may only say that the kernel is not as
    /// it was left.
    fn change_elastic_ips(&self, network: &Network, _change: &ElasticChange, version: u64) -> Result<bool> {
        self.apply(network, version)
    }

    /// What the backend remembers of the kernel's rules is not to be trusted: it reads them again.
    fn forget(&self) {}

    /// Reads back what the rules have counted.
    fn counters(&self) -> Result<Counters>;

    /// What of a node's network it does not have, by the name of the capability, and why; nothing where it has all that netd knows.
    fn missing(&self) -> Vec<(&'static str, String)>;
}

/// Packets and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counter {
    pub packets: u64,
    pub bytes: u64,
}

impl std::ops::AddAssign for Counter {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// What one interface may only use so much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bound {
    Arp,
    Dhcp,
    Gateway,
    Broadcast,
    Fragments,
    OpenedTooFast,
    OpenedTooMany,
    TakenTooFast,
    TakenTooMany,
}

/// What a backend has counted.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets to an elastic IP, by public address.
    pub elastic_in: BTreeMap<Ipv4Addr, Counter>,
    /// Packets that leave as an elastic IP, by public address.
    pub elastic_out: BTreeMap<Ipv4Addr, Counter>,
    /// Frames that anti-spoofing dropped, by tap or trunk port.
    pub spoofed: BTreeMap<LinkName, Counter>,
    /// Frames of protocols that segments do not have, by tap.
    pub foreign: BTreeMap<LinkName, Counter>,
    /// Packets that no security group let in or out, by the interface's mark.
    pub denied_in: BTreeMap<u32, Counter>,
    pub denied_out: BTreeMap<u32, Counter>,
    /// Frames beyond a bound, by tap.
    pub limited_frames: BTreeMap<(Bound, LinkName), Counter>,
    /// First packets of connections beyond a bound, by the interface's mark.
    pub limited_connections: BTreeMap<(Bound, u32), Counter>,
    /// First packets of connections that a rule of a security group let pass, by the ids of group and rule.
    pub group_rules: BTreeMap<(String, String), Counter>,
}
