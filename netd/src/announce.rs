//! Telling the public side that an address is here now: gratuitous ARP.
//!
//! The kernel answers requests by itself (proxy neighbours); what it cannot do is to correct the
//! caches of those who believe the address elsewhere. RFC 5227, section 2.3, has an address announced
//! twice, two seconds apart. Some stacks heed a request, some a reply, so both are sent.
//!
//! When an address moves between nodes, the old one may let go of it a moment after the new one has taken it, and
//! answer somebody in between. Nobody who heard that answer would find the new node before the second announcement, so
//! there is one more soon after the first.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::desired::MacAddress;
use crate::error::Error;
use crate::off_thread::off_thread;

/// When an address is announced, counted from the announcement before. The whole is `ANNOUNCE_INTERVAL` of RFC 5227, section 1.1.
const AFTER: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(1900)];
const ETHER_ARP: u16 = 0x0806;
const REQUEST: u16 = 1;
const REPLY: u16 = 2;

/// Announces addresses, and keeps quiet about those that went away in the meantime.
#[derive(Clone, Default)]
pub struct Announcer {
    /// The addresses that are here. An announcement after a move would draw the address back.
    held: Arc<Mutex<BTreeSet<Ipv4Addr>>>,
}

impl Announcer {
    /// The addresses that are here from now on; forgets all others.
    pub fn hold(&self, addresses: BTreeSet<Ipv4Addr>) {
        *self.held() = addresses;
    }

    /// Those of `gone` are here no longer, those of `new` are.
    pub fn change(&self, gone: impl Iterator<Item = Ipv4Addr>, new: impl Iterator<Item = Ipv4Addr>) {
        let mut held = self.held();
        for address in gone {
            held.remove(&address);
        }
        held.extend(new);
    }

    /// Announces `addresses` at once, and those still held twice again. Nobody waits for it: a thousand take some ten milliseconds.
    pub fn announce(&self, uplink_index: u32, mac: MacAddress, addresses: Vec<Ipv4Addr>) {
        if addresses.is_empty() {
            return;
        }
        let announcer = self.clone();
        tokio::spawn(async move {
            for pause in AFTER {
                tokio::time::sleep(pause).await;
                let still_here: Vec<Ipv4Addr> = {
                    let held = announcer.held();
                    addresses.iter().copied().filter(|address| held.contains(address)).collect()
                };
                let failed = Error::io("announcing elastic IPs by ARP on the uplink");
                let sent = off_thread(move || send_all(uplink_index, mac, &still_here).map_err(failed)).await;
                if let Err(error) = sent {
                    tracing::warn!(%error, "whoever believes these addresses elsewhere is not told");
                }
            }
        });
    }

    fn held(&self) -> MutexGuard<'_, BTreeSet<Ipv4Addr>> {
        // A set of addresses is whole whatever happened to the thread that last held it.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn send_all(uplink_index: u32, mac: MacAddress, addresses: &[Ipv4Addr]) -> io::Result<()> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    for address in addresses {
        for operation in [REQUEST, REPLY] {
            send(&socket, uplink_index, &frame(mac, *address, operation))?;
        }
    }
    Ok(())
}

fn send(socket: &OwnedFd, uplink_index: u32, frame: &[u8]) -> io::Result<()> {
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ETHER_ARP.to_be(),
        sll_ifindex: uplink_index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff; 8],
    };
    // SAFETY: the descriptor is open; the frame and the address live through the call, and their
    // lengths are given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of_val(&to) as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An Ethernet frame with an ARP packet (RFC 826) in which sender and target are `address`.
fn frame(mac: MacAddress, address: Ipv4Addr, operation: u16) -> Vec<u8> {
    let (mac, ip) = (mac.octets(), address.octets());
    let target_mac = if operation == REPLY { mac } else { [0; 6] };
    [
        &[0xff; 6][..],
        &mac,
        &ETHER_ARP.to_be_bytes(),
        // Ethernet, IPv4, lengths 6 and 4.
        &[0, 1, 8, 0, 6, 4],
        &operation.to_be_bytes(),
        &mac,
        &ip,
        &target_mac,
        &ip,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_an_arp_packet_about_itself() {
        let mac = "02:00:00:00:00:09".parse().unwrap();
        let frame = frame(mac, Ipv4Addr::new(198, 51, 100, 130), REQUEST);
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[28..32], frame[38..42]);
        assert_eq!(frame[22..28], mac.octets());
    }
}
