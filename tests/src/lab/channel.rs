//! How commands get into a node and their output back: one JSON object a line over a virtio-serial port.
//!
//! A node has several such ports, so that a test can run a command while another one goes on; a port is
//! one file on the host (QEMU's socket) and one character device in the node. The host locks a port for
//! the time of one command. Every line carries the number of the command it belongs to: what an earlier
//! user of the port left behind (he may have been killed) is skipped. When the host hangs up, the node
//! sees it at its end and ends the command.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::error::{LabError, OnPath};

/// Ports of a node: as many commands can run in it at once.
pub const PORTS: usize = 4;

/// A node that hears answers within this, unless its machine is very busy; then it is greeted again.
const GREETING_TIMEOUT: Duration = Duration::from_millis(400);

/// Name of port `n` as the node sees it in `/sys/class/virtio-ports`.
pub fn port_name(n: usize) -> String {
    format!("mallee.control.{n}")
}

/// Host to node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Chosen at random; repeated in every reply.
    pub id: u64,
    pub ask: Ask,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Run a program with these arguments; what it reads from its standard input, in base64.
    Run { argv: Vec<String>, stdin: String },
    /// What the node's own supervisor knows.
    Status,
}

/// Node to host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reply {
    pub id: u64,
    pub tell: Tell,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tell {
    /// Bytes of the command's standard output, in base64.
    Out(String),
    /// Bytes of its standard error, in base64.
    Err(String),
    /// It ended with this status (128 plus the signal when one ended it). The last reply.
    Exit(i32),
    Status(NodeStatus),
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub kernel: String,
    pub boot_id: String,
    /// Milliseconds from the kernel's start to the moment when services were started.
    pub booted_ms: u64,
    /// `/dev/kvm` is there.
    pub kvm: bool,
    pub services: Vec<ServiceStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub name: String,
    /// None while it is down.
    pub pid: Option<u32>,
    /// Times it was started again after it ended.
    pub restarts: u32,
}

