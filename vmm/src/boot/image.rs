//! A kernel's file as the loaders read it.
//!
//! They go to each header by itself and read it by itself, two system calls for some 50 bytes. All the headers are in the
//! file's first page, as a rule; so that is read once and answered from, and what is elsewhere is read where it is,
//! with a position that the kernel need not be told of.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Bytes that are read at the beginning.
const HEAD: usize = 4096;

pub struct Image {
    file: File,
    size: u64,
    head: Vec<u8>,
    position: u64,
}

impl Image {
    /// `size` is the file's, which a seek to its end believes.
    pub fn new(file: File, size: u64) -> io::Result<Self> {
        let mut head = vec![0; HEAD];
        let mut filled = 0;
        while filled < HEAD.min(usize::try_from(size).unwrap_or(HEAD)) {
            match file.read_at(&mut head[filled..], filled as u64)? {
                0 => break,
                count => filled += count,
            }
        }
        head.truncate(filled);
        Ok(Image { file, size, head, position: 0 })
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file's first bytes: all of it, or a page.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// What of the head is at the position and after.
    fn rest_of_head(&self) -> &[u8] {
        usize::try_from(self.position).ok().and_then(|position| self.head.get(position..)).unwrap_or_default()
    }
}

impl Read for Image {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = match self.rest_of_head().read(buffer)? {
            0 => self.file.read_at(buffer, self.position)?,
            count => count,
        };
        self.position += count as u64;
        Ok(count)
    }
}

impl ReadVolatile for Image {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        // Not in two parts: guest memory takes one read for all there is (`read_exact_volatile_from`).
        let mut head = self.rest_of_head();
        let count = match buffer.len() <= head.len() {
            true => head.read_volatile(buffer)?,
            false => read_at(&self.file, buffer, self.position).map_err(VolatileMemoryError::IOError)?,
        };
        self.position += count as u64;
        Ok(count)
    }
}

/// As `FileExt::read_at`, into memory that others may change.
fn read_at<B: BitmapSlice>(file: &File, buffer: &mut VolatileSlice<B>, position: u64) -> io::Result<usize> {
    let offset = libc::off_t::try_from(position).map_err(|_| io::ErrorKind::InvalidInput)?;
    let guard = buffer.ptr_guard_mut();
    // SAFETY: the kernel writes at most `len` bytes to the slice, which is valid memory while the guard is there.
    let count = unsafe { libc::pread(file.as_raw_fd(), guard.as_ptr().cast(), buffer.len(), offset) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    buffer.bitmap().mark_dirty(0, count);
    Ok(count)
}

impl Seek for Image {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, offset) = match to {
            SeekFrom::Start(position) => (position, 0),
            SeekFrom::Current(offset) => (self.position, offset),
            SeekFrom::End(offset) => (self.size, offset),
        };
        self.position = base.checked_add_signed(offset).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Cursor, Write};

    proptest! {
        #[test]
        fn it_reads_as_the_file_does(
            length in 0usize..3 * HEAD,
            steps in proptest::collection::vec((0u64..4 * HEAD as u64, 0usize..2 * HEAD, any::<bool>()), 0..20),
        ) {
            let content: Vec<u8> = (0..length).map(|n| n as u8 ^ (n >> 8) as u8).collect();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&content).unwrap();
            let mut image = Image::new(file, length as u64).unwrap();
            let mut expected = Cursor::new(content);
            for (position, count, from_end) in steps {
                let to = if from_end { SeekFrom::End(-(position.min(length as u64) as i64)) } else { SeekFrom::Start(position) };
                prop_assert_eq!(image.seek(to).unwrap(), expected.seek(to).unwrap());
                let (mut got, mut wanted) = (Vec::new(), Vec::new());
                image.by_ref().take(count as u64).read_to_end(&mut got).unwrap();
                Read::by_ref(&mut expected).take(count as u64).read_to_end(&mut wanted).unwrap();
                prop_assert_eq!(&got, &wanted);
                prop_assert_eq!(image.stream_position().unwrap(), expected.stream_position().unwrap());
                let mut volatile = vec![0; count];
                image.seek(to).unwrap();
                let read = image.read_volatile(&mut VolatileSlice::from(&mut volatile[..])).unwrap();
                prop_assert_eq!(&volatile[..read], &wanted[..]);
            }
        }
    }
}
