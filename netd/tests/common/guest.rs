//! An instance in user space: a host behind a real tap, with just enough of a stack.
//!
//! It answers ARP for its address, ICMP echo requests, and UDP datagrams to port 7 (with its name
//! and the address that it was asked from, then what it was sent). Everything else that arrives is
//! kept for the test to look at. It sends whatever it is told to, true or not.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable};
use etherparse::{Icmpv4Type, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{GATEWAY, GATEWAY_MAC, PATIENCE};

pub const ECHO_PORT: u16 = 7;
pub const BROADCAST_MAC: [u8; 6] = [0xff; 6];
/// Bytes of `struct virtio_net_hdr`, which each frame on a tap with IFF_VNET_HDR begins with.
const VNET_HEADER: usize = 10;

/// A UDP datagram that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram {
    pub from: Ipv4Addr,
    pub from_port: u16,
    pub to: Ipv4Addr,
    pub to_port: u16,
    pub payload: Vec<u8>,
}

struct Wire {
    tap: File,
    mac: [u8; 6],
    ip: Ipv4Addr,
    /// Addresses that were added to it.
    more: Mutex<Vec<Ipv4Addr>>,
    name: Mutex<String>,
    ended: AtomicBool,
    /// Every frame that arrived.
    frames: Mutex<Vec<Vec<u8>>>,
}

pub struct Guest {
    tap: String,
    wire: Arc<Wire>,
    datagrams: Mutex<mpsc::Receiver<Datagram>>,
    pings: Mutex<mpsc::Receiver<(Ipv4Addr, u16)>>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    pub fn open(tap: &str, mac: [u8; 6], ip: Ipv4Addr) -> Self {
        let wire = Arc::new(Wire {
            tap: attach(tap),
            mac,
            ip,
            more: Mutex::default(),
            name: Mutex::new(tap.to_owned()),
            ended: AtomicBool::new(false),
            frames: Mutex::default(),
        });
        let (datagram, datagrams) = mpsc::channel();
        let (ping, pings) = mpsc::channel();
        let stack = wire.clone();
        let thread = thread::spawn(move || stack.serve(&datagram, &ping));
        let (datagrams, pings) = (Mutex::new(datagrams), Mutex::new(pings));
        Self { tap: tap.to_owned(), wire, datagrams, pings, thread: Some(thread) }
    }

    /// Waits until the bridge forwards what it sends and gets, which it begins a moment after the tap was opened.
    pub fn is_heard(&self) {
        let tap = &self.tap;
        // The kernel takes note of a carrier that went (with netd's own file) and came up to a second later, and passes nothing to the tap for a moment
        // (`net/core/link_watch.c`).
        let is = |command: &str, state: &str| super::run(&format!("{command} {tap}")).contains(state).then_some(());
        super::eventually("the tap to be up", || is("ip -o link show dev", "state UP"));
        super::eventually("the port to forward", || is("bridge link show dev", "state forwarding"));
    }

    pub fn name(&self, name: &str) {
        *self.wire.name.lock().unwrap() = name.to_owned();
    }

    /// Adds an address, as an instance's own system does with a secondary one.
    pub fn add_address(&self, ip: Ipv4Addr) {
        self.wire.more.lock().unwrap().push(ip);
    }

    /// Sends a frame as it is.
    pub fn send(&self, frame: &[u8]) {
        self.wire.send(frame);
    }

    /// Sends a datagram through the gateway.
    pub fn send_udp(&self, to: Ipv4Addr, to_port: u16, payload: &[u8]) {
        self.send_udp_from(self.wire.ip, to, to_port, payload);
    }

    /// The same from that address.
    pub fn send_udp_from(&self, from: Ipv4Addr, to: Ipv4Addr, to_port: u16, payload: &[u8]) {
        self.send(&udp(self.wire.mac, GATEWAY_MAC, from, to, (40_000, to_port), payload));
    }

    /// The next datagram that was not answered by the guest itself.
    pub fn receive_udp(&self) -> Datagram {
        self.datagrams.lock().unwrap().recv_timeout(PATIENCE).expect("no datagram came")
    }

    /// The same, or none within that time.
    pub fn receive_udp_within(&self, time: std::time::Duration) -> Option<Datagram> {
        self.datagrams.lock().unwrap().recv_timeout(time).ok()
    }

    /// Sends an echo request through the gateway and waits for its answer.
    pub fn ping(&self, to: Ipv4Addr, sequence: u16) {
        self.send_ping(to, GATEWAY_MAC, sequence);
        self.await_pong(to, sequence);
    }

    pub fn send_ping(&self, to: Ipv4Addr, to_mac: [u8; 6], sequence: u16) {
        let builder = PacketBuilder::ethernet2(self.wire.mac, to_mac)
            .ipv4(self.wire.ip.octets(), to.octets(), 64)
            .icmpv4_echo_request(77, sequence);
        let mut frame = Vec::new();
        builder.write(&mut frame, b"ping").unwrap();
        self.send(&frame);
    }

