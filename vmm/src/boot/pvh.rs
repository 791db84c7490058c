//! What the PVH boot protocol hands to a kernel: `hvm_start_info` version 1 (Xen's
//! include/public/arch-x86/hvm/start_info.h, docs/misc/pvh.pandoc) with the memory map, the initrd as its first
//! module, the command line and the ACPI tables' root.
//!
//! The kernel is entered in 32-bit protected mode without paging, EBX at the structure (`cpu::regs`).

use linux_loader::loader::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::initrd::LoadedInitrd;
use super::zero_page::{E820_RAM, e820, write_cmdline};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, layout};

/// The structure's version with a memory map.
const VERSION: u32 = 1;

/// The crate's structures, which are plain integers, as bytes.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Plain<T>(T);

// SAFETY: `repr(C)` structures of integers without padding (the crate asserts their sizes), any content of which is valid.
unsafe impl ByteValued for Plain<hvm_start_info> {}
// SAFETY: as above.
unsafe impl ByteValued for Plain<hvm_modlist_entry> {}
// SAFETY: as above.
unsafe impl ByteValued for Plain<hvm_memmap_table_entry> {}

/// Writes command line, module list, memory map and start info; the latter's address is [`layout::PVH_START_INFO`].
pub fn write(memory: &GuestMemory, initrd: Option<LoadedInitrd>, cmdline: &str, rsdp: u64) -> Result<()> {
    write_cmdline(memory, cmdline)?;
    let failed = |error| Error::Memory(format!("PVH start info: {error}"));
    let map = e820(memory);
    for (index, (addr, size, kind)) in map.iter().enumerate() {
        let type_ = if *kind == E820_RAM { XEN_HVM_MEMMAP_TYPE_RAM } else { XEN_HVM_MEMMAP_TYPE_RESERVED };
        let entry = hvm_memmap_table_entry { addr: *addr, size: *size, type_, reserved: 0 };
        let at = layout::PVH_MEMORY_MAP + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        memory.write_obj(Plain(entry), GuestAddress(at)).map_err(failed)?;
    }
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.size, ..Default::default() };
        memory.write_obj(Plain(module), GuestAddress(layout::PVH_MODULES)).map_err(failed)?;
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: initrd.map_or(0, |_| 1),
        modlist_paddr: initrd.map_or(0, |_| layout::PVH_MODULES),
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory.write_obj(Plain(info), GuestAddress(layout::PVH_START_INFO)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(memory: &GuestMemory, address: u64) -> u64 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn everything_is_found_from_the_start_info() {
        let memory = crate::memory::allocate(64, false).unwrap();
        let initrd = LoadedInitrd { address: 0x300_0000, size: 0x1234 };
        write(&memory, Some(initrd), "console=hvc0", 0xe_0000).unwrap();
        let at = layout::PVH_START_INFO;
        assert_eq!(word(&memory, at), 1 << 32 | 0x336e_c578);
        assert_eq!(word(&memory, at + 8), 1 << 32);
        let modules = word(&memory, at + 16);
        assert_eq!((word(&memory, modules), word(&memory, modules + 8)), (0x300_0000, 0x1234));
        let mut line = [0; 13];
        memory.read_slice(&mut line, GuestAddress(word(&memory, at + 24))).unwrap();
        assert_eq!(&line, b"console=hvc0\0");
        assert_eq!(word(&memory, at + 32), 0xe_0000);
        let (map, count) = (word(&memory, at + 40), word(&memory, at + 48));
        assert_eq!(count, 3);
        let last = map + 2 * 24;
        assert_eq!((word(&memory, last), word(&memory, last + 8), word(&memory, last + 16)), (1 << 20, 63 << 20, 1));
    }

    #[test]
    fn without_an_initrd_there_is_no_module() {
        let memory = crate::memory::allocate(16, false).unwrap();
        write(&memory, None, "", 0xe_0000).unwrap();
        assert_eq!((word(&memory, layout::PVH_START_INFO + 8), word(&memory, layout::PVH_START_INFO + 16)), (0, 0));
    }
}
