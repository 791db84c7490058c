//! One stream between a guest's socket and a Unix socket of the host.
//!
//! # Credit
//!
//! Each side tells the other how large its buffer is and how many bytes it has taken out of it
//! (virtio 1.2, 5.10.6.3); a sender never has more on the way than fits. Towards the guest that bounds what is read from
//! the host's socket: nothing is read that the guest has no room for, so nothing waits here. Towards the host, data goes straight from guest memory
//! to the socket, and only what the socket does not take is kept, in a buffer of at most [`BUFFER`] bytes.
//! A guest that sends more than it was given credit for is reset.
//!
//! # Ends
//!
//! Each direction ends on its own. An end of file on the host becomes SHUTDOWN(send), a peer that is gone
//! SHUTDOWN(both), which the guest answers with RST. A guest's SHUTDOWN(send) becomes an end of file once the buffer has been written
//! out, SHUTDOWN(both) is then answered with RST. Nobody is waited for for ever: see [`Connection::is_overdue`].

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::super::iovec::IoVec;
use super::packet::{Header, Operation, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes that are kept for a host that does not read: the credit that the guest is given.
pub const BUFFER: usize = 64 << 10;
/// The guest is told of room in the buffer when it believes that less than this is free.
const LOW_CREDIT: u32 = BUFFER as u32 / 2;
/// How long a guest may take to answer a REQUEST, or a SHUTDOWN(both) that ends a connection. (Linux allows 2 s and
/// 8 s, VSOCK_DEFAULT_CONNECT_TIMEOUT and VSOCK_CLOSE_TIMEOUT.)
const PATIENCE: Duration = Duration::from_secs(8);

/// The connection ends at once, and the guest is told so with RST.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abort(pub &'static str);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The host has asked; REQUEST is to be sent.
    Asking,
    /// The guest has not answered yet.
    Asked,
    /// The guest has asked; RESPONSE is to be sent.
    Answering,
    Established,
}

/// What is to be sent to the guest next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Nothing,
    /// A packet without payload, with these flags.
    Control(Operation, u32),
    /// At most so many bytes from the socket, which had something when it was last looked at.
    Data(usize),
}

/// What reading from the host's socket gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    Bytes(usize),
    /// There will be an event when there is more.
    NothingYet,
    End,
}

pub struct Connection {
    pub ports: Ports,
    /// None as soon as nothing can go over it in either direction.
    stream: Option<UnixStream>,
    state: State,

    /// Guest to host: what the socket did not take yet, and counts of bytes since the beginning.
    backlog: VecDeque<u8>,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest last heard of it.
    told: Wrapping<u32>,
    owes_credit: bool,

    /// Host to guest: bytes sent, and the guest's account of its buffer.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    is_readable: bool,

    /// Directions that the guest has ended, as the flags of its SHUTDOWN.
    guest_ended: u32,
    /// Directions that the host has ended, and those of them that the guest knows of.
    host_ended: u32,
    host_end_told: u32,
    /// The host's peer is gone altogether.
    hung_up: bool,
    deadline: Option<Instant>,
    /// Whether the multiplexer has this connection in its list of those with something to send.
    pub is_queued: bool,
}

impl Connection {
    /// A connection that the host asks the guest for.
    pub fn to_guest(ports: Ports, stream: UnixStream) -> Self {
        let mut connection = Connection::new(ports, stream, State::Asking);
        // What the client has sent after its first line came with an event that is gone.
        connection.is_readable = true;
        connection
    }

    /// A connection that the guest has asked for with `request` and that a host's socket has taken.
    pub fn from_guest(request: &Header, stream: UnixStream) -> Self {
        let mut connection = Connection::new(request.ports(), stream, State::Answering);
        connection.note_credit(request);
        connection
    }

    fn new(ports: Ports, stream: UnixStream, state: State) -> Self {
        Connection {
            ports,
            stream: Some(stream),
            state,
            backlog: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            owes_credit: false,
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            is_readable: false,
            guest_ended: 0,
            host_ended: 0,
            host_end_told: 0,
            hung_up: false,
            deadline: None,
            is_queued: false,
        }
    }

