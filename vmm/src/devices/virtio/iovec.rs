//! Guest buffers as the kernel's `iovec`s, so that a tap or a file reads and writes guest memory with
//! no copy in between.
//!
//! Every segment is checked over its whole range when it is added; after that the pointers stay
//! valid as long as the guest's memory is mapped, which a worker ensures by holding the memory for as long as it runs.

use std::io;
use std::os::fd::RawFd;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::memory::GuestMemory;

/// The kernel's limit for one call (UIO_MAXIOV).
pub const MAX_SEGMENTS: usize = 1024;

/// A list of guest memory segments.
#[derive(Default)]
pub struct IoVec {
    segments: Vec<libc::iovec>,
    length: usize,
}

// SAFETY: the pointers are into guest memory, a mapping shared by all threads for as long as the VM
// lives; nothing thread-local is behind them.
unsafe impl Send for IoVec {}

/// One byte of guest memory.
#[derive(Clone)]
pub struct GuestByte(*mut u8);

// SAFETY: as for `IoVec`.
unsafe impl Send for GuestByte {}

impl GuestByte {
    pub fn write(&self, value: u8) {
        // SAFETY: the byte is the last of a segment that was checked when it was pushed, and the memory is
        // mapped as long as its worker runs.
        unsafe { self.0.write_volatile(value) }
    }
}

/// A segment is outside of guest memory, or there are too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfBounds;

impl IoVec {
    pub fn clear(&mut self) {
        self.segments.clear();
        self.length = 0;
    }

    /// Bytes in all segments.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub fn segments(&self) -> &[libc::iovec] {
        &self.segments
    }

    /// Appends the guest range, which may span regions.
    pub fn push(&mut self, memory: &GuestMemory, address: GuestAddress, length: usize) -> Result<(), OutOfBounds> {
        self.append(memory, address, length, false)
    }

    /// The same for a range that may be written. It counts as changed from now on: what the kernel writes there later tells nobody.
    pub fn push_writable(
        &mut self,
        memory: &GuestMemory,
        address: GuestAddress,
        length: usize,
    ) -> Result<(), OutOfBounds> {
        self.append(memory, address, length, true)
    }

    fn append(
        &mut self,
        memory: &GuestMemory,
        address: GuestAddress,
        length: usize,
        will_change: bool,
    ) -> Result<(), OutOfBounds> {
        for slice in GuestMemoryBackend::get_slices(memory, address, length) {
            let slice = slice.map_err(|_| OutOfBounds)?;
            if will_change {
                slice.bitmap().mark_dirty(0, slice.len());
            }
            if self.segments.len() >= MAX_SEGMENTS {
                return Err(OutOfBounds);
            }
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.segments.push(libc::iovec { iov_base, iov_len: slice.len() });
            self.length += slice.len();
        }
        Ok(())
    }

    /// Appends what `other` has.
    pub fn extend(&mut self, other: &IoVec) {
        self.segments.extend_from_slice(&other.segments);
        self.length += other.length;
    }

    /// Takes `count` bytes (at most all) away from the front.
    pub fn consume(&mut self, count: usize) {
        let mut left = count.min(self.length);
        self.length -= left;
        let mut whole = 0;
        for segment in &mut self.segments {
            if left < segment.iov_len {
                segment.iov_base = segment.iov_base.wrapping_byte_add(left);
                segment.iov_len -= left;
                break;
            }
            left -= segment.iov_len;
            whole += 1;
        }
        self.segments.drain(..whole);
    }

    /// Keeps the first `length` bytes (at most all).
    pub fn truncate(&mut self, length: usize) {
        let mut left = length;
        let mut kept = 0;
        for segment in &mut self.segments {
            if left == 0 {
                break;
            }
            segment.iov_len = segment.iov_len.min(left);
            left -= segment.iov_len;
            kept += 1;
        }
        self.segments.truncate(kept);
        self.length = self.length.min(length);
    }

    /// Takes the last byte away, to be written on its own.
    pub fn pop_byte(&mut self) -> Option<GuestByte> {
        while self.segments.last().is_some_and(|last| last.iov_len == 0) {
            self.segments.pop();
        }
        let last = self.segments.last_mut()?;
        last.iov_len -= 1;
        self.length -= 1;
        Some(GuestByte(last.iov_base.cast::<u8>().wrapping_add(last.iov_len)))
    }

    /// Copies from `offset` on to `bytes`; false, with nothing copied, if that is more than there is.
    pub fn read_at(&self, offset: usize, bytes: &mut [u8]) -> bool {
        let mut done = 0;
        self.for_each_part(offset, bytes.len(), |guest, length| {
            // SAFETY: `guest` has `length` bytes of mapped guest memory (checked when it was pushed), `bytes` has as
            // many left after `done`; guest memory and our own never overlap.
            unsafe { std::ptr::copy_nonoverlapping(guest, bytes.as_mut_ptr().add(done), length) };
            done += length;
        })
    }

    /// Copies `bytes` to `offset` on; false, with nothing copied, if they do not fit.
    pub fn write_at(&self, offset: usize, bytes: &[u8]) -> bool {
        let mut done = 0;
        self.for_each_part(offset, bytes.len(), |guest, length| {
            // SAFETY: as in `read_at`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().add(done), guest, length) };
            done += length;
        })
    }

    fn for_each_part(&self, offset: usize, length: usize, mut f: impl FnMut(*mut u8, usize)) -> bool {
        if offset.checked_add(length).is_none_or(|end| end > self.length) {
            return false;
        }
        let (mut skip, mut left) = (offset, length);
        for segment in &self.segments {
            if left == 0 {
                break;
            }
            if skip >= segment.iov_len {
                skip -= segment.iov_len;
                continue;
            }
            let part = left.min(segment.iov_len - skip);
            f(segment.iov_base.cast::<u8>().wrapping_add(skip), part);
            left -= part;
            skip = 0;
        }
        true
    }

    /// One `readv` from `fd` into the segments.
    pub fn read_from(&self, fd: RawFd) -> io::Result<usize> {
        // SAFETY: each segment is mapped, writable guest memory; there are at most MAX_SEGMENTS (`push`) of them.
        result(unsafe { libc::readv(fd, self.segments.as_ptr(), self.segments.len() as i32) })
    }

    /// One `writev` of the segments to `fd`.
    pub fn write_to(&self, fd: RawFd) -> io::Result<usize> {
        // SAFETY: as in `read_from`; the kernel only reads.
        result(unsafe { libc::writev(fd, self.segments.as_ptr(), self.segments.len() as i32) })
    }

    /// Fills all segments from `fd` at `offset`. Consumes the list.
    pub fn read_exact_at(&mut self, fd: RawFd, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            // SAFETY: as in `read_from`.
            let count =
                result(unsafe { libc::preadv(fd, self.segments.as_ptr(), self.segments.len() as i32, offset as i64) });
            offset += self.progress(count)?;
        }
        Ok(())
    }

    /// Writes all segments to `fd` at `offset`. Consumes the list.
    pub fn write_all_at(&mut self, fd: RawFd, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            // SAFETY: as in `write_to`.
            let count =
                result(unsafe { libc::pwritev(fd, self.segments.as_ptr(), self.segments.len() as i32, offset as i64) });
            offset += self.progress(count)?;
        }
        Ok(())
    }

    fn progress(&mut self, count: io::Result<usize>) -> io::Result<u64> {
        match count {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.consume(count);
                Ok(count as u64)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(error) => Err(error),
        }
    }
}

