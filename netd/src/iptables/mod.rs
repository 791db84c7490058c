//! The backend for hosts without nf_tables: chains of x_tables, which is what `iptables` was before it became a face of nf_tables.
//!
//! * `rules/`: **the rules themselves**; whoever wants to know what happens to a packet reads this.
//! * `ruleset.rs`: tables as data, and the difference to what there is as one script.
//! * `saved.rs`: what there is, read back.
//! * `program.rs`: the programs that read and write. x_tables has no netlink, and the layout of its binary interface belongs to the program.
//! * `counters.rs`: what the rules have counted.
//!
//! A table is replaced whole by one call of `iptables-restore --noflush`, with netd's chains changed and all others as they are: that is atomic for each
//! table, and not over the three that are used. So each order of tables leads through states that are closed: what is judged is judged in the table
//! `mangle` alone, translation (`nat`) and zones (`raw`) decide on first packets only, and connections that began in between are ended when they contradict
//! the network, as after any change.
//!
//! Rules name instances, since x_tables has no maps. A packet is led from its bridge to its interface by chains, so that it passes the rules of its own
//! segment and interface and no others'; but the more interfaces a segment has, and the more elastic IPs a node, the more it passes. Sets (`ipset`) are not used.
//!
//! Judging in `mangle`, netd comes before the host's own `filter`, which goes on to judge as it did: nothing is opened that it closes.
//!
//! What may not happen here: touching a chain that does not begin with [`PREFIX`], or a rule that does not lead to one.

mod counters;
mod program;
mod rules;
mod ruleset;
mod saved;

use crate::api::DropPolicy;
use crate::backend::{Backend, Counters};
use crate::bridging::Bridging;
use crate::desired::{InvalidNetwork, LinkName, Network};
use crate::error::{Error, Result};
use crate::limits::Limits;
use program::Programs;
use saved::Saved;

/// What the names of netd's chains begin with.
const PREFIX: &str = "mallee-";

/// The first Linux whose bridges have ports that are locked to the addresses behind them (`IFLA_BRPORT_LOCKED`).
const LOCKED_PORTS_SINCE: (u32, u32) = (5, 18);

/// The backend that is x_tables, by the programs of the `iptables` package.
#[derive(Debug)]
pub struct Iptables {
    uplink: LinkName,
    limits: Limits,
    programs: Programs,
}

impl Iptables {
    /// Finds the programs, and whether the kernel has what the rules are made of; an error names what is missing.
    pub fn new(uplink: LinkName, limits: Limits) -> Result<Self> {
        let release =
            std::fs::read_to_string("/proc/sys/kernel/osrelease").map_err(Error::io("asking for the kernel"))?;
        if version(&release).is_none_or(|version| version < LOCKED_PORTS_SINCE) {
            let (major, minor) = LOCKED_PORTS_SINCE;
            return Err(Error::Backend(format!(
                "the iptables backend needs Linux {major}.{minor} for bridge ports that are locked to an address; this is {}",
                release.trim_end()
            )));
        }
        let programs = Programs::find()?;
        programs.probe()?;
        Ok(Self { uplink, limits, programs })
    }
}

impl Backend for Iptables {
    fn name(&self) -> &'static str {
        "iptables"
    }

    fn bridging(&self) -> Bridging {
        Bridging::Routed
    }

    fn check(&self, network: &Network) -> Result<(), InvalidNetwork> {
        match network.interfaces.values().find(|interface| !interface.source_check) {
            Some(interface) => Err(InvalidNetwork::new(
                format!("interface {}", interface.id),
                "has its source check off, which the iptables backend cannot serve: it knows senders by their addresses, and leads \
                 nothing to an instance but what is for its own; a host with nftables can",
            )),
            None => Ok(()),
        }
    }

    fn apply(&self, network: &Network, _version: u64) -> Result<bool> {
        let found = Saved::parse(&self.programs.save()?);
        let script = ruleset::difference(&rules::tables(&self.uplink, &self.limits, network), &found);
        if script.is_empty() {
            return Ok(false);
        }
        tracing::debug!(script, "changing x_tables");
        self.programs.restore(&script)?;
        Ok(true)
    }

    fn counters(&self) -> Result<Counters> {
        Ok(counters::read(&Saved::parse(&self.programs.save()?)))
    }

    fn missing(&self) -> Vec<(&'static str, String)> {
        [
            ("nftables", "not used by this netd: its backend is iptables (`--backend`)"),
            (
                "source-check-off",
                "the iptables backend refuses interfaces without source check; it needs nftables",
            ),
            ("fast-path", "the iptables backend has none: each packet goes through all rules"),
            (
                "limits",
                "the iptables backend bounds how fast an instance opens connections, asks its gateway and asks for leases, and nothing else: not its ARP, \
                 broadcasts and fragments, not connections to it, not how many there are. It needs nftables",
            ),
            (
                "fragments",
                "iptables sees packets when their fragments are together, so an instance of this node could spoil fragmented packets of another \
                 that has, or whose name it takes, the same addresses. It needs nftables",
            ),
            ("trace", "the kernel tells which rules a packet passes for nftables only"),
        ]
        .map(|(name, reason)| (name, reason.to_owned()))
        .into()
    }
}

/// Removes netd's chains, where there are any and a program that could have made them. Returns whether there were.
pub fn clean() -> Result<bool> {
    // Asking for tables where there are none would make some.
    if tables().is_empty() {
        return Ok(false);
    }
    let Ok(programs) = Programs::find() else { return Ok(false) };
    let script = ruleset::difference(&[], &Saved::parse(&programs.save()?));
    if script.is_empty() {
        return Ok(false);
    }
    programs.restore(&script)?;
    Ok(true)
}

/// Chains of x_tables that drop what none of their rules accepts; or the tables, where no program is here that could say.
pub fn drop_policies() -> Result<(Vec<DropPolicy>, Vec<String>)> {
    let tables = tables();
    match Programs::find() {
        Ok(programs) if !tables.is_empty() => Ok((Saved::parse(&programs.save()?).drop_policies(), Vec::new())),
        _ => Ok((Vec::new(), tables)),
    }
}

/// The tables of x_tables that there are in this thread's network namespace, which is not the process's where the thread has left that.
fn tables() -> Vec<String> {
    let names = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    names.lines().map(str::to_owned).collect()
}

/// Major and minor number of a release such as `6.1.0-13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-']).map(|part| part.trim().parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn a_release_begins_with_its_version() {
        assert_eq!(version("6.1.0-13-amd64\n"), Some((6, 1)));
        assert_eq!(version("5.18-rc1"), Some((5, 18)));
        assert_eq!(version("linux"), None);
    }
}
