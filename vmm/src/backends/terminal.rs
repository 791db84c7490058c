//! What is behind a virtio console: a pseudo-terminal, a Unix socket with one client, or a file.
//!
//! Nothing here waits: a terminal that nobody reads takes what fits and says so. What is to become of the rest is the
//! device's decision (`devices::virtio::console`).

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::console::DEFAULT_LIMIT;
use crate::api::{self, ConsoleKind};
use crate::error::{Error, Result};

pub enum Terminal {
    Pty(Pty),
    Socket(Socket),
    File(BoundedFile),
}

/// A pseudo-terminal, whose other end is what a person's program opens.
pub struct Pty {
    master: File,
    /// Held open, so that the terminal does not hang up whenever nobody else has it.
    _other_end: File,
    link: PathBuf,
}

/// A listening socket and its one client.
pub struct Socket {
    listener: UnixListener,
    client: Option<UnixStream>,
    path: PathBuf,
}

/// A file that is begun anew when it is full, so that a guest cannot fill the host's disk.
pub struct BoundedFile {
    file: File,
    size: u64,
    limit: u64,
}

impl Terminal {
    pub fn open(config: &api::Console) -> Result<Self> {
        match config.kind {
            ConsoleKind::Pty => Pty::open(&config.path).map(Terminal::Pty),
            ConsoleKind::Socket => Socket::bind(&config.path).map(Terminal::Socket),
            ConsoleKind::File => {
                BoundedFile::open(&config.path, config.size_limit.unwrap_or(DEFAULT_LIMIT)).map(Terminal::File)
            }
        }
    }

    /// What is read and written now; there may be nobody.
    pub fn fd(&self) -> Option<RawFd> {
        match self {
            Terminal::Pty(pty) => Some(pty.master.as_raw_fd()),
            Terminal::Socket(socket) => socket.client.as_ref().map(AsRawFd::as_raw_fd),
            Terminal::File(_) => None,
        }
    }

    /// Where clients come from.
    pub fn listener(&self) -> Option<RawFd> {
        match self {
            Terminal::Socket(socket) => Some(socket.listener.as_raw_fd()),
            _ => None,
        }
    }

    /// Takes the next client; true if it is the one. While there is one, others are hung up on.
    pub fn accept(&mut self) -> io::Result<bool> {
        let Terminal::Socket(socket) = self else { return Ok(false) };
        let (client, _) = socket.listener.accept()?;
        if socket.client.is_some() {
            return Ok(false);
        }
        client.set_nonblocking(true)?;
        socket.client = Some(client);
        Ok(true)
    }

    /// The client is gone.
    pub fn hang_up(&mut self) {
        if let Terminal::Socket(socket) = self {
            socket.client = None;
        }
    }

    /// Writes as much as is taken now.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Terminal::Pty(pty) => pty.master.write(bytes),
            Terminal::Socket(socket) => match &mut socket.client {
                Some(client) => client.write(bytes),
                None => Err(ErrorKind::WouldBlock.into()),
            },
            Terminal::File(file) => file.write(bytes),
        }
    }

    /// Tells the host's side how large the guest's terminal is, where it has a size.
    pub fn set_size(&self, columns: u16, rows: u16) {
        if let Terminal::Pty(pty) = self {
            let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            // SAFETY: the kernel reads one `winsize` at the given address.
            unsafe { libc::ioctl(pty.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        }
    }
}

impl Pty {
    /// Makes a pseudo-terminal in raw mode, and `link` a symbolic link to it.
    fn open(link: &Path) -> Result<Self> {
        let master = open_master().map_err(Error::host("pseudo-terminal"))?;
        let name = other_end(&master).map_err(Error::host("pseudo-terminal"))?;
        let other_end = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC)
            .open(&name)
            .map_err(Error::file("pseudo-terminal", Path::new(&name)))?;
        make_raw(&other_end).map_err(Error::host("pseudo-terminal"))?;
        symlink(&name, link).map_err(|error| taken_or(error, "console's link", link))?;
        Ok(Pty { master, _other_end: other_end, link: link.to_owned() })
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.link);
    }
}

