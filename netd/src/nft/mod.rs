//! netd's tables in nf_tables: what they hold, and how they are made so in one transaction.
//!
//! * `expr.rs`, `rule.rs`: the expressions that rules are made of, and a vocabulary for writing rules.
//! * `layout.rs`: a table as data: its sets, maps, chains and rules.
//! * `rules/`: **the rules themselves**; whoever wants to know what happens to a packet reads this.
//! * `contents.rs`: what the sets and maps hold for a given desired network.
//! * `kernel.rs`: reads a table back from the kernel.
//! * `counters.rs`: what the tables have counted.
//! * `foreign.rs`: what of others' drops packets of instances, to be told.
//! * `batch.rs`: writes a difference as one netlink batch, which is one transaction.
//!
//! Rules do not depend on the network, but for those of security groups: they only name sets and maps. So an ordinary change, such as
//! moving an elastic IP, touches map elements and nothing else, and a packet costs the same with one
//! instance as with thousands. A change of a group touches the rules that differ. Only when the other rules in the kernel are not those
//! of this program (a new version, or somebody's `nft flush ruleset`) is a table made anew, in the same transaction.
//!
//! Only the tables named [`TABLE`] in the `ip` and `bridge` families are ever written.

mod batch;
mod contents;
mod counters;
mod expr;
mod foreign;
mod kernel;
mod layout;
mod rule;
mod rules;

use nftnl::ProtoFamily;

pub use contents::Contents;
pub use counters::{Counters, read as counters};
pub use foreign::drop_policies;
pub use kernel::Counter;
pub use layout::Set;
pub use rules::{chain_of, limits};

use crate::bridging::Bridging;
use crate::desired::Network;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::netfilter::NetfilterSocket;
use batch::Transaction;
use layout::Table;

/// Name of netd's tables.
pub const TABLE: &str = "mallee";

/// Makes the tables in the kernel hold what `network` needs. Returns whether anything was written.
pub fn apply(network: &Network, uplink: &str, bridging: Bridging, limits: &Limits) -> Result<bool> {
    let contents = Contents::of(network);
    let mut socket = open()?;
    let mut transaction = Transaction::new();
    for table in rules::tables(uplink, bridging, limits, network) {
        let found = kernel::read(&mut socket, &table).map_err(Error::netfilter("reading nftables"))?;
        match found {
            Some(found) if found.has_layout_of(&table) => {
                transaction.change_table(&table, &found, |set| contents.of_set(&table, set));
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
    let [ip, _] = any_tables();
    kernel::exists(&mut socket, &ip).map_err(Error::netfilter("asking for nf_tables"))?;
    Ok(())
}

/// The tables by name alone.
fn any_tables() -> [Table; 2] {
    rules::tables("unused", Bridging::Apart, &Limits::default(), &Network::default())
}

/// Whether rules on a bridge may ask for a frame's connection. Found out by asking for such a rule, in a table that is gone again at the end of the
/// same transaction.
pub fn has_bridge_conntrack() -> Result<bool> {
    let table = Table {
        family: ProtoFamily::Bridge,
        name: "mallee_probe",
        sets: vec![],
        chains: vec![layout::Chain {
            name: "probe".into(),
            base: None,
            rules: vec![rule::Rule::new("probe").state(rule::State::Invalid).drop()],
        }],
    };
    let mut transaction = Transaction::new();
    transaction.replace_table(&table, |_| layout::Elements::new());
    transaction.delete_table(&table);
    match transaction.commit(&mut open()?) {
        Ok(_) => Ok(true),
        Err(Error::Netfilter { source, .. }) if source.kind() != std::io::ErrorKind::PermissionDenied => {
            tracing::debug!(%source, "this kernel has no conntrack for bridges");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn open() -> Result<NetfilterSocket> {
    NetfilterSocket::open().map_err(Error::netfilter("opening a netfilter socket"))
}
