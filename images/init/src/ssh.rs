//! The ssh server: started once there is a host key, started again should it end.

use std::fs::{self, OpenOptions};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::host_keys;
use crate::report::{self, Phase};
use crate::supervisor::Children;

const SERVER: &str = "/usr/sbin/dropbear";
const LOG: &str = "/var/log/ssh.log";
/// The log is begun anew at a boot if it has grown beyond this many bytes.
const LOG_LIMIT: u64 = 1 << 20;
/// A server that ended is started again after this pause.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// How long the server may take until it listens before we stop looking (it goes on trying).
const LISTEN_PATIENCE: Duration = Duration::from_secs(20);

/// Keeps a server running in a thread of its own; returns as soon as it listens.
pub fn start(children: &Children) {
    let children = children.clone();
    thread::spawn(move || keep_running(&children));
    let deadline = Instant::now() + LISTEN_PATIENCE;
    while TcpStream::connect(("127.0.0.1", 22)).is_err() {
        if Instant::now() > deadline {
            report::line("the ssh server does not listen yet");
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    report::reached(Phase::Login, "the ssh server listens on port 22");
}

fn keep_running(children: &Children) {
    loop {
        match children.start(&mut command()) {
            Ok(server) => report::line(format_args!("the ssh server {}", server.wait())),
            Err(error) => report::line(format_args!("{SERVER} cannot be started: {error}")),
        }
        thread::sleep(RESTART_PAUSE);
    }
}

fn command() -> Command {
    let mut command = Command::new(SERVER);
    // In the foreground, log on standard error, no passwords, one host key.
    command.args(["-F", "-E", "-s", "-r", host_keys::KEY, "-p", "22"]);
    command
        .env_clear()
        .env("PATH", crate::boot::PATH)
        .stdin(Stdio::null());
    let too_long = fs::metadata(LOG).is_ok_and(|log| log.len() > LOG_LIMIT);
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    if too_long {
        let _ = fs::rename(LOG, format!("{LOG}.1"));
    }
    match options.open(LOG) {
        Ok(log) => command.stderr(log).stdout(Stdio::null()),
        Err(_) => command.stderr(Stdio::null()).stdout(Stdio::null()),
    };
    command
}