    /// The host's socket, while there is one.
    pub fn fd(&self) -> Option<RawFd> {
        self.stream.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Handles a packet of the guest's for this connection. `payload` is exactly as long as the header says.
    pub fn handle(&mut self, header: &Header, operation: Operation, payload: &mut IoVec) -> Result<(), Abort> {
        self.note_credit(header);
        match (operation, self.state) {
            (Operation::Response, State::Asked) => self.establish(),
            (Operation::Data, State::Established) => self.forward(payload),
            (Operation::Shutdown, State::Established) => self.end_by_guest(header.flags),
            (Operation::CreditUpdate, State::Established) => Ok(()),
            (Operation::CreditRequest, State::Established) => {
                self.owes_credit = true;
                Ok(())
            }
            // A guest that has asked sends nothing before it has our answer.
            (Operation::Data | Operation::Shutdown | Operation::CreditUpdate | Operation::CreditRequest, _) => {
                Err(Abort("packet for a connection that is not established"))
            }
            (Operation::Request | Operation::Response, _) => Err(Abort("connection asked for twice")),
            (Operation::Reset, _) => Err(Abort("reset by the guest")),
        }
    }

    fn note_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buffer;
        self.guest_forwarded = Wrapping(header.forwarded);
    }

    fn establish(&mut self) -> Result<(), Abort> {
        self.state = State::Established;
        self.deadline = None;
        // The host's client reads this line before anything else; see `backends::vsock`.
        let line = format!("OK {}\n", self.ports.host);
        match self.stream.as_mut().map(|stream| io::Write::write(stream, line.as_bytes())) {
            Some(Ok(count)) if count == line.len() => Ok(()),
            _ => Err(Abort("the host's client is gone")),
        }
    }

    /// Hands data to the socket, and keeps what it does not take.
    fn forward(&mut self, payload: &mut IoVec) -> Result<(), Abort> {
        if self.guest_ended & SHUTDOWN_SEND != 0 {
            return Err(Abort("data after the end"));
        }
        let length = payload.len() as u32;
        let on_the_way = (self.received - self.forwarded).0;
        if on_the_way.checked_add(length).is_none_or(|sum| sum as usize > BUFFER) {
            return Err(Abort("data beyond the credit"));
        }
        self.received += length;
        if self.backlog.is_empty() {
            self.write_from_guest(payload);
        }
        if !payload.is_empty() && self.stream.is_some() && self.host_ended & SHUTDOWN_RECEIVE == 0 {
            let start = self.backlog.len();
            self.backlog.resize(start + payload.len(), 0);
            // The ring's content may wrap around its end; copying needs it in one piece.
            let bytes = self.backlog.make_contiguous();
            payload.read_at(0, &mut bytes[start..]);
        } else {
            // Nobody reads it any more.
            self.count_forwarded(payload.len());
        }
        Ok(())
    }

    fn write_from_guest(&mut self, payload: &mut IoVec) {
        while !payload.is_empty() {
            let Some(fd) = self.fd() else { return };
            match payload.write_to(fd) {
                Ok(count) => {
                    payload.consume(count);
                    self.count_forwarded(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.lose_host(),
            }
        }
    }

    /// Writes out what is kept. To be called when the socket has room.
    pub fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let Some(stream) = &mut self.stream else { break };
            match io::Write::write(stream, self.backlog.as_slices().0) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.count_forwarded(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.lose_host(),
            }
        }
        // A connection with nothing to keep has no buffer.
        self.backlog = VecDeque::new();
        self.pass_end_on();
    }

    fn count_forwarded(&mut self, count: usize) {
        // At most BUFFER bytes.
        self.forwarded += count as u32;
        let free_in_guests_eyes = (BUFFER as u32).saturating_sub((self.received - self.told).0);
        if free_in_guests_eyes < LOW_CREDIT {
            self.owes_credit = true;
        }
    }

