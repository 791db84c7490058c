//! Does the steps of a plan.
//!
//! Nearly all of them are requests, which wait until there are many ([`Requests`]). What makes a link is done at once, since later requests name the link by an
//! index that it has only then; no request that waits speaks of that link, but one that removes another of its name, and so these are sent before.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeader, AddressMessage, AddressScope};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourHeader, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteMessage, RouteScope};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use rtnetlink::{
    AddressMessageBuilder, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder,
};

use super::requests::{Request, Requests};
use super::tap::{self, TapOptions};
use super::{GROUP, Links, PROTOCOL, Step};
use crate::desired::{LinkName, MacAddress};
use crate::error::{Error, Result};
use crate::sysctl;

/// Makes what is not there and replaces what is.
const SET: u16 = NLM_F_CREATE | NLM_F_REPLACE;

impl Links {
    /// Does the steps, in order. A thing to be removed that is gone already is removed. A step that fails keeps no other from being done, but for those that
    /// name a link which it did not make: one that somebody else has taken must not keep all of a node's instances from their network. The first error
    /// is returned when all is done.
    pub async fn perform(&self, steps: &[Step]) -> Result<()> {
        if steps.is_empty() {
            return Ok(());
        }
        let mut requests = Requests::open()?;
        let mut failed = None;
        let mut removing = false;
        for (number, step) in steps.iter().enumerate() {
            tracing::debug!(?step, "changing the network");
            let makes =
                matches!(step, Step::CreateBridge { .. } | Step::CreateTap { .. } | Step::CreateTrunkPort { .. });
            if requests.is_full() || (makes && removing) {
                requests = send(requests, steps, &mut failed).await?;
                removing = false;
            }
            removing |= matches!(step, Step::DeleteLink { .. });
            let prepared = match makes {
                true => self.make(step, &requests).await.map(|()| Vec::new()),
                false => self.requests_of(step),
            };
            match prepared {
                Ok(more) => more.into_iter().for_each(|request| requests.put(number, request)),
                Err(error) => note(&mut failed, named(error, step)),
            }
        }
        send(requests, steps, &mut failed).await?;
        failed.map_or(Ok(()), Err)
    }

    async fn make(&self, step: &Step, requests: &Requests) -> Result<()> {
        match step {
            Step::CreateBridge { name, mac, mtu, ip_rules } => {
                self.indexes().remove(name);
                self.create_bridge(name, *mac, *mtu, *ip_rules).await
            }
            Step::CreateTap { name, owner, multi_queue } => {
                self.indexes().remove(name);
                let options = TapOptions { owner: *owner, multi_queue: *multi_queue };
                tap::create(name, options, async { mark_tap(name, requests) }).await
            }
            Step::CreateTrunkPort { name, wire, lower, mtu } => {
                self.indexes().remove(name);
                self.create_trunk_port(name, *wire, *lower, *mtu).await
            }
            _ => Ok(()),
        }
    }

