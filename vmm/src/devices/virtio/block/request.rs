//! What a driver asks of a disk (virtio 1.2, 5.2.6), read from its buffers and checked.
//!
//! A request that cannot be told apart from noise (no header, no place for a status) breaks the queue. One that can, and asks for
//! what is not there or not allowed, gets a status that says so. What passes is within the disk over its whole range.

use std::io;
use std::ops::Range;

use virtio_bindings::virtio_blk::*;

use super::super::iovec::GuestByte;
use super::super::queue::{Broken, Chain};
use crate::backends::disk::SECTOR;

/// Type, reserved, sector.
pub const HEADER: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const SEGMENT: usize = 16;
/// `unmap`, the one flag that there is.
const UNMAP: u32 = 1;
/// Most bytes of a read or write. Drivers stay far below (Linux at some megabytes); one request is not to keep all others waiting.
const MAX_TRANSFER: usize = 1 << 30;
/// Most sectors of a discard (1 GiB) and a write of zeros (64 MiB), which may have to be written.
pub const MAX_DISCARD: u32 = 1 << 21;
pub const MAX_WRITE_ZEROES: u32 = 1 << 17;

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub sectors: u64,
    pub is_read_only: bool,
}

/// Offsets and ranges are in bytes. Data is what the chain has left: to be filled by a read, to be taken by a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    Identify,
    Discard(Range<u64>),
    WriteZeroes { range: Range<u64>, may_unmap: bool },
}

/// Why a request is not served.
#[derive(Debug)]
pub enum Refusal {
    /// The driver asks for what is not offered.
    Unsupported,
    /// It may not ask for this.
    Invalid,
    /// The host has failed.
    Failed(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::Unsupported => Refusal::Unsupported,
            _ => Refusal::Failed(error),
        }
    }
}

/// Takes header and status off the chain. The status is to be written whatever becomes of the request.
pub fn parse(chain: &mut Chain, bounds: Bounds) -> Result<(Result<Operation, Refusal>, GuestByte), Broken> {
    let mut header = [0; HEADER];
    if !chain.readable.read_at(0, &mut header) {
        return Err(Broken("block request without a header"));
    }
    chain.readable.consume(HEADER);
    let Some(status) = chain.writable.pop_byte() else {
        return Err(Broken("block request without a place for its status"));
    };
    Ok((operation(number(&header[..4]) as u32, number(&header[8..]), chain, bounds), status))
}

fn operation(kind: u32, sector: u64, chain: &Chain, bounds: Bounds) -> Result<Operation, Refusal> {
    match kind {
        VIRTIO_BLK_T_IN => Ok(Operation::Read { offset: transfer(sector, chain.writable.len(), bounds)? }),
        VIRTIO_BLK_T_OUT => {
            refuse_change(bounds)?;
            Ok(Operation::Write { offset: transfer(sector, chain.readable.len(), bounds)? })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Operation::Identify),
        VIRTIO_BLK_T_DISCARD => {
            let (range, flags) = segment(chain, bounds, MAX_DISCARD)?;
            match flags {
                0 => Ok(Operation::Discard(range)),
                _ => Err(Refusal::Unsupported),
            }
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            let (range, flags) = segment(chain, bounds, MAX_WRITE_ZEROES)?;
            match flags {
                0 | UNMAP => Ok(Operation::WriteZeroes { range, may_unmap: flags == UNMAP }),
                _ => Err(Refusal::Unsupported),
            }
        }
        _ => Err(Refusal::Unsupported),
    }
}

fn refuse_change(bounds: Bounds) -> Result<(), Refusal> {
    match bounds.is_read_only {
        true => Err(Refusal::Invalid),
        false => Ok(()),
    }
}

/// Offset of a transfer of whole sectors.
fn transfer(sector: u64, length: usize, bounds: Bounds) -> Result<u64, Refusal> {
    let bytes = length as u64;
    if length > MAX_TRANSFER || !bytes.is_multiple_of(SECTOR) {
        return Err(Refusal::Invalid);
    }
    Ok(within(sector, bytes / SECTOR, bounds)?.start)
}

/// The one segment of a discard or a write of zeros (the device says that it takes no more), and its flags.
fn segment(chain: &Chain, bounds: Bounds, most: u32) -> Result<(Range<u64>, u32), Refusal> {
    refuse_change(bounds)?;
    let mut bytes = [0; SEGMENT];
    if chain.readable.len() != SEGMENT || !chain.readable.read_at(0, &mut bytes) {
        return Err(Refusal::Invalid);
    }
    let sectors = number(&bytes[8..12]);
    if sectors > most.into() {
        return Err(Refusal::Invalid);
    }
    Ok((within(number(&bytes[..8]), sectors, bounds)?, number(&bytes[12..]) as u32))
}

/// The range in bytes, if it lies wholly within the disk.
fn within(sector: u64, sectors: u64, bounds: Bounds) -> Result<Range<u64>, Refusal> {
    match sector.checked_add(sectors) {
        Some(end) if end <= bounds.sectors => Ok(sector * SECTOR..end * SECTOR),
        _ => Err(Refusal::Invalid),
    }
}