    /// The host's peer reads no more.
    fn lose_host(&mut self) {
        self.count_forwarded(self.backlog.len());
        self.backlog.clear();
        self.host_ended |= SHUTDOWN_RECEIVE;
    }

    fn end_by_guest(&mut self, flags: u32) -> Result<(), Abort> {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        self.pass_end_on();
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            self.is_readable = false;
            if let Some(stream) = &self.stream {
                let _ = stream.shutdown(Shutdown::Read);
            }
        }
        Ok(())
    }

    fn pass_end_on(&mut self) {
        if self.guest_ended & SHUTDOWN_SEND != 0
            && self.backlog.is_empty()
            && let Some(stream) = &self.stream
        {
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    /// Both directions were ended by the guest, and what it sent is with the host: RST is the answer, and the end.
    pub fn is_over(&self) -> bool {
        self.guest_ended == SHUTDOWN_BOTH && self.backlog.is_empty()
    }

    /// The guest did not answer in time.
    pub fn is_overdue(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Whether [`Self::is_overdue`] can come true.
    pub fn has_deadline(&self) -> bool {
        self.deadline.is_some()
    }

    /// The socket has something to read, or has ended; `hung_up`: in both directions.
    pub fn set_readable(&mut self, hung_up: bool) {
        self.hung_up |= hung_up;
        let nobody_reads = self.guest_ended & SHUTDOWN_RECEIVE != 0 || self.host_ended & SHUTDOWN_SEND != 0;
        if !nobody_reads {
            self.is_readable = true;
        } else if self.hung_up {
            self.host_ended |= SHUTDOWN_SEND;
            self.lose_host();
        }
    }

    /// What the guest is to get next. Data has a header with the present credit, so it stands for a credit
    /// update too.
    pub fn next(&self) -> Next {
        match self.state {
            State::Asking => Next::Control(Operation::Request, 0),
            State::Answering => Next::Control(Operation::Response, 0),
            State::Asked => Next::Nothing,
            State::Established => self.next_of_established(),
        }
    }

    fn next_of_established(&self) -> Next {
        let room = self.guest_buffer.saturating_sub((self.sent - self.guest_forwarded).0);
        if self.is_readable && room > 0 {
            Next::Data(room as usize)
        } else if self.host_ended != self.host_end_told && self.host_end_told != SHUTDOWN_BOTH {
            Next::Control(Operation::Shutdown, self.host_ended)
        } else if self.owes_credit {
            Next::Control(Operation::CreditUpdate, 0)
        } else {
            Next::Nothing
        }
    }

    /// One read of the host's data into `buffer`.
    pub fn receive(&mut self, buffer: &IoVec) -> Received {
        loop {
            let Some(fd) = self.fd() else { return Received::NothingYet };
            match buffer.read_from(fd) {
                Ok(count) if count > 0 => return Received::Bytes(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.is_readable = false;
                    return Received::NothingYet;
                }
                Ok(_) | Err(_) => {
                    self.is_readable = false;
                    self.host_ended |= SHUTDOWN_SEND;
                    if self.hung_up {
                        self.lose_host();
                    }
                    return Received::End;
                }
            }
        }
    }

    /// Completes the header of a packet that is about to be given to the guest, and notes that it was.
    pub fn send(&mut self, header: &mut Header, now: Instant) {
        header.buffer = BUFFER as u32;
        header.forwarded = self.forwarded.0;
        self.told = self.forwarded;
        self.owes_credit = false;
        self.sent += header.length;
        match Operation::from_number(header.operation) {
            Some(Operation::Request) => {
                self.state = State::Asked;
                self.deadline = Some(now + PATIENCE);
            }
            Some(Operation::Response) => self.state = State::Established,
            Some(Operation::Shutdown) => {
                self.host_end_told = header.flags;
                if self.host_end_told == SHUTDOWN_BOTH {
                    self.stream = None;
                    self.deadline = Some(now + PATIENCE);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
impl Connection {
    pub fn backlog_length(&self) -> usize {
        self.backlog.len()
    }
}
