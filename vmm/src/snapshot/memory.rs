//! Guest memory in a snapshot: a file that is the RAM, range after range (`memory::ram_ranges`), with holes where it is zero.
//!
//! * A *full* file has every page that is not zero. It is written beside its name and renamed when it is whole and on disk, so that a VM that has the old one mapped
//!   keeps its memory.
//! * *Changes* are the pages that differ since the last snapshot. They are written, zero or not, to their place in a file that is there (on a copy
//!   of the base this gives what a full one would have) or into a new, otherwise empty one. In a file that some VM has mapped nothing
//!   is written: every monitor holds a lock on its memory file, shared among readers.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::error::{Error, Result};
use crate::memory::{self, GuestMemory, PAGE};

const WHAT: &str = "memory file";

/// For each region, a bit for each of its pages that has changed.
pub struct Changes(Vec<Vec<u64>>);

impl Changes {
    /// What has changed since this was last called (KVM's log and ours begin anew); `None` if that is not tracked.
    pub fn take(memory: &GuestMemory, vm: &VmFd) -> Result<Option<Self>> {
        let mut regions = Vec::new();
        for (slot, region) in memory.iter().enumerate() {
            let Some(ours) = memory::bitmap(region) else { return Ok(None) };
            let guests = vm.get_dirty_log(slot as u32, region.len() as usize);
            let guests = guests.map_err(Error::kvm("KVM_GET_DIRTY_LOG"))?;
            regions.push(guests.iter().zip(ours.get_and_reset()).map(|(guests, ours)| guests | ours).collect());
        }
        Ok(Some(Changes(regions)))
    }

    /// They have not been saved: the next to ask gets them, too.
    pub fn put_back(&self, memory: &GuestMemory) {
        for (region, changed) in memory.iter().zip(&self.0) {
            let Some(bitmap) = memory::bitmap(region) else { continue };
            (0..bitmap.len()).filter(|page| is_set(changed, *page)).for_each(|page| bitmap.set_bit(page));
        }
    }
}

fn is_set(bits: &[u64], page: usize) -> bool {
    bits.get(page / 64).is_some_and(|word| word & 1 << (page % 64) != 0)
}

/// Writes all of a paused VM's memory to `path`.
pub fn write_full(memory: &GuestMemory, path: &Path) -> Result<()> {
    replace(path, WHAT, |file| {
        file.set_len(length(memory))?;
        write_pages(memory, file, |_, _, page| !is_zero(page))
    })
}

/// Writes the changed pages of a paused VM's memory to `path`.
pub fn write_changes(memory: &GuestMemory, changes: &Changes, path: &Path) -> Result<()> {
    let failed = Error::file(WHAT, path);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(&failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Error::BadConfiguration(format!(
                "memory file {} is the memory of a VM that runs; give a copy of it or another name",
                path.display()
            )));
        }
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    let there = file.metadata().map_err(&failed)?.len();
    if there != 0 && there != length(memory) {
        return Err(Error::BadConfiguration(format!(
            "memory file {} has {there} bytes and this VM {}: it is no base of these changes",
            path.display(),
            length(memory)
        )));
    }
    file.set_len(length(memory))
        .and_then(|()| write_pages(memory, &file, |region, page, _| is_set(&changes.0[region], page)))
        .and_then(|()| file.sync_data())
        .map_err(&failed)
}

/// Maps a memory file for a VM with `mib` MiB, and holds it against who would write to it.
pub fn map(path: &Path, mib: u64, tracks_changes: bool) -> Result<GuestMemory> {
    let failed = Error::file(WHAT, path);
    let ranges = memory::ram_ranges(mib)?;
    let file = File::open(path).map_err(&failed)?;
    match file.try_lock_shared() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Error::BadConfiguration(format!("memory file {} is being written", path.display())));
        }
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    let metadata = file.metadata().map_err(&failed)?;
    let wanted: u64 = ranges.iter().map(|(_, size)| *size as u64).sum();
    if !metadata.is_file() || metadata.len() != wanted {
        return Err(Error::BadConfiguration(format!(
            "memory file {} has {} bytes; the snapshot's VM has {wanted}",
            path.display(),
            metadata.len()
        )));
    }
    memory::map(&ranges, Some(file), tracks_changes)
}

