//! One segment's DHCP server: a UDP socket bound to its bridge.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};

use dhcproto::Encodable;
use dhcproto::v4::{CLIENT_PORT, SERVER_PORT};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, SockaddrIn, bind, sendmsg, setsockopt, socket, sockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

use super::decode::decode;
use super::lease::{Answer, answer};
use super::{Given, Leases};
use crate::desired::LinkName;
use crate::error::{Error, Result};
use crate::per_segment::Told;

/// A message is at most one datagram of the largest MTU; longer ones are cut and fail to decode.
const LARGEST_MESSAGE: usize = 9216;
/// Some old clients drop messages shorter than BOOTP's (RFC 1542, section 2.1).
const SMALLEST_REPLY: usize = 300;

/// A socket that hears what arrives at port 67 on this bridge, and nothing else.
pub fn open(bridge: &LinkName) -> Result<UdpSocket> {
    open_on(bridge).map_err(Error::io(format!("opening the DHCP port on {bridge}")))
}

fn open_on(bridge: &LinkName) -> io::Result<UdpSocket> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    setsockopt(&fd, sockopt::Broadcast, &true)?;
    setsockopt(&fd, sockopt::BindToDevice, &bridge.to_string().into())?;
    bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, SERVER_PORT)))?;
    UdpSocket::from_std(fd.into())
}

/// Answers until it is dropped.
pub async fn serve(socket: UdpSocket, bridge_index: u32, leases: Told<Leases>, given: mpsc::UnboundedSender<Given>) {
    let mut buffer = vec![0; LARGEST_MESSAGE];
    loop {
        let length = match socket.recv(&mut buffer).await {
            Ok(length) => length,
            Err(error) => {
                // The bridge is being removed, or the kernel is out of memory for a moment.
                tracing::warn!(%error, "DHCP: receiving failed");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let leases = leases.borrow().clone();
        let Some(request) = decode(&buffer[..length]) else {
            tracing::debug!(segment = %leases.segment.id, "DHCP: a message that cannot be read");
            continue;
        };
        let Some(answer) = answer(&request, &leases) else { continue };
        match send(&socket, bridge_index, leases.segment.gateway, &answer).await {
            Ok(()) => report(&answer, &given),
            Err(error) => {
                tracing::warn!(segment = %leases.segment.id, to = %answer.to, %error, "DHCP: answering failed");
            }
        }
    }
}

fn report(answer: &Answer, given: &mpsc::UnboundedSender<Given>) {
    let Some(interface) = answer.gives else { return };
    tracing::info!(interface = %interface.id, instance = %interface.instance, ipv4 = %interface.ipv4, "lease given");
    // Nobody listens only while netd ends.
    let _ = given.send(Given {
        interface: interface.id.clone(),
        instance: interface.instance.clone(),
        ipv4: interface.ipv4,
    });
}

async fn send(socket: &UdpSocket, bridge_index: u32, gateway: Ipv4Addr, answer: &Answer<'_>) -> io::Result<()> {
    let mut bytes = answer.message.to_vec().map_err(io::Error::other)?;
    bytes.resize(bytes.len().max(SMALLEST_REPLY), 0);
    let to = SockaddrIn::from(SocketAddrV4::new(answer.to, CLIENT_PORT));
    // From the gateway's address: the bridge has the metadata service's too.
    let from = libc::in_pktinfo {
        ipi_ifindex: bridge_index as i32,
        ipi_spec_dst: libc::in_addr { s_addr: u32::from(gateway).to_be() },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    socket
        .async_io(Interest::WRITABLE, || {
            let control = [ControlMessage::Ipv4PacketInfo(&from)];
            let parts = [IoSlice::new(&bytes)];
            sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::MSG_DONTWAIT, Some(&to))?;
            Ok(())
        })
        .await
}
