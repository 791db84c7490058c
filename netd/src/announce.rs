//! Telling the public side that an address is here now: gratuitous ARP.
//!
//! The kernel answers requests by itself (proxy neighbours); what it cannot do is to correct the
//! caches of those who believe the address elsewhere. RFC 5227, section 2.3, has an address announced
//! twice, two seconds apart. Some stacks heed a request, some a reply, so both are sent.
//!
//! When an address moves between nodes, the controller tells the new one first, and the old one when the new one has the address. For that while both
//! have it, and the old one may contradict the new one: its kernel answers a request, or it announces once more what it got itself a moment before.
//! Who heard that sends to the old node. While that has the address, it answers; after that its kernel, which routes, passes on to the new node what still
//! comes, unless the host forbids to route from the uplink to the uplink, as firewalls do. Then nobody answers until the new node is heard
//! again. So an address is announced after times that double, and this is what holds:
//!
//! * **A node that lets go of an address says nothing more of it.** When [`Announcer::hold`] or [`Announcer::change`] has returned, nothing is announced
//!   that is not held, not even by an announcement that was under way. The reconciler calls them before anything else changes.
//! * **Whoever was misled is put right soon after the old node let go**: within [`FIRST_PAUSE`], or within as long as both nodes had the address if
//!   that is more. It holds where both have had it for two seconds at most: then comes the last announcement.
//!
//! More than a few at once are a node's that starts, where nothing has moved a moment ago: those are announced twice, as the RFC has it, or the segment would be flooded.
//!
//! To listen on the uplink for the other's announcements instead would not do: a kernel's answer to one asker is heard by nobody else, and neither node could
//! tell who of the two came later.

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

/// Between the first announcement of an address and the second.
const FIRST_PAUSE: Duration = Duration::from_millis(16);
/// How often the time since the first announcement doubles: to 2048 ms. RFC 5227, section 1.1, has `ANNOUNCE_INTERVAL` (2 s) between the first and the
/// last.
const DOUBLINGS: u32 = 7;
/// Addresses at once that are announced so often.
const FEW: usize = 64;
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

    /// Announces `addresses` at once, and those still held again and again for two seconds: 18 short frames in all for each of a few, and 4 of many. Nobody waits for
    /// it: a thousand take some ten milliseconds each time.
    pub fn announce(&self, uplink_index: u32, mac: MacAddress, addresses: Vec<Ipv4Addr>) {
        if addresses.is_empty() {
            return;
        }
        let (announcer, addresses) = (self.clone(), Arc::new(addresses));
        tokio::spawn(async move {
            for pause in pauses(addresses.len()) {
                tokio::time::sleep(pause).await;
                let (announcer, addresses) = (announcer.clone(), addresses.clone());
                let failed = Error::io("announcing elastic IPs by ARP on the uplink");
                let sent = off_thread(move || announcer.send_held(uplink_index, mac, &addresses).map_err(failed)).await;
                if let Err(error) = sent {
                    tracing::warn!(%error, "whoever believes these addresses elsewhere is not told");
                }
            }
        });
    }

    /// Sends for those of `addresses` that are here. Each is looked up and sent for in one, and for a few microseconds, so that an address that goes
    /// meanwhile is not announced after that, and nobody who lets go of one waits for all of them.
    fn send_held(&self, uplink_index: u32, mac: MacAddress, addresses: &[Ipv4Addr]) -> io::Result<()> {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        for address in addresses {
            let held = self.held();
            if held.contains(address) {
                for operation in [REQUEST, REPLY] {
                    send(&socket, uplink_index, &frame(mac, *address, operation))?;
                }
            }
        }
        Ok(())
    }

    fn held(&self) -> MutexGuard<'_, BTreeSet<Ipv4Addr>> {
        // A set of addresses is whole whatever happened to the thread that last held it.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Before each announcement of so many addresses, counted from the one before.
fn pauses(addresses: usize) -> Vec<Duration> {
    if addresses > FEW {
        return vec![Duration::ZERO, FIRST_PAUSE * 2_u32.pow(DOUBLINGS)];
    }
    let doubling = (0..DOUBLINGS).map(|n| FIRST_PAUSE * 2_u32.pow(n));
    [Duration::ZERO, FIRST_PAUSE].into_iter().chain(doubling).collect()
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
    use proptest::prelude::*;

    use super::*;

    /// When an address is announced, counted from the first time.
    fn moments(addresses: usize) -> Vec<Duration> {
        let since_first = |since: &mut Duration, pause| {
            *since += pause;
            Some(*since)
        };
        pauses(addresses).into_iter().scan(Duration::ZERO, since_first).collect()
    }

    #[test]
    fn the_last_announcement_comes_after_the_interval_of_the_rfc() {
        for addresses in [1, FEW, FEW + 1] {
            let last = moments(addresses).into_iter().next_back().unwrap();
            assert!((Duration::from_secs(2)..Duration::from_secs(3)).contains(&last), "{last:?}");
        }
        assert_eq!(moments(FEW + 1).len(), 2);
    }

    proptest! {
        /// Whatever the old node says while both have an address, a client that heard it is nobody's for as long as both had it, or for the first pause.
        #[test]
        fn who_was_misled_is_put_right_soon_after_the_old_node_let_go(both_us in 0_u64..2_000_000) {
            let let_go = Duration::from_micros(both_us);
            let next = moments(1).into_iter().find(|moment| *moment >= let_go).unwrap();
            prop_assert!(next - let_go <= let_go.max(FIRST_PAUSE), "next told {next:?}");
        }
    }

    #[test]
    fn an_address_that_went_is_not_announced() {
        let (announcer, gone, held) =
            (Announcer::default(), Ipv4Addr::new(198, 51, 100, 130), Ipv4Addr::new(198, 51, 100, 131));
        announcer.hold([gone, held].into());
        announcer.change([gone].into_iter(), std::iter::empty());
        // No link has the index 0: to send is to fail.
        let mac = "02:00:00:00:00:09".parse().unwrap();
        announcer.send_held(0, mac, &[gone]).unwrap();
        announcer.send_held(0, mac, &[held]).unwrap_err();
    }

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
