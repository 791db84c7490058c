//! virtio-console (virtio 1.2, 5.3) with one port: `/dev/hvc0`.
//!
//! # The host does not hold up the guest
//!
//! A driver waits for each line of output until the device has taken it (Linux does so with interrupts off), so output is always
//! taken at once. What the terminal does not take is kept, the newest [`BACKLOG`] bytes of it: who connects to the
//! socket later reads the end of what was said before. Input is the other way round: nothing is read from the terminal that the guest has
//! no buffer for, so that a long paste waits where it came from.
//!
//! The terminal is watched edge-triggered; what an edge said is kept in `is_readable` until a read finds nothing more.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::queue::{Broken, Chain, Used};
use super::worker::{Shell, Worker, watch};
use super::{Activation, ActiveQueue, Interrupt, QueuePosition, VirtioDevice};
use crate::api;
use crate::backends::terminal::Terminal;
use crate::confine::ThreadKind;
use crate::memory::GuestMemory;
use crate::metrics::DeviceMetrics;

/// VIRTIO_CONSOLE_F_SIZE (virtio 1.2, 5.3.3).
const SIZE: u32 = 0;
/// Receiving (host to guest) and transmitting.
const QUEUE_SIZES: &[u16] = &[64, 64];
/// Bytes of output that are kept for a terminal that does not take them.
const BACKLOG: usize = 64 << 10;
/// Bytes of output copied in one go.
const PIECE: usize = 4096;
/// A single request is taken up to this length; drivers have pages.
const MAX_OUTPUT: usize = 1 << 20;
/// Requests handled before the other direction and the stop event get their turn.
const BATCH: usize = 64;
/// Columns and rows where the configuration gives none.
const DEFAULT_SIZE: (u16, u16) = (80, 24);

/// Numbers in the worker's epoll set. Clients of the socket count up from [`CLIENT`], so that an old one's last event is
/// not taken for the next one's.
const RECEIVE_KICK: u64 = 0;
const TRANSMIT_KICK: u64 = 1;
const LISTENER: u64 = 2;
const CLIENT: u64 = 3;

pub struct Console {
    worker: Shell<ConsoleWorker>,
    config: [u8; 12],
}

impl Console {
    pub fn new(terminal: Terminal, config: &api::Console) -> Self {
        let output = Output { terminal, backlog: VecDeque::new(), metrics: Arc::new(DeviceMetrics::nowhere()) };
        let mut console = Console { worker: Shell::new(output), config: [0; 12] };
        console.set_size(config.columns.unwrap_or(DEFAULT_SIZE.0), config.rows.unwrap_or(DEFAULT_SIZE.1));
        // max_nr_ports: read only by drivers of several ports.
        console.config[4..8].copy_from_slice(&1u32.to_le_bytes());
        console
    }