fn open_master() -> io::Result<File> {
    // SAFETY: numbers only; a descriptor that is returned is owned by nobody else.
    let master = unsafe {
        match libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC) {
            fd if fd < 0 => return Err(io::Error::last_os_error()),
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    // SAFETY: numbers only.
    if unsafe { libc::grantpt(master.as_raw_fd()) != 0 || libc::unlockpt(master.as_raw_fd()) != 0 } {
        return Err(io::Error::last_os_error());
    }
    Ok(File::from(master))
}

/// Path of the end that belongs to `master`.
fn other_end(master: &File) -> io::Result<String> {
    let mut name = [0u8; 64];
    // SAFETY: the library writes at most the given length, the NUL included.
    let failed = unsafe { libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr().cast(), name.len()) };
    if failed != 0 {
        return Err(io::Error::from_raw_os_error(failed));
    }
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..length]).into_owned())
}

/// Bytes pass as they are: what a terminal does with them (echo, line ends) the guest's does already.
fn make_raw(terminal: &File) -> io::Result<()> {
    // SAFETY: all zeroes is a valid `termios`, a structure of integers.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: each call gets the address of one `termios`.
    let failed = unsafe {
        libc::tcgetattr(terminal.as_raw_fd(), &mut settings) != 0 || {
            libc::cfmakeraw(&mut settings);
            libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &settings) != 0
        }
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Socket {
    fn bind(path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path).map_err(|error| taken_or(error, "console's socket", path))?;
        let socket = Socket { listener, client: None, path: path.to_owned() };
        socket.listener.set_nonblocking(true).map_err(Error::host("console's socket"))?;
        Ok(socket)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn taken_or(error: io::Error, what: &'static str, path: &Path) -> Error {
    match error.kind() {
        ErrorKind::AddrInUse | ErrorKind::AlreadyExists => Error::BadConfiguration(format!(
            "{what} {} exists already: another VMM may be using it; remove it if not",
            path.display()
        )),
        _ => Error::file(what, path)(error),
    }
}

impl BoundedFile {
    fn open(path: &Path, limit: u64) -> Result<Self> {
        let file =
            OpenOptions::new().create(true).append(true).open(path).map_err(Error::file("console's file", path))?;
        let size = file.metadata().map_err(Error::file("console's file", path))?.len();
        Ok(BoundedFile { file, size, limit })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.size >= self.limit {
            self.file.set_len(0)?;
            self.size = 0;
        }
        let count = self.file.write(bytes)?;
        self.size += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn config(kind: ConsoleKind, path: &Path) -> api::Console {
        api::Console { kind, path: path.to_owned(), columns: None, rows: None, size_limit: Some(100) }
    }

    #[test]
    fn a_file_is_begun_anew_when_it_is_full() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let mut terminal = Terminal::open(&config(ConsoleKind::File, &path)).unwrap();
        for line in 0..25 {
            assert_eq!(terminal.write(format!("{line:09}\n").as_bytes()).unwrap(), 10);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() == 50 && text.ends_with("000000024\n"), "{text}");
    }

    #[test]
    fn a_pty_passes_bytes_as_they_are_and_its_link_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let mut terminal = Terminal::open(&config(ConsoleKind::Pty, &path)).unwrap();
        terminal.set_size(132, 50);
        let mut person = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&path).unwrap();
        terminal.write(b"a\r\nb").unwrap();
        let mut seen = [0; 4];
        person.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"a\r\nb");
        person.write_all(b"x\n").unwrap();
        let Terminal::Pty(pty) = &mut terminal else { panic!() };
        let mut typed = [0; 8];
        assert_eq!(pty.master.read(&mut typed).unwrap(), 2);
        assert_eq!(pty.master.read(&mut typed).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(terminal);
        assert!(std::fs::symlink_metadata(&path).is_err());
    }

    #[test]
    fn a_socket_has_one_client_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let mut terminal = Terminal::open(&config(ConsoleKind::Socket, &path)).unwrap();
        assert!(Terminal::open(&config(ConsoleKind::Socket, &path)).is_err());
        assert_eq!(terminal.write(b"lost").unwrap_err().kind(), ErrorKind::WouldBlock);
        let first = UnixStream::connect(&path).unwrap();
        assert!(terminal.accept().unwrap());
        let mut second = UnixStream::connect(&path).unwrap();
        assert!(!terminal.accept().unwrap());
        assert_eq!(second.read(&mut [0; 1]).unwrap(), 0);
        drop(first);
        terminal.hang_up();
        let _third = UnixStream::connect(&path).unwrap();
        assert!(terminal.accept().unwrap());
    }
}
