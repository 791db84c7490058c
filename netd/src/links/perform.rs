//! Does one step of a plan.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressHeader, AddressMessage, AddressScope};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourHeader, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};

use super::tap::{self, TapOptions};
use super::{GROUP, Links, PROTOCOL, Step, is_errno};
use crate::desired::{LinkName, MacAddress};
use crate::error::{Error, Result};
use crate::sysctl;

impl Links {
    /// Does the step. A thing to be removed that is gone already is removed.
    pub async fn perform(&self, step: &Step) -> Result<()> {
        tracing::debug!(?step, "changing the network");
        let outcome = match step {
            Step::DeleteLink { name } => self.delete_link(name).await,
            Step::CreateBridge { name, mac, mtu, ip_rules } => self.create_bridge(name, *mac, *mtu, *ip_rules).await,
            Step::SetIpRules { name, on } => self.set_ip_rules(name, *on).await,
            Step::SetMac { name, mac } => self.set(name, |link| link.address(mac.octets().to_vec())).await,
            Step::SetMtu { name, mtu } => self.set(name, |link| link.mtu(*mtu)).await,
            Step::SetAlias { name, alias } => self.set(name, |link| link.alias(alias.as_str())).await,
            Step::SetUp { name } => self.set(name, LinkMessageBuilder::up).await,
            Step::AddAddress { bridge, address } => self.add_address(bridge, *address).await,
            Step::RemoveAddress { bridge, address } => self.remove_address(bridge, *address).await,
            Step::SetNeighbour { bridge, ip, mac } => self.set_neighbour(bridge, *ip, *mac).await,
            Step::RemoveNeighbour { bridge, ip } => self.remove_neighbour(bridge, *ip).await,
            Step::CreateTap { name, owner, multi_queue } => {
                let options = TapOptions { owner: *owner, multi_queue: *multi_queue };
                tap::create(name, options, self.mark_tap(name)).await
            }
            Step::CreateTrunkPort { name, wire, lower, mtu } => self.create_trunk_port(name, *wire, *lower, *mtu).await,
            Step::Attach { port, bridge, hairpin, isolated } => self.attach(port, bridge, *hairpin, *isolated).await,
            Step::AddForwarding { port, mac } => self.add_forwarding(port, *mac).await,
            Step::RemoveForwarding { port, mac } => self.remove_forwarding(port, *mac).await,
            Step::SetTunnel { port, mac, node } => self.set_tunnel(port, *mac, *node).await,
            Step::RemoveTunnel { port, mac } => self.remove_tunnel(port, *mac).await,
            Step::AddFlood { port, node } => self.add_flood(port, *node).await,
            Step::RemoveFlood { port, node } => self.remove_flood(port, *node).await,
            Step::AddVpcRule { vpc } => self.add_vpc_rule(*vpc).await,
            Step::RemoveVpcRule { vpc } => self.remove_vpc_rule(*vpc).await,
            Step::AddBridgeRule { bridge, vpc } => self.add_bridge_rule(bridge, *vpc).await,
            Step::RemoveBridgeRule { bridge, vpc } => self.remove_bridge_rule(bridge, *vpc).await,
            Step::SetVpcRoute { route, bridge } => self.set_vpc_route(*route, bridge).await,
            Step::RemoveVpcRoute { route, bridge } => self.remove_vpc_route(*route, bridge).await,
            Step::RemoveLeaked { bridge, address } => self.remove_leaked(bridge, *address).await,
            Step::SetRoute { ip, bridge, source } => self.set_route(*ip, bridge, *source).await,
            Step::RemoveRoute { ip, bridge } => self.remove_route(*ip, bridge).await,
            Step::AddProxy { index, ip } => self.add_proxy(*ip, *index).await,
            Step::RemoveProxy { index, ip } => self.remove_proxy(*ip, *index).await,
        };
        outcome.map_err(|error| match error {
            Error::Link { source, .. } => Error::Link { doing: format!("{step:?}"), source },
            other => other,
        })
    }

    pub(super) async fn index(&self, name: &LinkName) -> Result<u32> {
        if let Some(index) = self.indexes().get(name) {
            return Ok(*index);
        }
        let found = self.index_of(name).await?;
        let index = found.ok_or_else(|| Error::Internal(format!("the link {name} went away while it was set up")))?;
        self.indexes().insert(name.clone(), index);
        Ok(index)
    }

