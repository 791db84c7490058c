//! Tables as data, and the script that leads there from what there is.
//!
//! Each rule has a comment: what it is for, and a digest of what it does. A chain whose comments are, in order, those that it should have, is left alone
//! with its counters. One that differs is written anew in the same replacement of its table, and rules that it had keep what they have counted.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::PREFIX;
use super::saved::{FoundRule, FoundTable, Saved};
use crate::backend::Counter;
use crate::digest;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// What the rule is for, as a person says it; without quotes.
    purpose: String,
    matches: String,
    target: String,
}

impl Rule {
    pub fn new(purpose: impl Into<String>) -> Self {
        Self { purpose: purpose.into(), matches: String::new(), target: String::new() }
    }

    /// One condition more.
    pub fn on(mut self, condition: impl AsRef<str>) -> Self {
        if !condition.as_ref().is_empty() {
            self.matches.push(' ');
            self.matches.push_str(condition.as_ref());
        }
        self
    }

    /// What the rule does, by a target of its own.
    pub fn then(mut self, target: impl Into<String>) -> Self {
        self.target = format!(" -j {}", target.into());
        self
    }

    pub fn drop(self) -> Self {
        self.then("DROP")
    }

    pub fn accept(self) -> Self {
        self.then("ACCEPT")
    }

    /// The chain is left.
    pub fn leave(self) -> Self {
        self.then("RETURN")
    }

    /// Goes on in the chain, and comes back.
    pub fn call(self, chain: &str) -> Self {
        self.then(format!("{PREFIX}{chain}"))
    }

    /// Goes on in the chain, whose end is also this one's.
    pub fn go(mut self, chain: &str) -> Self {
        self.target = format!(" -g {PREFIX}{chain}");
        self
    }

    fn comment(&self) -> String {
        let what = format!("{}{}", self.matches, self.target);
        format!("{} [{:08x}]", self.purpose, digest::folded(digest::fnv1a(what.as_bytes())))
    }

    /// The rule behind the name of its chain.
    fn text(&self) -> String {
        format!("{} -m comment --comment \"{}\"{}", self.matches.trim_start(), self.comment(), self.target)
    }
}

/// One of the kernel's tables, as far as it is netd's.
#[derive(Debug)]
pub struct Table {
    pub name: &'static str,
    /// The kernel's chains that lead to one of netd's each.
    pub hooks: &'static [(&'static str, &'static str)],
    /// By name without the prefix.
    pub chains: BTreeMap<String, Vec<Rule>>,
}

impl Table {
    pub fn new(name: &'static str, hooks: &'static [(&'static str, &'static str)]) -> Self {
        let chains = hooks.iter().map(|(_, chain)| ((*chain).to_owned(), Vec::new())).collect();
        Self { name, hooks, chains }
    }

    /// Adds to the end of a chain.
    pub fn put(&mut self, chain: &str, rules: impl IntoIterator<Item = Rule>) {
        debug_assert!(PREFIX.len() + chain.len() < 29, "{chain}: XT_EXTENSION_MAXNAMELEN");
        self.chains.entry(chain.to_owned()).or_default().extend(rules);
    }
}

/// What `iptables-restore` is to be told; nothing where nothing differs.
pub fn difference(wanted: &[Table], found: &Saved) -> String {
    let nothing = FoundTable::default();
    let mut script = String::new();
    for table in wanted {
        let there = found.tables.get(table.name).unwrap_or(&nothing);
        script += &of_table(table.name, table.hooks, &table.chains, there);
    }
    let gone = found.tables.iter().filter(|(name, _)| wanted.iter().all(|table| table.name != *name));
    for (name, there) in gone {
        script += &of_table(name, &[], &BTreeMap::new(), there);
    }
    script
}

fn of_table(name: &str, hooks: &[(&str, &str)], chains: &BTreeMap<String, Vec<Rule>>, found: &FoundTable) -> String {
    let mut lines = Vec::new();
    let changed = chains.iter().map(|(chain, rules)| (format!("{PREFIX}{chain}"), rules));
    let changed: BTreeMap<String, &Vec<Rule>> =
        changed.filter(|(chain, rules)| found.chains.get(chain).is_none_or(|there| !is_same(there, rules))).collect();
    let is_gone = |chain: &&String| chain.strip_prefix(PREFIX).is_none_or(|chain| !chains.contains_key(chain));
    let gone: Vec<&String> = found.chains.keys().filter(is_gone).collect();
    // Makes a chain, or empties it.
    lines.extend(changed.keys().chain(gone.iter().copied()).map(|chain| format!(":{chain} - [0:0]")));
    lines.extend(of_hooks(hooks, found));
    for (chain, rules) in &changed {
        let there = found.chains.get(chain).map(Vec::as_slice).unwrap_or_default();
        lines.extend(rules.iter().map(|rule| {
            let Counter { packets, bytes } = counted(there, &rule.comment());
            format!("[{packets}:{bytes}] -A {chain} {}", rule.text())
        }));
    }
    lines.extend(gone.iter().map(|chain| format!("-X {chain}")));
    let mut script = String::new();
    if !lines.is_empty() {
        // Writing to a string does not fail.
        let _ = writeln!(script, "*{name}\n{}\nCOMMIT", lines.join("\n"));
    }
    script
}

