//! The line between the two halves of a check: text over a vsock stream, which the guest opens to a port of the host's.
//!
//! [`stream`] and [`listen`] are the guest's vsock sockets, also for checks that need more of them. They are plain system calls: the
//! standard library knows no vsock.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The host's context id.
const HOST_CID: u32 = 2;
/// The check at place *n* has the host's port that much further.
pub const FIRST_PORT: u32 = 1000;

/// One end of the line.
pub struct Link {
    reader: BufReader<Box<dyn Read + Send>>,
    writer: Box<dyn Write + Send>,
}

impl Link {
    pub fn new(reader: impl Read + Send + 'static, writer: impl Write + Send + 'static) -> Self {
        Link { reader: BufReader::new(Box::new(reader)), writer: Box::new(writer) }
    }

    /// The guest's end for the check at `place`.
    pub fn to_host(place: usize) -> io::Result<Self> {
        let stream = stream(FIRST_PORT + place as u32)?;
        Ok(Link::new(stream.try_clone()?, stream))
    }

    /// Sends a line.
    pub fn say(&mut self, line: &str) -> Result<(), String> {
        writeln!(self.writer, "{line}").map_err(|error| format!("telling the other half {line:?}: {error}"))
    }

    /// Waits for a line.
    pub fn hear(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Err("the other half has ended".into()),
            Ok(_) => Ok(line.trim_end().to_owned()),
            Err(error) => Err(format!("hearing from the other half: {error}")),
        }
    }

    /// Waits for this line and no other.
    pub fn wait_for(&mut self, line: &str) -> Result<(), String> {
        let heard = self.hear()?;
        if heard == line { Ok(()) } else { Err(format!("the other half says {heard:?} and not {line:?}")) }
    }
}

/// A stream to the host's `port`.
pub fn stream(port: u32) -> io::Result<File> {
    let socket = socket()?;
    let address = address(HOST_CID, port);
    // SAFETY: `address` is a whole `sockaddr_vm`, which the kernel reads.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) })?;
    Ok(File::from(socket))
}

/// A guest's listening socket at `port`.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: as in `stream`; the second call takes numbers only.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) })?;
    check(unsafe { libc::listen(socket.as_raw_fd(), 8) })?;
    Ok(socket)
}

/// The next stream of a listening socket.
pub fn accept(listener: &OwnedFd) -> io::Result<File> {
    // SAFETY: no address is asked for; a descriptor that is returned is owned by nobody else.
    unsafe {
        let fd = libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC);
        check(fd)?;
        Ok(File::from_raw_fd(fd))
    }
}

/// Ends the sending direction of a stream.
pub fn end(stream: &File) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::shutdown(stream.as_raw_fd(), libc::SHUT_WR) })
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: numbers only; a descriptor that is returned is owned by nobody else.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        check(fd)?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeroes is a valid address, a structure of integers.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
