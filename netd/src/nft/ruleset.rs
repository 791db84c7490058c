//! netd's tables in the kernel, and what is known of them.
//!
//! To read a large ruleset back takes longer than everything else that netd does. But every transaction on any table of the network namespace has a number
//! (its *generation*), which the kernel tells for the asking. So what netd itself wrote, or has read, is what there is for as long as the generation
//! is the one that this led to; a change is then worked out from memory, and of the kernel only the rules of chains that change are read,
//! for their handles. Whoever else makes a transaction makes netd read everything again.
//!
//! What may not happen here: knowledge that outlives a transaction of somebody else's, or one of netd's that failed.

use std::collections::{BTreeMap, BTreeSet};

use nftnl::ProtoFamily;
use nix::net::if_::if_nametoindex;

use super::batch::Transaction;
use super::contents::Contents;
use super::kernel::{self, Found};
use super::layout::{Elements, Name, Set, Table, is_grown};
use super::rules::Node;
use super::rules::fast_path::FLOWTABLE;
use super::rules::folded::{self, chain_of_set};
use super::rules::{self, chain_of};
use super::{flowtable, open};
use crate::desired::{Direction, ElasticChange, GroupId, Network, SecurityGroup};
use crate::error::{Error, Result};
use crate::netfilter::NetfilterSocket;

#[derive(Debug)]
pub struct Ruleset {
    node: Node,
    /// Open for as long as it works: to close a socket, the kernel waits until what its transactions removed is gone for every packet, some ten
    /// milliseconds.
    socket: Option<NetfilterSocket>,
    known: Option<Known>,
}

/// What the tables hold, as of a generation.
#[derive(Debug)]
struct Known {
    generation: u32,
    /// Which of the callers' networks this is.
    version: u64,
    groups: BTreeMap<GroupId, SecurityGroup>,
    contents: Contents,
    /// Of each table, the names of its chains and sets.
    chains: Vec<BTreeSet<String>>,
    sets: Vec<BTreeSet<String>>,
    /// Of the flow table.
    devices: Option<BTreeSet<String>>,
}

impl Ruleset {
    pub fn new(node: Node) -> Self {
        Self { node, socket: None, known: None }
    }

    /// From now on nothing is known: everything is read again.
    pub fn forget(&mut self) {
        self.known = None;
    }

    /// The socket, which goes with a call that fails.
    fn socket(&mut self) -> Result<NetfilterSocket> {
        self.socket.take().map_or_else(open, Ok)
    }

    /// Makes the tables in the kernel hold what `network` needs. Two networks with the same `version` have the same rules and contents. Returns
    /// whether anything was written.
    pub fn apply(&mut self, network: &Network, version: u64) -> Result<bool> {
        let mut socket = self.socket()?;
        let generation = kernel::generation(&mut socket).map_err(Error::netfilter("reading nftables"))?;
        let devices = self.devices(&mut socket)?;
        let known = self.known.take().filter(|known| {
            // With its uplink goes what there is in the table of devices.
            let has_uplink = devices.as_ref().is_some_and(|devices| devices.contains(self.node.uplink.as_str()));
            known.generation == generation && has_uplink == self.node.fast_path
        });
        if known.as_ref().is_some_and(|known| known.version == version && known.devices == devices) {
            (self.known, self.socket) = (known, Some(socket));
            return Ok(false);
        }
        let contents = Contents::of(network);
        let differs =
            |group: &SecurityGroup| known.as_ref().is_none_or(|known| known.groups.get(&group.id) != Some(group));
        let folded = folded::elements(network.security_groups.values().filter(|group| differs(group)));
        let mut tables = rules::tables(&self.node, network, differs);
        // A bridge that could not be made keeps no other from its place.
        for flowtable in tables.iter_mut().filter_map(|table| table.flowtable.as_mut()) {
            flowtable.devices.retain(|device| if_nametoindex(device.as_str()).is_ok());
        }
        let was_folded = folded::elements(known.iter().flat_map(|known| known.groups_changed_in(network)));
        let mut transaction = Transaction::new();
        for (at, table) in tables.iter().enumerate() {
            match &known {
                Some(known) => {
                    let found = known.found(&mut socket, at, table, network, devices.clone())?;
                    let held = |set: &Set| of_set(&was_folded, &known.contents, table, set);
                    transaction.change_table(table, &found, held, |set| of_set(&folded, &contents, table, set));
                }
                None => {
                    let wanted = |set: &Set| of_set(&folded, &contents, table, set);
                    change_from_kernel(&mut transaction, &mut socket, table, wanted)?;
                }
            }
        }
        if known.is_none() && !self.node.fast_path {
            delete_if_there(&mut transaction, &mut socket, &Table::empty(ProtoFamily::NetDev))?;
        }
        let wrote = transaction.commit(&mut socket)?;
        let (mut chains, mut sets) = (vec![BTreeSet::new(); tables.len()], vec![BTreeSet::new(); tables.len()]);
        for (at, table) in tables.iter().enumerate() {
            if let Some(known) = &known {
                chains[at] = known.chains_kept(at, network);
                sets[at] = known.sets_kept(at, &chains[at]);
            }
            chains[at].extend(table.chains.iter().map(|chain| chain.name.to_string()));
            sets[at].extend(table.sets.iter().map(|set| set.name.to_string()));
        }
        let devices = tables.into_iter().find_map(|table| table.flowtable).map(|flowtable| flowtable.devices);
        let generation = if wrote { next(generation) } else { generation };
        let groups = network.security_groups.clone();
        self.known = Some(Known { generation, version, groups, contents, chains, sets, devices });
        self.socket = Some(socket);
        Ok(wrote)
    }