fn result(count: isize) -> io::Result<usize> {
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    fn memory() -> GuestMemory {
        // Two regions that touch, so that ranges may span them, and a hole after them.
        crate::memory::map(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)], None, true).unwrap()
    }

    #[test]
    fn a_range_may_span_regions_but_not_reach_into_a_hole() {
        let memory = memory();
        let mut vector = IoVec::default();
        vector.push(&memory, GuestAddress(0xff0), 0x20).unwrap();
        assert_eq!((vector.segments().len(), vector.len()), (2, 0x20));
        assert_eq!(vector.push(&memory, GuestAddress(0x1ff0), 0x11), Err(OutOfBounds));
        assert_eq!(vector.push(&memory, GuestAddress(u64::MAX), 2), Err(OutOfBounds));
    }

    #[test]
    fn only_what_may_be_written_counts_as_changed() {
        let memory = memory();
        let changed = || -> Vec<bool> {
            memory.iter().map(|region| crate::memory::bitmap(region).unwrap().is_addr_set(0)).collect()
        };
        let mut vector = IoVec::default();
        vector.push(&memory, GuestAddress(0xff0), 0x20).unwrap();
        assert_eq!(changed(), [false, false]);
        vector.push_writable(&memory, GuestAddress(0x1000), 1).unwrap();
        assert_eq!(changed(), [false, true]);
        vector.push_writable(&memory, GuestAddress(0xfff), 2).unwrap();
        assert_eq!(changed(), [true, true]);
    }

    proptest! {
        #[test]
        fn it_behaves_as_one_flat_buffer(
            parts in proptest::collection::vec((0u64..0x1f00, 0usize..0x100), 1..20),
            front in 0usize..2000, back in 0usize..300, kept in 0usize..3000, offset in 0usize..500, length in 0usize..500,
        ) {
            let memory = memory();
            let content: Vec<u8> = (0..0x2000u32).map(|i| (i * 7 % 251) as u8).collect();
            memory.write_slice(&content, GuestAddress(0)).unwrap();
            let mut vector = IoVec::default();
            let mut flat = Vec::new();
            for (address, length) in parts {
                vector.push(&memory, GuestAddress(address), length).unwrap();
                flat.extend_from_slice(&content[address as usize..][..length]);
            }
            vector.consume(front);
            flat.drain(..front.min(flat.len()));
            for _ in 0..back {
                prop_assert_eq!(vector.pop_byte().is_some(), flat.pop().is_some());
            }
            vector.truncate(kept);
            flat.truncate(kept);
            prop_assert_eq!(vector.len(), flat.len());
            let mut read = vec![0; length];
            prop_assert_eq!(vector.read_at(offset, &mut read), offset + length <= flat.len());
            if offset + length <= flat.len() {
                prop_assert_eq!(&read[..], &flat[offset..offset + length]);
            }
        }
    }
}