/// One rule of each of the kernel's chains leads to netd's, and it is the first, so that none before it lets pass what netd is to judge.
fn of_hooks(hooks: &[(&str, &str)], found: &FoundTable) -> Vec<String> {
    let mut lines = Vec::new();
    let lead = |chain: &str| Rule::new("netd").call(chain);
    for (hook, rules) in &found.hooks {
        let wanted = hooks.iter().find(|(name, _)| name == hook).map(|(_, chain)| lead(chain).comment());
        let own: Vec<usize> = (0..rules.len()).filter(|n| rules[*n].is_own()).collect();
        let is_right = match &wanted {
            Some(comment) => own == [0] && rules[0].comment == *comment,
            None => own.is_empty(),
        };
        if !is_right {
            lines.extend(own.iter().map(|n| format!("-D {hook} {}", rules[*n].text)));
        }
    }
    for (hook, chain) in hooks {
        let rules = found.hooks.get(*hook).map(Vec::as_slice).unwrap_or_default();
        let own = rules.iter().filter(|rule| rule.is_own()).count();
        let first = rules.first().is_some_and(|rule| rule.is_own() && rule.comment == lead(chain).comment());
        if !(first && own == 1) {
            lines.push(format!("-I {hook} {}", lead(chain).text()));
        }
    }
    lines
}

fn is_same(there: &[FoundRule], rules: &[Rule]) -> bool {
    there.len() == rules.len() && there.iter().zip(rules).all(|(found, rule)| found.comment == rule.comment())
}

/// What the rule had counted before its chain was written anew.
fn counted(there: &[FoundRule], comment: &str) -> Counter {
    there.iter().find(|found| found.comment == comment).map(|found| found.counter).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(chains: &BTreeMap<u8, Vec<u8>>) -> Table {
        let mut table = Table::new("mangle", &[("FORWARD", "way")]);
        for (chain, rules) in chains {
            table.put(
                &chain.to_string(),
                rules.iter().map(|n| Rule::new(format!("rule {n}")).on(format!("-s 10.0.0.{n}")).drop()),
            );
        }
        table
    }

    /// As far as it goes, what `iptables-restore` does and `iptables-save` prints.
    fn restore(found: &mut Saved, script: &str) {
        let mut table = String::new();
        for line in script.lines() {
            let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
            if let Some(name) = line.strip_prefix('*') {
                table = name.to_owned();
                continue;
            }
            let there = found.tables.entry(table.clone()).or_default();
            there.hooks.entry("FORWARD".into()).or_default();
            match (first, first.strip_prefix(':')) {
                (_, Some(chain)) => drop(there.chains.insert(chain.into(), Vec::new())),
                ("-X", _) => assert!(there.chains.remove(rest).is_some_and(|rules| rules.is_empty())),
                ("-I", _) => {
                    let printed = format!("*x\n:FORWARD ACCEPT [0:0]\n[0:0] -A {rest}\nCOMMIT\n");
                    let rule = Saved::parse(&printed).tables["x"].hooks["FORWARD"][0].clone();
                    there.hooks.get_mut("FORWARD").unwrap().insert(0, rule);
                }
                ("-D", _) => {
                    let (_, text) = rest.split_once(' ').unwrap();
                    let rules = there.hooks.get_mut("FORWARD").unwrap();
                    let at = rules.iter().position(|rule| rule.text == text).unwrap();
                    rules.remove(at);
                }
                (_, _) if first.starts_with('[') => {
                    let chain = rest.split(' ').nth(1).unwrap();
                    let printed = format!("*x\n:{chain} - [0:0]\n{line}\nCOMMIT\n");
                    let rule = Saved::parse(&printed).tables["x"].chains[chain][0].clone();
                    there.chains.get_mut(chain).expect("a rule of a chain that was not made").push(rule);
                }
                _ => assert_eq!(line, "COMMIT"),
            }
        }
    }

    fn lead_to(found: &mut Saved, wanted: &[Table]) {
        let script = difference(wanted, found);
        restore(found, &script);
    }

    proptest! {
        #[test]
        fn a_script_leads_there_and_then_nothing_is_left_to_do(
            before in proptest::collection::btree_map(0_u8..6, proptest::collection::vec(0_u8..4, 0..4), 0..5),
            after in proptest::collection::btree_map(0_u8..6, proptest::collection::vec(0_u8..4, 0..4), 0..5),
            others in 0_usize..3,
        ) {
            let mut found = Saved::default();
            lead_to(&mut found, &[table(&before)]);
            // Somebody comes before.
            let theirs = FoundRule { text: "-j theirs".into(), comment: String::new(), counter: Counter::default() };
            let hook = found.tables.get_mut("mangle").unwrap().hooks.get_mut("FORWARD").unwrap();
            (0..others).for_each(|_| hook.insert(0, theirs.clone()));
            let script = difference(&[table(&after)], &found);
            prop_assert_eq!(script.is_empty(), before == after && others == 0);
            restore(&mut found, &script);
            prop_assert_eq!(difference(&[table(&after)], &found), "");
            lead_to(&mut found, &[]);
            let left = &found.tables["mangle"];
            prop_assert!(left.chains.is_empty() && left.hooks["FORWARD"].len() == others);
        }
    }

    #[test]
    fn a_rule_that_stays_keeps_what_it_has_counted() {
        let mut found = Saved::default();
        let one = BTreeMap::from([(1, vec![1, 2])]);
        lead_to(&mut found, &[table(&one)]);
        found.tables.get_mut("mangle").unwrap().chains.get_mut("mallee-1").unwrap()[1].counter.packets = 7;
        let script = difference(&[table(&BTreeMap::from([(1, vec![2, 3])]))], &found);
        assert!(
            script.contains("[7:0] -A mallee-1 -s 10.0.0.2 ") && script.contains("[0:0] -A mallee-1 -s 10.0.0.3 "),
            "{script}"
        );
    }
}
