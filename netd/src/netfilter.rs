//! A netlink socket to netfilter: the transport under `nft/` and `conntrack.rs`.
//!
//! The kernel handles a netfilter netlink message inside of `sendmsg`: when the call returns, every
//! acknowledgement, error or first part of a dump is in the receive queue. A whole transaction must
//! be in *one* message to the socket, else the kernel sees a batch without its end and undoes it.
//! These sockets block, for microseconds; callers run them off the asynchronous threads.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use netlink_packet_core::NlasIterator;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `struct nfgenmsg`, which begins every netfilter message.
const FAMILY_HEADER: usize = 4;
/// One datagram of a dump is at most 32 KiB (`NLMSG_GOODSIZE` with the kernel's doubling).
const RECEIVE_BUFFER: usize = 64 * 1024;
/// Bytes of replies that may wait: of a batch of which so much is refused, the first refusals tell enough.
const MOST_REPLIES: usize = 32 << 20;
/// A dump that the tables changed under is read again so many times.
const DUMP_ATTEMPTS: usize = 8;

/// `NLM_F_DUMP_INTR`: the table changed while it was dumped.
const DUMP_INTERRUPTED: u16 = 0x10;
const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
const NLMSG_DONE: u16 = libc::NLMSG_DONE as u16;

/// A message that the kernel refused: its sequence number and why.
#[derive(Debug)]
pub struct Refusal {
    pub sequence: u32,
    pub error: io::Error,
}

#[derive(Debug)]
pub struct NetfilterSocket {
    socket: Socket,
    sequence: u32,
}

impl NetfilterSocket {
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        Ok(Self { socket, sequence: 0 })
    }

    /// A socket that hears what the kernel tells a group (`NFNLGRP_…`) from now on.
    pub fn listen(group: u32) -> io::Result<Self> {
        let listener = Self::open()?;
        listener.socket.add_membership(group)?;
        Ok(listener)
    }

    /// What has been told in messages of one kind, without waiting for more.
    pub fn heard<T>(&mut self, kind: u16, each: impl Fn(&[u8]) -> io::Result<Option<T>>) -> io::Result<Vec<T>> {
        let mut entries = Vec::new();
        let mut buffer = Vec::with_capacity(RECEIVE_BUFFER);
        while self.receive_queued(&mut buffer)? {
            for message in Messages(&buffer) {
                let message = message?;
                if message.kind == kind {
                    entries.extend(each(message.body.get(FAMILY_HEADER..).ok_or_else(malformed)?)?);
                }
            }
        }
        Ok(entries)
    }

    /// Sends one whole batch and returns what the kernel refused of it; nothing refused means that
    /// the batch is in force. `replies` is how many may come back.
    pub fn transact(&mut self, batch: &[u8], replies: usize) -> io::Result<Vec<Refusal>> {
        // A queued reply costs about a kilobyte of receive buffer whatever its size.
        let receive = (replies * 2048).clamp(RECEIVE_BUFFER * 4, MOST_REPLIES);
        let fd = self.socket.as_raw_fd();
        // SAFETY: the descriptor belongs to `self.socket`, which outlives the borrow.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        setsockopt(&fd.as_fd(), sockopt::SndBufForce, &(batch.len() * 2 + RECEIVE_BUFFER))?;
        setsockopt(&fd.as_fd(), sockopt::RcvBufForce, &receive)?;
        self.socket.send_to(batch, &SocketAddr::new(0, 0), 0)?;

        let mut refusals = Vec::new();
        let mut buffer = Vec::with_capacity(RECEIVE_BUFFER);
        while self.receive_queued(&mut buffer)? {
            for message in Messages(&buffer) {
                let message = message?;
                if let Some(error) = message.error()? {
                    refusals.push(Refusal { sequence: message.sequence, error });
                }
            }
        }
        Ok(refusals)
    }

    /// Sends one request and waits for its acknowledgement.
    pub fn request(&mut self, kind: u16, family: u8, flags: u16, attributes: &[u8]) -> io::Result<()> {
        let flags = flags | (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let message = self.message(kind, family, flags, attributes);
        match self.transact(&message, 1)?.into_iter().next() {
            Some(refusal) => Err(refusal.error),
            None => Ok(()),
        }
    }

    /// Asks for one thing; `read` gets the attributes of the answer.
    pub fn ask<T>(&mut self, kind: u16, family: u8, read: impl Fn(&[u8]) -> io::Result<T>) -> io::Result<T> {
        let message = self.message(kind, family, libc::NLM_F_REQUEST as u16, &[]);
        self.socket.send_to(&message, &SocketAddr::new(0, 0), 0)?;
        let mut buffer = Vec::with_capacity(RECEIVE_BUFFER);
        loop {
            self.receive(&mut buffer, 0)?;
            for message in Messages(&buffer) {
                let message = message?;
                if message.sequence == self.sequence {
                    return match message.error()? {
                        Some(error) => Err(error),
                        None => read(message.body.get(FAMILY_HEADER..).ok_or_else(malformed)?),
                    };
                }
            }
        }
    }

    /// Dumps a table of the kernel. `each` gets the message type and the attributes of each entry.
    /// The result holds one consistent view: where the kernel says that the table changed while it
    /// was read, it is read again.
    pub fn dump<T>(
        &mut self,
        kind: u16,
        family: u8,
        attributes: &[u8],
        each: impl Fn(&[u8]) -> io::Result<Option<T>>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(entries) = self.dump_once(kind, family, attributes, &each)? {
                return Ok(entries);
            }
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "the kernel's table changed each time while it was read"))
    }

    fn dump_once<T>(
        &mut self,
        kind: u16,
        family: u8,
        attributes: &[u8],
        each: &impl Fn(&[u8]) -> io::Result<Option<T>>,
    ) -> io::Result<Option<Vec<T>>> {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        let message = self.message(kind, family, flags, attributes);
        self.socket.send_to(&message, &SocketAddr::new(0, 0), 0)?;
        let mut entries = Vec::new();
        let mut interrupted = false;
        let mut buffer = Vec::with_capacity(RECEIVE_BUFFER);
        loop {
            self.receive(&mut buffer, 0)?;
            for message in Messages(&buffer) {
                let message = message?;
                if message.sequence != self.sequence {
                    continue;
                }
                interrupted |= message.flags & DUMP_INTERRUPTED != 0;
                if let Some(error) = message.error()? {
                    // A table that went away between two dumps has no entries.
                    let gone = error.raw_os_error() == Some(libc::ENOENT);
                    return if gone { Ok(Some(entries)) } else { Err(error) };
                }
                if message.kind == NLMSG_DONE {
                    return Ok((!interrupted).then_some(entries));
                }
                let attributes = message.body.get(FAMILY_HEADER..).ok_or_else(malformed)?;
                entries.extend(each(attributes)?);
            }
        }
    }

    /// Fills `buffer` with the next datagram.
    fn receive(&self, buffer: &mut Vec<u8>, flags: libc::c_int) -> io::Result<()> {
        loop {
            buffer.clear();
            match self.socket.recv(buffer, flags) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done.map(drop),
            }
        }
    }

    /// The same without waiting; false when the queue is empty.
    fn receive_queued(&self, buffer: &mut Vec<u8>) -> io::Result<bool> {
        match self.receive(buffer, libc::MSG_DONTWAIT) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn message(&mut self, kind: u16, family: u8, flags: u16, attributes: &[u8]) -> Vec<u8> {
        self.sequence += 1;
        let length = HEADER + FAMILY_HEADER + attributes.len();
        let mut message = Vec::with_capacity(length);
        message.extend_from_slice(&(length as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&0_u32.to_ne_bytes());
        message.extend_from_slice(&[family, libc::NFNETLINK_V0 as u8, 0, 0]);
        message.extend_from_slice(attributes);
        message
    }
}

/// One netlink message of a received buffer.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

impl Message<'_> {
    /// The error that the message carries; an acknowledgement and an ordinary message carry none.
    fn error(&self) -> io::Result<Option<io::Error>> {
        if self.kind != NLMSG_ERROR {
            return Ok(None);
        }
        let code = i32::from_ne_bytes(take(self.body, 0)?);
        Ok((code != 0).then(|| io::Error::from_raw_os_error(-code)))
    }
}

