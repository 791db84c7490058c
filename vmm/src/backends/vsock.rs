//! The host's side of vsock: Unix sockets in Firecracker's convention.
//!
//! A program on the host connects to the device's socket, sends `CONNECT <port>\n` and, if the guest accepts,
//! reads `OK <host port>\n`; from then on the stream is the guest's. A guest that connects to port *n* of the host (CID 2)
//! reaches whoever listens on `<path>_<n>`.
//!
//! Everything here is non-blocking: the one thread that serves all streams never waits for a peer.

use std::io::{self, ErrorKind, Read};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Longest first line of a client: `CONNECT 4294967295\n` has 19 bytes.
const MAX_LINE: usize = 32;
/// Longest path: `sun_path` (unix(7)) less its NUL and the longest `_<port>`.
const MAX_PATH: usize = 108 - 1 - 11;

/// The device's socket, and where those of the ports are.
pub struct VsockSockets {
    listener: UnixListener,
    path: PathBuf,
}

/// What a client's first line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Greeting {
    Connect(u32),
    NotYet,
    /// No such line, too long a line, or the client is gone.
    Refused,
}

impl VsockSockets {
    /// Binds the socket, which must not exist.
    pub fn bind(path: &Path) -> Result<Self> {
        if path.as_os_str().len() > MAX_PATH {
            return Err(Error::BadConfiguration(format!(
                "uds_path {} is longer than {MAX_PATH} bytes, and a socket's path with \"_<port>\" must fit into 107",
                path.display()
            )));
        }
        let listener = UnixListener::bind(path).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => Error::BadConfiguration(format!(
                "vsock's uds_path {} exists already: another VMM may be using it; remove it if not",
                path.display()
            )),
            _ => Error::file("vsock's socket", path)(error),
        })?;
        let sockets = VsockSockets { listener, path: path.to_owned() };
        sockets.listener.set_nonblocking(true).map_err(Error::host("vsock's socket"))?;
        Ok(sockets)
    }

    pub fn fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// The next client, if there is one.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Connects to whoever listens on the host's `port`. Fails at once if nobody does, or if that one's
    /// backlog is full.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        connect_at_once(Path::new(&path))
    }
}

impl Drop for VsockSockets {
    /// The name goes with the device; a client that finds it would wait for nobody.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Takes a client's first line from its stream, and nothing after it.
pub fn greeting(stream: &mut UnixStream) -> Greeting {
    let mut line = [0; MAX_LINE];
    let seen = match peek(stream, &mut line) {
        Ok(0) => return Greeting::Refused,
        Ok(count) => &line[..count],
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            return Greeting::NotYet;
        }
        Err(_) => return Greeting::Refused,
    };
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        return if seen.len() < MAX_LINE { Greeting::NotYet } else { Greeting::Refused };
    };
    let port = parse(&seen[..end]);
    match stream.read_exact(&mut line[..=end]) {
        Ok(()) => port.map_or(Greeting::Refused, Greeting::Connect),
        Err(_) => Greeting::Refused,
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    // `parse` would take a sign.
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

fn peek(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most the length of `bytes` to it.
    let count = unsafe { libc::recv(stream.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), libc::MSG_PEEK) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// The standard library's `connect` waits while a listener's backlog is full.
fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: numbers only; a descriptor that is returned is owned by nobody else.
    let socket = match unsafe { libc::socket(libc::AF_UNIX, kind, 0) } {
        fd if fd < 0 => return Err(io::Error::last_os_error()),
        fd => unsafe { OwnedFd::from_raw_fd(fd) },
    };
    // SAFETY: all zeroes is a valid address, a structure of integers.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let length = offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1;
    // SAFETY: `address` is a whole `sockaddr_un`, of which the kernel reads `length` bytes.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length as libc::socklen_t) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(UnixStream::from(socket)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn line(bytes: &[u8]) -> (Greeting, Vec<u8>) {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        client.write_all(bytes).unwrap();
        let seen = greeting(&mut server);
        let mut rest = [0; 64];
        let count = server.read(&mut rest).unwrap_or(0);
        (seen, rest[..count].to_vec())
    }

    #[test]
    fn the_first_line_is_read_and_not_a_byte_more() {
        assert_eq!(line(b"CONNECT 52\nhello"), (Greeting::Connect(52), b"hello".to_vec()));
        assert_eq!(line(b"CONNECT 4294967295\n"), (Greeting::Connect(u32::MAX), vec![]));
        assert_eq!(line(b"CONN").0, Greeting::NotYet);
        for bad in ["CONNECT 4294967296\n", "CONNECT +1\n", "CONNECT \n", "connect 1\n", "\n", &"x".repeat(32)] {
            assert_eq!(line(bad.as_bytes()).0, Greeting::Refused, "{bad:?}");
        }
    }

    #[test]
    fn a_port_is_a_socket_beside_the_devices_and_a_full_backlog_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v");
        let sockets = VsockSockets::bind(&path).unwrap();
        assert!(sockets.connect(7).is_err());
        let _listener = UnixListener::bind(folder.path().join("v_7")).unwrap();
        let mut made = Vec::new();
        // The standard library listens with a backlog of at most SOMAXCONN.
        let refused = (0..10_000).find_map(|_| match sockets.connect(7) {
            Ok(stream) => {
                made.push(stream);
                None
            }
            Err(error) => Some(error),
        });
        assert!(refused.is_some() && !made.is_empty());
        drop(sockets);
        assert!(!path.exists());
    }

    #[test]
    fn paths_that_are_taken_or_too_long_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v");
        std::fs::write(&path, "").unwrap();
        assert!(VsockSockets::bind(&path).err().unwrap().to_string().contains("exists already"));
        assert!(path.exists());
        assert!(VsockSockets::bind(&folder.path().join("x".repeat(100))).is_err());
    }
}
