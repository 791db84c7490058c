//! A root file system that was made for a small image grows to the size of the disk it finds itself on.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;

use crate::report;

// linux/fs/ext4/ext4.h; the argument is the new size in file system blocks.
nix::ioctl_write_ptr!(ext4_resize, b'f', 16, u64);

/// ext4's superblock lies 1024 bytes into the device.
const SUPERBLOCK: u64 = 1024;
const EXT4_MAGIC: u16 = 0xef53;

/// Grows `/`, mounted from `device`, if the device is larger. A failure leaves it as it was.
pub fn grow_root(device: &str) {
    match try_grow(device) {
        Ok(Some((from, to))) => {
            report::line(format_args!("/ grew from {} MiB to {} MiB", from >> 20, to >> 20));
        }
        Ok(None) => {}
        Err(error) => report::line(format_args!("/ keeps its size: {error}")),
    }
}

fn try_grow(device: &str) -> io::Result<Option<(u64, u64)>> {
    let mut disk = File::open(device)?;
    let disk_bytes = disk.seek(SeekFrom::End(0))?;
    let mut superblock = [0u8; 1024];
    disk.seek(SeekFrom::Start(SUPERBLOCK))?;
    disk.read_exact(&mut superblock)?;
    let Some(growth) = Growth::plan(&superblock, disk_bytes) else {
        return Ok(None);
    };
    let root = File::open("/")?;
    // SAFETY: the kernel reads one u64 behind the pointer, which lives through the call.
    unsafe { ext4_resize(root.as_raw_fd(), &growth.new_blocks) }?;
    // Lazy work of the kernel goes on in the background; nothing waits for it.
    fs::File::open("/")?.sync_all()?;
    Ok(Some((growth.old_bytes, growth.new_blocks * growth.block_size)))
}

#[derive(Debug, PartialEq, Eq)]
struct Growth {
    old_bytes: u64,
    new_blocks: u64,
    block_size: u64,
}

impl Growth {
    /// `None` if it is no ext4 or the device has no room worth the work (less than 1 MiB).
    fn plan(superblock: &[u8; 1024], disk_bytes: u64) -> Option<Self> {
        let word = |at: usize| {
            u32::from_le_bytes([superblock[at], superblock[at + 1], superblock[at + 2], superblock[at + 3]])
        };
        let magic = u16::from_le_bytes([superblock[0x38], superblock[0x39]]);
        let log_block_size = word(0x18);
        if magic != EXT4_MAGIC || log_block_size > 6 {
            return None;
        }
        let block_size = 1024u64 << log_block_size;
        // The upper half of the count counts only with the 64bit feature.
        let has_64bit = word(0x60) & 0x80 != 0;
        let high = if has_64bit { u64::from(word(0x150)) } else { 0 };
        let old_bytes = ((high << 32) | u64::from(word(0x04))).checked_mul(block_size)?;
        let new_blocks = disk_bytes / block_size;
        let gain = (new_blocks * block_size).checked_sub(old_bytes)?;
        (gain >= 1 << 20).then_some(Growth { old_bytes, new_blocks, block_size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(blocks: u32, log: u32) -> [u8; 1024] {
        let mut bytes = [0; 1024];
        bytes[0x04..0x08].copy_from_slice(&blocks.to_le_bytes());
        bytes[0x18..0x1c].copy_from_slice(&log.to_le_bytes());
        bytes[0x38..0x3a].copy_from_slice(&EXT4_MAGIC.to_le_bytes());
        bytes
    }

    #[test]
    fn a_larger_disk_is_used_whole() {
        let growth = Growth::plan(&superblock(16384, 2), 8 << 30).unwrap();
        assert_eq!(growth, Growth { old_bytes: 64 << 20, new_blocks: 2 << 20, block_size: 4096 });
    }

    #[test]
    fn a_disk_of_the_same_or_a_smaller_size_changes_nothing() {
        assert_eq!(Growth::plan(&superblock(16384, 2), 64 << 20), None);
        assert_eq!(Growth::plan(&superblock(16384, 2), 1 << 20), None);
        assert_eq!(Growth::plan(&superblock(16384, 2), (64 << 20) + 4096), None);
    }

    proptest::proptest! {
        #[test]
        fn any_superblock_is_survived(bytes in proptest::collection::vec(0u8.., 1024), disk in 0u64..) {
            let mut superblock: [u8; 1024] = bytes.try_into().unwrap();
            superblock[0x38..0x3a].copy_from_slice(&EXT4_MAGIC.to_le_bytes());
            if let Some(growth) = Growth::plan(&superblock, disk) {
                assert!(growth.new_blocks * growth.block_size <= disk);
                assert!(growth.new_blocks * growth.block_size > growth.old_bytes);
            }
        }
    }
}
