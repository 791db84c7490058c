//! What the kernel has: netd's links with what hangs on them, and other links by name only.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use futures::TryStreamExt;
use ipnet::Ipv4Net;
use netlink_packet_core::Nla;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{
    InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoTun, InfoVlan, InfoVxlan, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage};
use rtnetlink::RouteMessageBuilder;

use super::vpcs::{self, Routing};
use super::{GROUP, Links, PROTOCOL, VXLAN_PORT};
use crate::desired::{LinkName, MacAddress, VlanId, Vni, Wire};
use crate::error::{Error, Result};

// Attributes of a tun device (`include/uapi/linux/if_link.h`, `IFLA_TUN_*`).
const TUN_OWNER: u16 = 1;
const TUN_MULTI_QUEUE: u16 = 7;

/// What of the kernel's network concerns netd.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// netd's own bridges, taps and trunk ports.
    pub links: BTreeMap<LinkName, Link>,
    /// Names of all other links.
    pub foreign: BTreeSet<String>,
    /// Addresses on netd's bridges.
    pub addresses: BTreeSet<(LinkName, Ipv4Net)>,
    /// Static forwarding entries of netd's ports.
    pub forwarding: BTreeSet<(LinkName, MacAddress)>,
    /// Which node a MAC is on, by the VXLAN port that leads there.
    pub tunnels: BTreeMap<(LinkName, MacAddress), Ipv4Addr>,
    /// The nodes that a VXLAN port sends broadcasts to.
    pub floods: BTreeSet<(LinkName, Ipv4Addr)>,
    /// Permanent neighbours on netd's bridges.
    pub neighbours: BTreeMap<(LinkName, Ipv4Addr), MacAddress>,
    /// netd's host routes: to a public address, by way of a bridge, with the source of what the node itself sends there.
    pub routes: BTreeMap<Ipv4Addr, (LinkName, Option<Ipv4Addr>)>,
    /// The routing tables of VPCs.
    pub routing: Routing,
    /// Addresses that are answered for by proxy ARP, with the index of the link that does.
    pub proxies: BTreeSet<(u32, Ipv4Addr)>,
}

/// One of netd's links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub kind: LinkKind,
    /// Of a port: where it is one.
    pub port: Option<PortOf>,
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
    Bridge {
        /// It takes frames through the rules for IPv4.
        ip_rules: bool,
    },
    Tap {
        owner: Option<u32>,
        multi_queue: bool,
    },
    Trunk {
        wire: Wire,
        /// Index of the interface that a VLAN lies on.
        lower: Option<u32>,
    },
    Other,
}

/// A port's place on a bridge of netd's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortOf {
    pub bridge: LinkName,
    /// The port neither learns source addresses nor gets frames for unknown ones.
    pub pinned: bool,
    /// The port may send a frame back where it came from.
    pub hairpin: bool,
    /// It sends to the bridge alone, and only from the MACs that are behind it.
    pub isolated: bool,
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
        let mut observed = self.observe_all_but_proxies().await?;
        self.observe_proxies(&mut observed).await?;
        Ok(observed)
    }

    pub(super) async fn observe_all_but_proxies(&self) -> Result<Observed> {
        let mut observed = Observed::default();
        let names = self.observe_links(&mut observed).await?;
        self.observe_addresses(&names, &mut observed).await?;
        self.observe_forwarding(&names, &mut observed).await?;
        self.observe_neighbours(&names, &mut observed).await?;
        self.observe_routes(&names, &mut observed).await?;
        self.observe_rules(&mut observed).await?;
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
            if let Some(name) = own.get(&message.header.ifindex) {
                observed.add_forwarding(name, &message);
            }
        }
    }

    async fn observe_neighbours(&self, own: &BTreeMap<u32, LinkName>, observed: &mut Observed) -> Result<()> {
        let mut entries = self.handle.neighbours().get().set_address_family(AddressFamily::Inet).execute();
        while let Some(message) = entries.try_next().await.map_err(Error::link("listing neighbours"))? {
            let permanent = message.header.state == NeighbourState::Permanent;
            if let (Some(name), Some(ip), Some(mac), true) =
                (own.get(&message.header.ifindex), destination(&message), link_layer_address(&message), permanent)
            {
                observed.neighbours.insert((name.clone(), ip), mac);
            }
        }
        Ok(())
    }

    pub(super) async fn observe_proxies(&self, observed: &mut Observed) -> Result<()> {
        observed.proxies.clear();
        let request = self.handle.neighbours().get().set_address_family(AddressFamily::Inet);
        let mut proxies = request.proxies().execute();
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
            let Some((ip, index)) = destination_and_link(&message) else { continue };
            let Some(name) = own.get(&index) else { continue };
            observed.routing.add_route(&message, name);
            if let Some(source) = host_route(&message) {
                observed.routes.insert(ip, (name.clone(), source));
            }
        }
        Ok(())
    }
}

impl Observed {
    /// The MACs that frames to a port are forwarded for.
    pub fn forwarding_of<'a>(&'a self, port: &'a LinkName) -> impl Iterator<Item = MacAddress> + 'a {
        let from_first = self.forwarding.range((port.clone(), MacAddress::LEAST)..);
        from_first.take_while(move |(name, _)| name == port).map(|(_, mac)| *mac)
    }

