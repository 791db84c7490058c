//! Reads netd's tables back from the kernel.
//!
//! Writing needs expressions, which libnftnl encodes; reading needs only names, comments, keys and
//! counters, for which the attributes are walked directly (`include/uapi/linux/netfilter/nf_tables.h`).

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::flowtable::read_devices;
use super::layout::{Elements, NO_ELEMENTS, Set, Table, is_grown};
use super::rules::folded::chain_of_set;
use crate::backend::Counter;
use crate::netfilter::{NetfilterSocket, attribute, attributes, number, put, text};

// Attribute numbers that the `libc` crate does not have.
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
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
const ELEMENT_USERDATA: u16 = 6;
const ELEMENT_EXPR: u16 = 7;
const ELEMENT_EXPRESSIONS: u16 = 11;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;
/// Type of a comment in a rule's user data (`NFTNL_UDATA_RULE_COMMENT`), and in an element's (`NFTNL_UDATA_SET_ELEM_COMMENT`).
const USERDATA_COMMENT: u8 = 0;
const GENERATION_ID: u16 = 1;

/// A rule as the kernel has it.
#[derive(Debug, Clone)]
pub struct FoundRule {
    /// The kernel's own number for it.
    pub handle: u64,
    pub comment: String,
    /// Of a rule that counts.
    pub counter: Counter,
}

/// A table as the kernel has it.
pub struct Found {
    pub chains: BTreeSet<String>,
    /// Each chain's rules, in order.
    pub rules: BTreeMap<String, Vec<FoundRule>>,
    pub sets: BTreeSet<String>,
    /// What is in the sets, but for those whose elements are the kernel's own affair.
    pub elements: BTreeMap<String, Elements>,
    /// Those of its flow table, where it has one.
    pub devices: Option<BTreeSet<String>>,
}

impl Found {
    /// True when chains, rules and sets are those of `table`, but for those that grow with the network; what the sets hold does
    /// not matter.
    pub fn has_layout_of(&self, table: &Table) -> bool {
        let chain_is_as_wanted = |chain: &super::layout::Chain| {
            let comments = self.rules_of(&chain.name).iter().map(|rule| &rule.comment);
            self.chains.contains(&*chain.name)
                && comments.eq(&chain.rules.iter().map(|rule| table.comment(chain, rule)).collect::<Vec<_>>())
        };
        let fixed_chains = || table.chains.iter().filter(|chain| !is_grown(&chain.name));
        let fixed_sets = || table.sets.iter().filter(|set| !is_grown(&set.name));
        self.chains.iter().filter(|name| !is_grown(name)).count() == fixed_chains().count()
            && fixed_chains().all(chain_is_as_wanted)
            && self.sets.iter().filter(|name| !is_grown(name)).count() == fixed_sets().count()
            && fixed_sets().all(|set| self.sets.contains(&*set.name))
            && self.devices.is_some() == table.flowtable.is_some()
    }

    pub fn elements(&self, set: &Set) -> &Elements {
        self.elements.get(&*set.name).unwrap_or(&NO_ELEMENTS)
    }

