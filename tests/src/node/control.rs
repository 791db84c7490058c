//! The node's end of the control ports: runs what the host asks for. See [`crate::lab::channel`].

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::AsFd,
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        signal::{Signal, killpg},
    },
    unistd::Pid,
};

use super::{boot::say, supervisor::Supervisor};
use crate::lab::channel::{Ask, NodeStatus, PORTS, Reply, Request, Tell, port_name};

/// The device of the port with this name.
pub fn port_device(name: &str) -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")?.flatten() {
        let named = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if named.trim() == name {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio port {name}")))
}

/// Serves every control port, each in a thread of its own; does not return while one works.
pub fn serve(supervisor: &Supervisor, booted_ms: u64) -> io::Result<()> {
    let mut threads = Vec::new();
    for n in 0..PORTS {
        let device = port_device(&port_name(n))?;
        let port = Port {
            file: OpenOptions::new().read(true).write(true).open(&device)?,
            supervisor: supervisor.clone(),
            booted_ms,
        };
        threads.push(std::thread::spawn(move || port.serve()));
    }
    for thread in threads {
        if let Ok(Err(error)) = thread.join() {
            say(&format!("control port: {error}"));
        }
    }
    Ok(())
}

struct Port {
    file: File,
    supervisor: Supervisor,
    booted_ms: u64,
}

impl Port {
    fn serve(&self) -> io::Result<()> {
        // Edge-triggered: a port that nobody is connected to is readable and at its end all the time.
        let changes = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        changes.add(&self.file, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
        let mut lines = BufReader::new(&self.file);
        let mut line = Vec::new();
        loop {
            if lines.read_until(b'\n', &mut line)? == 0 {
                // Nobody is connected. Interrupted is as good as woken: the port is looked at again; and once
                // a second anyway, since a host that connects while this goes to sleep may make no edge.
                let _ = changes.wait(&mut [EpollEvent::empty()], EpollTimeout::from(1000u16));
                continue;
            }
            if let Ok(request) = serde_json::from_slice::<Request>(&line) {
                self.answer(request);
            }
            line.clear();
        }
    }

    fn answer(&self, request: Request) {
        let replies = Replies { id: request.id, file: Arc::new(Mutex::new(&self.file)) };
        match request.ask {
            Ask::Status => replies.send(Tell::Status(self.status())),
            Ask::Run { argv, stdin } => {
                let status = self.run(&argv, STANDARD.decode(stdin).unwrap_or_default(), &replies);
                replies.send(Tell::Exit(status));
            }
        }
    }

    fn status(&self) -> NodeStatus {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        NodeStatus {
            kernel: read("/proc/sys/kernel/osrelease"),
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            booted_ms: self.booted_ms,
            kvm: Path::new("/dev/kvm").exists(),
            services: self.supervisor.status(),
        }
    }

    /// Runs a command in a process group of its own, which is ended when the host hangs up.
    fn run(&self, argv: &[String], stdin: Vec<u8>, replies: &Replies<'_>) -> i32 {
        let Some((program, arguments)) = argv.split_first() else {
            replies.error("no command");
            return 127;
        };
        let started = Command::new(program)
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn();
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                replies.error(&format!("{program}: {error}"));
                return 127;
            }
        };
        let group = Pid::from_raw(child.id() as i32);
        let (input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            scope.spawn(move || input.map(|mut input| input.write_all(&stdin)));
            scope.spawn(|| replies.copy(output, Tell::Out));
            scope.spawn(|| replies.copy(errors, Tell::Err));
            let status = loop {
                match child.try_wait() {
                    Ok(Some(status)) => {
                        break status.code().or(status.signal().map(|signal| 128 + signal));
                    }
                    Ok(None) => {}
                    Err(error) => {
                        replies.error(&error.to_string());
                        break None;
                    }
                }
                if self.host_hung_up() {
                    let _ = killpg(group, Signal::SIGKILL);
                }
                std::thread::sleep(Duration::from_millis(5));
            };
            status.unwrap_or(127)
        })
    }

    /// Whether the one who asked is gone. A new line on the port says so too: nobody sends a second
    /// request on a connection before the first was answered.
    fn host_hung_up(&self) -> bool {
        let mut ends = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        poll(&mut ends, PollTimeout::ZERO).is_ok()
            && ends[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLIN))
    }
}

/// Writes the replies to one request; each line whole.
struct Replies<'a> {
    id: u64,
    file: Arc<Mutex<&'a File>>,
}

impl Replies<'_> {
    fn send(&self, tell: Tell) {
        let Ok(mut line) = serde_json::to_vec(&Reply { id: self.id, tell }) else {
            return;
        };
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // A host that hung up wants no reply.
        let _ = file.write_all(&line);
    }

    fn error(&self, text: &str) {
        self.send(Tell::Err(STANDARD.encode(format!("{text}\n"))));
    }

    fn copy(&self, from: Option<impl Read>, tell: impl Fn(String) -> Tell) {
        let Some(mut from) = from else { return };
        let mut buffer = [0; 16 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            self.send(tell(STANDARD.encode(&buffer[..length])));
        }
    }
}
