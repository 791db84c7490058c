//! All connections of one device: who they are, which of them have something for the guest, and who is
//! refused.
//!
//! # Bounds
//!
//! At most [`MAX_CONNECTIONS`] connections, each with at most `connection::BUFFER` bytes; [`MAX_GREETINGS`] clients that have not
//! said yet where they want to go; [`MAX_RESETS`] refusals that the guest has given no buffer for. When the last are
//! all taken, the guest's packets stay in their ring (virtio 1.2, 5.10.6.1: a device may stop when its resources are exhausted)
//! until it makes room.
//!
//! # No lost wake-up
//!
//! Sockets are watched edge-triggered, once. What an edge said stays in the connection (`is_readable`) until a read finds nothing more, and
//! a connection that has something to say is in `queued` exactly then when [`Connection::next`] says so: everything
//! that can change its answer is followed by [`Multiplexer::queue`].

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{Epoll, EventSet};

use super::super::iovec::IoVec;
use super::super::queue::Broken;
use super::super::worker::watch;
use super::connection::{Connection, Next, Received};
use super::packet::{HEADER, HOST_CID, Header, Operation, Ports, TYPE_STREAM};
use crate::backends::vsock::{Greeting, VsockSockets, greeting};
use crate::metrics::DeviceMetrics;

/// As many as Firecracker has.
pub const MAX_CONNECTIONS: usize = 1023;
pub const MAX_GREETINGS: usize = 64;
pub const MAX_RESETS: usize = 256;
/// Largest payload of a packet towards the guest.
const MAX_PAYLOAD: usize = 64 << 10;
/// Host ports of connections that the host asks for begin here, so that they are apart from those that a guest would
/// name.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// How long a client may take for its first line.
const GREETING_PATIENCE: Duration = Duration::from_secs(5);
/// Clients taken from the listener in one go.
const ACCEPT_BATCH: usize = 64;
/// Numbers in the epoll set: the listener's, and the first of a stream. None is used twice.
pub const LISTENER: u64 = 1 << 32;
const FIRST_STREAM: u64 = LISTENER + 1;

pub struct Multiplexer {
    cid: u32,
    sockets: VsockSockets,
    connections: HashMap<u64, Connection>,
    numbers: HashMap<Ports, u64>,
    greetings: HashMap<u64, (UnixStream, Instant)>,
    next_number: u64,
    next_host_port: u32,
    /// Connections with something to say, each once, in turn.
    queued: VecDeque<u64>,
    resets: VecDeque<Ports>,
    /// The listener had a client that could not be taken; it is tried again at the next tick.
    accepts_later: bool,
    /// Something may wait for too long.
    needs_tick: bool,
    payload: IoVec,
    metrics: Arc<DeviceMetrics>,
}

impl Multiplexer {
    pub fn new(cid: u32, sockets: VsockSockets) -> Self {
        Multiplexer {
            cid,
            sockets,
            connections: HashMap::new(),
            numbers: HashMap::new(),
            greetings: HashMap::new(),
            next_number: FIRST_STREAM,
            next_host_port: FIRST_HOST_PORT,
            queued: VecDeque::new(),
            resets: VecDeque::new(),
            accepts_later: false,
            needs_tick: false,
            payload: IoVec::default(),
            metrics: Arc::new(DeviceMetrics::nowhere()),
        }
    }

    /// What happens from now on is counted in `metrics`.
    pub fn count_in(&mut self, metrics: Arc<DeviceMetrics>) {
        self.metrics = metrics;
    }

    /// Forgets everything but the sockets' names: the driver begins anew.
    pub fn clear(&mut self) {
        self.metrics.count("conns_removed", self.connections.len() as u64);
        self.connections.clear();
        self.numbers.clear();
        self.queued.clear();
        self.resets.clear();
    }

    /// Watches what there is. An edge that came before is seen again: what is ready when it is added is reported.
    pub fn register(&self, epoll: &Epoll) -> io::Result<()> {
        watch(epoll, self.sockets.fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER)?;
        for (number, (stream, _)) in &self.greetings {
            watch_stream(epoll, stream.as_raw_fd(), *number)?;
        }
        for (number, fd) in self.connections.iter().filter_map(|(number, it)| Some((number, it.fd()?))) {
            watch_stream(epoll, fd, *number)?;
        }
        Ok(())
    }

