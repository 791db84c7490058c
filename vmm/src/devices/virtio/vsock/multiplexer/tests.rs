//! Against real Unix sockets: the guest's side is packets, the host's side a client or a listener.

use super::super::connection::BUFFER;
use super::super::packet::{SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::*;
use crate::devices::virtio::queue::testing::memory;
use crate::memory::GuestMemory;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EpollEvent;

const CID: u32 = 3;
const GUEST_BUFFER: u32 = 8192;
/// Where in guest memory packets are put.
const OUT: u64 = 0x1000;
const IN: u64 = 0x4_0000;

struct Rig {
    multiplexer: Multiplexer,
    epoll: Epoll,
    memory: GuestMemory,
    folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let multiplexer = Multiplexer::new(CID, VsockSockets::bind(&folder.path().join("v")).unwrap());
        let epoll = Epoll::new().unwrap();
        multiplexer.register(&epoll).unwrap();
        Rig { multiplexer, epoll, memory: memory(), folder }
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("v_{port}"))).unwrap()
    }

    fn client(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("v")).unwrap()
    }

    fn events(&mut self) {
        let mut ready = [EpollEvent::default(); 64];
        let count = self.epoll.wait(0, &mut ready).unwrap();
        for event in &ready[..count] {
            self.multiplexer.on_event(event.data(), event.event_set(), &self.epoll);
        }
    }

    /// A packet from the guest.
    fn guest_sends(&mut self, header: Header, payload: &[u8]) {
        self.memory.write_slice(payload, GuestAddress(OUT)).unwrap();
        let mut list = IoVec::default();
        list.push(&self.memory, GuestAddress(OUT), payload.len()).unwrap();
        self.multiplexer.handle(&Header { length: payload.len() as u32, ..header }, &mut list, &self.epoll);
    }

    /// The next packet for the guest, in a buffer of 1 KiB.
    fn guest_gets(&mut self) -> Option<(Operation, Header, Vec<u8>)> {
        self.events();
        let mut buffer = IoVec::default();
        buffer.push(&self.memory, GuestAddress(IN), HEADER + 1024).unwrap();
        let length = self.multiplexer.fill(&buffer, Instant::now()).unwrap()? as usize;
        let mut bytes = vec![0; length];
        buffer.read_at(0, &mut bytes);
        let header = Header::parse(bytes[..HEADER].try_into().unwrap());
        assert_eq!((header.length as usize, header.source_cid), (length - HEADER, HOST_CID));
        Some((Operation::from_number(header.operation).unwrap(), header, bytes[HEADER..].to_vec()))
    }

    /// A stream that the guest asked for.
    fn stream_of_guest(&mut self, port: u32) -> (UnixStream, Ports) {
        let listener = self.listen(port);
        let ports = Ports { host: port, guest: 5000 };
        self.guest_sends(packet(ports, Operation::Request), &[]);
        let (operation, header, _) = self.guest_gets().unwrap();
        assert_eq!((operation, header.buffer), (Operation::Response, BUFFER as u32));
        (listener.accept().unwrap().0, ports)
    }
}

fn packet(ports: Ports, operation: Operation) -> Header {
    Header {
        source_cid: CID.into(),
        destination_cid: HOST_CID,
        source_port: ports.guest,
        destination_port: ports.host,
        kind: TYPE_STREAM,
        operation: operation as u16,
        buffer: GUEST_BUFFER,
        ..Header::default()
    }
}

#[test]
fn a_client_of_the_hosts_is_connected_when_the_guest_says_so() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.write_all(b"CONNECT 52\nearly").unwrap();
    rig.events();
    let (operation, header, _) = rig.guest_gets().unwrap();
    assert_eq!((operation, header.destination_port), (Operation::Request, 52));
    let ports = Ports { host: header.source_port, guest: 52 };
    // Nothing of what the client sent early goes to a guest that has not accepted.
    assert_eq!(rig.guest_gets(), None);
    rig.guest_sends(packet(ports, Operation::Response), &[]);
    let (operation, _, data) = rig.guest_gets().unwrap();
    assert_eq!((operation, &data[..]), (Operation::Data, &b"early"[..]));
    let expected = format!("OK {}\nhello", ports.host);
    rig.guest_sends(packet(ports, Operation::Data), b"hello");
    let mut seen = vec![0; expected.len()];
    client.read_exact(&mut seen).unwrap();
    assert_eq!(String::from_utf8(seen).unwrap(), expected);
}