    /// To be called while the device does not work. True if that is another size.
    pub fn set_size(&mut self, columns: u16, rows: u16) -> bool {
        let before = self.config;
        self.config[..2].copy_from_slice(&columns.to_le_bytes());
        self.config[2..4].copy_from_slice(&rows.to_le_bytes());
        if let Some(output) = self.worker.parts() {
            output.terminal.set_size(columns, rows);
        }
        self.config != before
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        1 << SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let [receive, transmit] = activation.take_queues()?;
        let tells_size = !activation.is_resumed;
        let interrupt = activation.interrupt.clone();
        self.worker.start(|output| ConsoleWorker {
            receive,
            transmit,
            output: Output { metrics: activation.metrics, ..output },
            client: CLIENT,
            is_readable: false,
            interrupt: activation.interrupt,
            chain: Chain::default(),
            _memory: activation.memory,
        })?;
        if tells_size {
            // Linux reads the size of a console without MULTIPORT only when it is told of a change.
            interrupt.configuration();
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<QueuePosition> {
        self.worker.stop()
    }
}

/// The terminal, and what it has not taken yet.
struct Output {
    terminal: Terminal,
    backlog: VecDeque<u8>,
    metrics: Arc<DeviceMetrics>,
}

impl Output {
    fn write(&mut self, mut bytes: &[u8]) {
        // A file or a socket without a client says nothing when it could be written again.
        self.flush();
        while self.backlog.is_empty() && !bytes.is_empty() {
            match self.terminal.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        let too_many = (self.backlog.len() + bytes.len()).saturating_sub(BACKLOG);
        self.backlog.drain(..too_many.min(self.backlog.len()));
        self.backlog.extend(&bytes[bytes.len().saturating_sub(BACKLOG)..]);
        self.metrics.count("discarded_bytes", too_many as u64);
    }

    /// To be called when the terminal has room.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            match self.terminal.write(self.backlog.as_slices().0) {
                Ok(count) => drop(self.backlog.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

struct ConsoleWorker {
    receive: ActiveQueue,
    transmit: ActiveQueue,
    output: Output,
    /// Number of the present client.
    client: u64,
    /// The terminal had input when it was last looked at.
    is_readable: bool,
    interrupt: Arc<Interrupt>,
    chain: Chain,
    /// What the chain's pointers point into.
    _memory: GuestMemory,
}

impl Worker for ConsoleWorker {
    const NAME: &'static str = "virtio-console";
    const KIND: ThreadKind = ThreadKind::Console;
    type Parts = Output;

    fn register(&self, epoll: &Epoll) -> io::Result<()> {
        watch(epoll, self.receive.kick.as_raw_fd(), EventSet::IN, RECEIVE_KICK)?;
        watch(epoll, self.transmit.kick.as_raw_fd(), EventSet::IN, TRANSMIT_KICK)?;
        if let Some(listener) = self.output.terminal.listener() {
            watch(epoll, listener, EventSet::IN, LISTENER)?;
        }
        self.watch_terminal(epoll)
    }

    fn handle(&mut self, number: u64, events: EventSet, epoll: &Epoll) -> Result<(), Broken> {
        match number {
            RECEIVE_KICK => {
                self.receive.take_kick();
                self.input()
            }
            TRANSMIT_KICK => {
                self.transmit.take_kick();
                self.take_output()
            }
            LISTENER => {
                self.accept(epoll);
                Ok(())
            }
            number if number == self.client => {
                if events.contains(EventSet::OUT) {
                    self.output.flush();
                }
                self.is_readable |= events.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR);
                self.input()
            }
            _ => Ok(()),
        }
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn take_apart(self) -> (Self::Parts, Vec<QueuePosition>) {
        (self.output, vec![self.receive.queue.position(), self.transmit.queue.position()])
    }
}

impl ConsoleWorker {
    fn watch_terminal(&self, epoll: &Epoll) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        self.output.terminal.fd().map_or(Ok(()), |fd| watch(epoll, fd, events, self.client))
    }

    fn accept(&mut self, epoll: &Epoll) {
        match self.output.terminal.accept() {
            Ok(true) => {
                self.client += 1;
                if let Err(error) = self.watch_terminal(epoll) {
                    tracing::warn!(%error, "virtio-console: a client is hung up on");
                    self.output.terminal.hang_up();
                }
            }
            Ok(false) => {}
            Err(error) => tracing::debug!(%error, "virtio-console: accept"),
        }
    }

    /// From the guest.
    fn take_output(&mut self) -> Result<(), Broken> {
        let queue = &mut self.transmit.queue;
        let mut count = 0;
        while count < BATCH && queue.pop(&mut self.chain)? {
            let text = &mut self.chain.readable;
            if text.len() > MAX_OUTPUT {
                return Err(Broken("console output that is too long"));
            }
            let mut piece = [0; PIECE];
            while !text.is_empty() {
                let piece = &mut piece[..text.len().min(PIECE)];
                text.read_at(0, piece);
                text.consume(piece.len());
                self.output.write(piece);
            }
            queue.publish(&[Used { head: self.chain.head, length: 0 }])?;
            count += 1;
            if queue.needs_interrupt()? {
                self.interrupt.queue();
            }
        }
        if queue.enable_kicks()? {
            let _ = self.transmit.kick.write(1);
        }
        Ok(())
    }

    /// To the guest, as long as it has buffers.
    fn input(&mut self) -> Result<(), Broken> {
        let queue = &mut self.receive.queue;
        for _ in 0..BATCH {
            let Some(fd) = self.output.terminal.fd().filter(|_| self.is_readable) else { break };
            if !queue.pop(&mut self.chain)? {
                if queue.enable_kicks()? {
                    continue;
                }
                queue.metrics().stalls.increment();
                break;
            }
            if self.chain.writable.is_empty() {
                return Err(Broken("receive buffer without room"));
            }
            match self.chain.writable.read_from(fd) {
                Ok(count) if count > 0 => {
                    queue.publish(&[Used { head: self.chain.head, length: count as u32 }])?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => queue.undo_pop(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    queue.undo_pop();
                    self.is_readable = false;
                }
                Ok(_) | Err(_) => {
                    queue.undo_pop();
                    self.is_readable = false;
                    self.output.terminal.hang_up();
                }
            }
        }
        if queue.needs_interrupt()? {
            self.interrupt.queue();
        }
        if self.is_readable && queue.enable_kicks()? {
            // More than a batch is there, on both sides.
            let _ = self.receive.kick.write(1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::queue::testing::{Buffer, memory, queue_with, used};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    struct Machine {
        worker: ConsoleWorker,
        epoll: Epoll,
        memory: GuestMemory,
        folder: tempfile::TempDir,
    }

    /// Receive queue at 0, transmit queue in a memory of its own.
    fn machine(receive: &[&[Buffer]], transmit: &[&[Buffer]], text: &[u8]) -> Machine {
        let folder = tempfile::tempdir().unwrap();
        let config = api::Console {
            kind: api::ConsoleKind::Socket,
            path: folder.path().join("c"),
            columns: None,
            rows: None,
            size_limit: None,
        };
        let (memory, other) = (memory(), memory());
        other.write_slice(text, GuestAddress(0x8000)).unwrap();
        let active = |queue| ActiveQueue { queue, kick: EventFd::new(EFD_NONBLOCK).unwrap() };
        let worker = ConsoleWorker {
            receive: active(queue_with(&memory, receive)),
            transmit: active(queue_with(&other, transmit)),
            output: Output {
                terminal: Terminal::open(&config).unwrap(),
                backlog: VecDeque::new(),
                metrics: Arc::new(DeviceMetrics::nowhere()),
            },
            client: CLIENT,
            is_readable: false,
            interrupt: Arc::new(Interrupt::alone()),
            chain: Chain::default(),
            _memory: other,
        };
        let epoll = Epoll::new().unwrap();
        worker.register(&epoll).unwrap();
        Machine { worker, epoll, memory, folder }
    }

    impl Machine {
        /// Handles what is there to be handled.
        fn run(&mut self) {
            let mut ready = [vmm_sys_util::epoll::EpollEvent::default(); 8];
            loop {
                let count = self.epoll.wait(0, &mut ready).unwrap();
                if count == 0 {
                    return;
                }
                for event in &ready[..count] {
                    self.worker.handle(event.data(), event.event_set(), &self.epoll).unwrap();
                }
            }
        }

        fn client(&self) -> UnixStream {
            UnixStream::connect(self.folder.path().join("c")).unwrap()
        }
    }

    #[test]
    fn output_before_there_is_a_client_is_kept_for_the_first_one() {
        let mut machine = machine(&[], &[&[(0x8000, 5, false)]], b"hello");
        machine.worker.transmit.kick.write(1).unwrap();
        machine.run();
        let mut client = machine.client();
        machine.run();
        let mut text = [0; 5];
        client.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
    }

    #[test]
    fn what_a_terminal_does_not_take_is_bounded_and_the_newest() {
        let mut machine = machine(&[], &[], b"");
        let output = &mut machine.worker.output;
        for line in 0..20_000 {
            output.write(format!("{line:09}\n").as_bytes());
        }
        assert_eq!(output.backlog.len(), BACKLOG);
        let text: Vec<u8> = output.backlog.iter().copied().collect();
        assert!(text.ends_with(b"000019999\n"));
        output.write(&[b'x'; 3 * BACKLOG]);
        assert!(output.backlog.len() == BACKLOG && output.backlog.iter().all(|byte| *byte == b'x'));
    }

    #[test]
    fn input_waits_for_buffers_and_clients_come_and_go() {
        let mut machine = machine(&[&[(0x8000, 4, true)], &[(0x9000, 4, true)]], &[], b"");
        let mut client = machine.client();
        client.write_all(b"0123456789").unwrap();
        machine.run();
        let lengths: Vec<u32> =
            used(&machine.memory, &machine.worker.receive.queue).iter().map(|it| it.length).collect();
        assert_eq!(lengths, [4, 4]);
        let mut seen = [0; 4];
        machine.memory.read_slice(&mut seen, GuestAddress(0x9000)).unwrap();
        assert_eq!(&seen, b"4567");
        // The rest is still in the socket, and the client is not given up for it.
        assert!(machine.worker.is_readable && machine.worker.output.terminal.fd().is_some());
    }

    #[test]
    fn a_client_that_leaves_makes_room_for_the_next() {
        let mut machine = machine(&[&[(0x8000, 4, true)]], &[], b"");
        drop(machine.client());
        machine.run();
        assert!(machine.worker.output.terminal.fd().is_none());
        let mut client = machine.client();
        client.write_all(b"hi").unwrap();
        machine.run();
        assert_eq!(used(&machine.memory, &machine.worker.receive.queue), [Used { head: 0, length: 2 }]);
    }
}
