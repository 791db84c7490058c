//! Giving pages of guest memory back to the host.
//!
//! A page that is given back costs nothing until the guest touches it again. What it then finds is zeroes, or, where its
//! memory is a private mapping of a snapshot's file, what the file has; a driver that gives a page up does not
//! count on its content. Either way the advice is MADV_DONTNEED, which drops this VM's own copy. Shared mappings would
//! need MADV_REMOVE instead; there are none, and [`Reclaim::new`] refuses them.
//!
//! Whole host pages only: of a range that the guest names, what covers a page in part stays. A range that is named twice
//! is given back twice, which the kernel does not mind.

use std::io;
use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestMemory;

/// Size of the host's pages, and of a balloon's (virtio 1.2, 5.5.6: VIRTIO_BALLOON_PFN_SHIFT is 12).
pub const PAGE: u64 = 4096;

/// The mappings behind a guest's memory.
pub struct Reclaim {
    mappings: Vec<Mapping>,
    /// What the ranges are in. Held so that they stay mapped.
    _memory: GuestMemory,
}

struct Mapping {
    guest: Range<u64>,
    host: usize,
}

/// The range is not wholly in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfBounds;

impl Reclaim {
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        let mut mappings = Vec::new();
        for region in memory.iter() {
            if region.flags() & libc::MAP_SHARED != 0 {
                return Err(io::Error::other("guest memory is a shared mapping, from which nothing can be given back"));
            }
            let start = region.start_addr().0;
            mappings.push(Mapping { guest: start..start + region.len(), host: region.as_ptr() as usize });
        }
        Ok(Reclaim { mappings, _memory: memory.clone() })
    }

    /// Gives back the whole pages of a guest-physical range; how many bytes that were. The range may span mappings.
    pub fn give_back(&self, range: Range<u64>) -> Result<u64, OutOfBounds> {
        self.check(&range)?;
        let whole = range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE;
        let mut given = 0;
        for mapping in &self.mappings {
            let start = whole.start.max(mapping.guest.start);
            let end = whole.end.min(mapping.guest.end);
            if start < end {
                discard(mapping.host + (start - mapping.guest.start) as usize, (end - start) as usize);
                given += end - start;
            }
        }
        Ok(given)
    }

    /// Every byte of the range must be in a mapping; mappings are in ascending order and do not overlap.
    fn check(&self, range: &Range<u64>) -> Result<(), OutOfBounds> {
        let mut next = range.start;
        for mapping in &self.mappings {
            if mapping.guest.contains(&next) {
                next = mapping.guest.end.min(range.end.max(next));
            }
        }
        if next >= range.end && range.start <= range.end { Ok(()) } else { Err(OutOfBounds) }
    }

    /// Gives back the whole pages of a piece of host memory that is known to be guest memory (an `IoVec`'s segment).
    pub fn give_back_host(&self, start: usize, length: usize) -> Result<u64, OutOfBounds> {
        let mapping = self
            .mappings
            .iter()
            .find(|mapping| {
                (mapping.host..mapping.host + (mapping.guest.end - mapping.guest.start) as usize).contains(&start)
            })
            .ok_or(OutOfBounds)?;
        let guest = mapping.guest.start + (start - mapping.host) as u64;
        self.give_back(guest..guest.checked_add(length as u64).ok_or(OutOfBounds)?)
    }
}

/// Pages of the balloon's queue, as ranges without gaps: sorted, each once.
pub fn coalesce(pages: &mut [u32]) -> impl Iterator<Item = Range<u64>> + '_ {
    pages.sort_unstable();
    let mut rest: &[u32] = pages;
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let mut last = first;
        let count = rest
            .iter()
            .take_while(|page| {
                let joins = **page - last <= 1;
                last = if joins { **page } else { last };
                joins
            })
            .count();
        rest = &rest[count..];
        Some(u64::from(first) * PAGE..(u64::from(last) + 1) * PAGE)
    })
}