#[test]
fn a_guest_that_refuses_hangs_up_on_the_client() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    rig.events();
    let (_, header, _) = rig.guest_gets().unwrap();
    rig.guest_sends(packet(Ports { host: header.source_port, guest: 52 }, Operation::Reset), &[]);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    assert!(rig.multiplexer.connections.is_empty() && rig.multiplexer.numbers.is_empty());
}

#[test]
fn a_port_without_a_listener_an_unknown_stream_and_another_type_are_reset() {
    let mut rig = Rig::new();
    let ports = Ports { host: 7, guest: 8 };
    let seqpacket = Header { kind: 2, ..packet(ports, Operation::Request) };
    let nonsense = Header { operation: 99, ..packet(ports, Operation::Request) };
    for header in [packet(ports, Operation::Request), packet(ports, Operation::Data), seqpacket, nonsense] {
        rig.guest_sends(header, &[]);
        let (operation, answer, _) = rig.guest_gets().unwrap();
        assert_eq!((operation, answer.source_port, answer.destination_port), (Operation::Reset, 7, 8));
    }
    rig.guest_sends(packet(ports, Operation::Reset), &[]);
    let forged = Header { source_cid: 4, ..packet(ports, Operation::Request) };
    rig.guest_sends(forged, &[]);
    assert_eq!(rig.guest_gets(), None);
}

#[test]
fn the_guests_credit_bounds_what_is_read_and_an_update_goes_on_where_it_stopped() {
    let mut rig = Rig::new();
    let (mut host, ports) = rig.stream_of_guest(1);
    let data: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
    host.write_all(&data).unwrap();
    let mut seen = Vec::new();
    let mut take_all = |rig: &mut Rig| {
        while let Some((operation, _, data)) = rig.guest_gets() {
            assert_eq!(operation, Operation::Data);
            seen.extend(data);
        }
        seen.len()
    };
    assert_eq!(take_all(&mut rig), 8192);
    rig.guest_sends(Header { forwarded: 8192, ..packet(ports, Operation::CreditUpdate) }, &[]);
    assert_eq!(take_all(&mut rig), 16_384);
    rig.guest_sends(Header { forwarded: 16_384, ..packet(ports, Operation::CreditUpdate) }, &[]);
    assert_eq!(take_all(&mut rig), 20_000);
    assert_eq!(seen, data);
}

#[test]
fn a_host_that_does_not_read_costs_one_buffer_and_loses_nothing() {
    let mut rig = Rig::new();
    let (mut host, ports) = rig.stream_of_guest(1);
    let piece: Vec<u8> = (0..8192u32).map(|i| (i % 253) as u8).collect();
    let (mut sent, mut forwarded) = (0usize, 0u32);
    // As a guest does: no more than it has credit for.
    while sent + piece.len() - forwarded as usize <= BUFFER {
        rig.guest_sends(packet(ports, Operation::Data), &piece);
        sent += piece.len();
        while let Some((_, header, _)) = rig.guest_gets() {
            forwarded = header.forwarded;
        }
    }
    let mut seen = Vec::new();
    let mut part = [0; 5000];
    while seen.len() < sent {
        let count = host.read(&mut part).unwrap();
        seen.extend_from_slice(&part[..count]);
        rig.events();
    }
    assert!(seen.chunks(piece.len()).all(|chunk| chunk == piece));
    let (operation, header, _) = rig.guest_gets().unwrap();
    assert_eq!((operation, header.forwarded as usize), (Operation::CreditUpdate, sent));
}

#[test]
fn data_beyond_the_credit_ends_the_stream() {
    let mut rig = Rig::new();
    let (_host, ports) = rig.stream_of_guest(1);
    let piece = vec![0; 60_000];
    for _ in 0..20 {
        rig.guest_sends(packet(ports, Operation::Data), &piece);
    }
    let operations: Vec<_> = std::iter::from_fn(|| rig.guest_gets()).map(|(operation, ..)| operation).collect();
    assert!(operations.contains(&Operation::Reset), "{operations:?}");
    assert!(rig.multiplexer.connections.is_empty());
}

#[test]
fn each_direction_ends_on_its_own() {
    let mut rig = Rig::new();
    let (mut host, ports) = rig.stream_of_guest(1);
    host.write_all(b"last words").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(rig.guest_gets().unwrap().2, b"last words");
    let (operation, header, _) = rig.guest_gets().unwrap();
    assert_eq!((operation, header.flags), (Operation::Shutdown, SHUTDOWN_SEND));
    // The other direction is as good as before.
    rig.guest_sends(packet(ports, Operation::Data), b"still here");
    rig.guest_sends(Header { flags: SHUTDOWN_SEND, ..packet(ports, Operation::Shutdown) }, &[]);
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
}

