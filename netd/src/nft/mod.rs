//! netd's tables in nf_tables: what they hold, and how they are made so in one transaction.
//!
//! * `expr.rs`, `rule.rs`: the expressions that rules are made of, and a vocabulary for writing rules.
//! * `layout.rs`: a table as data: its sets, maps, chains and rules.
//! * `rules/`: **the rules themselves**; whoever wants to know what happens to a packet reads this.
//! * `contents.rs`: what the sets and maps hold for a given desired network.
//! * `flowtable.rs`: flow tables, which connections that there are go by.
//! * `kernel.rs`: reads a table back from the kernel.
//! * `counters.rs`: what the tables have counted.
//! * `foreign.rs`: what of others' drops packets of instances, to be told.
//! * `batch.rs`: writes a difference as one netlink batch, which is one transaction.
//! * `ruleset.rs`: from a network to the difference, by what is known of the kernel or read from it.
//!
//! Rules do not depend on the network, but for those of security groups: they only name sets and maps (and many rules of a group are elements too). So an ordinary change, such as
//! moving an elastic IP, touches map elements and nothing else, and a packet costs the same with one
//! instance as with thousands. A change of a group touches the rules that differ. Only when the other rules in the kernel are not those
//! of this program (a new version, or somebody's `nft flush ruleset`) is a table made anew, in the same transaction.
//!
//! Only the tables named [`TABLE`] in the `ip`, `bridge` and `netdev` families are ever written.

mod batch;
mod contents;
mod counters;
mod expr;
mod flowtable;
mod foreign;
mod kernel;
mod layout;
mod rule;
mod rules;
mod ruleset;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nftnl::ProtoFamily;

pub use foreign::drop_policies;

use crate::backend::{Backend, Counters, FastPath};
use crate::bridging::Bridging;
use crate::desired::{ElasticChange, InvalidNetwork, LinkName, Network};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::netfilter::NetfilterSocket;
use batch::Transaction;
use layout::Table;
use rules::Node;
use ruleset::Ruleset;

/// Name of netd's tables.
pub const TABLE: &str = "mallee";

/// The backend that is nf_tables, by netlink.
#[derive(Debug)]
pub struct Nftables {
    bridging: Bridging,
    ruleset: Mutex<Ruleset>,
    /// Options of the kernel without which no network can be limited, and so none is taken.
    missing: Vec<&'static str>,
    /// Why every packet goes through the rules; nothing where those of connections that there are do not.
    no_fast_path: String,
}

impl Nftables {
    /// Finds out what this kernel's nf_tables can do.
    pub fn new(uplink: LinkName, limits: Limits, fast_path: FastPath) -> Result<Self> {
        let bridging = Bridging::detect()?;
        let no_fast_path = fast_path_problem(fast_path, bridging)?;
        let node = Node { uplink, bridging, limits, fast_path: no_fast_path.is_empty() };
        Ok(Self { bridging, ruleset: Mutex::new(Ruleset::new(node)), missing: missing_for_limits()?, no_fast_path })
    }

    /// What the kernel lacks for limits, if anything.
    fn without_limits(&self) -> Option<String> {
        let options = self.missing.join(" nor ");
        (!options.is_empty()).then(|| format!("its kernel has no {options}, and every network is refused for it"))
    }

