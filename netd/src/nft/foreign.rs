//! Others' chains that drop what none of their rules accepts.
//!
//! A packet passes every base chain of its hook, whoever made it: an "accept" of netd's ends netd's chain and no other. So a host
//! whose firewall drops by policy (Docker's FORWARD, firewalld's, a hardened input) stops instances' packets, and the
//! person who looks for them sees nothing wrong in netd's tables. Here they are found, to be named; they are never changed.

use nftnl::ProtoFamily;

use super::TABLE;
use super::kernel::{CHAIN_NAME, CHAIN_TABLE, kind};
use crate::api::DropPolicy;
use crate::error::{Error, Result};
use crate::netfilter::{attribute, number, text};

// Attributes of a chain (`include/uapi/linux/netfilter/nf_tables.h`) that the `libc` crate does not have.
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const HOOK_NUMBER: u16 = 1;
/// `NF_DROP` (`include/uapi/linux/netfilter.h`).
const DROP: u32 = 0;

const FAMILIES: [(ProtoFamily, &str); 3] =
    [(ProtoFamily::Ipv4, "ip"), (ProtoFamily::Inet, "inet"), (ProtoFamily::Bridge, "bridge")];
/// By their numbers, which are the same for these three families.
const HOOKS: [&str; 5] = ["prerouting", "input", "forward", "output", "postrouting"];

/// Every base chain that is not netd's and drops by policy, of the families that IPv4 packets and frames pass.
pub fn drop_policies() -> Result<Vec<DropPolicy>> {
    let mut socket = super::open()?;
    let mut found = Vec::new();
    for (family, name) in FAMILIES {
        let chains = socket.dump(kind(libc::NFT_MSG_GETCHAIN), family as u8, &[], |entry| {
            let policy = attribute(entry, CHAIN_POLICY)?.map(number);
            let (Some(hook), Some(Some(DROP))) = (attribute(entry, CHAIN_HOOK)?, policy) else { return Ok(None) };
            let hook = attribute(hook, HOOK_NUMBER)?.and_then(number).and_then(|hook| HOOKS.get(hook as usize));
            let of = |kind| Ok::<_, std::io::Error>(attribute(entry, kind)?.map(text).unwrap_or_default());
            Ok(Some(DropPolicy {
                family: name.into(),
                table: of(CHAIN_TABLE)?,
                chain: of(CHAIN_NAME)?,
                hook: hook.copied().unwrap_or("another hook").into(),
            }))
        });
        let chains = chains.map_err(Error::netfilter(format!("listing the chains of family {name}")))?;
        found.extend(chains.into_iter().filter(|chain| chain.table != TABLE));
    }
    Ok(found)
}