    pub fn rules_of(&self, chain: &str) -> &[FoundRule] {
        self.rules.get(chain).map_or(&[], Vec::as_slice)
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
    let mut found = Found {
        chains: read_chains(socket, table)?,
        rules: read_rules(socket, table)?,
        sets: read_set_names(socket, table)?.into_iter().collect(),
        elements: BTreeMap::new(),
        devices: match &table.flowtable {
            Some(flowtable) => read_devices(socket, table, flowtable.name)?,
            None => None,
        },
    };
    let is_of_kernel = |name: &str| table.sets.iter().any(|set| set.name == name && set.is_of_kernel());
    for name in found.sets.iter().filter(|name| !is_of_kernel(name)) {
        let entries = read_elements(socket, table, name)?;
        found.elements.insert(name.clone(), entries.into_iter().map(|entry| (entry.key, entry.value)).collect());
    }
    Ok(Some(found))
}

/// The generation of all tables of the network namespace, whosever they are: each transaction makes it one more.
pub fn generation(socket: &mut NetfilterSocket) -> io::Result<u32> {
    socket.ask(kind(libc::NFT_MSG_GETGEN), 0, |answer| {
        let id = attribute(answer, GENERATION_ID)?.and_then(number);
        id.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel does not tell its generation"))
    })
}

/// The counters of a set's elements, by key.
pub fn counters(socket: &mut NetfilterSocket, table: &Table, set: &str) -> io::Result<Vec<(Vec<u8>, Counter)>> {
    let entries = read_elements(socket, table, set)?;
    Ok(entries.into_iter().map(|entry| (entry.key, entry.counter)).collect())
}

/// What the sets of groups' rules have counted: of each, its name, and the elements' names with their counters.
#[expect(clippy::type_complexity, reason = "a list of named lists")]
pub fn counters_of_folded(
    socket: &mut NetfilterSocket,
    table: &Table,
) -> io::Result<Vec<(String, Vec<(String, Counter)>)>> {
    let names = read_set_names(socket, table)?;
    let folded = names.into_iter().filter(|name| chain_of_set(name).is_some());
    let counted = |element: Element| (text(&element.value), element.counter);
    folded
        .map(|name| {
            let elements = read_elements(socket, table, &name)?;
            Ok((name, elements.into_iter().map(counted).collect()))
        })
        .collect()
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

/// The rules of a table by chain. Asked for chain by chain: where a dump of a whole table goes on in the next message, the kernel counts all
/// rules from the first again, so that it takes the square of their number.
pub fn read_rules(socket: &mut NetfilterSocket, table: &Table) -> io::Result<BTreeMap<String, Vec<FoundRule>>> {
    let chains = read_chains(socket, table)?;
    chains.into_iter().map(|chain| Ok((chain.clone(), read_rules_of(socket, table, &chain)?))).collect()
}

/// The rules of a chain, in order.
pub fn read_rules_of(socket: &mut NetfilterSocket, table: &Table, chain: &str) -> io::Result<Vec<FoundRule>> {
    let mut request = Vec::new();
    put(&mut request, RULE_TABLE, &terminated(table.name));
    put(&mut request, RULE_CHAIN, &terminated(chain));
    socket.dump(kind(libc::NFT_MSG_GETRULE), table.family as u8, &request, |entry| {
        // A kernel that does not know the filter tells of every chain's.
        let Some(name) = named_in_table(entry, RULE_TABLE, RULE_CHAIN, table)? else { return Ok(None) };
        if name != chain {
            return Ok(None);
        }
        let handle = attribute(entry, RULE_HANDLE)?.and_then(|value| value.try_into().ok());
        Ok(Some(FoundRule {
            handle: handle.map_or(0, u64::from_be_bytes),
            comment: attribute(entry, RULE_USERDATA)?.and_then(comment).unwrap_or_default(),
            counter: counter_among(attribute(entry, RULE_EXPRESSIONS)?.unwrap_or_default())?,
        }))
    })
}

/// The counter in a rule's list of expressions.
fn counter_among(expressions: &[u8]) -> io::Result<Counter> {
    for expression in attributes(expressions) {
        let (_, expression) = expression?;
        if attribute(expression, EXPR_NAME)?.map(text).as_deref() == Some("counter") {
            return read_counter(expression);
        }
    }
    Ok(Counter::default())
}

fn read_counter(expression: &[u8]) -> io::Result<Counter> {
    let counter = attribute(expression, EXPR_DATA)?.unwrap_or_default();
    let number = |kind| -> io::Result<u64> {
        let value = attribute(counter, kind)?.and_then(|value| value.try_into().ok());
        Ok(value.map_or(0, u64::from_be_bytes))
    };
    Ok(Counter { packets: number(COUNTER_PACKETS)?, bytes: number(COUNTER_BYTES)? })
}

/// The comment in user data, which is a list of type, length and value, a byte each.
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
        if let Some(verdict) = attribute(data, DATA_VERDICT)? {
            return Ok(attribute(verdict, VERDICT_CHAIN)?.map(text).unwrap_or_default().into_bytes());
        }
        Ok(attribute(data, DATA_VALUE)?.unwrap_or_default().to_vec())
    };
    Ok(Element {
        key: value_of(ELEMENT_KEY)?,
        value: match attribute(element, ELEMENT_USERDATA)?.and_then(comment) {
            Some(name) => name.into_bytes(),
            None => value_of(ELEMENT_DATA)?,
        },
        counter: match attribute(element, ELEMENT_EXPR)? {
            Some(expression) => read_counter(expression)?,
            None => counter_among(attribute(element, ELEMENT_EXPRESSIONS)?.unwrap_or_default())?,
        },
    })
}

pub(super) fn terminated(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}