/// A command's end as seen on the host.
#[derive(Debug, Default)]
pub struct Outcome {
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// Asks the node whose folder this is, and hands each reply to `on_reply` until that returns a value.
///
/// A node that boots does not hear what is said to it, so it is greeted until it answers, for as long
/// as `patience`. What is asked then is asked once: a command never runs twice.
pub fn ask<T>(
    folder: &Path,
    ask: Ask,
    patience: Duration,
    on_reply: impl FnMut(Tell) -> Option<T>,
) -> Result<T, LabError> {
    let deadline = Instant::now() + patience;
    let port = Port::lock(folder)?;
    loop {
        let mut conversation = port.connect()?;
        if conversation.greet()? {
            return conversation.ask(ask, None, on_reply)?.ok_or_else(|| port.broken("it is silent"));
        }
        if Instant::now() > deadline {
            return Err(port.broken("it does not answer (is it still booting?)"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Runs a command in the node to its end. Its output goes to `out` and `err` as it comes.
pub fn run(
    folder: &Path,
    argv: &[String],
    stdin: &[u8],
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<i32, LabError> {
    let command = Ask::Run { argv: argv.to_vec(), stdin: STANDARD.encode(stdin) };
    let copy = |to: &mut dyn Write, text: &str| {
        // The command's end is waited for even when nobody reads its output any more.
        let _ = to.write_all(&STANDARD.decode(text).unwrap_or_default()).and_then(|()| to.flush());
    };
    ask(folder, command, Duration::from_secs(10), |tell| match tell {
        Tell::Out(text) => {
            copy(out, &text);
            None
        }
        Tell::Err(text) => {
            copy(err, &text);
            None
        }
        Tell::Exit(status) => Some(status),
        Tell::Status(_) => None,
    })
}

/// What the node's supervisor knows; waits up to `patience` for it to be there.
pub fn status(folder: &Path, patience: Duration) -> Result<NodeStatus, LabError> {
    ask(folder, Ask::Status, patience, |tell| match tell {
        Tell::Status(status) => Some(status),
        _ => None,
    })
}

/// One port, locked.
struct Port {
    folder: PathBuf,
    number: usize,
    _lock: Flock<File>,
}

impl Port {
    /// A free port, or the first one as soon as it is free.
    fn lock(folder: &Path) -> Result<Port, LabError> {
        for number in 0..PORTS {
            if let Some(lock) = lock_file(folder, number, FlockArg::LockExclusiveNonblock)? {
                return Ok(Port { folder: folder.to_owned(), number, _lock: lock });
            }
        }
        let lock = lock_file(folder, 0, FlockArg::LockExclusive)?
            .ok_or_else(|| broken(folder, "its ports cannot be locked"))?;
        Ok(Port { folder: folder.to_owned(), number: 0, _lock: lock })
    }

    fn connect(&self) -> Result<Conversation<'_>, LabError> {
        let stream = connect(&self.folder, &socket_name(self.number))?;
        Ok(Conversation { port: self, lines: BufReader::new(stream) })
    }

    fn broken(&self, reason: &str) -> LabError {
        broken(&self.folder, reason)
    }
}

/// A connected port.
struct Conversation<'a> {
    port: &'a Port,
    lines: BufReader<UnixStream>,
}

impl Conversation<'_> {
    /// Whether the node hears.
    fn greet(&mut self) -> Result<bool, LabError> {
        let status =
            self.ask(Ask::Status, Some(GREETING_TIMEOUT), |tell| matches!(tell, Tell::Status(_)).then_some(()));
        match status {
            Ok(answer) => Ok(answer.is_some()),
            // QEMU hung up: the machine ended, or takes up another connection first.
            Err(LabError::Channel { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// None when nothing came within the timeout.
    fn ask<T>(
        &mut self,
        ask: Ask,
        timeout: Option<Duration>,
        mut on_reply: impl FnMut(Tell) -> Option<T>,
    ) -> Result<Option<T>, LabError> {
        let folder = &self.port.folder;
        let request = Request { id: random_id()?, ask };
        let mut line = serde_json::to_vec(&request).map_err(|e| self.port.broken(&e.to_string()))?;
        line.push(b'\n');
        let stream = self.lines.get_mut();
        stream.set_read_timeout(timeout).on("reading from a port of", folder)?;
        stream.write_all(&line).map_err(|e| self.port.broken(&e.to_string()))?;
        loop {
            line.clear();
            match self.lines.read_until(b'\n', &mut line) {
                Ok(0) => return Err(self.port.broken("it ended while it was asked")),
                Ok(_) => {}
                Err(error) if is_timeout(&error) => return Ok(None),
                Err(error) => return Err(self.port.broken(&error.to_string())),
            }
            let reply = serde_json::from_slice::<Reply>(&line);
            let ours = reply.ok().filter(|reply| reply.id == request.id);
            if let Some(value) = ours.and_then(|reply| on_reply(reply.tell)) {
                return Ok(Some(value));
            }
        }
    }
}

pub(super) fn socket_name(number: usize) -> String {
    format!("control{number}.sock")
}

/// Connects to a socket in `folder`, however long the folder's path is: a socket's address holds 108
/// bytes, so the way to it goes through the open folder's descriptor.
pub(super) fn connect(folder: &Path, socket: &str) -> Result<UnixStream, LabError> {
    let open = File::open(folder).on("opening", folder)?;
    let short = format!("/proc/self/fd/{}/{socket}", open.as_raw_fd());
    UnixStream::connect(short).on("connecting to", folder.join(socket))
}

fn lock_file(folder: &Path, number: usize, how: FlockArg) -> Result<Option<Flock<File>>, LabError> {
    let path = folder.join(format!("control{number}.lock"));
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path).on("opening", &path)?;
    Ok(Flock::lock(file, how).ok())
}

fn random_id() -> Result<u64, LabError> {
    use std::io::Read;
    let mut bytes = [0; 8];
    let path = "/dev/urandom";
    File::open(path).and_then(|mut f| f.read_exact(&mut bytes)).on("reading", path)?;
    Ok(u64::from_ne_bytes(bytes))
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

fn broken(folder: &Path, reason: &str) -> LabError {
    LabError::Channel {
        node: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        reason: reason.to_owned(),
    }
}
