//! Ethernet II frames.

use super::Mac;
use crate::wire::{Reader, Writer};

/// Longest frame in bytes, without its check sequence: header and an MTU of 1500.
pub const FRAME_MAX: usize = HEADER + 1500;
/// Shortest frame in bytes, likewise.
const FRAME_MIN: usize = 60;
const HEADER: usize = 14;

pub const ARP: u16 = 0x0806;
pub const IPV4: u16 = 0x0800;

#[derive(Debug)]
pub struct Frame<'a> {
    pub destination: Mac,
    pub source: Mac,
    pub kind: u16,
    pub payload: &'a [u8],
}

pub fn parse(bytes: &[u8]) -> Option<Frame<'_>> {
    let mut reader = Reader::new(bytes);
    Some(Frame {
        destination: Mac(reader.array()?),
        source: Mac(reader.array()?),
        kind: reader.u16()?,
        payload: reader.rest(),
    })
}

/// Writes a frame around what `payload` writes, and says how long it is.
pub fn build(
    buffer: &mut [u8],
    [destination, source]: [Mac; 2],
    kind: u16,
    payload: impl FnOnce(&mut [u8]) -> Option<usize>,
) -> Option<usize> {
    let (header, rest) = buffer.split_at_mut_checked(HEADER)?;
    Writer::new(header).bytes(&destination.0)?.bytes(&source.0)?.u16(kind)?;
    let length = payload(rest)?;
    let padding = FRAME_MIN - HEADER;
    if length < padding {
        rest.get_mut(length..padding)?.fill(0);
    }
    Some(HEADER + length.max(padding))
}