fn length(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Writes the pages that are `wanted` (by region, number and content), neighbours together.
fn write_pages(memory: &GuestMemory, file: &File, wanted: impl Fn(usize, usize, &[u8]) -> bool) -> io::Result<()> {
    let mut offset = 0;
    for (index, region) in memory.iter().enumerate() {
        let length = region.len() as usize;
        // SAFETY: the region is one mapping of that length, alive as long as `memory`; the VM is paused, so nothing writes to it.
        let bytes = unsafe { std::slice::from_raw_parts(region.as_ptr().cast_const(), length) };
        let is_wanted = |page: usize| wanted(index, page, &bytes[page * PAGE..][..PAGE]);
        let pages = length / PAGE;
        let mut next = 0;
        while let Some(first) = (next..pages).find(|page| is_wanted(*page)) {
            let end = (first + 1..pages).find(|page| !is_wanted(*page)).unwrap_or(pages);
            file.write_all_at(&bytes[first * PAGE..end * PAGE], offset + (first * PAGE) as u64)?;
            // The page at the end was looked at already.
            next = end + 1;
        }
        offset += region.len();
    }
    Ok(())
}

fn is_zero(page: &[u8]) -> bool {
    // In pieces that the compiler makes wide instructions of.
    page.chunks_exact(256).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Has `write` fill a file that takes the place of the one at `path` when it is on disk, or never.
pub fn replace(path: &Path, what: &'static str, write: impl FnOnce(&File) -> io::Result<()>) -> Result<()> {
    let part = {
        let mut name = path.to_owned().into_os_string();
        name.push(".part");
        PathBuf::from(name)
    };
    let done = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&part)
        .and_then(|file| write(&file).and_then(|()| file.sync_data()))
        .and_then(|()| std::fs::rename(&part, path));
    done.map_err(|error| {
        // What is half written helps nobody; that it cannot be removed is not the news.
        let _ = std::fs::remove_file(&part);
        Error::file(what, path)(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, GuestAddress};

    const MIB: u64 = 8;

    fn changed(pages: &[usize]) -> Changes {
        let mut bits = vec![0; (MIB << 20) as usize / PAGE / 64];
        pages.iter().for_each(|page| bits[page / 64] |= 1 << (page % 64));
        Changes(vec![bits])
    }

    fn fill(memory: &GuestMemory, page: u64, value: u8) {
        memory.write_slice(&[value; PAGE], GuestAddress(page * PAGE as u64)).unwrap();
    }

    #[test]
    fn a_full_file_is_the_memory_and_takes_only_what_is_not_zero() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let memory = memory::allocate(MIB, false).unwrap();
        for (page, value) in [(0, 1), (1, 2), (700, 3), (2047, 4)] {
            fill(&memory, page, value);
        }
        write_full(&memory, &path).unwrap();
        let file = std::fs::metadata(&path).unwrap();
        assert_eq!(file.len(), MIB << 20);
        assert!(file.blocks() * 512 <= 16 * PAGE as u64, "{} blocks", file.blocks());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

        let restored = map(&path, MIB, true).unwrap();
        let mut bytes = vec![0; (MIB << 20) as usize];
        restored.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert_eq!(bytes, std::fs::read(&path).unwrap());
        assert_eq!((bytes[0], bytes[PAGE], bytes[700 * PAGE], bytes[701 * PAGE]), (1, 2, 3, 0));
        // What a clone writes is its own.
        fill(&restored, 0, 9);
        assert_eq!(map(&path, MIB, false).unwrap().read_obj::<u8>(GuestAddress(0)).unwrap(), 1);
    }

    #[test]
    fn changes_on_a_copy_of_the_base_are_the_full_file() {
        let folder = tempfile::tempdir().unwrap();
        let (base, later, full) = (folder.path().join("base"), folder.path().join("later"), folder.path().join("full"));
        let memory = memory::allocate(MIB, false).unwrap();
        [(0, 1), (1, 2), (700, 3)].into_iter().for_each(|(page, value)| fill(&memory, page, value));
        write_full(&memory, &base).unwrap();
        // One that was and one that was not there, and one that becomes zero.
        [(1, 7), (2, 8), (700, 0)].into_iter().for_each(|(page, value)| fill(&memory, page, value));
        std::fs::copy(&base, &later).unwrap();
        write_changes(&memory, &changed(&[1, 2, 700]), &later).unwrap();
        write_full(&memory, &full).unwrap();
        assert_eq!(std::fs::read(&later).unwrap(), std::fs::read(&full).unwrap());
        let alone = folder.path().join("alone");
        write_changes(&memory, &changed(&[1, 2, 700]), &alone).unwrap();
        let alone = std::fs::metadata(&alone).unwrap();
        assert!(alone.len() == MIB << 20 && alone.blocks() * 512 <= 12 * PAGE as u64, "{} blocks", alone.blocks());
    }

    #[test]
    fn files_that_are_mapped_or_of_another_size_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let memory = memory::allocate(MIB, false).unwrap();
        fill(&memory, 0, 1);
        write_full(&memory, &path).unwrap();
        let clone = map(&path, MIB, false).unwrap();
        fill(&memory, 0, 2);
        let error = write_changes(&memory, &changed(&[0]), &path).unwrap_err().to_string();
        assert!(error.contains("runs"), "{error}");
        // A full one takes its name, not its place.
        write_full(&memory, &path).unwrap();
        assert_eq!(clone.read_obj::<u8>(GuestAddress(0)).unwrap(), 1);
        drop(clone);
        write_changes(&memory, &changed(&[0]), &path).unwrap();

        for size in [0, (MIB << 20) - 1, (MIB << 20) + 1] {
            File::create(&path).unwrap().set_len(size).unwrap();
            assert!(map(&path, MIB, false).is_err(), "{size}");
        }
        assert!(write_changes(&memory, &changed(&[0]), &path).is_err());
        assert!(map(folder.path(), MIB, false).is_err());
        assert!(write_full(&memory, &folder.path().join("nowhere/memory")).is_err());
    }

    #[test]
    fn changes_that_were_not_saved_come_again() {
        let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
        let memory = memory::allocate(MIB, true).unwrap();
        memory::attach(&vm, &memory).unwrap();
        fill(&memory, 3, 1);
        let changes = Changes::take(&memory, &vm).unwrap().unwrap();
        assert!(is_set(&changes.0[0], 3) && !is_set(&changes.0[0], 4));
        assert!(!is_set(&Changes::take(&memory, &vm).unwrap().unwrap().0[0], 3));
        changes.put_back(&memory);
        assert!(is_set(&Changes::take(&memory, &vm).unwrap().unwrap().0[0], 3));
        assert!(Changes::take(&memory::allocate(MIB, false).unwrap(), &vm).unwrap().is_none());
    }
}