    /// Whether a packet of the guest's can be handled: each may cost a refusal.
    pub fn has_room(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Whether there is (or may be) something for the guest.
    pub fn has_outgoing(&self) -> bool {
        !self.resets.is_empty() || !self.queued.is_empty()
    }

    /// Whether [`Self::tick`] has to be called in about a second.
    pub fn needs_tick(&self) -> bool {
        self.needs_tick
    }

    /// Ends what has waited for too long.
    pub fn tick(&mut self, now: Instant, epoll: &Epoll) {
        self.greetings.retain(|_, (_, deadline)| *deadline > now);
        let overdue: Vec<u64> =
            self.connections.iter().filter(|(_, it)| it.is_overdue(now)).map(|(number, _)| *number).collect();
        for number in overdue {
            self.abort(number, "no answer in time");
        }
        if std::mem::take(&mut self.accepts_later) {
            self.accept(epoll);
        }
        self.needs_tick =
            self.accepts_later || !self.greetings.is_empty() || self.connections.values().any(Connection::has_deadline);
    }

    /// Handles a packet of the guest's; `payload` is as long as the header says.
    pub fn handle(&mut self, header: &Header, payload: &mut IoVec, epoll: &Epoll) {
        if header.source_cid != u64::from(self.cid) || header.destination_cid != HOST_CID {
            // Neither from this guest nor for the host: there is nobody to answer to.
            return;
        }
        let ports = header.ports();
        let operation = Operation::from_number(header.operation).filter(|_| header.kind == TYPE_STREAM);
        match (operation, self.numbers.get(&ports).copied()) {
            (Some(operation), Some(number)) => self.handle_known(number, header, operation, payload),
            (Some(Operation::Request), None) => self.connect(header, epoll),
            (Some(Operation::Reset), None) => {}
            (None, Some(number)) => self.abort(number, "unknown operation or type"),
            (_, None) => self.resets.push_back(ports),
        }
    }

    fn handle_known(&mut self, number: u64, header: &Header, operation: Operation, payload: &mut IoVec) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        if operation == Operation::Reset {
            return self.remove(number);
        }
        match connection.handle(header, operation, payload) {
            Ok(()) => self.settle(number),
            Err(why) => self.abort(number, why.0),
        }
    }

    /// The guest asks for a connection to a port of the host's.
    fn connect(&mut self, request: &Header, epoll: &Epoll) {
        let ports = request.ports();
        let connected = match self.connections.len() < MAX_CONNECTIONS {
            true => self.sockets.connect(ports.host),
            false => Err(io::Error::other("too many connections")),
        };
        let added = connected.and_then(|stream| {
            let number = self.take_number();
            watch_stream(epoll, stream.as_raw_fd(), number)?;
            self.add(number, Connection::from_guest(request, stream));
            Ok(())
        });
        if let Err(error) = added {
            tracing::debug!(%error, port = ports.host, "vsock: the guest's connection is refused");
            self.resets.push_back(ports);
        }
    }

