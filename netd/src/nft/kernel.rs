//! Reads netd's tables back from the kernel.
//!
//! Writing needs expressions, which libnftnl encodes; reading needs only names, comments, keys and
//! counters, for which the attributes are walked directly (`include/uapi/linux/netfilter/nf_tables.h`).

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::layout::{Elements, Set, Table};
use crate::netfilter::{NetfilterSocket, attribute, attributes, put, text};

// Attribute numbers that the `libc` crate does not have.
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_USERDATA: u16 = 7;
const TABLE_NAME: u16 = 1;
pub(super) const CHAIN_TABLE: u16 = 1;
pub(super) const CHAIN_NAME: u16 = 3;
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const ELEMENTS_TABLE: u16 = 1;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS_LIST: u16 = 3;
const LIST_ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_EXPR: u16 = 7;
const DATA_VALUE: u16 = 1;
const EXPR_DATA: u16 = 2;
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;
/// Type of a comment in a rule's user data (`NFTNL_UDATA_RULE_COMMENT`).
const USERDATA_COMMENT: u8 = 0;

/// Packets and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counter {
    pub packets: u64,
    pub bytes: u64,
}

/// A table as the kernel has it.
pub struct Found {
    chains: BTreeSet<String>,
    /// Comments of each chain's rules, in order.
    rules: BTreeMap<String, Vec<String>>,
    sets: BTreeMap<String, Elements>,
}

impl Found {
    /// True when chains, rules and sets are those of `table`; what the sets hold does not matter.
    pub fn has_layout_of(&self, table: &Table) -> bool {
        let chains_match = self.chains.len() == table.chains.len()
            && table.chains.iter().all(|chain| {
                let wanted: Vec<String> = chain.rules.iter().map(|rule| table.comment(chain, rule)).collect();
                self.chains.contains(chain.name) && self.rules.get(chain.name).unwrap_or(&Vec::new()) == &wanted
            });
        let sets_match =
            self.sets.len() == table.sets.len() && table.sets.iter().all(|set| self.sets.contains_key(set.name));
        chains_match && sets_match
    }

    pub fn elements(&self, set: &Set) -> Elements {
        self.sets.get(set.name).cloned().unwrap_or_default()
    }
}

/// Whether the table is there at all.
pub fn exists(socket: &mut NetfilterSocket, table: &Table) -> io::Result<bool> {
    let names = socket.dump(kind(libc::NFT_MSG_GETTABLE), table.family as u8, &[], |entry| {
        Ok(attribute(entry, TABLE_NAME)?.map(text))
    })?;
    Ok(names.iter().any(|name| name == table.name))
}

/// The table as it is, or none.
pub fn read(socket: &mut NetfilterSocket, table: &Table) -> io::Result<Option<Found>> {
    if !exists(socket, table)? {
        return Ok(None);
    }
    let mut found =
        Found { chains: read_chains(socket, table)?, rules: read_rules(socket, table)?, sets: BTreeMap::new() };
    for name in read_set_names(socket, table)? {
        let entries = read_elements(socket, table, &name)?;
        let elements = entries.into_iter().map(|entry| (entry.key, entry.value)).collect();
        found.sets.insert(name, elements);
    }
    Ok(Some(found))
}

/// The counters of a set's elements, by key.
pub fn counters(socket: &mut NetfilterSocket, table: &Table, set: &str) -> io::Result<Vec<(Vec<u8>, Counter)>> {
    let entries = read_elements(socket, table, set)?;
    Ok(entries.into_iter().map(|entry| (entry.key, entry.counter)).collect())
}

pub(super) fn kind(message: i32) -> u16 {
    (libc::NFNL_SUBSYS_NFTABLES << 8) as u16 | message as u16
}

