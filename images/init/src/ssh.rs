//! The ssh server: started once there is a host key, started again should it end.

use std::fs::{self, OpenOptions};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::host_keys;
use crate::report::{self, Phase};
use crate::supervisor::Children;

const PORT: u16 = 22;
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
    while !is_listening() {
        if Instant::now() > deadline {
            report::line("the ssh server does not listen yet");
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
    report::reached(Phase::Login, "the ssh server listens on port 22");
}

/// Returns when the machine goes down.
fn keep_running(children: &Children) {
    loop {
        match children.start(command()) {
            Ok(Some(server)) => report::line(format_args!("the ssh server {}", server.wait())),
            Ok(None) => return,
            Err(error) => report::line(format_args!("{SERVER} cannot be started: {error}")),
        }
        thread::sleep(RESTART_PAUSE);
    }
}

/// Asks the kernel's table instead of connecting, for which the server would start a process.
fn is_listening() -> bool {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .any(|table| fs::read_to_string(table).is_ok_and(|text| has_listener(&text, PORT)))
}

/// Rows are `0: ADDRESS:PORT REMOTE:PORT STATE …` in hexadecimal; state 0A is LISTEN.
fn has_listener(table: &str, port: u16) -> bool {
    let local = format!(":{port:04X}");
    table.lines().any(|row| {
        let mut fields = row.split_whitespace().skip(1);
        fields.next().is_some_and(|address| address.ends_with(&local)) && fields.nth(1) == Some("0A")
    })
}

fn command() -> Command {
    let mut command = Command::new(SERVER);
    // In the foreground, log on standard error, no passwords, one host key.
    command.args(["-F", "-E", "-s", "-r", host_keys::KEY, "-p", "22"]);
    command.env_clear().env("PATH", crate::boot::PATH).stdin(Stdio::null());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_a_row_with_the_port_and_the_state() {
        let head = "  sl  local_address rem_address   st tx_queue\n";
        let row = |port, state| format!("{head}   0: 00000000:{port} 00000000:0000 {state} 00000000\n");
        assert!(has_listener(&row("0016", "0A"), 22));
        assert!(!has_listener(&row("0016", "01"), 22));
        assert!(!has_listener(&row("0017", "0A"), 22));
        assert!(!has_listener("", 22));
    }
}
