//! The guest's half of the network benchmark (`bench::net`): streams and packets to and from the host, counted for a while each.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::{interface, while_doing};

/// The word of the command line that asks for this.
pub const WORD: &str = "guest.bench=net";
/// The line with the numbers begins so; they follow in the order of [`Rates`].
pub const MARK: &str = "guest-net:";
pub const MAC: &str = "06:00:c6:12:fc:02";
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 18, 252, 1);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(198, 18, 252, 2);
/// The host takes what comes; over TCP it ends the stream when it has all of it.
pub const SINK_PORT: u16 = 5001;
/// The host sends without end.
pub const SOURCE_PORT: u16 = 5002;
/// The host says how many packets the sink has taken so far.
pub const COUNTED_PORT: u16 = 5003;
/// The host sends packets back.
pub const ECHO_PORT: u16 = 5004;

/// How long each is counted.
const SPAN: Duration = Duration::from_secs(2);
const CHUNK: usize = 256 << 10;
/// Bytes of a packet, a small one.
const PACKET: usize = 64;
/// A packet may be lost; then the next one goes.
const LOST: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// MiB a second of one TCP stream to the host, and from it.
    pub to_host: f64,
    pub from_host: f64,
    /// UDP packets a second that arrive at the host.
    pub packets: f64,
    /// Microseconds from a UDP packet to its answer.
    pub round_trip: f64,
}

impl Rates {
    /// From a line of the guest's.
    pub fn from_line(line: &str) -> Option<Self> {
        let numbers = line.split_once(MARK)?.1.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>();
        match numbers.ok()?[..] {
            [to_host, from_host, packets, round_trip] => Some(Rates { to_host, from_host, packets, round_trip }),
            _ => None,
        }
    }
}

/// Measures and prints the line.
pub fn run() -> Result<(), String> {
    let name = interface::find(MAC)?;
    interface::configure(&name, GUEST).map_err(while_doing("the interface's address"))?;
    let failed = while_doing::<std::io::Error>;
    let to_host = to_host().map_err(failed("a stream to the host"))?;
    let from_host = from_host().map_err(failed("a stream from the host"))?;
    let packets = packets().map_err(failed("packets to the host"))?;
    let round_trip = round_trip().map_err(failed("packets there and back"))?;
    println!("{MARK} {to_host:.2} {from_host:.2} {packets:.0} {round_trip:.1}");
    Ok(())
}

fn mib_a_second(bytes: usize, begin: Instant) -> f64 {
    bytes as f64 / f64::from(1 << 20) / begin.elapsed().as_secs_f64()
}

fn to_host() -> std::io::Result<f64> {
    let mut stream = TcpStream::connect((HOST, SINK_PORT))?;
    let chunk = vec![0; CHUNK];
    let (begin, mut bytes) = (Instant::now(), 0);
    while begin.elapsed() < SPAN {
        bytes += stream.write(&chunk)?;
    }
    // What is still under way counts, and so does its time.
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(mib_a_second(bytes, begin))
}

fn from_host() -> std::io::Result<f64> {
    let mut stream = TcpStream::connect((HOST, SOURCE_PORT))?;
    let mut chunk = vec![0; CHUNK];
    let (begin, mut bytes) = (Instant::now(), 0);
    while begin.elapsed() < SPAN {
        bytes += stream.read(&mut chunk)?;
    }
    Ok(mib_a_second(bytes, begin))
}

fn packets() -> std::io::Result<f64> {
    let socket = UdpSocket::bind((GUEST, 0))?;
    socket.connect((HOST, SINK_PORT))?;
    let before = counted()?;
    let begin = Instant::now();
    while begin.elapsed() < SPAN {
        socket.send(&[0; PACKET])?;
    }
    let took = begin.elapsed();
    Ok((counted()? - before) as f64 / took.as_secs_f64())
}

fn counted() -> std::io::Result<u64> {
    let mut text = String::new();
    TcpStream::connect((HOST, COUNTED_PORT))?.read_to_string(&mut text)?;
    text.parse().map_err(std::io::Error::other)
}

fn round_trip() -> std::io::Result<f64> {
    let socket = UdpSocket::bind((GUEST, 0))?;
    socket.connect((HOST, ECHO_PORT))?;
    socket.set_read_timeout(Some(LOST))?;
    let (begin, mut answers) = (Instant::now(), 0u32);
    while begin.elapsed() < SPAN {
        socket.send(&[0; PACKET])?;
        answers += u32::from(socket.recv(&mut [0; PACKET]).is_ok());
    }
    Ok(begin.elapsed().as_secs_f64() * 1e6 / f64::from(answers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_finds_the_numbers_in_the_guests_line() {
        let rates = Rates::from_line("x guest-net: 10.5 20 3000 41.5\r").unwrap();
        assert_eq!(rates, Rates { to_host: 10.5, from_host: 20.0, packets: 3000.0, round_trip: 41.5 });
        assert!(Rates::from_line("guest-net: 1 2 3").is_none() && Rates::from_line("1 2 3 4").is_none());
    }
}