    /// Takes the clients that wait at the listener.
    fn accept(&mut self, epoll: &Epoll) {
        for _ in 0..ACCEPT_BATCH {
            match self.sockets.accept() {
                Ok(Some(stream)) => self.greet(stream, epoll),
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(%error, "vsock: a client of the host's cannot be taken");
                    break;
                }
            }
        }
        // More may wait, and no edge will come for them.
        self.accepts_later = true;
        self.needs_tick = true;
    }

    fn greet(&mut self, stream: UnixStream, epoll: &Epoll) {
        if self.greetings.len() >= MAX_GREETINGS || self.connections.len() >= MAX_CONNECTIONS {
            tracing::debug!("vsock: too many clients of the host's; one is hung up on");
            return;
        }
        let number = self.take_number();
        if watch_stream(epoll, stream.as_raw_fd(), number).is_ok() {
            self.greetings.insert(number, (stream, Instant::now() + GREETING_PATIENCE));
            self.needs_tick = true;
        }
    }

    /// An event of the epoll set that is not of the queues.
    pub fn on_event(&mut self, number: u64, events: EventSet, epoll: &Epoll) {
        if number == LISTENER {
            self.accept(epoll);
        } else if self.greetings.contains_key(&number) {
            self.read_greeting(number);
        } else if let Some(connection) = self.connections.get_mut(&number) {
            let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
            if hung_up || events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
                connection.set_readable(hung_up);
            }
            if hung_up || events.contains(EventSet::OUT) {
                connection.flush();
            }
            self.settle(number);
        }
    }

    fn read_greeting(&mut self, number: u64) {
        let Some((mut stream, deadline)) = self.greetings.remove(&number) else { return };
        match greeting(&mut stream) {
            Greeting::NotYet => {
                self.greetings.insert(number, (stream, deadline));
            }
            Greeting::Connect(port) if self.connections.len() < MAX_CONNECTIONS => {
                let ports = self.free_ports(port);
                self.add(number, Connection::to_guest(ports, stream));
            }
            Greeting::Connect(_) | Greeting::Refused => {}
        }
    }

    /// A host port that has no connection to this port of the guest's. There are more ports than connections.
    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let ports = Ports { host: self.next_host_port, guest };
            self.next_host_port = self.next_host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.numbers.contains_key(&ports) {
                return ports;
            }
        }
    }

    fn take_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number - 1
    }

    fn add(&mut self, number: u64, connection: Connection) {
        self.numbers.insert(connection.ports, number);
        self.connections.insert(number, connection);
        self.metrics.count("conns_added", 1);
        self.queue(number);
    }

    /// After anything has happened to a connection.
    fn settle(&mut self, number: u64) {
        match self.connections.get(&number) {
            Some(connection) if connection.is_over() => {
                self.resets.push_back(connection.ports);
                self.remove(number);
            }
            _ => self.queue(number),
        }
    }

    fn queue(&mut self, number: u64) {
        if let Some(connection) = self.connections.get_mut(&number)
            && !connection.is_queued
            && connection.next() != Next::Nothing
        {
            connection.is_queued = true;
            self.queued.push_back(number);
        }
    }

    fn abort(&mut self, number: u64, why: &str) {
        if let Some(connection) = self.connections.get(&number) {
            tracing::debug!(ports = ?connection.ports, why, "vsock: a connection is reset");
            self.resets.push_back(connection.ports);
            self.metrics.count("conns_killed", 1);
            self.remove(number);
        }
    }

    fn remove(&mut self, number: u64) {
        if let Some(connection) = self.connections.remove(&number) {
            self.numbers.remove(&connection.ports);
            self.metrics.count("conns_removed", 1);
        }
    }

    /// Puts the next packet for the guest into `buffer`; how many bytes, or `None` if there is no packet after all.
    pub fn fill(&mut self, buffer: &IoVec, now: Instant) -> Result<Option<u32>, Broken> {
        if let Some(ports) = self.resets.pop_front() {
            let header = Header::from_host(self.cid.into(), ports, Operation::Reset);
            buffer.write_at(0, &header.to_bytes());
            return Ok(Some(HEADER as u32));
        }
        while let Some(number) = self.queued.pop_front() {
            let Some(connection) = self.connections.get_mut(&number) else { continue };
            connection.is_queued = false;
            let mut header = match connection.next() {
                Next::Nothing => continue,
                Next::Control(operation, flags) => {
                    Header { flags, ..Header::from_host(self.cid.into(), connection.ports, operation) }
                }
                Next::Data(room) => {
                    self.payload.clear();
                    self.payload.extend(buffer);
                    self.payload.consume(HEADER);
                    self.payload.truncate(room.min(MAX_PAYLOAD));
                    if self.payload.is_empty() {
                        return Err(Broken("receive buffer without room for data"));
                    }
                    match connection.receive(&self.payload) {
                        Received::Bytes(count) => Header {
                            length: count as u32,
                            ..Header::from_host(self.cid.into(), connection.ports, Operation::Data)
                        },
                        Received::NothingYet | Received::End => {
                            self.settle(number);
                            continue;
                        }
                    }
                }
            };
            connection.send(&mut header, now);
            self.needs_tick |= connection.has_deadline();
            buffer.write_at(0, &header.to_bytes());
            self.queue(number);
            return Ok(Some(HEADER as u32 + header.length));
        }
        Ok(None)
    }
}

fn watch_stream(epoll: &Epoll, fd: std::os::fd::RawFd, number: u64) -> io::Result<()> {
    let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    watch(epoll, fd, events, number)
}

#[cfg(test)]
mod tests;
