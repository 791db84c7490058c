//! The initial RAM disk: placed as high as the kernel can reach, below the end of low RAM, so that it
//! stays clear of the kernel while that unpacks itself.

use std::fs::File;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use crate::error::{Error, Result};
use crate::memory::{GuestMemory, layout, low_ram_end};

const PAGE: u64 = 4096;

/// Where the initrd is.
#[derive(Debug, Clone, Copy)]
pub struct LoadedInitrd {
    pub address: u64,
    pub size: u64,
}

/// Loads the initrd at `path` above `kernel_end`, ending no higher than `highest` (inclusive, the
/// setup header's `initrd_addr_max`).
pub fn load(memory: &GuestMemory, path: &Path, kernel_end: u64, highest: Option<u32>) -> Result<LoadedInitrd> {
    let mut file = File::open(path).map_err(Error::file("initrd", path))?;
    let size = file.metadata().map_err(Error::file("initrd", path))?.len();
    if size == 0 {
        return Err(Error::BadConfiguration(format!("initrd {} is empty", path.display())));
    }
    let ceiling = highest.map_or(layout::DEVICE_HOLE, |highest| u64::from(highest) + 1);
    let top = low_ram_end(memory).min(ceiling);
    let address = top
        .checked_sub(size)
        .map(|address| address & !(PAGE - 1))
        .filter(|address| *address >= kernel_end)
        .ok_or_else(|| {
        Error::BadConfiguration(format!(
            "initrd {} ({size} bytes) does not fit between the kernel's end {kernel_end:#x} and {top:#x}: \
                 give the guest more memory",
            path.display()
        ))
    })?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, size as usize)
        .map_err(|error| Error::BadConfiguration(format!("initrd {}: {error}", path.display())))?;
    Ok(LoadedInitrd { address, size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn it_ends_below_ram_and_above_the_kernel_or_is_refused() {
        let memory = crate::memory::allocate(16, false).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let initrd = load(&memory, file.path(), 0x20_0000, None).unwrap();
        assert_eq!(initrd.address % PAGE, 0);
        assert!(initrd.address + initrd.size <= 16 << 20);
        assert!(load(&memory, file.path(), (16 << 20) - 4096, None).is_err());
    }
}