    pub fn await_pong(&self, from: Ipv4Addr, sequence: u16) {
        let pings = self.pings.lock().unwrap();
        loop {
            let pong = pings.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no echo reply {sequence} from {from}"));
            if pong == (from, sequence) {
                return;
            }
        }
    }

    /// Asks for the MAC of `ip` and waits for the answer.
    pub fn resolve(&self, ip: Ipv4Addr) -> [u8; 6] {
        self.send(&arp(self.wire.mac, BROADCAST_MAC, 1, (self.wire.mac, self.wire.ip), ([0; 6], ip)));
        self.await_frame("an ARP reply", |frame| {
            let reply = frame.get(12..14) == Some(&[8, 6]) && frame.get(20..22) == Some(&[0, 2]);
            (reply && frame[28..32] == ip.octets()).then(|| frame[22..28].try_into().unwrap())
        })
    }

    /// Waits for a frame in which `found` finds something, among those that came already and those
    /// that come.
    pub fn await_frame<T>(&self, what: &str, mut found: impl FnMut(&[u8]) -> Option<T>) -> T {
        let mut seen = 0;
        super::eventually(what, || {
            let frames = self.wire.frames.lock().unwrap();
            let new = &frames[seen..];
            seen = frames.len();
            new.iter().find_map(|frame| found(frame))
        })
    }

    /// The frames that have arrived.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        self.wire.frames.lock().unwrap().clone()
    }

    /// Takes a lease as a DHCP client does; returns the acknowledgement.
    pub fn dhcp(&self, broadcast: bool) -> Message {
        let offer = self.dhcp_exchange(MessageType::Discover, vec![], broadcast, MessageType::Offer);
        let options = vec![
            DhcpOption::RequestedIpAddress(offer.yiaddr()),
            offer.opts().get(OptionCode::ServerIdentifier).unwrap().clone(),
        ];
        self.dhcp_exchange(MessageType::Request, options, broadcast, MessageType::Ack)
    }

    pub fn dhcp_exchange(
        &self,
        kind: MessageType,
        options: Vec<DhcpOption>,
        broadcast: bool,
        expected: MessageType,
    ) -> Message {
        let xid = u32::from(u8::from(kind)) + 1000;
        let start = Instant::now();
        self.send(&self.dhcp_frame(self.wire.mac, kind, options, broadcast, xid));
        loop {
            assert!(start.elapsed() < PATIENCE, "no DHCP {expected:?} came");
            let datagram = self.receive_udp();
            assert_eq!((datagram.from, datagram.from_port, datagram.to_port), (GATEWAY, 67, 68));
            let message = Message::decode(&mut Decoder::new(&datagram.payload)).unwrap();
            if message.xid() == xid && message.opts().has_msg_type(expected) {
                return message;
            }
        }
    }

    /// A client's broadcast, in the name of `chaddr`.
    pub fn dhcp_frame(
        &self,
        chaddr: [u8; 6],
        kind: MessageType,
        options: Vec<DhcpOption>,
        broadcast: bool,
        xid: u32,
    ) -> Vec<u8> {
        let mut message = Message::default();
        message.set_opcode(Opcode::BootRequest).set_chaddr(&chaddr).set_xid(xid);
        if broadcast {
            message.set_flags(Flags::default().set_broadcast());
        }
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        for option in options {
            message.opts_mut().insert(option);
        }
        let payload = message.to_vec().unwrap();
        let (from, to) = (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST);
        udp(self.wire.mac, BROADCAST_MAC, from, to, (68, 67), &payload)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.wire.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Wire {
    fn send(&self, frame: &[u8]) {
        let whole = [&[0; VNET_HEADER], frame].concat();
        (&self.tap).write_all(&whole).unwrap();
    }

    fn serve(&self, datagrams: &mpsc::Sender<Datagram>, pings: &mpsc::Sender<(Ipv4Addr, u16)>) {
        let mut buffer = vec![0; 65_536];
        while !self.ended.load(Ordering::Relaxed) {
            let mut ready = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(20_u8)) != Ok(1) {
                continue;
            }
            // The tap was removed.
            let Ok(length) = (&self.tap).read(&mut buffer) else { return };
            let frame = &buffer[VNET_HEADER..length];
            self.frames.lock().unwrap().push(frame.to_vec());
            self.handle(frame, datagrams, pings);
        }
    }

    fn handle(&self, frame: &[u8], datagrams: &mpsc::Sender<Datagram>, pings: &mpsc::Sender<(Ipv4Addr, u16)>) {
        let Ok(packet) = SlicedPacket::from_ethernet(frame) else { return };
        let from_mac: [u8; 6] = frame[6..12].try_into().unwrap();
        match (&packet.net, &packet.transport) {
            (Some(NetSlice::Arp(_)), _) if frame[20..22] == [0, 1] && self.has(ipv4_at(frame, 38)) => {
                let asker = (from_mac, ipv4_at(frame, 28));
                self.send(&arp(self.mac, from_mac, 2, (self.mac, ipv4_at(frame, 38)), asker));
            }
            (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Icmpv4(icmp))) => {
                let (from, to) = (ip.header().source_addr(), ip.header().destination_addr());
                match icmp.icmp_type() {
                    Icmpv4Type::EchoRequest(echo) if self.has(to) => {
                        let builder = PacketBuilder::ethernet2(self.mac, from_mac)
                            .ipv4(to.octets(), from.octets(), 64)
                            .icmpv4_echo_reply(echo.id, echo.seq);
                        let mut reply = Vec::new();
                        builder.write(&mut reply, icmp.payload()).unwrap();
                        self.send(&reply);
                    }
                    Icmpv4Type::EchoReply(echo) => {
                        let _ = pings.send((from, echo.seq));
                    }
                    _ => {}
                }
            }
            (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Udp(segment))) => {
                let datagram = Datagram {
                    from: ip.header().source_addr(),
                    from_port: segment.source_port(),
                    to: ip.header().destination_addr(),
                    to_port: segment.destination_port(),
                    payload: segment.payload().to_vec(),
                };
                if self.has(datagram.to) && datagram.to_port == ECHO_PORT {
                    self.echo(from_mac, &datagram);
                } else {
                    let _ = datagrams.send(datagram);
                }
            }
            _ => {}
        }
    }

    fn echo(&self, to_mac: [u8; 6], asked: &Datagram) {
        let name = self.name.lock().unwrap().clone();
        let head = format!("{name} asked by {} ", asked.from);
        let payload = [head.as_bytes(), &asked.payload].concat();
        let ports = (ECHO_PORT, asked.from_port);
        self.send(&udp(self.mac, to_mac, asked.to, asked.from, ports, &payload));
    }

    fn has(&self, ip: Ipv4Addr) -> bool {
        self.ip == ip || self.more.lock().unwrap().contains(&ip)
    }
}

