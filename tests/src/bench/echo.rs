//! What a virtio network interface moves, measured from outside: the probe guest (`images/probe`) answers, echoes and counts UDP packets on any KVM, in a network
//! namespace that this program has for itself.
//!
//! The guest is the same binary under each monitor, and does next to nothing for a packet. Only monitors with virtio-mmio devices can be measured, whose windows
//! the command line names.

use std::{
    io,
    net::UdpSocket,
    path::Path,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};

use super::{error::BenchError, run::Guest};
use crate::guest::net_bench::{GUEST, HOST};

/// The probe's ports (`images/probe/README.md`).
const ECHO: u16 = 7;
const DISCARD: u16 = 9;
const COUNTERS: u16 = 19;

/// How long each is counted.
const SPAN: Duration = Duration::from_secs(2);
/// A packet that is not answered by then is lost.
const PATIENCE: Duration = Duration::from_millis(200);
/// The guest has come up by then.
const BOOT: Duration = Duration::from_secs(20);
/// Bytes of a packet, a small one.
const PACKET: usize = 64;
/// Packets that are on their way at once when echoes are counted: fewer than a receive queue has buffers.
const WINDOW: u32 = 32;

/// What was measured in one boot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Microseconds from a packet to its echo, the median.
    pub round_trip: f64,
    /// Echoes a second with [`WINDOW`] packets under way.
    pub echoes: f64,
    /// Packets a second that the guest took without answering.
    pub taken: f64,
}

/// The probe with an address of its own.
pub fn guest<'a>(probe: &Path, work: &'a Path) -> Guest<'a> {
    let command_line = format!("console=ttyS0 probe.ip={GUEST}/24 probe.metadata=off");
    Guest { kernel: probe.to_owned(), initrd: None, command_line, work }
}

/// Leaves the host's network for a namespace in which nothing is. To be called while the program has one thread.
pub fn leave_network() -> Result<(), BenchError> {
    let failed = |source| BenchError::File { action: "making", path: "a network namespace".into(), source };
    unshare(CloneFlags::CLONE_NEWNET).map_err(|error| failed(error.into()))
}

/// Measures a guest that is starting.
pub fn measure() -> io::Result<Rates> {
    let echo = socket(ECHO)?;
    wait_for_guest(&echo)?;
    Ok(Rates { round_trip: round_trip(&echo)?, echoes: echoes(&echo)?, taken: taken()? })
}

fn socket(port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((HOST, 0))?;
    socket.connect((GUEST, port))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn wait_for_guest(echo: &UdpSocket) -> io::Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < BOOT {
        // Before the tap has its carrier nothing can be sent.
        if echo.send(b"?").and_then(|_| echo.recv(&mut [0; PACKET])).is_ok() {
            return Ok(());
        }
    }
    Err(io::Error::other(format!("the guest does not answer within {} s", BOOT.as_secs())))
}

fn round_trip(echo: &UdpSocket) -> io::Result<f64> {
    let begun = Instant::now();
    let mut took = Vec::new();
    while begun.elapsed() < SPAN {
        let sent = Instant::now();
        echo.send(&[0; PACKET])?;
        if echo.recv(&mut [0; PACKET]).is_ok() {
            took.push(sent.elapsed());
        }
    }
    took.sort_unstable();
    took.get(took.len() / 2)
        .map(|median| median.as_secs_f64() * 1e6)
        .ok_or_else(|| io::Error::other("no packet came back"))
}

fn echoes(echo: &UdpSocket) -> io::Result<f64> {
    let (begun, mut under_way, mut answered) = (Instant::now(), 0, 0u32);
    while begun.elapsed() < SPAN {
        while under_way < WINDOW {
            echo.send(&[0; PACKET])?;
            under_way += 1;
        }
        match echo.recv(&mut [0; PACKET]) {
            Ok(_) => {
                under_way -= 1;
                answered += 1;
            }
            // All of them are lost.
            Err(_) => under_way = 0,
        }
    }
    Ok(f64::from(answered) / begun.elapsed().as_secs_f64())
}

fn taken() -> io::Result<f64> {
    let (discard, counters) = (socket(DISCARD)?, socket(COUNTERS)?);
    let before = discarded(&counters)?;
    let begun = Instant::now();
    while begun.elapsed() < SPAN {
        match discard.send(&[0; PACKET]) {
            // The tap is full: the guest's turn.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => drop(sent?),
        }
    }
    let took = begun.elapsed();
    Ok((discarded(&counters)? - before) as f64 / took.as_secs_f64())
}

/// The probe's counter of the packets that it took. A question may be lost among the packets before it.
fn discarded(counters: &UdpSocket) -> io::Result<u64> {
    let mut answer = [0; 2048];
    for _ in 0..20 {
        counters.send(b"?")?;
        if let Ok(length) = counters.recv(&mut answer) {
            let text = String::from_utf8_lossy(&answer[..length]);
            let value = text.lines().find_map(|line| line.strip_prefix("udp_discarded ")?.parse().ok());
            return value.ok_or_else(|| io::Error::other(format!("the guest's counters: {text}")));
        }
    }
    Err(io::Error::other("the guest does not tell its counters"))
}
