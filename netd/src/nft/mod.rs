//! netd's tables in nf_tables: what they hold, and how they are made so in one transaction.
//!
//! * `expr.rs`, `rule.rs`: the expressions that rules are made of, and a vocabulary for writing rules.
//! * `layout.rs`: a table as data: its sets, maps, chains and rules.
//! * `rules.rs`: **the rules themselves**; whoever wants to know what happens to a packet reads this.
//! * `trunk.rs`: the rules for what comes from other nodes and goes there.
//! * `contents.rs`: what the sets and maps hold for a given desired network.
//! * `kernel.rs`: reads a table back from the kernel.
//! * `foreign.rs`: what of others' drops packets of instances, to be told.
//! * `batch.rs`: writes a difference as one netlink batch, which is one transaction.
//!
//! Rules do not depend on the network: they only name sets and maps. So an ordinary change, such as
//! moving an elastic IP, touches map elements and nothing else, and a packet costs the same with one
//! instance as with thousands. Only when the rules in the kernel are not those of this program (a
//! new version, or somebody's `nft flush ruleset`) is a table made anew, in the same transaction.
//!
//! Only the tables named [`TABLE`] in the `ip` and `bridge` families are ever written.

mod batch;
mod contents;
mod expr;
mod foreign;
mod kernel;
mod layout;
mod rule;
mod rules;
mod trunk;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

pub use contents::Contents;
pub use foreign::drop_policies;
pub use kernel::Counter;

use crate::desired::{LinkName, Network};
use crate::error::{Error, Result};
use crate::netfilter::NetfilterSocket;
use batch::Transaction;
use layout::Table;

/// Name of netd's tables.
pub const TABLE: &str = "mallee";

/// Makes the tables in the kernel hold what `network` needs. Returns whether anything was written.
pub fn apply(network: &Network, uplink: &str) -> Result<bool> {
    let contents = Contents::of(network);
    let mut socket = open()?;
    let mut transaction = Transaction::new();
    for table in rules::tables(uplink) {
        let found = kernel::read(&mut socket, &table).map_err(Error::netfilter("reading nftables"))?;
        match found {
            Some(found) if found.has_layout_of(&table) => {
                for set in &table.sets {
                    let wanted = contents.of_set(&table, set);
                    transaction.change_elements(&table, set, &found.elements(set), &wanted);
                }
            }
            _ => {
                tracing::info!(family = ?table.family, "making the nftables table anew");
                transaction.replace_table(&table, |set| contents.of_set(&table, set));
            }
        }
    }
    transaction.commit(&mut socket)
}

/// Removes netd's tables. Returns whether there were any.
pub fn clean() -> Result<bool> {
    let mut socket = open()?;
    let mut transaction = Transaction::new();
    for table in rules::tables("unused") {
        let found = kernel::exists(&mut socket, &table).map_err(Error::netfilter("reading nftables"))?;
        if found {
            transaction.delete_table(&table);
        }
    }
    transaction.commit(&mut socket)
}

/// Counters that the tables keep.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets from outside to an elastic IP, by public address.
    pub elastic_in: BTreeMap<Ipv4Addr, Counter>,
    /// Packets that leave as an elastic IP, by public address.
    pub elastic_out: BTreeMap<Ipv4Addr, Counter>,
    /// Frames that anti-spoofing dropped, by tap or trunk port.
    pub spoofed: BTreeMap<LinkName, Counter>,
}

/// Reads the counters back from the kernel.
pub fn counters() -> Result<Counters> {
    let mut socket = open()?;
    let mut read = |table: &Table, set: &str| {
        kernel::counters(&mut socket, table, set).map_err(Error::netfilter(format!("reading the set {set}")))
    };
    let [ip, bridge] = rules::tables("unused");
    let by_address = |counters: Vec<(Vec<u8>, Counter)>| {
        counters
            .into_iter()
            .filter_map(|(key, counter)| Some((Ipv4Addr::from(<[u8; 4]>::try_from(key).ok()?), counter)))
            .collect()
    };
    Ok(Counters {
        elastic_in: by_address(read(&ip, rules::EIP_IN_COUNT.name)?),
        elastic_out: by_address(read(&ip, rules::EIP_OUT_COUNT.name)?),
        spoofed: read(&bridge, rules::SPOOFED.name)?
            .into_iter()
            .filter_map(|(key, counter)| Some((crate::netfilter::text(&key).parse().ok()?, counter)))
            .collect(),
    })
}

/// Asks the kernel whether nf_tables is there at all; an error says what is missing.
pub fn probe() -> Result<()> {
    let mut socket = open()?;
    let [ip, _] = rules::tables("unused");
    kernel::exists(&mut socket, &ip).map_err(Error::netfilter("asking for nf_tables"))?;
    Ok(())
}

fn open() -> Result<NetfilterSocket> {
    NetfilterSocket::open().map_err(Error::netfilter("opening a netfilter socket"))
}
