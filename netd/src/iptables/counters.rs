//! What the chains have counted.

use std::net::Ipv4Addr;

use super::PREFIX;
use super::rules::{
    self, DENIED_HAIRPIN, DENIED_IN, DENIED_OUT, ELASTIC_IN, ELASTIC_OUT, SPOOFED, TOO_FAST, TOO_MUCH_DHCP,
};
use super::saved::{FoundRule, Saved};
use crate::backend::{Bound, Counter, Counters};
use crate::desired::LinkName;

pub fn read(saved: &Saved) -> Counters {
    let mut counters = Counters::default();
    let chains = saved.tables.values().flat_map(|table| &table.chains);
    for (chain, rules) in chains {
        let Some(chain) = chain.strip_prefix(PREFIX) else { continue };
        if let Some(tap) = chain.strip_prefix(SPOOFED).and_then(|tap| tap.parse().ok()) {
            let (dhcp, spoofed) = dropped(rules, TOO_MUCH_DHCP);
            counters.limited_frames.insert((Bound::Dhcp, LinkName::clone(&tap)), dhcp);
            counters.spoofed.insert(tap, spoofed);
        }
        if let Some(mark) = mark_of(chain, DENIED_OUT) {
            let (too_fast, denied) = dropped(rules, TOO_FAST);
            counters.limited_connections.insert((Bound::OpenedTooFast, mark), too_fast);
            *counters.denied_out.entry(mark).or_default() += denied;
        }
        // What comes by elastic IPs of this node has a chain of its own.
        if let Some(mark) = mark_of(chain, DENIED_IN).or(mark_of(chain, DENIED_HAIRPIN)) {
            *counters.denied_in.entry(mark).or_default() += dropped(rules, TOO_FAST).1;
        }
        rules.iter().for_each(|rule| add(&mut counters, rule));
    }
    counters
}

fn mark_of(chain: &str, kind: &str) -> Option<u32> {
    u32::from_str_radix(chain.strip_prefix(kind)?, 16).ok()
}

/// What the chain's rules for `bound` have dropped, and what its others have.
fn dropped(rules: &[FoundRule], bound: &str) -> (Counter, Counter) {
    let mut sums = (Counter::default(), Counter::default());
    for rule in rules.iter().filter(|rule| rule.text.ends_with("-j DROP")) {
        let sum = if rule.comment.starts_with(bound) { &mut sums.0 } else { &mut sums.1 };
        *sum += rule.counter;
    }
    sums
}

/// A rule that says itself what it counts.
fn add(counters: &mut Counters, rule: &FoundRule) {
    // Without the digest at the end.
    let Some((purpose, _)) = rule.comment.rsplit_once(" [") else { return };
    if let Some(tap) = purpose.strip_prefix(TOO_FAST).and_then(|rest| rest.strip_prefix(": ")?.parse().ok()) {
        *counters.limited_frames.entry((Bound::Gateway, tap)).or_default() += rule.counter;
    }
    let elastic = |start: &str| purpose.strip_prefix(start)?.parse::<Ipv4Addr>().ok();
    if let Some(public) = elastic(ELASTIC_IN) {
        *counters.elastic_in.entry(public).or_default() += rule.counter;
    } else if let Some(public) = elastic(ELASTIC_OUT) {
        *counters.elastic_out.entry(public).or_default() += rule.counter;
    } else if let Some((group, id)) = rules::rule_of(purpose).filter(|(group, _)| group.starts_with("sg-")) {
        *counters.group_rules.entry((group.to_owned(), id.to_owned())).or_default() += rule.counter;
    }
}