    /// Takes up one entry of the forwarding tables. The bridges' and the VXLANs' come in one list; only an entry of a
    /// VXLAN's has a destination.
    fn add_forwarding(&mut self, name: &LinkName, message: &NeighbourMessage) {
        let tagged = message.attributes.iter().any(|attribute| matches!(attribute, NeighbourAttribute::Vlan(_)));
        // `Noarp` is a static entry; `Permanent` is the port's own address.
        let fixed = message.header.state == NeighbourState::Noarp && !tagged;
        match (link_layer_address(message), destination(message)) {
            (Some(mac), Some(node)) => drop(self.tunnels.insert((name.clone(), mac), node)),
            // All zeros, which is no host's address, stands for everybody.
            (None, Some(node)) => drop(self.floods.insert((name.clone(), node))),
            (Some(mac), None) if fixed => drop(self.forwarding.insert((name.clone(), mac))),
            _ => {}
        }
    }
}

pub(super) fn link_name(message: &LinkMessage) -> String {
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
        port: None,
        mac: [0; 6],
        mtu: 0,
        alias: None,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: false,
        traffic: Traffic::default(),
    };
    let (mut controller, mut lower) = (None, None);
    let mut infos: &[LinkInfo] = &[];
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().unwrap_or_default(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Carrier(carrier) => link.carrier = *carrier != 0,
            LinkAttribute::Controller(index) => controller = own.get(index).cloned(),
            LinkAttribute::Link(index) => lower = Some(*index),
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
    link.port = controller.map(|bridge| PortOf {
        bridge,
        pinned: is_pinned(infos),
        hairpin: is_hairpin(infos),
        isolated: is_isolated(infos),
    });
    link.kind = infos.iter().find_map(|info| read_kind(info, lower)).unwrap_or_else(|| kind_without_data(infos));
    link
}

fn is_pinned(infos: &[LinkInfo]) -> bool {
    infos.iter().any(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
            port.contains(&InfoBridgePort::Learning(false)) && port.contains(&InfoBridgePort::UnicastFlood(false))
        }
        _ => false,
    })
}

fn is_hairpin(infos: &[LinkInfo]) -> bool {
    let on = |port: &Vec<InfoBridgePort>| port.contains(&InfoBridgePort::HairpinMode(true));
    infos.iter().any(|info| matches!(info, LinkInfo::PortData(InfoPortData::BridgePort(port)) if on(port)))
}

/// One without the other is neither: it is set again.
fn is_isolated(infos: &[LinkInfo]) -> bool {
    infos.iter().any(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
            port.contains(&InfoBridgePort::Isolated(true)) && port.contains(&InfoBridgePort::Locked(true))
        }
        _ => false,
    })
}

/// The kind, where its data tell it.
fn read_kind(info: &LinkInfo, lower: Option<u32>) -> Option<LinkKind> {
    let LinkInfo::Data(data) = info else { return None };
    match data {
        InfoData::Bridge(attributes) => {
            Some(LinkKind::Bridge { ip_rules: attributes.contains(&InfoBridge::NfCallIpTables(true)) })
        }
        InfoData::Tun(attributes) => Some(read_tap(attributes)),
        InfoData::Vlan(attributes) => attributes.iter().find_map(|attribute| match attribute {
            InfoVlan::Id(vid) => Some(LinkKind::Trunk { wire: Wire::Vlan { vid: VlanId::new((*vid).into())? }, lower }),
            _ => None,
        }),
        InfoData::Vxlan(attributes) => read_vxlan(attributes),
        _ => None,
    }
}

fn kind_without_data(infos: &[LinkInfo]) -> LinkKind {
    match infos.contains(&LinkInfo::Kind(InfoKind::Bridge)) {
        true => LinkKind::Bridge { ip_rules: false },
        false => LinkKind::Other,
    }
}

fn read_tap(attributes: &[InfoTun]) -> LinkKind {
    let (mut owner, mut multi_queue) = (None, false);
    for attribute in attributes {
        match attribute.kind() {
            TUN_OWNER => owner = tun_value(attribute).map(u32::from_ne_bytes),
            TUN_MULTI_QUEUE => multi_queue = tun_value(attribute) == Some([1_u8]),
            _ => {}
        }
    }
    LinkKind::Tap { owner, multi_queue }
}

/// A VXLAN as netd makes them, or none: one that learns, or with another port, is made anew.
fn read_vxlan(attributes: &[InfoVxlan]) -> Option<LinkKind> {
    let (mut vni, mut local) = (None, None);
    for attribute in attributes {
        match attribute {
            InfoVxlan::Id(number) => vni = Vni::new(*number),
            InfoVxlan::Local(address) => local = Some(*address),
            InfoVxlan::Learning(true) => return None,
            InfoVxlan::Port(port) if *port != VXLAN_PORT => return None,
            _ => {}
        }
    }
    Some(LinkKind::Trunk { wire: Wire::Vxlan { vni: vni?, local: local? }, lower: None })
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

pub(super) fn destination(message: &NeighbourMessage) -> Option<Ipv4Addr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(*ip),
        // Of a forwarding entry: the message's family is the bridge's and says nothing of the address.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            <[u8; 4]>::try_from(bytes.as_slice()).ok().map(Ipv4Addr::from)
        }
        _ => None,
    })
}

/// The source of what the node sends by it, where it is one of netd's host routes.
pub(super) fn host_route(message: &RouteMessage) -> Option<Option<Ipv4Addr>> {
    let is_main = vpcs::table_of(message) == u32::from(RouteHeader::RT_TABLE_MAIN);
    let ours = message.header.protocol == PROTOCOL && message.header.destination_prefix_length == 32 && is_main;
    ours.then(|| vpcs::source(message))
}

pub(super) fn destination_and_link(message: &RouteMessage) -> Option<(Ipv4Addr, u32)> {
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