    fn ruleset(&self) -> MutexGuard<'_, Ruleset> {
        // What is known is taken out before anything is done that could fail.
        self.ruleset.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Nftables {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn bridging(&self) -> Bridging {
        self.bridging
    }

    fn has_fast_path(&self) -> bool {
        self.no_fast_path.is_empty()
    }

    fn check(&self, _network: &Network) -> Result<(), InvalidNetwork> {
        match self.without_limits() {
            Some(problem) => Err(InvalidNetwork::new("this node", problem)),
            None => Ok(()),
        }
    }

    fn apply(&self, network: &Network, version: u64) -> Result<bool> {
        self.ruleset().apply(network, version)
    }

    fn change_elastic_ips(&self, network: &Network, change: &ElasticChange, _version: u64) -> Result<bool> {
        self.ruleset().change_elastic_ips(network, change)
    }

    fn forget(&self) {
        self.ruleset().forget();
    }

    fn counters(&self) -> Result<Counters> {
        counters::read()
    }

    fn missing(&self) -> Vec<(&'static str, String)> {
        let missing = [
            ("security-groups", self.bridging.problem().to_owned()),
            ("limits", self.without_limits().unwrap_or_default()),
            ("fast-path", self.no_fast_path.clone()),
        ];
        missing.into_iter().filter(|(_, problem)| !problem.is_empty()).collect()
    }
}

/// Removes netd's tables. Returns whether there were any.
pub fn clean() -> Result<bool> {
    let mut socket = open()?;
    let mut transaction = Transaction::new();
    for table in any_tables() {
        let found = kernel::exists(&mut socket, &table).map_err(Error::netfilter("reading nftables"))?;
        if found {
            transaction.delete_table(&table);
        }
    }
    transaction.commit(&mut socket)
}

/// Asks the kernel whether nf_tables is there at all; an error says what is missing.
pub fn probe() -> Result<()> {
    let mut socket = open()?;
    let [ip, ..] = any_tables();
    kernel::exists(&mut socket, &ip).map_err(Error::netfilter("asking for nf_tables"))?;
    Ok(())
}

/// The tables by name alone.
fn any_tables() -> [Table; 3] {
    [ProtoFamily::Ipv4, ProtoFamily::Bridge, ProtoFamily::NetDev].map(Table::empty)
}

/// Why connections that there are cannot pass by the rules, or nothing where they can.
fn fast_path_problem(asked: FastPath, bridging: Bridging) -> Result<String> {
    let problem = match asked {
        FastPath::Off => "turned off (`--fast-path off`): each packet goes through all rules",
        FastPath::Auto if bridging != Bridging::Conntrack => {
            "it needs bridges that know connections: load the module `nf_conntrack_bridge` (CONFIG_NF_CONNTRACK_BRIDGE) and start netd again"
        }
        FastPath::Auto if !takes(&rules::fast_path::needed())? => {
            "this kernel has no flow tables for IPv4 (CONFIG_NF_FLOW_TABLE, CONFIG_NF_FLOW_TABLE_INET, CONFIG_NFT_FLOW_OFFLOAD), or no rules for what leaves \
             by a device (CONFIG_NETFILTER_EGRESS): each packet goes through all rules"
        }
        FastPath::Auto => "",
    };
    Ok(problem.to_owned())
}

/// Whether rules on a bridge may ask for a frame's connection.
pub fn has_bridge_conntrack() -> Result<bool> {
    has(ProtoFamily::Bridge, Vec::new(), rule::Rule::new("probe").state(rule::State::Invalid).drop())
}

/// The kernel's options that limits need and that are not there.
fn missing_for_limits() -> Result<Vec<&'static str>> {
    let mut missing = Vec::new();
    for (option, sets, rule) in rules::limits::needed() {
        if !has(ProtoFamily::Ipv4, sets, rule)? {
            missing.push(option);
        }
    }
    Ok(missing)
}

/// Whether the kernel takes such a rule and these sets. Found out by asking for them, in a table that is gone again at the end of the same transaction.
fn has(family: ProtoFamily, sets: Vec<layout::Set>, rule: rule::Rule) -> Result<bool> {
    let chains = vec![layout::Chain { name: "probe".into(), base: None, rules: vec![rule] }];
    takes(&[Table { family, name: rules::PROBE, sets, chains, flowtable: None }])
}