#[test]
fn a_guest_that_closes_gets_its_answer_after_its_data_is_with_the_host() {
    let mut rig = Rig::new();
    let (mut host, ports) = rig.stream_of_guest(1);
    let piece = vec![7; 40_000];
    let mut sent = 0;
    while rig.multiplexer.connections.values().all(|it| it.next() == Next::Nothing) && sent < 8 {
        rig.guest_sends(packet(ports, Operation::Data), &piece);
        sent += 1;
        while rig.guest_gets().is_some() {}
        let kept = rig.multiplexer.connections.values().next().unwrap();
        if kept.backlog_length() > 0 {
            break;
        }
    }
    rig.guest_sends(Header { flags: SHUTDOWN_BOTH, ..packet(ports, Operation::Shutdown) }, &[]);
    assert_eq!(rig.guest_gets().map(|it| it.0).filter(|it| *it == Operation::Reset), None);
    let mut total = 0;
    let mut part = [0; 16_384];
    loop {
        let count = host.read(&mut part).unwrap();
        rig.events();
        total += count;
        if count == 0 {
            break;
        }
    }
    assert_eq!(total, sent * piece.len());
    let operations: Vec<_> = std::iter::from_fn(|| rig.guest_gets()).map(|(operation, ..)| operation).collect();
    assert_eq!(operations.last(), Some(&Operation::Reset));
    assert!(rig.multiplexer.connections.is_empty());
}

#[test]
fn a_host_that_is_gone_is_told_to_the_guest_and_not_waited_for() {
    let mut rig = Rig::new();
    let (host, _) = rig.stream_of_guest(1);
    drop(host);
    let (operation, header, _) = rig.guest_gets().unwrap();
    assert_eq!((operation, header.flags), (Operation::Shutdown, SHUTDOWN_BOTH));
    assert!(rig.multiplexer.needs_tick());
    rig.multiplexer.tick(Instant::now() + Duration::from_secs(60), &rig.epoll);
    assert_eq!(rig.guest_gets().unwrap().0, Operation::Reset);
    assert!(rig.multiplexer.connections.is_empty() && !rig.multiplexer.needs_tick());
}

#[test]
fn clients_that_say_nothing_are_few_and_hung_up_on() {
    let mut rig = Rig::new();
    let mut clients: Vec<_> = (0..MAX_GREETINGS + 1).map(|_| rig.client()).collect();
    for _ in 0..4 {
        rig.events();
        rig.multiplexer.tick(Instant::now(), &rig.epoll);
    }
    assert_eq!(rig.multiplexer.greetings.len(), MAX_GREETINGS);
    assert_eq!(clients.pop().unwrap().read(&mut [0; 1]).unwrap(), 0);
    rig.multiplexer.tick(Instant::now() + Duration::from_secs(60), &rig.epoll);
    assert!(rig.multiplexer.greetings.is_empty());
    assert_eq!(clients[0].read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn refusals_that_the_guest_does_not_fetch_are_bounded() {
    let mut rig = Rig::new();
    let mut handled = 0;
    while rig.multiplexer.has_room() {
        rig.guest_sends(packet(Ports { host: 9, guest: handled }, Operation::Request), &[]);
        handled += 1;
    }
    assert_eq!(handled as usize, MAX_RESETS);
    rig.guest_gets().unwrap();
    assert!(rig.multiplexer.has_room());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_packet_panics_or_grows_anything_beyond_its_bound(
        packets in proptest::collection::vec(
            (0u16..9, 0u32..4, 0u32..3, any::<u32>(), any::<u32>(), any::<u32>(), 0usize..3000, any::<bool>()), 1..80),
    ) {
        let mut rig = Rig::new();
        let _listeners: Vec<_> = (0..3).map(|port| rig.listen(port)).collect();
        for (operation, host, guest, flags, buffer, forwarded, length, fetch) in packets {
            let header = Header {
                operation, flags, buffer, forwarded,
                ..packet(Ports { host, guest }, Operation::Request)
            };
            rig.guest_sends(header, &vec![1; length]);
            if fetch {
                rig.guest_gets();
            }
            prop_assert!(rig.multiplexer.connections.len() <= 9);
            prop_assert_eq!(rig.multiplexer.connections.len(), rig.multiplexer.numbers.len());
        }
    }
}
