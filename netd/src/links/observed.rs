//! What the kernel has: netd's links with what hangs on them, and other links by name only.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use futures::TryStreamExt;
use ipnet::Ipv4Net;
use netlink_packet_core::Nla;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoTun, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::RouteMessageBuilder;

use super::{GROUP, Links, PROTOCOL};
use crate::desired::{LinkName, MacAddress};
use crate::error::{Error, Result};

// Attributes of a tun device (`include/uapi/linux/if_link.h`, `IFLA_TUN_*`).
const TUN_OWNER: u16 = 1;
const TUN_MULTI_QUEUE: u16 = 7;

/// What of the kernel's network concerns netd.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// netd's own bridges and taps.
    pub links: BTreeMap<LinkName, Link>,
    /// Names of all other links.
    pub foreign: BTreeSet<String>,
    /// Addresses on netd's bridges.
    pub addresses: BTreeSet<(LinkName, Ipv4Net)>,
    /// Static forwarding entries of netd's taps.
    pub forwarding: BTreeSet<(LinkName, MacAddress)>,
    /// Permanent neighbours on netd's bridges.
    pub neighbours: BTreeMap<(LinkName, Ipv4Addr), MacAddress>,
    /// netd's host routes: to a public address, by way of a bridge.
    pub routes: BTreeMap<Ipv4Addr, LinkName>,
    /// Addresses that are answered for by proxy ARP, with the index of the link that does.
    pub proxies: BTreeSet<(u32, Ipv4Addr)>,
}

/// One of netd's links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub kind: LinkKind,
    pub mac: [u8; 6],
    pub mtu: u32,
    pub alias: Option<String>,
    pub up: bool,
    /// Of a tap: somebody has it open.
    pub carrier: bool,
    pub traffic: Traffic,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    Bridge,
    Tap {
        owner: Option<u32>,
        multi_queue: bool,
        /// The bridge it is a port of.
        bridge: Option<LinkName>,
        /// The port neither learns source addresses nor gets frames for unknown ones.
        pinned: bool,
    },
    Other,
}

/// Counters of a link, as the node sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub rx_packets: u64,
    pub tx_packets: u64,
}

impl Links {
    /// Reads everything that [`Observed`] holds.
    pub async fn observe(&self) -> Result<Observed> {
        let mut observed = Observed::default();
        let names = self.observe_links(&mut observed).await?;
        self.observe_addresses(&names, &mut observed).await?;
        self.observe_forwarding(&names, &mut observed).await?;
        self.observe_neighbours(&names, &mut observed).await?;
        self.observe_routes(&names, &mut observed).await?;
        Ok(observed)
    }

    /// Fills in the links; returns the names of netd's own by index.
    async fn observe_links(&self, observed: &mut Observed) -> Result<BTreeMap<u32, LinkName>> {
        let messages: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.map_err(Error::link("listing links"))?;
        let mut own = BTreeMap::new();
        for message in &messages {
            let name = link_name(message);
            match name.parse::<LinkName>() {
                Ok(name) if is_own(message) => {
                    own.insert(message.header.index, name);
                }
                _ => {
                    observed.foreign.insert(name);
                }
            }
        }
        for message in &messages {
            if let Some(name) = own.get(&message.header.index) {
                observed.links.insert(name.clone(), read_link(message, &own));
            }
        }
        Ok(own)
    }

    async fn observe_addresses(&self, own: &BTreeMap<u32, LinkName>, observed: &mut Observed) -> Result<()> {
        let mut addresses = self.handle.address().get().execute();
        while let Some(message) = addresses.try_next().await.map_err(Error::link("listing addresses"))? {
            if let (Some(name), Some(address)) =
                (own.get(&message.header.index), ipv4_of(&message.attributes, message.header.prefix_len))
            {
                observed.addresses.insert((name.clone(), address));
            }
        }
        Ok(())
    }

    /// IPv4 addresses of one link.
    pub(super) async fn addresses_of(&self, index: u32) -> Result<Vec<Ipv4Net>> {
        let mut messages = self.handle.address().get().set_link_index_filter(index).execute();
        let mut addresses = Vec::new();
        while let Some(message) = messages.try_next().await.map_err(Error::link("listing addresses"))? {
            addresses.extend(ipv4_of(&message.attributes, message.header.prefix_len));
        }
        Ok(addresses)
    }