fn ipv4_at(frame: &[u8], offset: usize) -> Ipv4Addr {
    Ipv4Addr::from(<[u8; 4]>::try_from(&frame[offset..offset + 4]).unwrap())
}

/// A UDP datagram in its frame.
pub fn udp(
    from_mac: [u8; 6],
    to_mac: [u8; 6],
    from: Ipv4Addr,
    to: Ipv4Addr,
    ports: (u16, u16),
    payload: &[u8],
) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(from_mac, to_mac).ipv4(from.octets(), to.octets(), 64).udp(ports.0, ports.1);
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).unwrap();
    frame
}

/// An Ethernet frame of the type, with a body that no protocol would take.
pub fn frame(from: [u8; 6], to: [u8; 6], kind: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &from, &kind.to_be_bytes(), body].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// Puts a tag into a frame: 802.1Q's (0x8100) or a provider's (802.1ad, 0x88a8).
pub fn tagged(frame: &[u8], kind: u16, vid: u16) -> Vec<u8> {
    [&frame[..12], &kind.to_be_bytes(), &vid.to_be_bytes(), &frame[12..]].concat()
}

/// The fragments of an IPv4 frame without options, each with `size` bytes, a multiple of eight, of its payload.
pub fn fragments(frame: &[u8], id: u16, size: usize) -> Vec<Vec<u8>> {
    let (head, payload) = frame.split_at(34);
    let parts = payload.chunks(size).count();
    let fragment = |(n, part): (usize, &[u8])| {
        let more = if n + 1 < parts { 0x2000 } else { 0 };
        let mut whole = [head, part].concat();
        whole[16..18].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
        whole[18..20].copy_from_slice(&id.to_be_bytes());
        whole[20..22].copy_from_slice(&(more | (n * size / 8) as u16).to_be_bytes());
        whole[24..26].fill(0);
        // RFC 1071.
        let sum = whole[14..34].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
        let folded = (sum & 0xffff) + (sum >> 16);
        whole[24..26].copy_from_slice(&(!(folded as u16)).to_be_bytes());
        whole
    };
    payload.chunks(size).enumerate().map(fragment).collect()
}

/// An ARP packet in its frame; sender and target as MAC and address.
pub fn arp(
    from_mac: [u8; 6],
    to_mac: [u8; 6],
    operation: u16,
    sender: ([u8; 6], Ipv4Addr),
    target: ([u8; 6], Ipv4Addr),
) -> Vec<u8> {
    [
        &to_mac[..],
        &from_mac,
        &[8, 6, 0, 1, 8, 0, 6, 4],
        &operation.to_be_bytes(),
        &sender.0,
        &sender.1.octets(),
        &target.0,
        &target.1.octets(),
    ]
    .concat()
}

/// Opens an existing tap as a VMM does.
fn attach(name: &str) -> File {
    nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
    let tap = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let request =
        libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short } };
    // Busy for a moment after its last holder has closed it: a process that another test is starting has every
    // descriptor of this one until it executes its program.
    let deadline = Instant::now() + PATIENCE;
    // SAFETY: the descriptor is open and the request filled in.
    while let Err(error) = unsafe { tun_set_iff(tap.as_raw_fd(), &request) } {
        assert!(error == nix::errno::Errno::EBUSY && Instant::now() < deadline, "attaching to {name}: {error}");
        thread::sleep(Duration::from_millis(1));
    }
    tap
}