/// The messages of a received buffer.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = io::Result<Message<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let parsed = self.parse();
        if parsed.is_err() {
            self.0 = &[];
        }
        Some(parsed)
    }
}

impl<'a> Messages<'a> {
    fn parse(&mut self) -> io::Result<Message<'a>> {
        let length = u32::from_ne_bytes(take(self.0, 0)?) as usize;
        let body = self.0.get(HEADER..length).ok_or_else(malformed)?;
        let message = Message {
            kind: u16::from_ne_bytes(take(self.0, 4)?),
            flags: u16::from_ne_bytes(take(self.0, 6)?),
            sequence: u32::from_ne_bytes(take(self.0, 8)?),
            body,
        };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Ok(message)
    }
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).ok_or_else(malformed)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel sent a netlink message that cannot be read")
}

/// `NLA_F_NESTED`: the attribute's value is attributes.
pub const NESTED: u16 = 1 << 15;

/// The attributes in `bytes`, as type and value; a malformed one is an error.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = io::Result<(u16, &[u8])>> {
    NlasIterator::new(bytes).map(|attribute| {
        let attribute = attribute.map_err(|_| malformed())?;
        let length = attribute.value_length();
        let all = attribute.into_inner();
        let value = all.get(4..4 + length).ok_or_else(malformed)?;
        // The high two bits are flags (`NLA_F_NESTED`, `NLA_F_NET_BYTEORDER`).
        let kind = u16::from_ne_bytes(take(all, 2)?) & 0x3fff;
        Ok((kind, value))
    })
}

/// The value of the attribute `kind` in `bytes`, if it is there.
pub fn attribute(bytes: &[u8], kind: u16) -> io::Result<Option<&[u8]>> {
    for found in attributes(bytes) {
        let (found_kind, value) = found?;
        if found_kind == kind {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// A 32-bit number, which netfilter sends in network byte order.
pub fn number(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

/// A NUL-terminated string attribute.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// Appends an attribute to a message that is being built.
pub fn put(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = (value.len() + 4) as u16;
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reading_any_bytes_ends(bytes: Vec<u8>) {
            for message in Messages(&bytes).flatten() {
                let _ = message.error();
                let _ = attribute(message.body, 1);
            }
        }

        #[test]
        fn an_attribute_reads_back(kind in 0_u16..0x3fff, value: Vec<u8>) {
            prop_assume!(value.len() < 60_000);
            let mut bytes = Vec::new();
            put(&mut bytes, kind, &value);
            put(&mut bytes, kind.wrapping_add(1) & 0x3fff, b"after");
            prop_assert_eq!(attribute(&bytes, kind).unwrap(), Some(value.as_slice()));
        }
    }
}
