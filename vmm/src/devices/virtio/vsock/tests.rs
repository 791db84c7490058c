//! The device between its rings and real Unix sockets, on its own thread.

use super::packet::{HOST_CID, Operation, Ports, TYPE_STREAM};
use super::*;
use crate::devices::virtio::queue::testing::{Buffer, memory, queue_with, used};
use std::io::Read;
use std::os::unix::net::UnixListener;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn header(operation: Operation, length: u32) -> Header {
    Header {
        source_cid: 3,
        destination_cid: HOST_CID,
        source_port: 5000,
        destination_port: 7,
        length,
        kind: TYPE_STREAM,
        operation: operation as u16,
        buffer: 4096,
        ..Header::default()
    }
}

/// Three rings, each in a memory of its own.
struct Rings {
    memories: [GuestMemory; 3],
    queues: Vec<ActiveQueue>,
}

fn rings(chains: [&[&[Buffer]]; 3]) -> Rings {
    let memories = [memory(), memory(), memory()];
    let queues = memories.iter().zip(chains).map(|(memory, chains)| {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        kick.write(1).unwrap();
        ActiveQueue { queue: queue_with(memory, chains), kick }
    });
    Rings { queues: queues.collect(), memories }
}

fn activation(queues: Vec<ActiveQueue>, memory: &GuestMemory) -> Activation {
    Activation {
        features: 0,
        is_resumed: false,
        queues,
        interrupt: Arc::new(Interrupt::alone()),
        memory: memory.clone(),
        metrics: crate::metrics::device(VIRTIO_ID_VSOCK, "", 3),
    }
}

#[test]
fn a_stream_of_the_guests_reaches_the_hosts_listener_through_the_rings() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = Vsock::new(3, VsockSockets::bind(&folder.path().join("v")).unwrap()).unwrap();
    let listener = UnixListener::bind(folder.path().join("v_7")).unwrap();
    let receive: &[&[Buffer]] = &[&[(0x8000, 100, true)], &[(0x9000, 100, true)]];
    let transmit: &[&[Buffer]] = &[&[(0x8000, 44, false)], &[(0x9000, 44, false), (0xa000, 5, false)]];
    let Rings { memories, queues } = rings([receive, transmit, &[]]);
    memories[1].write_slice(&header(Operation::Request, 0).to_bytes(), GuestAddress(0x8000)).unwrap();
    let response = crate::devices::virtio::queue::testing::used_index(&queues[0].queue);
    // The data waits for the response, as a guest's does: its header is no packet yet.
    memories[1].write_slice(&header(Operation::CreditUpdate, 0).to_bytes(), GuestAddress(0x9000)).unwrap();
    device.activate(activation(queues, &memories[0])).unwrap();
    let (mut host, _) = listener.accept().unwrap();
    while memories[0].read_obj::<u16>(response).unwrap() < 1 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let positions = device.deactivate();
    assert_eq!(positions[1].next_available, 2);
    drop(device);
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
    assert!(!folder.path().join("v").exists());
}

#[test]
fn streams_outlive_a_pause_and_not_a_reset() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = Vsock::new(3, VsockSockets::bind(&folder.path().join("v")).unwrap()).unwrap();
    let listener = UnixListener::bind(folder.path().join("v_7")).unwrap();
    let start = |device: &mut Vsock, is_resumed, with_request: bool| {
        let transmit: &[&[Buffer]] = if with_request { &[&[(0x8000, 44, false)]] } else { &[] };
        let Rings { memories, queues } = rings([&[&[(0x8000, 100, true)]], transmit, &[]]);
        memories[1].write_slice(&header(Operation::Request, 0).to_bytes(), GuestAddress(0x8000)).unwrap();
        device.activate(Activation { is_resumed, ..activation(queues, &memories[0]) }).unwrap();
    };
    start(&mut device, false, true);
    let (mut host, _) = listener.accept().unwrap();
    device.deactivate();
    start(&mut device, true, false);
    device.deactivate();
    host.set_nonblocking(true).unwrap();
    assert_eq!(host.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    start(&mut device, false, false);
    device.deactivate();
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_restored_guest_is_told_once_that_its_connections_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = Vsock::new(3, VsockSockets::bind(&folder.path().join("v")).unwrap()).unwrap();
    device.adopt(&[]);
    let Rings { memories, queues } = rings([&[], &[], &[&[(0x8000, 4, true)], &[(0x9000, 4, true)]]]);
    memories[2].write_slice(&[0xff; 4], GuestAddress(0x8000)).unwrap();
    let told = crate::devices::virtio::queue::testing::used_index(&queues[2].queue);
    device.activate(activation(queues, &memories[0])).unwrap();
    while memories[2].read_obj::<u16>(told).unwrap() < 1 {
        std::thread::sleep(Duration::from_millis(1));
    }
    device.deactivate();
    assert_eq!(memories[2].read_obj::<u32>(GuestAddress(0x8000)).unwrap(), EVENT_TRANSPORT_RESET);
    assert_eq!(memories[2].read_obj::<u16>(told).unwrap(), 1);
}