    /// The Ethernet address of one link.
    pub(super) async fn mac_of(&self, index: u32) -> Result<Option<MacAddress>> {
        let mut messages = self.handle.link().get().match_index(index).execute();
        let message = messages.try_next().await.map_err(Error::link("reading the uplink"))?;
        Ok(message.into_iter().flat_map(|message| message.attributes).find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => MacAddress::new(bytes.try_into().ok()?),
            _ => None,
        }))
    }

    async fn observe_forwarding(&self, own: &BTreeMap<u32, LinkName>, observed: &mut Observed) -> Result<()> {
        let request = self.handle.neighbours().get().set_address_family(AddressFamily::Bridge);
        let mut entries = request.execute();
        loop {
            let message = match entries.try_next().await {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(()),
                // A kernel without any bridge has no such table.
                Err(error) if super::is_errno(&error, libc::EOPNOTSUPP) => return Ok(()),
                Err(error) => return Err(Error::link("listing bridge forwarding entries")(error)),
            };
            // `Noarp` is a static entry; `Permanent` is the port's own address.
            let fixed = message.header.state == NeighbourState::Noarp;
            let untagged = !message.attributes.iter().any(|attribute| matches!(attribute, NeighbourAttribute::Vlan(_)));
            if let (Some(name), Some(mac), true) =
                (own.get(&message.header.ifindex), link_layer_address(&message), fixed && untagged)
            {
                observed.forwarding.insert((name.clone(), mac));
            }
        }
    }

    async fn observe_neighbours(&self, own: &BTreeMap<u32, LinkName>, observed: &mut Observed) -> Result<()> {
        let request = || self.handle.neighbours().get().set_address_family(AddressFamily::Inet);
        let mut entries = request().execute();
        while let Some(message) = entries.try_next().await.map_err(Error::link("listing neighbours"))? {
            let permanent = message.header.state == NeighbourState::Permanent;
            if let (Some(name), Some(ip), Some(mac), true) =
                (own.get(&message.header.ifindex), destination(&message), link_layer_address(&message), permanent)
            {
                observed.neighbours.insert((name.clone(), ip), mac);
            }
        }
        let mut proxies = request().proxies().execute();
        while let Some(message) = proxies.try_next().await.map_err(Error::link("listing proxy neighbours"))? {
            let ours = message.attributes.contains(&NeighbourAttribute::Protocol(PROTOCOL));
            let proxy = message.header.flags.contains(NeighbourFlags::Proxy);
            if let (Some(ip), true) = (destination(&message), ours && proxy) {
                observed.proxies.insert((message.header.ifindex, ip));
            }
        }
        Ok(())
    }

    async fn observe_routes(&self, own: &BTreeMap<u32, LinkName>, observed: &mut Observed) -> Result<()> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let mut routes = self.handle.route().get(request).execute();
        while let Some(message) = routes.try_next().await.map_err(Error::link("listing routes"))? {
            if message.header.protocol != PROTOCOL || message.header.destination_prefix_length != 32 {
                continue;
            }
            if let Some((ip, index)) = host_route(&message)
                && let Some(name) = own.get(&index)
            {
                observed.routes.insert(ip, name.clone());
            }
        }
        Ok(())
    }
}

fn link_name(message: &LinkMessage) -> String {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
        .unwrap_or_default()
}

fn is_own(message: &LinkMessage) -> bool {
    message.attributes.contains(&LinkAttribute::Group(GROUP))
}

fn read_link(message: &LinkMessage, own: &BTreeMap<u32, LinkName>) -> Link {
    let mut link = Link {
        index: message.header.index,
        kind: LinkKind::Other,
        mac: [0; 6],
        mtu: 0,
        alias: None,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: false,
        traffic: Traffic::default(),
    };
    let mut controller = None;
    let mut infos: &[LinkInfo] = &[];
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().unwrap_or_default(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Carrier(carrier) => link.carrier = *carrier != 0,
            LinkAttribute::Controller(index) => controller = own.get(index).cloned(),
            LinkAttribute::LinkInfo(found) => infos = found,
            LinkAttribute::Stats64(stats) => {
                link.traffic = Traffic {
                    rx_bytes: stats.rx_bytes,
                    tx_bytes: stats.tx_bytes,
                    rx_packets: stats.rx_packets,
                    tx_packets: stats.tx_packets,
                }
            }
            _ => {}
        }
    }
    link.kind = read_kind(infos, controller);
    link
}

fn read_kind(infos: &[LinkInfo], bridge: Option<LinkName>) -> LinkKind {
    if infos.contains(&LinkInfo::Kind(InfoKind::Bridge)) {
        return LinkKind::Bridge;
    }
    if !infos.contains(&LinkInfo::Kind(InfoKind::Tun)) {
        return LinkKind::Other;
    }
    let (mut owner, mut multi_queue, mut pinned) = (None, false, false);
    for info in infos {
        match info {
            LinkInfo::Data(InfoData::Tun(attributes)) => {
                for attribute in attributes {
                    match attribute.kind() {
                        TUN_OWNER => owner = tun_value(attribute).map(u32::from_ne_bytes),
                        TUN_MULTI_QUEUE => multi_queue = tun_value(attribute) == Some([1_u8]),
                        _ => {}
                    }
                }
            }
            LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                pinned = port.contains(&InfoBridgePort::Learning(false))
                    && port.contains(&InfoBridgePort::UnicastFlood(false));
            }
            _ => {}
        }
    }
    LinkKind::Tap { owner, multi_queue, bridge, pinned }
}

fn tun_value<const N: usize>(attribute: &InfoTun) -> Option<[u8; N]> {
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    bytes.try_into().ok()
}

fn ipv4_of(attributes: &[AddressAttribute], prefix: u8) -> Option<Ipv4Net> {
    let ipv4 = |wanted_local: bool| {
        attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(std::net::IpAddr::V4(ip)) if wanted_local => Some(*ip),
            AddressAttribute::Address(std::net::IpAddr::V4(ip)) if !wanted_local => Some(*ip),
            _ => None,
        })
    };
    Ipv4Net::new(ipv4(true).or_else(|| ipv4(false))?, prefix).ok()
}

fn link_layer_address(message: &NeighbourMessage) -> Option<MacAddress> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => MacAddress::new(bytes.as_slice().try_into().ok()?),
        _ => None,
    })
}

fn destination(message: &NeighbourMessage) -> Option<Ipv4Addr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(*ip),
        _ => None,
    })
}

fn host_route(message: &RouteMessage) -> Option<(Ipv4Addr, u32)> {
    let mut ip = None;
    let mut output = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => ip = Some(*address),
            RouteAttribute::Oif(index) => output = Some(*index),
            _ => {}
        }
    }
    Some((ip?, output?))
}
