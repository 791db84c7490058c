//! The kernel's own account of the rules that a packet passes (`meta nftrace`, `include/uapi/linux/netfilter/nf_tables.h`).
//!
//! A table beside netd's has the packet traced from its first hook on. Only in the replica's namespace.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;

use super::Step;
use crate::error::{Error, Result};
use crate::netfilter::{NetfilterSocket, attribute, text};
use crate::nft;

/// `NFNLGRP_NFTRACE`
const GROUP: u32 = 9;
/// `NFT_MSG_TRACE`
const MESSAGE: u16 = 17;
const TRACE_CHAIN: u16 = 2;
const TRACE_RULE: u16 = 3;
const TRACE_TYPE: u16 = 4;
const TRACE_VERDICT: u16 = 5;
const TRACE_FAMILY: u16 = 15;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
/// `NFT_TRACETYPE_RULE`
const OF_RULE: u32 = 3;

pub struct Listener {
    socket: NetfilterSocket,
    /// What rules say of themselves, by family and the kernel's number.
    rules: BTreeMap<(u32, u64), String>,
}

impl Listener {
    /// Hears of packets from one address to another, from now on.
    pub fn on(from: Ipv4Addr, to: Ipv4Addr) -> Result<Self> {
        let socket = NetfilterSocket::listen(GROUP).map_err(Error::netfilter("listening for traces"))?;
        nft::trace(from, to)?;
        Ok(Self { socket, rules: nft::rule_names()? })
    }

    /// The rules that were passed. Where a rule looks up others in a set, the one that it found: no other packet than this one was there to be counted.
    pub fn steps(&mut self) -> Result<Vec<Step>> {
        let kind = (libc::NFNL_SUBSYS_NFTABLES << 8) as u16 | MESSAGE;
        let rules = &self.rules;
        let heard = self.socket.heard(kind, |entry| read(entry, rules)).map_err(Error::netfilter("reading a trace"))?;
        let mut found = nft::elements_passed()?;
        let named = |(family, mut step): (u32, Step)| {
            if nft::is_lookup_of_rules(&step.rule)
                && let Some(rule) = found.remove(&(family, step.chain.clone()))
            {
                step.rule = rule;
            }
            step
        };
        Ok(heard.into_iter().map(named).collect())
    }
}

/// A rule that said something, and its family; policies and rules of others' tables do not.
fn read(entry: &[u8], rules: &BTreeMap<(u32, u64), String>) -> io::Result<Option<(u32, Step)>> {
    let number = |kind| -> io::Result<Option<u32>> {
        Ok(attribute(entry, kind)?.and_then(|value| value.try_into().ok()).map(u32::from_be_bytes))
    };
    if number(TRACE_TYPE)? != Some(OF_RULE) {
        return Ok(None);
    }
    let handle = attribute(entry, TRACE_RULE)?.and_then(|value| value.try_into().ok()).map(u64::from_be_bytes);
    let (Some(family), Some(handle)) = (number(TRACE_FAMILY)?, handle) else { return Ok(None) };
    let Some(rule) = rules.get(&(family, handle)) else { return Ok(None) };
    let verdict = attribute(entry, TRACE_VERDICT)?.unwrap_or_default();
    let code = attribute(verdict, VERDICT_CODE)?.and_then(|value| value.try_into().ok()).map(i32::from_be_bytes);
    let verdict = match code {
        Some(libc::NF_ACCEPT) => "accept".to_owned(),
        Some(libc::NF_DROP) => "drop".to_owned(),
        Some(jump @ (libc::NFT_JUMP | libc::NFT_GOTO)) => {
            let chain = attribute(verdict, VERDICT_CHAIN)?.map(text).unwrap_or_default();
            format!("{} {chain}", if jump == libc::NFT_JUMP { "jump" } else { "goto" })
        }
        _ => String::new(),
    };
    let step = Step {
        family: if family == libc::NFPROTO_BRIDGE as u32 { "bridge" } else { "ip" },
        chain: attribute(entry, TRACE_CHAIN)?.map(text).unwrap_or_default(),
        rule: rule.clone(),
        verdict,
    };
    Ok(Some((family, step)))
}