/// Little-endian, up to eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::queue::testing::{Buffer, memory, queue_with};
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    const BOUNDS: Bounds = Bounds { sectors: 100, is_read_only: false };

    /// Parses a request whose header and data are `bytes`, cut as `cuts` says, with `writable` bytes and a status behind them.
    fn parsed(bytes: &[u8], cuts: &[u32], writable: u32, bounds: Bounds) -> Result<Result<Operation, Refusal>, Broken> {
        let memory = memory();
        memory.write_slice(bytes, GuestAddress(0x8000)).unwrap();
        let mut buffers: Vec<Buffer> = Vec::new();
        let mut at = 0;
        for cut in cuts.iter().copied().chain([bytes.len() as u32]) {
            let end = cut.min(bytes.len() as u32).max(at);
            buffers.push((0x8000 + u64::from(at), end - at, false));
            at = end;
        }
        buffers.push((0x4_0000, writable, true));
        buffers.push((0xf_0000, 1, true));
        let mut queue = queue_with(&memory, &[&buffers]);
        let mut chain = Chain::default();
        queue.pop(&mut chain)?;
        parse(&mut chain, bounds).map(|(operation, _)| operation)
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    fn ranged(kind: u32, sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [&header(kind, 7)[..], &sector.to_le_bytes(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    fn ranged_on(bounds: Bounds, kind: u32, sector: u64, sectors: u32, flags: u32) -> Result<Operation, Refusal> {
        parsed(&ranged(kind, sector, sectors, flags), &[20], 0, bounds).unwrap()
    }

    #[test]
    fn ranges_are_read_from_the_data_wherever_it_is_cut() {
        let discard = ranged_on(BOUNDS, VIRTIO_BLK_T_DISCARD, 90, 10, 0).unwrap();
        assert_eq!(discard, Operation::Discard(90 * 512..100 * 512));
        for may_unmap in [false, true] {
            let zeroes = ranged_on(BOUNDS, VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, may_unmap.into()).unwrap();
            assert_eq!(zeroes, Operation::WriteZeroes { range: 0..512, may_unmap });
        }
    }

    #[test]
    fn flags_that_are_not_known_are_unsupported() {
        for (kind, flags) in [(VIRTIO_BLK_T_DISCARD, 1), (VIRTIO_BLK_T_DISCARD, 2), (VIRTIO_BLK_T_WRITE_ZEROES, 2)] {
            assert!(matches!(ranged_on(BOUNDS, kind, 0, 1, flags), Err(Refusal::Unsupported)));
        }
    }

    #[test]
    fn ranges_past_the_end_too_long_or_several_at_once_fail() {
        let large = Bounds { sectors: u64::MAX / 512, is_read_only: false };
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            for (sector, sectors) in [(100, 1), (99, 2), (u64::MAX, 1), (u64::MAX - 1, 2), (0, 101)] {
                assert!(matches!(ranged_on(BOUNDS, kind, sector, sectors, 0), Err(Refusal::Invalid)), "{sector}");
            }
            assert!(matches!(ranged_on(large, kind, 0, MAX_DISCARD + 1, 0), Err(Refusal::Invalid)));
            let twice = [ranged(kind, 0, 1, 0), vec![0; 16]].concat();
            assert!(matches!(parsed(&twice, &[], 0, BOUNDS).unwrap(), Err(Refusal::Invalid)));
            assert!(matches!(parsed(&header(kind, 0), &[], 0, BOUNDS).unwrap(), Err(Refusal::Invalid)));
        }
    }

    #[test]
    fn nothing_changes_a_disk_that_is_read_only() {
        let bounds = Bounds { is_read_only: true, ..BOUNDS };
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert!(matches!(ranged_on(bounds, kind, 0, 1, 0), Err(Refusal::Invalid)));
        }
        let write = [header(VIRTIO_BLK_T_OUT, 0), vec![0; 512]].concat();
        assert!(matches!(parsed(&write, &[], 0, bounds).unwrap(), Err(Refusal::Invalid)));
        assert_eq!(
            parsed(&header(VIRTIO_BLK_T_IN, 3), &[], 512, bounds).unwrap().unwrap(),
            Operation::Read { offset: 3 * 512 }
        );
    }

    #[test]
    fn without_a_header_there_is_no_request() {
        assert!(parsed(&[0; 15], &[], 0, BOUNDS).is_err());
    }

    proptest! {
        /// Whatever is asked for: what passes lies within the disk, and its data is as long as its range.
        #[test]
        fn what_passes_lies_within_the_disk(
            kind in prop_oneof![0u32..14, any::<u32>()], sector in prop_oneof![0u64..110, any::<u64>()],
            other in prop_oneof![0u64..110, any::<u64>()], count in prop_oneof![0u32..110, any::<u32>()],
            flags in 0u32..3, data in 0usize..3000, cuts in proptest::collection::vec(0u32..64, 0..6),
            writable in 0u32..60_000, is_read_only: bool,
        ) {
            let mut bytes = header(kind, sector);
            bytes.extend(ranged(0, other, count, flags).drain(16..));
            bytes.resize(HEADER + data.min(2048), 0);
            let mut cuts = cuts;
            cuts.sort_unstable();
            let bounds = Bounds { is_read_only, ..BOUNDS };
            let Ok(Ok(operation)) = parsed(&bytes, &cuts, writable, bounds) else { return Ok(()) };
            let end = bounds.sectors * SECTOR;
            match operation {
                Operation::Read { offset } => prop_assert!(offset + u64::from(writable) <= end),
                Operation::Write { offset } => prop_assert!(!is_read_only && offset + data.min(2048) as u64 <= end),
                Operation::Discard(range) | Operation::WriteZeroes { range, .. } => {
                    prop_assert!(!is_read_only && range.start <= range.end && range.end <= end);
                }
                Operation::Flush | Operation::Identify => {}
            }
        }
    }
}