    /// Those of the flow table, of which the kernel takes what goes, without a new generation.
    fn devices(&self, socket: &mut NetfilterSocket) -> Result<Option<BTreeSet<String>>> {
        if !self.node.fast_path {
            return Ok(None);
        }
        let table = Table::empty(ProtoFamily::Ipv4);
        flowtable::read_devices(socket, &table, FLOWTABLE).map_err(Error::netfilter("reading the flow table"))
    }

    /// Makes the change in one transaction that says nothing of other elastic IPs; `network` is as it is after it. What the maps hold of those that
    /// change is taken to be what it should be: if it is not, the kernel refuses the whole.
    pub fn change_elastic_ips(&mut self, network: &Network, change: &ElasticChange) -> Result<bool> {
        let known = self.known.take();
        let gone = Contents::of_elastic_ips(network, change.before.iter());
        let new = Contents::of_elastic_ips(network, change.after.iter());
        let mut transaction = Transaction::new();
        for (family, sets) in rules::elastic_ip_sets(&self.node) {
            let table = Table::empty(family);
            for set in sets {
                transaction.change_elements(&table, &set, gone.of_set(&table, &set), new.of_set(&table, &set));
            }
        }
        let mut socket = self.socket()?;
        let wrote = transaction.commit(&mut socket)?;
        self.socket = Some(socket);
        self.known = known.map(|mut known| {
            known.contents.replace(gone, new);
            known.generation = if wrote { next(known.generation) } else { known.generation };
            known
        });
        Ok(wrote)
    }
}

impl Known {
    /// A table as it is, but for what stays in any case: the chains and sets of rules of groups that are the same in `network`. The rules are those of chains
    /// that may change.
    fn found(
        &self,
        socket: &mut NetfilterSocket,
        at: usize,
        table: &Table,
        network: &Network,
        devices: Option<BTreeSet<String>>,
    ) -> Result<Found> {
        let kept = self.chains_kept(at, network);
        let chains: BTreeSet<String> = self.chains[at].difference(&kept).cloned().collect();
        let mut rules = BTreeMap::new();
        for chain in table.chains.iter().filter(|chain| is_grown(&chain.name) && chains.contains(&*chain.name)) {
            let found = kernel::read_rules_of(socket, table, &chain.name);
            rules.insert(chain.name.to_string(), found.map_err(Error::netfilter("reading rules"))?);
        }
        let sets = self.sets[at].difference(&self.sets_kept(at, &kept)).cloned().collect();
        Ok(Found { chains, rules, sets, elements: BTreeMap::new(), devices })
    }

    /// The chains of groups that are in `network` as they were.
    fn chains_kept(&self, at: usize, network: &Network) -> BTreeSet<String> {
        let same = network.security_groups.values().filter(|group| self.groups.get(&group.id) == Some(group));
        let chains =
            same.flat_map(|group| [Direction::Inbound, Direction::Outbound].map(|way| chain_of(&group.id, way)));
        chains.filter(|name| self.chains[at].contains(name)).collect()
    }

    /// The sets of rules of these chains.
    fn sets_kept(&self, at: usize, chains: &BTreeSet<String>) -> BTreeSet<String> {
        let kept = |name: &&String| chain_of_set(name).is_some_and(|chain| chains.contains(chain));
        self.sets[at].iter().filter(kept).cloned().collect()
    }

    /// The groups as they were that are others in `network`, or are not there.
    fn groups_changed_in<'a>(&'a self, network: &'a Network) -> impl Iterator<Item = &'a SecurityGroup> {
        self.groups.values().filter(|group| network.security_groups.get(&group.id) != Some(group))
    }
}

/// The elements of a set: those of groups' rules are apart from all others.
fn of_set<'a>(folded: &'a BTreeMap<Name, Elements>, contents: &'a Contents, table: &Table, set: &Set) -> &'a Elements {
    folded.get(&set.name).unwrap_or_else(|| contents.of_set(table, set))
}

fn change_from_kernel<'a>(
    transaction: &mut Transaction,
    socket: &mut NetfilterSocket,
    table: &Table,
    wanted: impl Fn(&Set) -> &'a Elements,
) -> Result<()> {
    let found = kernel::read(socket, table).map_err(Error::netfilter("reading nftables"))?;
    match found {
        Some(found) if found.has_layout_of(table) => {
            transaction.change_table(table, &found, |set| found.elements(set), wanted);
        }
        _ => {
            tracing::info!(family = ?table.family, "making the nftables table anew");
            transaction.replace_table(table, wanted);
        }
    }
    Ok(())
}

fn delete_if_there(transaction: &mut Transaction, socket: &mut NetfilterSocket, table: &Table) -> Result<()> {
    if kernel::exists(socket, table).map_err(Error::netfilter("reading nftables"))? {
        transaction.delete_table(table);
    }
    Ok(())
}

/// The generation after one transaction; none has the number 0 (`nf_tables_commit`).
fn next(generation: u32) -> u32 {
    generation.checked_add(1).unwrap_or(1)
}
