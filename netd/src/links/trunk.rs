//! Making a trunk port, and telling a VXLAN which node a MAC is on.
//!
//! A VXLAN keeps a forwarding table of its own, below the bridge's, in which each MAC has the address of the node that it
//! is on (`bridge fdb`, entries with `dst`). The MAC of all zeros stands for everybody: what is for a group, or for nobody
//! known, goes to each node listed there; since the bridge does not pass it frames for unknown MACs, that is broadcasts.
//! It never learns: who sends a frame into a tunnel could otherwise draw another's frames to itself.

use std::net::Ipv4Addr;

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourHeader, NeighbourMessage, NeighbourState,
};
use rtnetlink::{LinkVlan, LinkVxlan};

use super::perform::{del_neighbour, new_neighbour};
use super::requests::Request;
use super::{GROUP, Links, VXLAN_PORT, is_errno};
use crate::desired::{LinkName, MacAddress, Wire};
use crate::error::{Error, Result};
use crate::sysctl;

/// Everybody, in a VXLAN's forwarding table.
const EVERYBODY: [u8; 6] = [0; 6];

impl Links {
    /// Makes the port, still down and on no bridge.
    pub(super) async fn create_trunk_port(
        &self,
        name: &LinkName,
        wire: Wire,
        lower: Option<u32>,
        mtu: u32,
    ) -> Result<()> {
        let made = self.handle.link().add(port_message(name, wire, lower, mtu)).execute().await;
        made.map_err(|error| match (wire, is_errno(&error, libc::EEXIST)) {
            (Wire::Vlan { vid }, true) => Error::WireTaken(format!("VLAN {vid} of the trunk interface")),
            (Wire::Vxlan { vni, .. }, true) => Error::WireTaken(format!("VXLAN {vni}")),
            _ => Error::link("")(error),
        })?;
        sysctl::no_ipv6(name)
    }

    pub(super) fn set_tunnel(&self, port: &LinkName, mac: MacAddress, node: Ipv4Addr) -> Result<Request> {
        Ok(new_neighbour(entry(self.index(port)?, mac.octets(), Some(node)), NLM_F_CREATE | NLM_F_REPLACE))
    }

    pub(super) fn remove_tunnel(&self, port: &LinkName, mac: MacAddress) -> Result<Request> {
        Ok(del_neighbour(entry(self.index(port)?, mac.octets(), None)))
    }

    /// One more node for everybody's frames: the kernel takes several for this one MAC when each is appended.
    pub(super) fn add_flood(&self, port: &LinkName, node: Ipv4Addr) -> Result<Request> {
        Ok(new_neighbour(entry(self.index(port)?, EVERYBODY, Some(node)), NLM_F_CREATE | NLM_F_APPEND))
    }

    pub(super) fn remove_flood(&self, port: &LinkName, node: Ipv4Addr) -> Result<Request> {
        Ok(del_neighbour(entry(self.index(port)?, EVERYBODY, Some(node))))
    }
}

fn port_message(name: &LinkName, wire: Wire, lower: Option<u32>, mtu: u32) -> LinkMessage {
    match wire {
        Wire::Vlan { vid } => {
            LinkVlan::new(name.as_str(), lower.unwrap_or_default(), vid.number()).mtu(mtu).link_group(GROUP).build()
        }
        Wire::Vxlan { vni, local } => LinkVxlan::new(name.as_str(), vni.number())
            .local(local)
            .port(VXLAN_PORT)
            .learning(false)
            .mtu(mtu)
            .link_group(GROUP)
            .build(),
    }
}

/// An entry of the port's own table (`NTF_SELF`), not of its bridge's.
fn entry(index: u32, mac: [u8; 6], node: Option<Ipv4Addr>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header = NeighbourHeader {
        family: AddressFamily::Bridge,
        ifindex: index,
        state: NeighbourState::Permanent,
        flags: NeighbourFlags::Own,
        ..Default::default()
    };
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    message.attributes.extend(node.map(|node| NeighbourAttribute::Destination(NeighbourAddress::Inet(node))));
    message
}
