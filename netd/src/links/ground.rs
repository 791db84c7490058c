//! The node's own interfaces, which netd uses and never changes: the uplink, the trunk, the underlay.
//!
//! * The *uplink* is the public side.
//! * The *trunk* carries VLAN segments: a switch's trunk port is at its other end. It needs no address.
//! * The *underlay* is where VXLAN segments' tunnels end: the first IPv4 address of the interface given for it, or of the
//!   uplink.
//!
//! They may come and go while netd runs, so they are looked at again for each piece of work. What the kernel was built
//! without does not change: it is asked once, at the start ([`Kernel::probe`]).

use futures::TryStreamExt;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::{Ground, Links, is_errno};
use crate::bridging::Bridging;
use crate::desired::{LinkName, MacAddress, Surroundings, TrunkLink, Underlay, UplinkAddresses};
use crate::error::{Error, Result};

/// Which interface is what, as the command line says, and what the kernel can make of them.
#[derive(Debug, Clone)]
pub struct NodeLinks {
    pub uplink: LinkName,
    pub trunk: Option<LinkName>,
    /// None for the uplink.
    pub underlay: Option<LinkName>,
    pub kernel: Kernel,
}

/// What not every kernel has: kinds of links, of which an error says what is missing, and how the backend judges neighbours there.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub vlan: std::result::Result<(), String>,
    pub vxlan: std::result::Result<(), String>,
    pub bridging: Bridging,
}

/// The public side's interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uplink {
    pub index: u32,
    /// None on a link without Ethernet, which needs no ARP.
    pub mac: Option<MacAddress>,
}

/// What the network stands on, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    pub uplink: Uplink,
    pub around: Surroundings,
    /// Has the trunk interface also when it is down, which takes no VLAN away from it.
    pub ground: Ground,
}

impl Kernel {
    /// Asks the kernel for a link of each kind without saying enough to make one: a kernel that knows the kind says what
    /// it misses, one that does not says so. No link is made, nor can one be left behind.
    pub async fn probe(links: &Links, bridging: Bridging) -> Result<Self> {
        if bridging == Bridging::Routed {
            // No port to other nodes is locked or isolated, nor could what comes from there be told from what is of this node.
            let reason = "segments that reach other nodes need a backend that judges frames: nftables, and this netd's is iptables";
            return Ok(Self { vlan: Err(reason.into()), vxlan: Err(reason.into()), bridging });
        }
        Ok(Self {
            vlan: links.knows_kind(InfoKind::Vlan, "802.1Q (CONFIG_VLAN_8021Q, module `8021q`)").await?,
            vxlan: links.knows_kind(InfoKind::Vxlan, "VXLAN (CONFIG_VXLAN, module `vxlan`)").await?,
            bridging,
        })
    }
}

impl Links {
    async fn knows_kind(&self, kind: InfoKind, what: &str) -> Result<std::result::Result<(), String>> {
        let message = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(kind).name("malleeprobe").build();
        match self.handle.link().add(message).execute().await {
            Err(error) if is_errno(&error, libc::EOPNOTSUPP) => Ok(Err(format!("this kernel has no {what}"))),
            Err(error) if is_errno(&error, libc::EINVAL) => Ok(Ok(())),
            Err(error) => Err(Error::link(format!("asking the kernel for {what}"))(error)),
            Ok(()) => Err(Error::Internal(format!("the kernel made a link of no description when asked for {what}"))),
        }
    }

    /// The node's interfaces as they are now.
    pub async fn site(&self, names: &NodeLinks) -> Result<Site> {
        let missing = || Error::NoUplink(names.uplink.to_string());
        let found = self.link(&names.uplink).await?.ok_or_else(missing)?;
        let index = found.header.index;
        let addresses = UplinkAddresses { name: names.uplink.to_string(), addresses: self.addresses_of(index).await? };
        let trunk = match &names.trunk {
            Some(name) => self.link(name).await?,
            None => None,
        };
        let around = Surroundings {
            trunk: trunk_link(names, trunk.as_ref()),
            underlay: self.underlay(names).await?,
            uplink: addresses,
        };
        let ground =
            Ground { uplink: index, trunk: trunk.map(|link| link.header.index), bridging: names.kernel.bridging };
        Ok(Site { uplink: Uplink { index, mac: mac_of(&found) }, around, ground })
    }

    async fn underlay(&self, names: &NodeLinks) -> Result<std::result::Result<Underlay, String>> {
        if let Err(missing) = &names.kernel.vxlan {
            return Ok(Err(missing.clone()));
        }
        let name = names.underlay.as_ref().unwrap_or(&names.uplink);
        let Some(link) = self.link(name).await? else {
            return Ok(Err(format!("the underlay's interface {name} is not there")));
        };
        Ok(match self.addresses_of(link.header.index).await?.first() {
            Some(address) => Ok(Underlay { address: address.addr(), mtu: mtu_of(&link) }),
            None => Err(format!("the underlay's interface {name} has no IPv4 address for tunnels to end at")),
        })
    }

    async fn link(&self, name: &LinkName) -> Result<Option<LinkMessage>> {
        let mut found = self.handle.link().get().match_name(name.to_string()).execute();
        match found.try_next().await {
            Err(error) if is_errno(&error, libc::ENODEV) => Ok(None),
            outcome => outcome.map_err(Error::link(format!("looking at {name}"))),
        }
    }
}

fn trunk_link(names: &NodeLinks, found: Option<&LinkMessage>) -> std::result::Result<TrunkLink, String> {
    if names.kernel.bridging == Bridging::Routed {
        names.kernel.vlan.clone()?;
    }
    let Some(name) = &names.trunk else {
        return Err("this node has no trunk interface; give netd one with --trunk".into());
    };
    names.kernel.vlan.clone()?;
    match found {
        None => Err(format!("the trunk interface {name} is not there")),
        Some(link) if !link.header.flags.contains(LinkFlags::Up) => {
            Err(format!("the trunk interface {name} is down; set it up (`ip link set {name} up`)"))
        }
        Some(link) => Ok(TrunkLink { name: name.clone(), mtu: mtu_of(link) }),
    }
}

fn mac_of(link: &LinkMessage) -> Option<MacAddress> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => MacAddress::new(bytes.as_slice().try_into().ok()?),
        _ => None,
    })
}

fn mtu_of(link: &LinkMessage) -> u32 {
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    mtu.unwrap_or_default()
}