    async fn set(
        &self,
        name: &LinkName,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<()> {
        let index = self.index(name).await?;
        let message = change(LinkUnspec::new_with_index(index)).build();
        self.handle.link().set(message).execute().await.map_err(Error::link(""))
    }

    async fn delete_link(&self, name: &LinkName) -> Result<()> {
        self.indexes().remove(name);
        match self.index_of(name).await? {
            Some(index) => gone_is_good(self.handle.link().del(index).execute().await),
            None => Ok(()),
        }
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

    async fn set_ip_rules(&self, name: &LinkName, on: bool) -> Result<()> {
        let message = LinkBridge::new(name.as_str()).nf_call_iptables(on).build();
        self.handle.link().change(message).execute().await.map_err(Error::link(""))
    }

    /// Gives a tap that is being made to netd's group, and keeps IPv6 off it.
    async fn mark_tap(&self, name: &LinkName) -> Result<()> {
        self.set(name, |link| link.link_group(GROUP)).await?;
        sysctl::no_ipv6(name)
    }

    /// The MACs behind the port are known and fixed, so it need not learn, and need not be sent what is for
    /// nobody known. That leaves a hostile instance no way to draw another's frames to itself.
    async fn attach(&self, port: &LinkName, bridge: &LinkName, hairpin: bool, isolated: bool) -> Result<()> {
        let controller = self.index(bridge).await?;
        self.set(port, |link| link.controller(controller)).await?;
        let port = LinkBridgePort::new(self.index(port).await?).learning(false).flood(false).hairpin(hairpin);
        let port = port.isolated(isolated).locked(isolated).build();
        self.handle.link().set_port(port).execute().await.map_err(Error::link(""))
    }

    async fn add_address(&self, bridge: &LinkName, address: Ipv4Net) -> Result<()> {
        let index = self.index(bridge).await?;
        let mut request = self.handle.address().add(index, address.addr().into(), address.prefix_len());
        // Never chosen as the source of anything that leaves the segment.
        request.message_mut().header.scope = AddressScope::Link;
        request.replace().execute().await.map_err(Error::link(""))
    }

    async fn remove_address(&self, bridge: &LinkName, address: Ipv4Net) -> Result<()> {
        let mut message = AddressMessage::default();
        message.header = AddressHeader {
            family: AddressFamily::Inet,
            prefix_len: address.prefix_len(),
            index: self.index(bridge).await?,
            ..Default::default()
        };
        message.attributes.push(AddressAttribute::Local(address.addr().into()));
        gone_is_good(self.handle.address().del(message).execute().await)
    }

    async fn set_neighbour(&self, bridge: &LinkName, ip: Ipv4Addr, mac: MacAddress) -> Result<()> {
        let index = self.index(bridge).await?;
        let request = self.handle.neighbours().add(index, ip.into());
        let request = request.link_layer_address(&mac.octets()).state(NeighbourState::Permanent);
        request.replace().execute().await.map_err(Error::link(""))
    }

    async fn remove_neighbour(&self, bridge: &LinkName, ip: Ipv4Addr) -> Result<()> {
        let message = neighbour(self.index(bridge).await?, ip, NeighbourFlags::empty());
        gone_is_good(self.handle.neighbours().del(message).execute().await)
    }

    async fn add_forwarding(&self, port: &LinkName, mac: MacAddress) -> Result<()> {
        let index = self.index(port).await?;
        let request = self.handle.neighbours().add_bridge(index, &mac.octets());
        let request = request.state(NeighbourState::Noarp).flags(NeighbourFlags::Controller);
        request.replace().execute().await.map_err(Error::link(""))
    }

    async fn remove_forwarding(&self, port: &LinkName, mac: MacAddress) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header = NeighbourHeader {
            family: AddressFamily::Bridge,
            ifindex: self.index(port).await?,
            flags: NeighbourFlags::Controller,
            ..Default::default()
        };
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
        gone_is_good(self.handle.neighbours().del(message).execute().await)
    }

    async fn set_route(&self, ip: Ipv4Addr, bridge: &LinkName, source: Option<Ipv4Addr>) -> Result<()> {
        let message = host_route(ip, self.index(bridge).await?, source);
        self.handle.route().add(message).replace().execute().await.map_err(Error::link(""))
    }

    async fn remove_route(&self, ip: Ipv4Addr, bridge: &LinkName) -> Result<()> {
        match self.index_of(bridge).await? {
            Some(index) => gone_is_good(self.handle.route().del(host_route(ip, index, None)).execute().await),
            // The route went with its bridge.
            None => Ok(()),
        }
    }

    async fn add_proxy(&self, ip: Ipv4Addr, uplink_index: u32) -> Result<()> {
        let mut request = self.handle.neighbours().add(uplink_index, ip.into());
        *request.message_mut() = neighbour(uplink_index, ip, NeighbourFlags::Proxy);
        request.message_mut().attributes.push(NeighbourAttribute::Protocol(PROTOCOL));
        request.replace().execute().await.map_err(Error::link(""))
    }

    async fn remove_proxy(&self, ip: Ipv4Addr, uplink_index: u32) -> Result<()> {
        let message = neighbour(uplink_index, ip, NeighbourFlags::Proxy);
        gone_is_good(self.handle.neighbours().del(message).execute().await)
    }
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

/// What was to be removed is gone: that is as good as having removed it.
pub(super) fn gone_is_good(outcome: std::result::Result<(), rtnetlink::Error>) -> Result<()> {
    const GONE: [i32; 4] = [libc::ENOENT, libc::ENODEV, libc::ESRCH, libc::EADDRNOTAVAIL];
    match outcome {
        Err(error) if GONE.iter().any(|number| is_errno(&error, *number)) => Ok(()),
        outcome => outcome.map_err(Error::link("")),
    }
}
