//! A file, or a block device, that holds a disk's sectors as they are.

use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use super::SECTOR;
use crate::devices::virtio::iovec::IoVec;

/// Zeros are written in pieces of this size where the file system has no better way.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Size and block size in bytes.
pub fn measure(mut file: &File) -> io::Result<(u64, u64)> {
    // Seeking also tells the size of a block device.
    let size = file.seek(SeekFrom::End(0))?;
    let block = file.metadata()?.blksize();
    // A file system may name what it likes to transfer at once (megabytes over a network).
    let block = if block.is_power_of_two() { block.clamp(SECTOR, 64 << 10) } else { 4096 };
    Ok((size, block))
}

/// Makes a file longer, by a hole. A block device has the size that its owner gives it.
pub fn grow(file: &File, size: u64) -> io::Result<()> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::Unsupported, "only a regular file can be made longer here"));
    }
    file.set_len(size)?;
    file.sync_data()
}

pub fn read(file: &File, into: &mut IoVec, offset: u64) -> io::Result<()> {
    into.read_exact_at(file.as_raw_fd(), offset)
}

pub fn write(file: &File, from: &mut IoVec, offset: u64) -> io::Result<()> {
    from.write_all_at(file.as_raw_fd(), offset)
}

pub fn discard(file: &File, offset: u64, length: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE, offset, length)
}

pub fn write_zeroes(file: &File, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
    let modes = [libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE];
    for mode in &modes[usize::from(!may_unmap)..] {
        match fallocate(file, *mode, offset, length) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            done => return done,
        }
    }
    let end = offset + length;
    let mut at = offset;
    while at < end {
        let piece = ZEROS.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
        at += write_zeros(file, piece, at)?;
    }
    Ok(())
}

/// Writes zeros, at most `length` of [`ZEROS`]; how many. By the call that all writes are made with, so that no rule of a filter is there for this alone.
fn write_zeros(file: &File, length: usize, offset: u64) -> io::Result<u64> {
    let segment = libc::iovec { iov_base: ZEROS.as_ptr().cast_mut().cast(), iov_len: length };
    // SAFETY: one segment within a constant, which the kernel only reads.
    let count = unsafe { libc::pwritev(file.as_raw_fd(), &segment, 1, offset as i64) };
    match u64::try_from(count) {
        Ok(0) => Err(ErrorKind::WriteZero.into()),
        Ok(count) => Ok(count),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == ErrorKind::Interrupted => Ok(0),
            error => Err(error),
        },
    }
}

/// fallocate(2) that leaves the size as it is.
fn fallocate(file: &File, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
    let number = |value: u64| libc::off_t::try_from(value).map_err(|_| io::Error::from(ErrorKind::InvalidInput));
    let (offset, length) = (number(offset)?, number(length)?);
    loop {
        // SAFETY: numbers and a descriptor that is open for the length of the call.
        let result = unsafe { libc::fallocate(file.as_raw_fd(), mode | libc::FALLOC_FL_KEEP_SIZE, offset, length) };
        let error = io::Error::last_os_error();
        match (result, error.kind()) {
            (0, _) => return Ok(()),
            (_, ErrorKind::Interrupted) => {}
            _ => return Err(error),
        }
    }
}
