//! The connection to GDB: bytes in and out, each in as few calls as there are packets.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use gdbstub::conn::{Connection, ConnectionExt};

/// What can be gone on with.
pub enum Ready {
    Data,
    Other,
}

pub struct Wire {
    stream: UnixStream,
    /// Received: what of `buffer` is not taken yet.
    buffer: [u8; 4096],
    taken: usize,
    filled: usize,
    /// To be sent.
    outgoing: Vec<u8>,
}

impl Wire {
    pub fn new(stream: UnixStream) -> Self {
        Wire { stream, buffer: [0; 4096], taken: 0, filled: 0, outgoing: Vec::new() }
    }

    /// Waits for data or for `other` to be readable.
    pub fn wait(&mut self, other: &impl AsRawFd) -> io::Result<Ready> {
        Connection::flush(self)?;
        if self.taken < self.filled {
            return Ok(Ready::Data);
        }
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut polls = [poll(self.stream.as_raw_fd()), poll(other.as_raw_fd())];
        loop {
            // SAFETY: two `pollfd`s are passed, of which the kernel writes `revents`.
            match unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) } {
                count if count > 0 && polls[0].revents != 0 => return Ok(Ready::Data),
                count if count > 0 => return Ok(Ready::Other),
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.outgoing.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Write::write_all(&mut self.stream, &self.outgoing)?;
        self.outgoing.clear();
        Ok(())
    }
}

impl ConnectionExt for Wire {
    fn read(&mut self) -> io::Result<u8> {
        if self.taken == self.filled {
            // An acknowledgement has no packet behind it.
            Connection::flush(self)?;
            self.filled = Read::read(&mut self.stream, &mut self.buffer)?;
            self.taken = 0;
            if self.filled == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.taken += 1;
        Ok(self.buffer[self.taken - 1])
    }

    /// Only asked for by an event loop that waits in another way than ours.
    fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(self.buffer[self.taken..self.filled].first().copied())
    }
}
