//! The network: from a frame that came in to the frames that go out.
//!
//! [`stack::Stack`] is all that the guest's loop deals with. Below it, a module for each protocol
//! parses and builds that protocol alone, and the clients (`dhcp`, `tcp`, `metadata`) are state
//! machines that are given time and messages and say what to send.
//!
//! Answers go back to the hardware address that the question came from, so an echo needs no
//! look-up and measures nothing but itself.

pub mod arp;
pub mod dhcp;
pub mod dhcp_message;
pub mod eth;
pub mod http;
pub mod icmp;
pub mod ipv4;
pub mod metadata;
pub mod services;
pub mod stack;
pub mod tcp;
pub mod tcp_segment;
pub mod udp;

use core::fmt;
use core::net::Ipv4Addr;
use core::time::Duration;

/// A hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    pub const BROADCAST: Mac = Mac([0xff; 6]);

    /// Not the address of one station.
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The guest's address on its segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub ip: Ipv4Addr,
    /// Length of the network prefix in bits, 0 to 32.
    pub prefix: u8,
    pub gateway: Option<Ipv4Addr>,
}

impl Address {
    /// The station on the segment that a packet for `destination` is handed to.
    pub fn next_hop(&self, destination: Ipv4Addr) -> Ipv4Addr {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
        let on_link = (self.ip.to_bits() ^ destination.to_bits()) & mask == 0;
        match self.gateway {
            Some(gateway) if !on_link => gateway,
            _ => destination,
        }
    }
}

/// A network address together with the hardware address that leads to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub mac: Mac,
    pub ip: Ipv4Addr,
}

/// What the stack needs of the machine around it.
pub trait Host {
    /// Sends the frame that `build` writes into a buffer of [`eth::FRAME_MAX`] bytes; `build` says how long it
    /// is, or `None` to send nothing. The frame may be lost, as on any network.
    fn transmit(&mut self, build: impl FnOnce(&mut [u8]) -> Option<usize>);
    /// Something happened that is to be told.
    fn report(&mut self, event: Event<'_>);
    /// Adds the machine's own counters to an answer of the stats service, one `name value` a line.
    fn statistics(&mut self, out: &mut dyn fmt::Write) -> fmt::Result;
}

/// What is told on the console, and to the monitor as a phase.
#[derive(Debug)]
pub enum Event<'a> {
    /// The interface has its address; `lease` is how long for, if not for ever.
    Address { address: Address, server: Option<Ipv4Addr>, lease: Option<Duration> },
    /// The lease ran out or was taken back.
    AddressLost,
    /// A document of the metadata service: its body, or `None` for "not found".
    Metadata { path: &'static str, body: Option<&'a [u8]> },
    /// Reading the metadata failed and will be tried again.
    MetadataFailed { why: metadata::Failure, again_in: Duration },
    /// All metadata was read.
    MetadataRead,
    /// A peer asked for the guest to be turned off, which the command line allows.
    PowerOff { by: Ipv4Addr },
}

/// Counted since the guest began.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames that were not understood: too short, wrong checksum, nonsense.
    pub malformed: u64,
    /// Frames for somebody else, or of a kind that is not handled.
    pub ignored: u64,
    pub arp_replies: u64,
    pub icmp_echoes: u64,
    pub udp_echoes: u64,
    pub discarded: u64,
    pub discarded_bytes: u64,
    pub stats_replies: u64,
    pub tcp_refusals: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_on_the_link_goes_to_the_gateway() {
        let ip = Ipv4Addr::new(10, 0, 0, 2);
        let gateway = Ipv4Addr::new(10, 0, 0, 1);
        let (near, far) = (Ipv4Addr::new(10, 0, 0, 200), Ipv4Addr::new(169, 254, 169, 254));
        let address = Address { ip, prefix: 24, gateway: Some(gateway) };
        assert_eq!((address.next_hop(near), address.next_hop(far)), (near, gateway));
        assert_eq!(Address { gateway: None, ..address }.next_hop(far), far);
        assert_eq!(Address { prefix: 0, ..address }.next_hop(far), far);
        assert_eq!(Address { prefix: 32, ..address }.next_hop(near), gateway);
    }
}
