//! Datagrams to and from an interface that may have no address yet.
//!
//! Answers are read by a packet socket below the IP layer, which would drop what is not addressed to it;
//! a filter in the kernel lets through only UDP to the client's port. The renewal, which goes from our address to the
//! server's, is sent by an ordinary socket.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use super::client::Destination;
use super::wire;
use crate::net::interface::{Interface, Mac};

/// Ethernet's largest payload by far, in this network.
const BUFFER: usize = 4096;

pub struct Exchange {
    packet: OwnedFd,
    name: String,
    index: i32,
    mac: Mac,
}

impl Exchange {
    pub fn open(interface: &Interface, mac: Mac) -> io::Result<Self> {
        let index = interface.index()?;
        // SAFETY: a plain system call; its result is checked.
        let raw =
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let packet = unsafe { OwnedFd::from_raw_fd(raw) };
        // Filter before binding: protocol 0 receives nothing until then.
        attach_filter(&packet)?;
        bind(&packet, index)?;
        Ok(Exchange { packet, name: interface.name().to_owned(), index, mac })
    }

    pub fn send(&self, message: &[u8], to: Destination) -> io::Result<()> {
        match to {
            Destination::Everybody => self.broadcast(&wire::broadcast_datagram(message)),
            Destination::Server(server) => self.send_to_server(message, server),
        }
    }

    fn broadcast(&self, datagram: &[u8]) -> io::Result<()> {
        let mut address = link_address(self.index);
        address.sll_halen = 6;
        address.sll_addr[..6].fill(0xff);
        // SAFETY: buffer and address live through the call, their lengths are theirs.
        let sent = unsafe {
            libc::sendto(
                self.packet.as_raw_fd(),
                datagram.as_ptr().cast(),
                datagram.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn send_to_server(&self, message: &[u8], server: Ipv4Addr) -> io::Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, wire::CLIENT_PORT))?;
        setsockopt(&socket, sockopt::BindToDevice, &self.name.as_str().into())?;
        socket.send_to(message, (server, wire::SERVER_PORT)).map(|_| ())
    }

    /// The payload of the next datagram to the client's port, or `None` when `until` has come.
    pub fn receive_until(&self, until: Instant) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0u8; BUFFER];
        loop {
            match nix::unistd::read(&self.packet, &mut buffer) {
                Ok(length) => {
                    if let Some(payload) = wire::client_payload(&buffer[..length]) {
                        return Ok(Some(payload.to_vec()));
                    }
                }
                Err(nix::Error::EAGAIN) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    // Rounded up, so that the last millisecond is not spent in a loop.
                    let milliseconds = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
                    let mut watched = [PollFd::new(self.packet.as_fd(), PollFlags::POLLIN)];
                    match poll(&mut watched, PollTimeout::from(milliseconds)) {
                        Ok(_) | Err(nix::Error::EINTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                // The interface went down under us: to the protocol a lost packet.
                Err(nix::Error::EINTR | nix::Error::ENETDOWN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl std::fmt::Debug for Exchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Exchange on {} ({:02x?})", self.name, self.mac)
    }
}

fn link_address(index: i32) -> libc::sockaddr_ll {
    // SAFETY: sockaddr_ll is plain data, for which zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_IP as u16).to_be();
    address.sll_ifindex = index;
    address
}

fn bind(socket: &OwnedFd, index: i32) -> io::Result<()> {
    let address = link_address(index);
    // SAFETY: the address lives through the call and its length is its own.
    let bound = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    };
    if bound == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Classic BPF: UDP, not a later fragment, destination port 68.
fn attach_filter(socket: &OwnedFd) -> io::Result<()> {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let program = [
        // The protocol in the IP header.
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 9),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 6, libc::IPPROTO_UDP as u32),
        // The fragment's offset.
        op(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 0, 6),
        op(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 4, 0, 0x1fff),
        // The destination port, behind a header of 4 * IHL bytes.
        op(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 0, 0, 0),
        op(libc::BPF_LD | libc::BPF_H | libc::BPF_IND, 0, 0, 2),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, u32::from(wire::CLIENT_PORT)),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies the program, whose length is stated, before the call returns.
    let attached = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if attached == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