    fn requests_of(&self, step: &Step) -> Result<Vec<Request>> {
        let request = match step {
            Step::DeleteLink { name } => self.delete_link(name),
            Step::SetIpRules { name, on } => set_ip_rules(name, *on),
            Step::SetMac { name, mac } => set(name, |link| link.address(mac.octets().to_vec())),
            Step::SetMtu { name, mtu } => set(name, |link| link.mtu(*mtu)),
            Step::SetAlias { name, alias } => set(name, |link| link.alias(alias.as_str())),
            Step::SetUp { name } => set(name, LinkMessageBuilder::up),
            Step::AddAddress { bridge, address } => add_address(self.index(bridge)?, *address),
            Step::RemoveAddress { bridge, address } => remove_address(self.index(bridge)?, *address),
            Step::SetNeighbour { bridge, ip, mac } => set_neighbour(self.index(bridge)?, *ip, *mac),
            Step::RemoveNeighbour { bridge, ip } => {
                del_neighbour(neighbour(self.index(bridge)?, *ip, NeighbourFlags::empty()))
            }
            Step::Attach { port, bridge, hairpin, isolated } => {
                return self.attach(port, bridge, *hairpin, *isolated).map(Into::into);
            }
            Step::AddForwarding { port, mac } => new_neighbour(forwarding(self.index(port)?, *mac), SET),
            Step::RemoveForwarding { port, mac } => del_neighbour(forwarding(self.index(port)?, *mac)),
            Step::SetTunnel { port, mac, node } => self.set_tunnel(port, *mac, *node)?,
            Step::RemoveTunnel { port, mac } => self.remove_tunnel(port, *mac)?,
            Step::AddFlood { port, node } => self.add_flood(port, *node)?,
            Step::RemoveFlood { port, node } => self.remove_flood(port, *node)?,
            Step::AddVpcRule { vpc } => Self::add_vpc_rule(*vpc),
            Step::RemoveVpcRule { vpc } => Self::remove_vpc_rule(*vpc),
            Step::AddBridgeRule { bridge, vpc } => Self::add_bridge_rule(bridge, *vpc),
            Step::RemoveBridgeRule { bridge, vpc } => Self::remove_bridge_rule(bridge, *vpc),
            Step::SetVpcRoute { route, bridge } => self.set_vpc_route(*route, bridge)?,
            Step::RemoveLeaked { bridge, address } => self.remove_leaked(bridge, *address)?,
            Step::SetRoute { ip, bridge, source } => set_route(host_route(*ip, self.index(bridge)?, *source)),
            Step::AddProxy { index, ip } => add_proxy(*ip, *index),
            Step::RemoveProxy { index, ip } => del_neighbour(neighbour(*index, *ip, NeighbourFlags::Proxy)),
            // A route goes with its bridge.
            Step::RemoveVpcRoute { route, bridge } => {
                return Ok(self
                    .known_index(bridge)?
                    .map(|index| Self::remove_vpc_route(*route, index))
                    .into_iter()
                    .collect());
            }
            Step::RemoveRoute { ip, bridge } => {
                let index = self.known_index(bridge)?;
                return Ok(index.map(|index| del_route(host_route(*ip, index, None))).into_iter().collect());
            }
            Step::CreateBridge { .. } | Step::CreateTap { .. } | Step::CreateTrunkPort { .. } => return Ok(Vec::new()),
        };
        Ok(vec![request])
    }

    /// The index of a link that must be there.
    pub(super) fn index(&self, name: &LinkName) -> Result<u32> {
        let found = self.known_index(name)?;
        found.ok_or_else(|| Error::Internal(format!("the link {name} went away while it was set up")))
    }

    /// The index of a link, if it is there.
    fn known_index(&self, name: &LinkName) -> Result<Option<u32>> {
        if let Some(index) = self.indexes().get(name) {
            return Ok(Some(*index));
        }
        match if_nametoindex(name.as_str()) {
            Ok(index) => {
                self.indexes().insert(name.clone(), index);
                Ok(Some(index))
            }
            Err(Errno::ENODEV) => Ok(None),
            Err(error) => Err(Error::io(format!("looking for {name}"))(error.into())),
        }
    }

    fn delete_link(&self, name: &LinkName) -> Request {
        self.indexes().remove(name);
        let message = LinkUnspec::new_with_name(name.as_str()).build();
        Request { message: RouteNetlinkMessage::DelLink(message), flags: 0 }
    }

    async fn create_bridge(&self, name: &LinkName, mac: MacAddress, mtu: u32, ip_rules: bool) -> Result<()> {
        let message = LinkBridge::new(name.as_str())
            .address(mac.octets().to_vec())
            .mtu(mtu)
            .link_group(GROUP)
            // No queries of its own into the segments, and no waiting before a port forwards.
            .mcast_snooping(false)
            .forward_delay(0)
            .nf_call_iptables(ip_rules)
            .build();
        self.handle.link().add(message).execute().await.map_err(Error::link(""))?;
        sysctl::quiet_bridge(name)
    }

    /// The MACs behind the port are known and fixed, so it need not learn, and need not be sent what is for
    /// nobody known. That leaves a hostile instance no way to draw another's frames to itself.
    fn attach(&self, port: &LinkName, bridge: &LinkName, hairpin: bool, isolated: bool) -> Result<[Request; 2]> {
        let controller = self.index(bridge)?;
        let placed = set(port, |link| link.controller(controller));
        let port = LinkBridgePort::new(self.index(port)?).learning(false).flood(false).hairpin(hairpin);
        let port = port.isolated(isolated).locked(isolated).build();
        Ok([placed, Request { message: RouteNetlinkMessage::NewLink(port), flags: 0 }])
    }
}

