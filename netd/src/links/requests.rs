//! Requests to rtnetlink, many in one call.
//!
//! The kernel carries out the requests of one `sendmsg` one after the other, inside of the call, and goes on after one that it refuses. None of them asks for
//! an acknowledgement, so that refusals alone are answered, and these are in the queue when the call returns. A network of ten thousand addresses
//! is some forty thousand requests: each sent by itself and waited for, the waiting takes longer than all that the kernel does.
//!
//! What may not happen here: a request being sent after one that was put in later.

use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::socket::{setsockopt, sockopt};

use crate::error::{Error, Result};
use crate::off_thread::off_thread;

/// Bytes that are sent at once: some hundreds of requests, which the kernel takes a few milliseconds for.
const FULL: usize = 64 << 10;
/// Room for a refusal of each request; one takes up to about a kilobyte of it.
const QUEUE_BYTES: usize = 2 << 20;
const DATAGRAM_BYTES: usize = 64 << 10;

/// What an error says that leaves things as they were to become: what was to be removed is gone, or what was to be added is there.
const GONE: &[i32] = &[libc::ENOENT, libc::ENODEV, libc::ESRCH, libc::EADDRNOTAVAIL];
const THERE: &[i32] = &[libc::EEXIST];

/// A request, with its flags beside `NLM_F_REQUEST`.
pub(super) struct Request {
    pub message: RouteNetlinkMessage,
    pub flags: u16,
}

impl Request {
    /// The errors that are as good as success.
    fn good_errors(&self) -> &'static [i32] {
        match self.message {
            RouteNetlinkMessage::DelLink(_)
            | RouteNetlinkMessage::DelAddress(_)
            | RouteNetlinkMessage::DelNeighbour(_)
            | RouteNetlinkMessage::DelRoute(_)
            | RouteNetlinkMessage::DelRule(_) => GONE,
            RouteNetlinkMessage::NewRule(_) => THERE,
            _ => &[],
        }
    }

    /// Appends the request as it is sent.
    fn write(self, sequence: u32, bytes: &mut Vec<u8>) {
        let mut message = NetlinkMessage::from(self.message);
        message.header.flags = NLM_F_REQUEST | self.flags;
        message.header.sequence_number = sequence;
        message.finalize();
        let begin = bytes.len();
        bytes.resize(begin + message.buffer_len(), 0);
        message.serialize(&mut bytes[begin..]);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
}

/// A step of which the kernel refused a request, by its number, and why.
pub(super) type Refusal = (usize, rtnetlink::Error);

/// Requests that wait to be sent, in the network namespace of the thread that made this.
pub(super) struct Requests {
    socket: Socket,
    bytes: Vec<u8>,
    /// Of each that waits, the step that it is of, and its good errors.
    waiting: Vec<(usize, &'static [i32])>,
}

impl Requests {
    pub fn open() -> Result<Self> {
        let failed = || Error::io("opening an rtnetlink socket");
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed())?;
        socket.bind_auto().map_err(failed())?;
        // Answers repeat no request.
        socket.set_cap_ack(true).map_err(failed())?;
        // SAFETY: the descriptor belongs to `socket`, which outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
        setsockopt(&fd.as_fd(), sockopt::RcvBufForce, &QUEUE_BYTES).map_err(|error| failed()(error.into()))?;
        Ok(Self { socket, bytes: Vec::new(), waiting: Vec::new() })
    }

    /// Adds a request of the step with this number.
    pub fn put(&mut self, step: usize, request: Request) {
        self.waiting.push((step, request.good_errors()));
        request.write(self.waiting.len() as u32, &mut self.bytes);
    }

    pub fn is_full(&self) -> bool {
        self.bytes.len() >= FULL
    }

    /// Sends what waits, and returns the first refusal.
    pub async fn send(mut self) -> Result<(Self, Option<Refusal>)> {
        if self.waiting.is_empty() {
            return Ok((self, None));
        }
        off_thread(move || {
            let refused = self.refused_of(&self.bytes)?;
            let is_bad = |(step, good, error): (usize, &[i32], rtnetlink::Error)| {
                let good = good.iter().any(|number| super::is_errno(&error, *number));
                (!good).then_some((step, error))
            };
            let waiting = &self.waiting;
            let refusal = refused.into_iter().find_map(|(sequence, error)| {
                let (step, good) = waiting.get((sequence as usize).checked_sub(1)?)?;
                is_bad((*step, *good, error))
            });
            self.bytes.clear();
            self.waiting.clear();
            Ok((self, refusal))
        })
        .await
    }

    /// Sends one request at once, before all that wait. It blocks for some microseconds.
    pub fn send_alone(&self, request: Request) -> Result<()> {
        let mut bytes = Vec::new();
        request.write(0, &mut bytes);
        match self.refused_of(&bytes)?.into_iter().next() {
            Some((_, error)) => Err(Error::link("")(error)),
            None => Ok(()),
        }
    }

    /// Has the kernel carry out what is in `bytes`; what it refused comes back by sequence number.
    fn refused_of(&self, bytes: &[u8]) -> Result<Vec<(u32, rtnetlink::Error)>> {
        let failed = || Error::io("sending requests to rtnetlink");
        self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0).map_err(failed())?;
        let mut refused = Vec::new();
        let mut buffer = Vec::with_capacity(DATAGRAM_BYTES);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
                Ok(_) => refused.extend(refusal_in(&buffer)?),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(refused),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(failed()(error)),
            }
        }
    }
}

/// Each answer is a datagram of its own.
fn refusal_in(datagram: &[u8]) -> Result<Option<(u32, rtnetlink::Error)>> {
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram)
        .map_err(|error| Error::Internal(format!("the kernel's answer cannot be read: {error}")))?;
    Ok(match message.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => {
            Some((message.header.sequence_number, rtnetlink::Error::NetlinkError(error)))
        }
        _ => None,
    })
}
