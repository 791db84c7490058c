//! The root disk: a copy-on-write child of the cached image.
//!
//! On file systems with reflinks (XFS, Btrfs, bcachefs) the disk shares the image's blocks (ioctl
//! `FICLONE`, ioctl_ficlonerange(2)) and making it takes the same microseconds for any size. On
//! others the image's data, not its holes, is copied inside the kernel. A qcow2 child on the cached
//! image, which the VMM serves, would spare those the copy; then the image must stay as long as its children do.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// How a disk came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// It was there from an earlier start.
    Kept,
    /// Shares the image's blocks.
    Reflinked,
    /// The image's data was copied.
    Copied,
}

impl Made {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Reflinked => "reflink",
            Self::Copied => "copy",
        }
    }
}

/// Makes the disk at `target` from `image`, `size` bytes long (at least the image's own), owned by
/// `uid`; a disk that is there is kept and only ever grown.
///
/// The disk is made beside and renamed, so that a disk that is there is a whole one.
pub fn make(image: &Path, target: &Path, size: u64, uid: u32) -> io::Result<Made> {
    match super::folder::open_foreign_for_writing(target) {
        Ok(disk) => {
            if disk.metadata()?.len() < size {
                disk.set_len(size)?;
            }
            return Ok(Made::Kept);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let beside = target.with_extension("new");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let image = File::open(image)?;
    let disk = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&beside)?;
    let made = if reflink(&image, &disk)? {
        Made::Reflinked
    } else {
        copy_data(&image, &disk)?;
        Made::Copied
    };
    disk.set_len(size.max(image.metadata()?.len()))?;
    fchown(&disk, Some(uid), Some(uid))?;
    fs::rename(&beside, target)?;
    Ok(made)
}

/// True when the file system could do it.
fn reflink(image: &File, disk: &File) -> io::Result<bool> {
    // SAFETY: both descriptors are open for the length of the call; FICLONE takes a descriptor, no pointer.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), libc::FICLONE, image.as_raw_fd()) };
    match Errno::result(result) {
        Ok(_) => Ok(true),
        Err(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::EINVAL | Errno::EXDEV | Errno::ENOSYS) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Copies what is not a hole (lseek(2), `SEEK_DATA` and `SEEK_HOLE`).
fn copy_data(image: &File, disk: &File) -> io::Result<()> {
    let length = image.metadata()?.len() as i64;
    let mut end = 0;
    while let Some(start) = seek(image, end, Whence::SeekData)? {
        end = seek(image, start, Whence::SeekHole)?.unwrap_or(length);
        lseek(image, start, Whence::SeekSet)?;
        lseek(disk, start, Whence::SeekSet)?;
        // On Linux this is copy_file_range(2), with a fall-back where the kernel has none.
        let copied = io::copy(&mut io::Read::take(image, (end - start) as u64), &mut &*disk)?;
        if copied != (end - start) as u64 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the cached image became shorter while it was copied",
            ));
        }
    }
    Ok(())
}

/// `None` when there is nothing of the kind before the file's end.
fn seek(file: &File, from: i64, whence: Whence) -> io::Result<Option<i64>> {
    match lseek(file, from, whence) {
        Ok(position) => Ok(Some(position)),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    /// Blocks (number, byte) written into an otherwise empty file of `blocks` blocks.
    fn sparse(path: &Path, blocks: u64, data: &[(u64, u8)]) -> Vec<u8> {
        let file = File::create(path).unwrap();
        file.set_len(blocks * 4096).unwrap();
        for (block, byte) in data {
            file.write_all_at(&[*byte; 4096], block % blocks * 4096).unwrap();
        }
        fs::read(path).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn the_disk_reads_as_the_image_and_zeros_after_it(
            blocks in 1u64..40, data in proptest::collection::vec((any::<u64>(), any::<u8>()), 0..20), grow in 0u64..100_000,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let image = folder.path().join("image");
            let mut expected = sparse(&image, blocks, &data);
            let target = folder.path().join("disk");
            let uid = nix::unistd::getuid().as_raw();
            let size = expected.len() as u64 + grow;
            let made = make(&image, &target, size, uid).unwrap();
            prop_assert_ne!(made, Made::Kept);
            expected.resize(size as usize, 0);
            prop_assert!(fs::read(&target).unwrap() == expected);
            prop_assert_eq!(make(&image, &target, size, uid).unwrap(), Made::Kept);
        }
    }

    #[test]
    fn a_copy_keeps_the_holes() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let (image, copy) = (folder.path().join("image"), folder.path().join("copy"));
        sparse(&image, 4096, &[(100, 1), (4000, 2)]);
        let to = File::create(&copy).unwrap();
        copy_data(&File::open(&image).unwrap(), &to).unwrap();
        let used = to.metadata().unwrap().blocks() * 512;
        assert!(used <= 64 * 1024, "{used} bytes are used for two blocks of data");
    }

    #[test]
    fn what_a_crash_left_beside_is_replaced_and_a_disk_in_use_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (image, target) = (folder.path().join("image"), folder.path().join("disk"));
        fs::write(&image, b"image").unwrap();
        fs::write(folder.path().join("disk.new"), b"half").unwrap();
        let uid = nix::unistd::getuid().as_raw();
        make(&image, &target, 5, uid).unwrap();
        fs::write(&target, b"guest").unwrap();
        assert_eq!(make(&image, &target, 8, uid).unwrap(), Made::Kept);
        assert_eq!(fs::read(&target).unwrap(), b"guest\0\0\0");
    }
}
