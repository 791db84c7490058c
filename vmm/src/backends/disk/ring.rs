//! io_uring on one raw file: the kernel works on many requests at once, and says through a descriptor that can be waited for
//! which of them are done.
//!
//! A ring can do more than any system call filter sees, since what is submitted lies in memory. So the ring itself is restricted when it is
//! made, before there is a guest: it reads, writes and syncs the one file that was registered with it, and nothing
//! else (io_uring_register(2), IORING_REGISTER_RESTRICTIONS; Linux 5.10).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};

/// IORING_REGISTER_FILES_UPDATE (include/uapi/linux/io_uring.h).
const REGISTER_FILES_UPDATE: u8 = 6;
/// Index of the one registered file.
const FILE: types::Fixed = types::Fixed(0);

pub struct Ring(IoUring);

impl Ring {
    /// For at most `entries` requests at once.
    pub fn new(file: &File, entries: u32) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(entries)?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        let codes = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
        let mut restrictions: Vec<_> = codes.into_iter().map(Restriction::sqe_op).collect();
        restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
        restrictions.push(Restriction::register_op(REGISTER_FILES_UPDATE));
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        Ok(Ring(ring))
    }

    /// Puts another file in the place of the present one. Nothing may be under way.
    pub fn set_file(&self, file: &File) -> io::Result<()> {
        self.0.submitter().register_files_update(0, &[file.as_raw_fd()]).map(drop)
    }

    /// Readable when something is done.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Adds a read, to be told of under `token`.
    ///
    /// # Safety
    /// What the segments point to stays mapped until the request is done.
    pub unsafe fn read(&mut self, token: u64, segments: &[libc::iovec], offset: u64) -> io::Result<()> {
        let entry = opcode::Readv::new(FILE, segments.as_ptr(), segments.len() as u32).offset(offset);
        self.push(entry.build().user_data(token))
    }

    /// Adds a write, likewise.
    ///
    /// # Safety
    /// As for [`Self::read`].
    pub unsafe fn write(&mut self, token: u64, segments: &[libc::iovec], offset: u64) -> io::Result<()> {
        let entry = opcode::Writev::new(FILE, segments.as_ptr(), segments.len() as u32).offset(offset);
        self.push(entry.build().user_data(token))
    }

    /// Adds a sync of the file's data.
    pub fn sync(&mut self, token: u64) -> io::Result<()> {
        let entry = opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC);
        self.push(entry.build().user_data(token))
    }

    fn push(&mut self, entry: Entry) -> io::Result<()> {
        if self.0.submission().is_full() {
            self.submit(0)?;
        }
        // SAFETY: the segments' memory is the callers' promise; the list of them need only last until it is submitted, which is before
        // anything else is done with it (IORING_FEAT_SUBMIT_STABLE, older than the restrictions without which there is no ring).
        unsafe { self.0.submission().push(&entry) }.map_err(io::Error::other)
    }

    /// Hands over what was added, and waits until at least `wanted` requests are done.
    pub fn submit(&mut self, wanted: usize) -> io::Result<()> {
        if wanted == 0 && self.0.submission().is_empty() {
            return Ok(());
        }
        loop {
            match self.0.submit_and_wait(wanted) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }

    /// The next request that is done: its token, and how many bytes were moved.
    pub fn next(&mut self) -> Option<(u64, io::Result<u32>)> {
        let done = self.0.completion().next()?;
        let result = u32::try_from(done.result()).map_err(|_| io::Error::from_raw_os_error(-done.result()));
        Some((done.user_data(), result))
    }
}
