//! TCP segments (RFC 9293, section 3.1).

use core::net::Ipv4Addr;

use super::ipv4;
use crate::wire::{Reader, Writer, checksum};

const HEADER: usize = 20;
/// Option "maximum segment size".
const MSS: [u8; 2] = [2, 4];
/// What a packet of 1500 bytes leaves for data.
const MSS_VALUE: u16 = 1460;

/// The control bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(pub u8);

impl Flags {
    pub const FIN: Flags = Flags(1);
    pub const SYN: Flags = Flags(2);
    pub const RST: Flags = Flags(4);
    pub const PSH: Flags = Flags(8);
    pub const ACK: Flags = Flags(16);

    pub const fn has(self, flag: Flags) -> bool {
        self.0 & flag.0 != 0
    }

    pub const fn with(self, flag: Flags) -> Flags {
        Flags(self.0 | flag.0)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    pub source_port: u16,
    pub destination_port: u16,
    pub sequence: u32,
    pub acknowledgment: u32,
    pub flags: Flags,
    pub payload: &'a [u8],
}

impl Segment<'_> {
    /// How far the segment moves the sequence number on.
    pub fn length(&self) -> u32 {
        // A payload is at most 64 KiB.
        self.payload.len() as u32 + u32::from(self.flags.has(Flags::SYN)) + u32::from(self.flags.has(Flags::FIN))
    }
}

/// `None` for one that is damaged.
pub fn parse<'a>(packet: &ipv4::Packet<'a>) -> Option<Segment<'a>> {
    let bytes = packet.payload;
    let pseudo = ipv4::pseudo_header(packet.source, packet.destination, ipv4::TCP, u16::try_from(bytes.len()).ok()?);
    if checksum(&[&pseudo, bytes]) != 0 {
        return None;
    }
    let mut reader = Reader::new(bytes);
    let (source_port, destination_port) = (reader.u16()?, reader.u16()?);
    let (sequence, acknowledgment) = (reader.u32()?, reader.u32()?);
    let header_length = usize::from(reader.u8()? >> 4) * 4;
    let flags = Flags(reader.u8()?);
    let payload = bytes.get(header_length.max(HEADER)..)?;
    Some(Segment { source_port, destination_port, sequence, acknowledgment, flags, payload })
}

pub fn build(
    buffer: &mut [u8],
    [source, destination]: [Ipv4Addr; 2],
    window: u16,
    segment: &Segment<'_>,
) -> Option<usize> {
    let options = if segment.flags.has(Flags::SYN) { 4 } else { 0 };
    let mut writer = Writer::new(buffer);
    writer
        .u16(segment.source_port)?
        .u16(segment.destination_port)?
        .u32(segment.sequence)?
        .u32(segment.acknowledgment)?
        .u8((((HEADER + options) / 4) << 4) as u8)?
        .u8(segment.flags.0)?
        .u16(window)?
        // Checksum, urgent pointer.
        .u32(0)?;
    if options > 0 {
        writer.bytes(&MSS)?.u16(MSS_VALUE)?;
    }
    writer.bytes(segment.payload)?;
    let length = writer.len();
    let bytes = buffer.get_mut(..length)?;
    let pseudo = ipv4::pseudo_header(source, destination, ipv4::TCP, u16::try_from(length).ok()?);
    let sum = checksum(&[&pseudo, bytes]);
    bytes[16..18].copy_from_slice(&sum.to_be_bytes());
    Some(length)
}

/// The answer to a segment that belongs to no connection (RFC 9293, 3.5.2), unless it is a reset itself.
pub fn refusal<'a>(segment: &Segment<'_>) -> Option<Segment<'a>> {
    if segment.flags.has(Flags::RST) {
        return None;
    }
    let (sequence, acknowledgment, flags) = if segment.flags.has(Flags::ACK) {
        (segment.acknowledgment, 0, Flags::RST)
    } else {
        (0, segment.sequence.wrapping_add(segment.length()), Flags::RST.with(Flags::ACK))
    };
    Some(Segment {
        source_port: segment.destination_port,
        destination_port: segment.source_port,
        sequence,
        acknowledgment,
        flags,
        payload: &[],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    fn packet(payload: &[u8]) -> ipv4::Packet<'_> {
        ipv4::Packet { source: A, destination: B, protocol: ipv4::TCP, payload }
    }

    #[test]
    fn a_refusal_of_a_syn_acknowledges_it() {
        let syn = Segment {
            source_port: 1,
            destination_port: 2,
            sequence: u32::MAX,
            acknowledgment: 0,
            flags: Flags::SYN,
            payload: &[],
        };
        let refused = refusal(&syn).unwrap();
        assert_eq!((refused.source_port, refused.destination_port, refused.acknowledgment), (2, 1, 0));
        assert!(refusal(&refused).is_none());
    }

    proptest! {
        #[test]
        fn what_is_built_is_parsed_and_a_changed_bit_is_seen(data in proptest::collection::vec(any::<u8>(), 0..1400), flags in 0u8..32, bit: usize) {
            let segment = Segment { source_port: 5, destination_port: 80, sequence: 7, acknowledgment: 9, flags: Flags(flags), payload: &data };
            let mut buffer = vec![0; 1500];
            let length = build(&mut buffer, [A, B], 1000, &segment).unwrap();
            buffer.truncate(length);
            let parsed = packet(&buffer);
            let parsed = parse(&parsed).unwrap();
            prop_assert_eq!((parsed.sequence, parsed.acknowledgment, parsed.flags, parsed.payload), (7, 9, Flags(flags), &data[..]));
            let bit = bit % (length * 8);
            buffer[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(parse(&packet(&buffer)).is_none());
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 18..64)) {
            bytes[16..18].fill(0);
            let pseudo = ipv4::pseudo_header(A, B, ipv4::TCP, bytes.len() as u16);
            let sum = checksum(&[&pseudo, &bytes]);
            bytes[16..18].copy_from_slice(&sum.to_be_bytes());
            let _ = parse(&packet(&bytes));
        }
    }
}
