//! What the tables have counted: elements of sets, and the rules of security groups.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use super::kernel;
use super::layout::{Set, Table, is_grown};
use super::rules::folded::chain_of_set;
use super::{any_tables, open, rules};
use crate::backend::{Counter, Counters};
use crate::desired::LinkName;
use crate::error::{Error, Result};
use crate::netfilter::{NetfilterSocket, text};

/// Reads the counters back from the kernel.
pub fn read() -> Result<Counters> {
    let mut socket = open()?;
    let [ip, bridge, devices] = any_tables();
    let mut counters = Counters {
        elastic_in: by(Ipv4Addr::from, &mut socket, &[&ip, &devices], &rules::EIP_VPC)?,
        elastic_out: elastic_out(&mut socket, &ip, &devices)?,
        spoofed: by_link(&mut socket, &bridge, &rules::SPOOFED)?,
        foreign: by_link(&mut socket, &bridge, &rules::FOREIGN)?,
        denied_in: by(u32::from_ne_bytes, &mut socket, &[&ip, &bridge], &rules::DENIED_IN)?,
        denied_out: by(u32::from_ne_bytes, &mut socket, &[&ip, &bridge], &rules::DENIED_OUT)?,
        ..Counters::default()
    };
    for (bound, set) in rules::limits::BY_TAP {
        for (tap, counter) in by_link(&mut socket, &bridge, set)? {
            *counters.limited_frames.entry((bound, tap)).or_default() += counter;
        }
    }
    for (bound, set) in rules::limits::BY_INTERFACE {
        let counted = by(u32::from_ne_bytes, &mut socket, &[&ip, &bridge], set)?;
        counters.limited_connections.extend(counted.into_iter().map(|(mark, counter)| ((bound, mark), counter)));
    }
    for table in [&ip, &bridge] {
        let found = kernel::read_rules(&mut socket, table).map_err(Error::netfilter("reading the groups' rules"))?;
        for (chain, rules) in found.into_iter().filter(|(chain, _)| is_grown(chain)) {
            rules.iter().for_each(|rule| count(&mut counters, &chain, &rule.comment, rule.counter));
        }
        let folded = kernel::counters_of_folded(&mut socket, table);
        for (set, elements) in folded.map_err(Error::netfilter("reading the sets of groups' rules"))? {
            let chain = chain_of_set(&set).unwrap_or_default();
            elements.iter().for_each(|(name, counter)| count(&mut counters, chain, name, *counter));
        }
    }
    Ok(counters)
}

/// Adds what a rule or an element counted. One rule of a group may be several of these; chains and names are as `rules/groups.rs` writes them.
fn count(counters: &mut Counters, chain: &str, name: &str, counter: Counter) {
    if let (Some((_, group)), Some((id, _))) = (chain.split_once('_'), name.split_once(':')) {
        *counters.group_rules.entry((group.to_owned(), id.to_owned())).or_default() += counter;
    }
}

/// Bytes of the header of a frame that is about to leave, which the table of devices counts too.
const FRAME_HEADER: u64 = 14;

fn elastic_out(socket: &mut NetfilterSocket, ip: &Table, devices: &Table) -> Result<BTreeMap<Ipv4Addr, Counter>> {
    let mut sums = by(Ipv4Addr::from, socket, &[ip], &rules::EIP_OUT_COUNT)?;
    for (address, Counter { packets, bytes }) in by(Ipv4Addr::from, socket, &[devices], &rules::EIP_OUT_COUNT)? {
        let bytes = bytes.saturating_sub(packets * FRAME_HEADER);
        *sums.entry(address).or_default() += Counter { packets, bytes };
    }
    Ok(sums)
}

/// The sum over the tables, by keys of four bytes; one that does not have the set adds nothing.
fn by<K: Ord>(
    key_of: impl Fn([u8; 4]) -> K,
    socket: &mut NetfilterSocket,
    tables: &[&Table],
    set: &Set,
) -> Result<BTreeMap<K, Counter>> {
    let mut sums: BTreeMap<K, Counter> = BTreeMap::new();
    for table in tables {
        for (key, counter) in of_set(socket, table, set)? {
            if let Ok(octets) = <[u8; 4]>::try_from(key) {
                *sums.entry(key_of(octets)).or_default() += counter;
            }
        }
    }
    Ok(sums)
}

fn by_link(socket: &mut NetfilterSocket, table: &Table, set: &Set) -> Result<BTreeMap<LinkName, Counter>> {
    let counted = of_set(socket, table, set)?.into_iter();
    Ok(counted.filter_map(|(key, counter)| Some((text(&key).parse().ok()?, counter))).collect())
}

fn of_set(socket: &mut NetfilterSocket, table: &Table, set: &Set) -> Result<Vec<(Vec<u8>, Counter)>> {
    kernel::counters(socket, table, &set.name).map_err(Error::netfilter(format!("reading the set {}", set.name)))
}
