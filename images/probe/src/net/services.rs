//! The services on UDP, by their ports.
//!
//! Two hosts that answer each other's answers would do so for ever, and a forged source would set them
//! off. So nothing is answered that comes from one of these ports.

use core::fmt::{self, Write};
use core::net::Ipv4Addr;

use super::{Counters, Host};
use crate::options::Options;
use crate::time::Instant;
use crate::wire::Writer;

/// Sends back what it gets (RFC 862).
pub const ECHO: u16 = 7;
/// Takes and counts what it gets (RFC 863).
pub const DISCARD: u16 = 9;
/// Answers each datagram with the counters. (The port was chargen's, RFC 864.)
pub const STATS: u16 = 19;
/// What the stats service is sent to turn the guest off.
const POWER_OFF: &[u8] = b"poweroff";

/// Which service answers a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    Echo,
    Discard,
    Stats,
    PowerOff,
}

/// The service that a datagram is for.
pub fn find(source_port: u16, destination_port: u16, payload: &[u8], options: &Options) -> Option<Service> {
    if [0, ECHO, DISCARD, STATS].contains(&source_port) {
        return None;
    }
    match destination_port {
        ECHO => Some(Service::Echo),
        DISCARD => Some(Service::Discard),
        STATS if options.may_power_off && payload.trim_ascii_end() == POWER_OFF => Some(Service::PowerOff),
        STATS => Some(Service::Stats),
        _ => None,
    }
}

/// Writes the answer of the stats service: a `name value` on each line.
pub fn write_stats(
    buffer: &mut [u8],
    now: Instant,
    ip: Ipv4Addr,
    counters: &Counters,
    host: &mut impl Host,
) -> Option<usize> {
    let mut writer = Writer::new(buffer);
    write_all(&mut writer, now, ip, counters, host).ok()?;
    Some(writer.len())
}

fn write_all(
    out: &mut dyn Write,
    now: Instant,
    ip: Ipv4Addr,
    counters: &Counters,
    host: &mut impl Host,
) -> fmt::Result {
    writeln!(out, "address {ip}")?;
    writeln!(out, "uptime_us {}", now.micros())?;
    for (name, value) in [
        ("icmp_echoes", counters.icmp_echoes),
        ("udp_echoes", counters.udp_echoes),
        ("udp_discarded", counters.discarded),
        ("udp_discarded_bytes", counters.discarded_bytes),
        ("stats_replies", counters.stats_replies),
        ("arp_replies", counters.arp_replies),
        ("tcp_refusals", counters.tcp_refusals),
        ("malformed", counters.malformed),
        ("ignored", counters.ignored),
    ] {
        writeln!(out, "{name} {value}")?;
    }
    host.statistics(out)
}
