//! What a guest says of its memory (virtio 1.2, 5.5.6.3): pairs of a tag and a number. They are the guest's words, shown to whoever
//! asks and used for nothing.

use super::super::iovec::IoVec;
use crate::api::BalloonStatistics;

/// A tag (le16) and a value (le64), without padding.
const PAIR: usize = 10;
/// A buffer with more pairs than this is read as far as that.
const MAX_PAIRS: usize = 64;

/// Takes the numbers that `buffer` has into `statistics`. Tags that mean nothing here are left out.
pub fn read(buffer: &IoVec, statistics: &mut BalloonStatistics) {
    let mut pair = [0; PAIR];
    for index in 0..(buffer.len() / PAIR).min(MAX_PAIRS) {
        if buffer.read_at(index * PAIR, &mut pair) {
            let tag = u16::from_le_bytes([pair[0], pair[1]]);
            let value = pair[2..].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            if let Some(member) = member(statistics, tag) {
                *member = Some(value);
            }
        }
    }
}

/// VIRTIO_BALLOON_S_* (virtio 1.2, 5.5.6.4, and those that Linux added since).
fn member(statistics: &mut BalloonStatistics, tag: u16) -> Option<&mut Option<u64>> {
    Some(match tag {
        0 => &mut statistics.swap_in,
        1 => &mut statistics.swap_out,
        2 => &mut statistics.major_faults,
        3 => &mut statistics.minor_faults,
        4 => &mut statistics.free_memory,
        5 => &mut statistics.total_memory,
        6 => &mut statistics.available_memory,
        7 => &mut statistics.disk_caches,
        8 => &mut statistics.hugetlb_allocations,
        9 => &mut statistics.hugetlb_failures,
        10 => &mut statistics.oom_kill,
        11 => &mut statistics.alloc_stall,
        12 => &mut statistics.async_scan,
        13 => &mut statistics.direct_scan,
        14 => &mut statistics.async_reclaim,
        15 => &mut statistics.direct_reclaim,
        _ => return None,
    })
}
