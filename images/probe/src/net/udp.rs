//! UDP datagrams (RFC 768).

use core::net::Ipv4Addr;

use super::ipv4;
use crate::wire::{Reader, Writer, checksum};

const HEADER: usize = 8;

#[derive(Debug)]
pub struct Datagram<'a> {
    pub source_port: u16,
    pub destination_port: u16,
    pub payload: &'a [u8],
}

/// `None` for one that is damaged or shorter than it says.
pub fn parse<'a>(packet: &ipv4::Packet<'a>) -> Option<Datagram<'a>> {
    let mut reader = Reader::new(packet.payload);
    let (source_port, destination_port) = (reader.u16()?, reader.u16()?);
    let length = reader.u16()?;
    let sum = reader.u16()?;
    let bytes = packet.payload.get(..length.into())?;
    let payload = bytes.get(HEADER..)?;
    // Zero: the sender computed none.
    if sum != 0 {
        let pseudo = ipv4::pseudo_header(packet.source, packet.destination, ipv4::UDP, length);
        if checksum(&[&pseudo, bytes]) != 0 {
            return None;
        }
    }
    Some(Datagram { source_port, destination_port, payload })
}

/// Writes a datagram around what `payload` writes, and says how long it is.
pub fn build(
    buffer: &mut [u8],
    [source, destination]: [Ipv4Addr; 2],
    [source_port, destination_port]: [u16; 2],
    payload: impl FnOnce(&mut [u8]) -> Option<usize>,
) -> Option<usize> {
    let length = HEADER + payload(buffer.get_mut(HEADER..)?)?;
    let datagram = buffer.get_mut(..length)?;
    let stated = u16::try_from(length).ok()?;
    Writer::new(datagram).u16(source_port)?.u16(destination_port)?.u16(stated)?.u16(0)?;
    let pseudo = ipv4::pseudo_header(source, destination, ipv4::UDP, stated);
    let sum = match checksum(&[&pseudo, datagram]) {
        0 => 0xffff,
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    Some(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    fn packet(payload: &[u8]) -> ipv4::Packet<'_> {
        ipv4::Packet { source: A, destination: B, protocol: ipv4::UDP, payload }
    }

    proptest! {
        #[test]
        fn what_is_built_is_parsed_and_a_changed_bit_is_seen(data in proptest::collection::vec(any::<u8>(), 0..1400), bit: usize) {
            let mut buffer = vec![0; 1500];
            let length = build(&mut buffer, [A, B], [68, 67], |out| {
                out.get_mut(..data.len())?.copy_from_slice(&data);
                Some(data.len())
            }).unwrap();
            buffer.truncate(length);
            let datagram = packet(&buffer);
            let datagram = parse(&datagram).unwrap();
            prop_assert_eq!((datagram.source_port, datagram.destination_port, datagram.payload), (68, 67, &data[..]));
            let bit = bit % (length * 8);
            let checksum_field = 48..64;
            if !checksum_field.contains(&bit) {
                buffer[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(parse(&packet(&buffer)).is_none());
            }
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&packet(&bytes));
        }
    }
}
