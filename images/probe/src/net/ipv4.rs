//! IPv4 (RFC 791) without options sent and without reassembly: a fragment is not for the probe.

use core::net::Ipv4Addr;

use crate::wire::{Reader, Writer, checksum};

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

const HEADER: usize = 20;
const VERSION_4: u8 = 4;
const DO_NOT_FRAGMENT: u16 = 1 << 14;
/// More fragments follow, or this is not the first.
const FRAGMENT: u16 = 1 << 13 | 0x1fff;
const TIME_TO_LIVE: u8 = 64;

#[derive(Debug)]
pub struct Packet<'a> {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub protocol: u8,
    pub payload: &'a [u8],
}

#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    Malformed,
    Fragment,
}

pub fn parse(bytes: &[u8]) -> Result<Packet<'_>, Refusal> {
    let first = bytes.first().ok_or(Refusal::Malformed)?;
    let header_length = usize::from(first & 0xf) * 4;
    if first >> 4 != VERSION_4 || header_length < HEADER {
        return Err(Refusal::Malformed);
    }
    let header = bytes.get(..header_length).ok_or(Refusal::Malformed)?;
    if checksum(&[header]) != 0 {
        return Err(Refusal::Malformed);
    }
    fields(bytes, header_length).ok_or(Refusal::Malformed)?
}

fn fields(bytes: &[u8], header_length: usize) -> Option<Result<Packet<'_>, Refusal>> {
    let mut reader = Reader::new(bytes);
    reader.u16()?;
    let total_length = usize::from(reader.u16()?);
    reader.u16()?;
    let fragment = reader.u16()?;
    reader.u8()?;
    let protocol = reader.u8()?;
    reader.u16()?;
    let source = Ipv4Addr::from(reader.array::<4>()?);
    let destination = Ipv4Addr::from(reader.array::<4>()?);
    // What lies behind the packet is the frame's padding.
    let payload = bytes.get(header_length..total_length)?;
    if fragment & FRAGMENT != 0 {
        return Some(Err(Refusal::Fragment));
    }
    Some(Ok(Packet { source, destination, protocol, payload }))
}

/// Whether a packet from `source` may be answered: it can be one station's address.
pub fn is_station(source: Ipv4Addr) -> bool {
    !(source.is_unspecified() || source.is_broadcast() || source.is_multicast() || source.is_loopback())
}

/// Writes a packet around what `payload` writes, and says how long it is.
pub fn build(
    buffer: &mut [u8],
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    payload: impl FnOnce(&mut [u8]) -> Option<usize>,
) -> Option<usize> {
    let (header, rest) = buffer.split_at_mut_checked(HEADER)?;
    let total_length = HEADER + payload(rest)?;
    let mut writer = Writer::new(header);
    writer
        .u8(VERSION_4 << 4 | (HEADER / 4) as u8)?
        .u8(0)?
        .u16(u16::try_from(total_length).ok()?)?
        // Never fragmented, so the identification means nothing (RFC 6864, 4.1).
        .u16(0)?
        .u16(DO_NOT_FRAGMENT)?
        .u8(TIME_TO_LIVE)?
        .u8(protocol)?
        .u16(0)?
        .bytes(&source.octets())?
        .bytes(&destination.octets())?;
    let sum = checksum(&[header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    Some(total_length)
}

/// What UDP's and TCP's checksums cover beside the segment (RFC 768; RFC 9293, 3.1).
pub fn pseudo_header(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, length: u16) -> [u8; 12] {
    let ([a, b, c, d], [e, f, g, h], [i, j]) = (source.octets(), destination.octets(), length.to_be_bytes());
    [a, b, c, d, e, f, g, h, 0, protocol, i, j]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    fn packet(payload: &[u8]) -> Vec<u8> {
        let mut buffer = vec![0; 1500];
        let length = build(&mut buffer, A, B, UDP, |out| {
            out.get_mut(..payload.len())?.copy_from_slice(payload);
            Some(payload.len())
        });
        buffer.truncate(length.unwrap());
        buffer
    }

    #[test]
    fn padding_is_not_payload() {
        let mut bytes = packet(b"abc");
        bytes.resize(46, 0);
        let packet = parse(&bytes).unwrap();
        assert_eq!((packet.source, packet.destination, packet.protocol), (A, B, UDP));
        assert_eq!(packet.payload, b"abc");
    }

    #[test]
    fn a_length_beyond_the_frame_is_refused() {
        let bytes = packet(&[7; 100]);
        assert_eq!(parse(&bytes[..119]).unwrap_err(), Refusal::Malformed);
    }

    #[test]
    fn a_fragment_is_told_apart() {
        let mut bytes = packet(b"abc");
        bytes[6] |= 0x20;
        bytes[10..12].fill(0);
        let sum = checksum(&[&bytes[..20]]);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(parse(&bytes).unwrap_err(), Refusal::Fragment);
    }

    proptest! {
        #[test]
        fn any_changed_bit_of_the_header_is_seen(bit in 0usize..160) {
            let mut bytes = packet(b"abc");
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(parse(&bytes).unwrap_err(), Refusal::Malformed);
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(&bytes);
        }
    }
}