/// A worker without a thread.
fn worker(rings: Rings, sockets: VsockSockets) -> (VsockWorker, [GuestMemory; 3]) {
    let Rings { memories, mut queues } = rings;
    let (events, transmit, receive) = (queues.pop().unwrap(), queues.pop().unwrap(), queues.pop().unwrap());
    let worker = VsockWorker {
        receive,
        transmit,
        events,
        parts: Parts {
            multiplexer: Multiplexer::new(3, sockets),
            timer: TimerFd::new().unwrap(),
            timer_is_set: false,
            tells_reset: false,
        },
        interrupt: Arc::new(Interrupt::alone()),
        chain: Chain::default(),
        _memory: memories[0].clone(),
    };
    (worker, memories)
}

#[test]
fn refusals_wait_for_buffers_and_come_when_there_are_some() {
    let folder = tempfile::tempdir().unwrap();
    let sockets = VsockSockets::bind(&folder.path().join("v")).unwrap();
    let transmit: &[&[Buffer]] = &[&[(0x8000, 44, false)], &[(0x8000, 44, false)]];
    let (mut worker, memories) = worker(rings([&[], transmit, &[]]), sockets);
    memories[1].write_slice(&header(Operation::Request, 0).to_bytes(), GuestAddress(0x8000)).unwrap();
    let epoll = Epoll::new().unwrap();
    worker.handle(TRANSMIT_KICK, EventSet::IN, &epoll).unwrap();
    assert_eq!(used(&memories[1], &worker.transmit.queue).len(), 2);
    assert!(worker.parts.multiplexer.has_outgoing());
    worker.receive.queue = queue_with(&memories[0], &[&[(0x9000, 44, true)], &[(0xa000, 44, true)]]);
    worker.handle(RECEIVE_KICK, EventSet::IN, &epoll).unwrap();
    let given = used(&memories[0], &worker.receive.queue);
    assert_eq!(given.iter().map(|it| it.length).collect::<Vec<_>>(), [44, 44]);
    let mut bytes = [0; HEADER];
    memories[0].read_slice(&mut bytes, GuestAddress(0xa000)).unwrap();
    let answer = Header::parse(&bytes);
    assert_eq!((answer.operation, answer.ports()), (Operation::Reset as u16, Ports { host: 5000, guest: 7 }));
}

#[test]
fn broken_packets_and_buffers_break_the_queue() {
    let lies = header(Operation::Data, 10);
    type Chains = &'static [&'static [Buffer]];
    let cases: [(Chains, Chains, Header); 3] = [
        (&[], &[&[(0x8000, 43, false)]], lies),
        (&[], &[&[(0x8000, 44, false), (0x9000, 9, false)]], lies),
        (&[&[(0x8000, 43, true)]], &[&[(0x8000, 44, false)]], header(Operation::Request, 0)),
    ];
    for (receive, transmit, header) in cases {
        let folder = tempfile::tempdir().unwrap();
        let sockets = VsockSockets::bind(&folder.path().join("v")).unwrap();
        let (mut worker, memories) = worker(rings([receive, transmit, &[]]), sockets);
        memories[1].write_slice(&header.to_bytes(), GuestAddress(0x8000)).unwrap();
        assert!(worker.handle(TRANSMIT_KICK, EventSet::IN, &Epoll::new().unwrap()).is_err());
    }
}

#[test]
fn context_ids_of_the_host_are_no_guests() {
    let folder = tempfile::tempdir().unwrap();
    for (number, cid) in [0, 2, u32::MAX].into_iter().enumerate() {
        let sockets = VsockSockets::bind(&folder.path().join(number.to_string())).unwrap();
        assert!(Vsock::new(cid, sockets).is_err(), "{cid}");
    }
}
