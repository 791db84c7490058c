//! What the kernel tells of its links, addresses, neighbours, routes and routing rules as they change.
//!
//! netd knows what it last read ([`Observed`]). The kernel puts a message in the monitor's queue before the call that changes something returns, so an empty
//! queue says that this is still so, without reading it all again. A message that speaks of something of netd's makes netd read again, also where
//! netd itself was the cause; most messages on a node do not: other links' neighbours come and go all the time. A queue that overflows has lost
//! messages, and they might have been about anything.
//!
//! Of proxy neighbours the kernel tells nothing.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{NeighbourMessage, NeighbourState};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::sys::socket::{setsockopt, sockopt};

use super::Observed;
use super::observed::{destination, destination_and_link, host_route, link_name};
use crate::desired::LinkName;
use crate::error::{Error, Result};

/// `RTNLGRP_LINK`, `…_NEIGH`, `…_IPV4_IFADDR`, `…_IPV4_ROUTE`, `…_IPV4_RULE` (`include/uapi/linux/rtnetlink.h`).
const GROUPS: [u32; 5] = [1, 3, 5, 7, 8];
/// A message takes up to about a kilobyte of it, whatever its size.
const QUEUE_BYTES: usize = 4 << 20;
const DATAGRAM_BYTES: usize = 64 << 10;

pub struct Monitor {
    socket: Socket,
}

impl Monitor {
    /// Hears of everything from now on.
    pub fn open() -> Result<Self> {
        let failed = || Error::io("listening to rtnetlink");
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed())?;
        socket.bind_auto().map_err(failed())?;
        // SAFETY: the descriptor belongs to `socket`, which outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
        setsockopt(&fd.as_fd(), sockopt::RcvBufForce, &QUEUE_BYTES).map_err(|error| failed()(error.into()))?;
        for group in GROUPS {
            socket.add_membership(group).map_err(failed())?;
        }
        Ok(Self { socket })
    }

    /// Empties the queue. True when nothing in it speaks against `known`, and nothing was lost.
    pub fn still(&mut self, known: &Observed) -> bool {
        let own = LazyCell::new(|| known.links.iter().map(|(name, link)| (link.index, name)).collect());
        let mut still = true;
        self.empty(|message| still = still && !concerns(message, known, &own)) && still
    }

    /// Forgets what was told until now.
    pub fn skip(&mut self) {
        while !self.empty(|_| {}) {}
    }

    /// Hands each message to `each`; false when some were lost.
    fn empty(&mut self, mut each: impl FnMut(&RouteNetlinkMessage)) -> bool {
        let mut whole = true;
        let mut buffer = Vec::with_capacity(DATAGRAM_BYTES);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
                Ok(_) => whole &= for_each_message(&buffer, &mut each),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return whole,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The kernel says so once (`ENOBUFS`), and goes on with what came after.
                Err(_) => return false,
            }
        }
    }
}

/// False when a message cannot be read.
fn for_each_message(mut bytes: &[u8], each: &mut impl FnMut(&RouteNetlinkMessage)) -> bool {
    while !bytes.is_empty() {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) else { return false };
        let length = (message.header.length as usize).next_multiple_of(4);
        if let NetlinkPayload::InnerMessage(message) = &message.payload {
            each(message);
        }
        bytes = bytes.get(length.max(4)..).unwrap_or_default();
    }
    true
}

type Own<'a> = BTreeMap<u32, &'a LinkName>;

fn concerns(message: &RouteNetlinkMessage, known: &Observed, own: &Own) -> bool {
    match message {
        RouteNetlinkMessage::NewLink(link) => own.contains_key(&link.header.index) || is_news(link, known),
        RouteNetlinkMessage::NewNeighbour(neighbour) | RouteNetlinkMessage::DelNeighbour(neighbour) => {
            own.get(&neighbour.header.ifindex).is_some_and(|name| is_set(neighbour, name, known))
        }
        RouteNetlinkMessage::NewRoute(route) => speaks_against(route, true, known, own),
        RouteNetlinkMessage::DelRoute(route) => speaks_against(route, false, known, own),
        // An address that goes takes routes with it of which nothing is told.
        _ => true,
    }
}

/// A link of somebody else's under a name that was not there. The bridges' own messages have another family and say nothing of names.
fn is_news(link: &LinkMessage, known: &Observed) -> bool {
    link.header.interface_family == AddressFamily::Unspec && !known.foreign.contains(&link_name(link))
}

/// A neighbour or a forwarding entry that somebody set. Those that the kernel learns are none.
fn is_set(message: &NeighbourMessage, link: &LinkName, known: &Observed) -> bool {
    message.header.family == AddressFamily::Bridge
        || matches!(message.header.state, NeighbourState::Permanent | NeighbourState::Noarp)
        || destination(message).is_some_and(|ip| known.neighbours.contains_key(&(link.clone(), ip)))
}

/// Whether a route that came, or went, is otherwise known.
fn speaks_against(route: &RouteMessage, is_there: bool, known: &Observed, own: &Own) -> bool {
    let Some((ip, index)) = destination_and_link(route) else { return false };
    let Some(link) = own.get(&index) else { return false };
    match host_route(route) {
        Some(source) if is_there => known.routes.get(&ip) != Some(&((*link).clone(), source)),
        Some(_) => known.routes.contains_key(&ip),
        None => true,
    }
}