fn takes(tables: &[Table]) -> Result<bool> {
    let mut transaction = Transaction::new();
    for table in tables {
        transaction.replace_table(table, |_| &layout::NO_ELEMENTS);
        transaction.delete_table(table);
    }
    match transaction.commit(&mut open()?) {
        Ok(_) => Ok(true),
        Err(Error::Netfilter { source, .. }) if source.kind() != std::io::ErrorKind::PermissionDenied => {
            tracing::debug!(%source, ?tables, "this kernel does not take these rules");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Has the kernel tell of packets from one address to another which rules they pass, from their first hook on. Only where no packet but one's own is.
pub fn trace(from: Ipv4Addr, to: Ipv4Addr) -> Result<()> {
    let mut transaction = Transaction::new();
    for (family, first) in [(ProtoFamily::Bridge, i32::MIN), (ProtoFamily::Ipv4, i32::MIN)] {
        let mut rule = rule::Rule::new("traced");
        if family == ProtoFamily::Bridge {
            rule = rule.ether_type(rules::ETHER_IPV4);
        }
        let rules = vec![rule.source_is(from).destination_is(to).traced()];
        let base = Some(layout::Base {
            kind: nftnl::ChainType::Filter,
            hook: nftnl::Hook::PreRouting,
            priority: first,
            device: None,
        });
        let chains = vec![layout::Chain { name: "trace".into(), base, rules }];
        let table = Table { family, name: "mallee_trace", sets: vec![], chains, flowtable: None };
        transaction.replace_table(&table, |_| &layout::NO_ELEMENTS);
    }
    transaction.commit(&mut open()?)?;
    Ok(())
}

/// What each rule of netd's tables is for, by the table's family and the kernel's number of the rule.
pub fn rule_names() -> Result<BTreeMap<(u32, u64), String>> {
    let mut socket = open()?;
    let mut names = BTreeMap::new();
    for table in any_tables() {
        let found = kernel::read_rules(&mut socket, &table).map_err(Error::netfilter("reading the rules"))?;
        for rule in found.into_values().flatten() {
            // Without the digest at the end (`Table::comment`).
            let purpose = rule.comment.rsplit_once(" [").map_or(rule.comment.as_str(), |(purpose, _)| purpose);
            names.insert((table.family as u32, rule.handle), purpose.to_owned());
        }
    }
    Ok(names)
}

/// Of each group's chain in which an element of a set has let a packet pass, what that element is: by the table's family and the chain's name. Where packets pass but
/// one, the rule that let it pass.
pub fn elements_passed() -> Result<BTreeMap<(u32, String), String>> {
    let mut socket = open()?;
    let mut passed = BTreeMap::new();
    for table in any_tables() {
        let counters = kernel::counters_of_folded(&mut socket, &table);
        for (set, elements) in counters.map_err(Error::netfilter("reading the sets of groups' rules"))? {
            let Some(chain) = rules::folded::chain_of_set(&set) else { continue };
            let element = elements.into_iter().find(|(_, counter)| counter.packets > 0);
            passed.extend(element.map(|(name, _)| ((table.family as u32, chain.to_owned()), name)));
        }
    }
    Ok(passed)
}

/// Whether a rule of this purpose looks up others in a set, of which [`elements_passed`] tells.
pub fn is_lookup_of_rules(purpose: &str) -> bool {
    purpose.starts_with(rules::folded::PURPOSE)
}

fn open() -> Result<NetfilterSocket> {
    NetfilterSocket::open().map_err(Error::netfilter("opening a netfilter socket"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::testing;

    #[test]
    fn a_kernel_without_limits_is_refused_by_its_option() {
        let (uplink, limits): (LinkName, _) = ("pub0".parse().unwrap(), Limits::default());
        let ruleset = Mutex::new(Ruleset::new(Node { uplink, bridging: Bridging::Apart, limits, fast_path: false }));
        let no_fast_path = String::new();
        let missing = vec!["CONFIG_NFT_LIMIT"];
        let nftables = Nftables { bridging: Bridging::Apart, ruleset, missing, no_fast_path };
        let refused = nftables.check(&testing::network()).unwrap_err();
        assert!(refused.problem.contains("CONFIG_NFT_LIMIT"), "{refused}");
    }
}