fn read_chains(socket: &mut NetfilterSocket, table: &Table) -> io::Result<BTreeSet<String>> {
    let chains = socket.dump(kind(libc::NFT_MSG_GETCHAIN), table.family as u8, &[], |entry| {
        named_in_table(entry, CHAIN_TABLE, CHAIN_NAME, table)
    })?;
    Ok(chains.into_iter().collect())
}

fn read_set_names(socket: &mut NetfilterSocket, table: &Table) -> io::Result<Vec<String>> {
    socket.dump(kind(libc::NFT_MSG_GETSET), table.family as u8, &[], |entry| {
        named_in_table(entry, SET_TABLE, SET_NAME, table)
    })
}

/// The name of an entry, when it is of netd's table.
fn named_in_table(entry: &[u8], table_kind: u16, name_kind: u16, table: &Table) -> io::Result<Option<String>> {
    let of_table = attribute(entry, table_kind)?.map(text).as_deref() == Some(table.name);
    Ok(if of_table { attribute(entry, name_kind)?.map(text) } else { None })
}

fn read_rules(socket: &mut NetfilterSocket, table: &Table) -> io::Result<BTreeMap<String, Vec<String>>> {
    let mut request = Vec::new();
    put(&mut request, RULE_TABLE, &terminated(table.name));
    let rules = socket.dump(kind(libc::NFT_MSG_GETRULE), table.family as u8, &request, |entry| {
        let Some(chain) = named_in_table(entry, RULE_TABLE, RULE_CHAIN, table)? else {
            return Ok(None);
        };
        let comment = attribute(entry, RULE_USERDATA)?.and_then(comment).unwrap_or_default();
        Ok(Some((chain, comment)))
    })?;
    let mut by_chain: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (chain, comment) in rules {
        by_chain.entry(chain).or_default().push(comment);
    }
    Ok(by_chain)
}

/// The comment in a rule's user data, which is a list of type, length and value, a byte each.
fn comment(mut userdata: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = userdata {
        let value = rest.get(..usize::from(*length))?;
        if *kind == USERDATA_COMMENT {
            return Some(text(value));
        }
        userdata = &rest[usize::from(*length)..];
    }
    None
}

struct Element {
    key: Vec<u8>,
    value: Vec<u8>,
    counter: Counter,
}

fn read_elements(socket: &mut NetfilterSocket, table: &Table, set: &str) -> io::Result<Vec<Element>> {
    let mut request = Vec::new();
    put(&mut request, ELEMENTS_TABLE, &terminated(table.name));
    put(&mut request, ELEMENTS_SET, &terminated(set));
    let messages = socket.dump(kind(libc::NFT_MSG_GETSETELEM), table.family as u8, &request, |entry| {
        let mut elements = Vec::new();
        for element in attributes(attribute(entry, ELEMENTS_LIST)?.unwrap_or_default()) {
            let (kind, element) = element?;
            if kind == LIST_ELEMENT {
                elements.push(read_element(element)?);
            }
        }
        Ok(Some(elements))
    })?;
    Ok(messages.into_iter().flatten().collect())
}

fn read_element(element: &[u8]) -> io::Result<Element> {
    let value_of = |kind| -> io::Result<Vec<u8>> {
        let data = attribute(element, kind)?.unwrap_or_default();
        Ok(attribute(data, DATA_VALUE)?.unwrap_or_default().to_vec())
    };
    let counter = match attribute(element, ELEMENT_EXPR)? {
        Some(expr) => attribute(expr, EXPR_DATA)?.unwrap_or_default(),
        None => &[],
    };
    let number = |kind| -> io::Result<u64> {
        let value = attribute(counter, kind)?.and_then(|value| value.try_into().ok());
        Ok(value.map_or(0, u64::from_be_bytes))
    };
    Ok(Element {
        key: value_of(ELEMENT_KEY)?,
        value: value_of(ELEMENT_DATA)?,
        counter: Counter { packets: number(COUNTER_PACKETS)?, bytes: number(COUNTER_BYTES)? },
    })
}

fn terminated(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}