fn discard(start: usize, length: usize) {
    // SAFETY: the range is within a mapping of guest memory (`Reclaim::give_back` took it from one), which stays mapped while
    // `Reclaim` holds it, and nothing of ours is in it. The guest gets other content, which is what it asked for.
    let result = unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
    if result != 0 {
        tracing::warn!(error = %io::Error::last_os_error(), "guest memory cannot be given back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> GuestMemory {
        // Two that touch, and one after a hole.
        let ranges = [(0, 0x4000), (0x4000, 0x4000), (0x10_0000, 0x4000)];
        crate::memory::map(&ranges.map(|(start, length)| (GuestAddress(start), length)), None, false).unwrap()
    }

    fn filled() -> GuestMemory {
        let memory = memory();
        for page in [0u64, 1, 2, 3, 4, 5, 6, 7, 0x100, 0x101, 0x102, 0x103] {
            memory.write_slice(&[7; 4096], GuestAddress(page * PAGE)).unwrap();
        }
        memory
    }

    fn is_zero(memory: &GuestMemory, address: u64) -> bool {
        memory.read_obj::<u8>(GuestAddress(address)).unwrap() == 0
    }

    #[test]
    fn whole_pages_are_given_back_across_mappings_and_partial_ones_stay() {
        let memory = filled();
        let reclaim = Reclaim::new(&memory).unwrap();
        assert_eq!(reclaim.give_back(0x2fff..0x6001), Ok(0x3000));
        let zero: Vec<u64> = (0..8).filter(|page| is_zero(&memory, page * PAGE)).collect();
        assert_eq!(zero, [3, 4, 5]);
        assert_eq!(reclaim.give_back(0x2fff..0x6001), Ok(0x3000));
        assert_eq!(reclaim.give_back(0x100..0x200), Ok(0));
    }

    #[test]
    fn ranges_that_reach_out_of_memory_change_nothing() {
        let memory = filled();
        let reclaim = Reclaim::new(&memory).unwrap();
        for range in [0x7000..0x9000, 0x8000..0x9000, 0x7000..0x10_1000, u64::MAX - 1..u64::MAX, 0x10_3000..0x10_5000] {
            assert_eq!(reclaim.give_back(range.clone()), Err(OutOfBounds), "{range:x?}");
        }
        assert!(!is_zero(&memory, 0x7000) && !is_zero(&memory, 0x10_3000));
        #[allow(clippy::reversed_empty_ranges)]
        let backwards = 0x3000..0x1000;
        assert_eq!(reclaim.give_back(backwards), Err(OutOfBounds));
    }

    #[test]
    fn a_private_mapping_of_a_file_shows_the_file_again() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &[9; 0x4000]).unwrap();
        let memory = crate::memory::map(&[(GuestAddress(0), 0x4000)], Some(file), false).unwrap();
        memory.write_slice(&[1; 0x4000], GuestAddress(0)).unwrap();
        Reclaim::new(&memory).unwrap().give_back(0x1000..0x2000).unwrap();
        let at = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!((at(0xfff), at(0x1000), at(0x1fff), at(0x2000)), (1, 9, 9, 1));
    }

    proptest! {
        #[test]
        fn coalesced_ranges_are_the_pages_each_once(mut pages in proptest::collection::vec(0u32..300, 0..400)) {
            let set: BTreeSet<u64> = pages.iter().map(|page| u64::from(*page)).collect();
            let ranges: Vec<_> = coalesce(&mut pages).collect();
            let covered: Vec<u64> = ranges.iter().flat_map(|range| range.start / PAGE..range.end / PAGE).collect();
            prop_assert_eq!(covered, set.into_iter().collect::<Vec<_>>());
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }

        #[test]
        fn no_range_panics(start: u64, length: u64, small: bool) {
            let reclaim = Reclaim::new(&memory()).unwrap();
            let (start, length) = if small { (start % 0x11_0000, length % 0x9000) } else { (start, length) };
            let _ = reclaim.give_back(start..start.saturating_add(length));
        }
    }

    #[test]
    fn the_last_page_number_is_no_overflow() {
        let ranges: Vec<_> = coalesce(&mut [u32::MAX, u32::MAX, 0]).collect();
        assert_eq!(ranges, [0..PAGE, u64::from(u32::MAX) * PAGE..(u64::from(u32::MAX) + 1) * PAGE]);
    }
}
