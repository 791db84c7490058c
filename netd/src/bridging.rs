//! How IPv4 between two instances on one bridge is judged, which depends on the kernel.
//!
//! Security groups are stateful, so whoever judges needs the connection that a frame belongs to. A kernel with
//! `nf_conntrack_bridge` knows it where the frame is: on the bridge. A kernel with `br_netfilter` can hand each frame to the rules
//! for IPv4, which know it, and take it back. With neither, neighbours are kept apart: that is a loss, and no hole. A backend that cannot judge frames at all has
//! the gateway route between neighbours, whose ports are isolated.
//!
//! Found out once, when netd starts. What may not happen here: a way between two instances that no group judges.

use std::path::Path;

use crate::error::Result;
use crate::nft;

/// Where the kernel tells that it has `br_netfilter`, in this network namespace.
const BR_NETFILTER: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bridging {
    /// The bridge knows connections.
    Conntrack,
    /// Frames pass the rules for IPv4 on their way over a bridge that asks for it.
    IpRules,
    /// Neighbours cannot speak IPv4 to one another.
    Apart,
    /// Ports are isolated from one another and locked to the MACs behind them. The gateway answers ARP for its whole segment, and routes.
    Routed,
}

impl Bridging {
    /// What this kernel's nf_tables can do.
    pub fn detect() -> Result<Self> {
        Ok(if nft::has_bridge_conntrack()? {
            Self::Conntrack
        } else if Path::new(BR_NETFILTER).exists() {
            Self::IpRules
        } else {
            Self::Apart
        })
    }

    /// Why security groups are not whole, or nothing where they are.
    pub fn problem(self) -> &'static str {
        match self {
            Self::Conntrack | Self::IpRules | Self::Routed => "",
            Self::Apart => {
                "instances on one node and one subnet cannot reach one another: load the module `nf_conntrack_bridge` \
                 (CONFIG_NF_CONNTRACK_BRIDGE), or else `br_netfilter` (CONFIG_BRIDGE_NETFILTER), and start netd again"
            }
        }
    }
}