/// Sends what waits; a refusal is noted with its step.
async fn send(requests: Requests, steps: &[Step], failed: &mut Option<Error>) -> Result<Requests> {
    let (requests, refusal) = requests.send().await?;
    if let Some((number, error)) = refusal {
        note(failed, named(Error::link("")(error), &steps[number]));
    }
    Ok(requests)
}

fn note(failed: &mut Option<Error>, error: Error) {
    tracing::warn!(%error, "a step of many failed");
    failed.get_or_insert(error);
}

fn named(error: Error, step: &Step) -> Error {
    match error {
        Error::Link { source, .. } => Error::Link { doing: format!("{step:?}"), source },
        other => other,
    }
}

fn set(
    name: &LinkName,
    change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
) -> Request {
    let message = change(LinkUnspec::new_with_name(name.as_str())).build();
    Request { message: RouteNetlinkMessage::SetLink(message), flags: 0 }
}

/// Gives a tap that is being made to netd's group, and keeps IPv6 off it.
fn mark_tap(name: &LinkName, requests: &Requests) -> Result<()> {
    requests.send_alone(set(name, |link| link.link_group(GROUP)))?;
    sysctl::no_ipv6(name)
}

fn set_ip_rules(name: &LinkName, on: bool) -> Request {
    let message = LinkBridge::new(name.as_str()).nf_call_iptables(on).build();
    Request { message: RouteNetlinkMessage::NewLink(message), flags: 0 }
}

fn add_address(index: u32, address: Ipv4Net) -> Request {
    let mut message =
        AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address.addr(), address.prefix_len()).build();
    // Never chosen as the source of anything that leaves the segment.
    message.header.scope = AddressScope::Link;
    Request { message: RouteNetlinkMessage::NewAddress(message), flags: SET }
}

fn remove_address(index: u32, address: Ipv4Net) -> Request {
    let mut message = AddressMessage::default();
    message.header =
        AddressHeader { family: AddressFamily::Inet, prefix_len: address.prefix_len(), index, ..Default::default() };
    message.attributes.push(AddressAttribute::Local(address.addr().into()));
    Request { message: RouteNetlinkMessage::DelAddress(message), flags: 0 }
}

fn set_neighbour(index: u32, ip: Ipv4Addr, mac: MacAddress) -> Request {
    let mut message = neighbour(index, ip, NeighbourFlags::empty());
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
    new_neighbour(message, SET)
}

fn add_proxy(ip: Ipv4Addr, uplink_index: u32) -> Request {
    let mut message = neighbour(uplink_index, ip, NeighbourFlags::Proxy);
    message.attributes.push(NeighbourAttribute::Protocol(PROTOCOL));
    new_neighbour(message, SET)
}

pub(super) fn new_neighbour(message: NeighbourMessage, flags: u16) -> Request {
    Request { message: RouteNetlinkMessage::NewNeighbour(message), flags }
}

pub(super) fn del_neighbour(message: NeighbourMessage) -> Request {
    Request { message: RouteNetlinkMessage::DelNeighbour(message), flags: 0 }
}

pub(super) fn set_route(message: RouteMessage) -> Request {
    Request { message: RouteNetlinkMessage::NewRoute(message), flags: SET }
}

pub(super) fn del_route(message: RouteMessage) -> Request {
    Request { message: RouteNetlinkMessage::DelRoute(message), flags: 0 }
}

/// A static entry of the bridge's table (`NTF_MASTER`).
fn forwarding(index: u32, mac: MacAddress) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header = NeighbourHeader {
        family: AddressFamily::Bridge,
        ifindex: index,
        state: NeighbourState::Noarp,
        flags: NeighbourFlags::Controller,
        ..Default::default()
    };
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
    message
}

fn neighbour(index: u32, ip: Ipv4Addr, flags: NeighbourFlags) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header = NeighbourHeader {
        family: AddressFamily::Inet,
        ifindex: index,
        state: NeighbourState::Permanent,
        flags,
        ..Default::default()
    };
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)));
    message
}

fn host_route(ip: Ipv4Addr, bridge_index: u32, source: Option<Ipv4Addr>) -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(ip, 32)
        .output_interface(bridge_index)
        .scope(RouteScope::Link)
        .protocol(PROTOCOL);
    match source {
        Some(source) => route.pref_source(source).build(),
        None => route.build(),
    }
}
