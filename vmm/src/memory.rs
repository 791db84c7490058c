//! Guest-physical memory: the map, and the host memory behind it.
//!
//! One private mapping per RAM range: anonymous, or of a snapshot's memory file, whose pages all clones of it share until they
//! write to them. RAM below 4 GiB ends where the device hole begins;
//! what does not fit goes on at 4 GiB, as on every PC. Fixed places below 1 MiB hold what the boot
//! protocol and the firmware tables need.
//!
//! Where differences are to be saved later, two logs say what has changed: KVM's, of what the guest writes, and a bitmap beside each mapping, of
//! what this process writes (`vm-memory` marks its own accesses, `devices::virtio::iovec` those of the kernel on a device's behalf).

use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::error::{Error, Result};

/// Guest memory as used throughout, with a bitmap of changed pages where they are tracked.
pub type GuestMemory = vm_memory::GuestMemoryMmap<Option<AtomicBitmap>>;

/// Size of a page in both logs (bytes).
pub const PAGE: usize = 4096;

/// The fixed places of the guest-physical address space.
pub mod layout {
    use crate::api::guest;

    /// Global descriptor table of the boot CPU.
    pub const GDT: u64 = 0x500;
    /// PVH's `hvm_start_info`, its list of modules (one entry) and its memory map.
    pub const PVH_START_INFO: u64 = 0x6000;
    pub const PVH_MODULES: u64 = 0x6100;
    pub const PVH_MEMORY_MAP: u64 = 0x6200;
    /// The zero page (`struct boot_params`, Documentation/arch/x86/boot.rst).
    pub const ZERO_PAGE: u64 = 0x7000;
    /// Initial stack pointer; grows down towards the zero page's end.
    pub const BOOT_STACK: u64 = 0x8ff0;
    /// Page map level 4, then the page directory pointer table, then four page directories
    /// that map the first 4 GiB one to one with 2 MiB pages.
    pub const PML4: u64 = 0x9000;
    pub const PDPT: u64 = 0xa000;
    pub const PAGE_DIRECTORIES: u64 = 0xb000;
    /// Kernel command line, and its greatest length including the final NUL (x86 COMMAND_LINE_SIZE).
    pub const CMDLINE: u64 = 0x2_0000;
    pub const CMDLINE_MAX: usize = 2048;
    /// End of conventional memory; what follows up to 1 MiB is reserved to firmware tables.
    pub const LOW_RAM_END: u64 = 0x9_fc00;
    /// RSDP and the other ACPI tables (ACPI 6.5, 5.2.5.1: the RSDP is searched from 0xe0000).
    pub const ACPI: u64 = 0xe_0000;
    pub const ACPI_END: u64 = 0xe_f000;
    /// The generation id's page.
    pub const GENERATION_ID: u64 = 0xe_f000;
    /// SMBIOS 3 entry point (SMBIOS 3.7, 5.2.2: searched from 0xf0000 in steps of 16 bytes).
    pub const SMBIOS: u64 = 0xf_0000;
    /// Where a processor that is reset begins; SMBIOS ends before.
    pub const RESET_VECTOR: u64 = 0xf_fff0;
    /// Kernels are loaded from here on.
    pub const HIGH_RAM: u64 = 0x10_0000;
    /// Where a bzImage's protected-mode part goes: the usual `pref_address`.
    pub const BZIMAGE: u64 = 0x100_0000;
    /// Begin of the hole for devices below 4 GiB.
    pub const DEVICE_HOLE: u64 = guest::VIRTIO_MMIO_BASE;
    pub const DEVICE_HOLE_END: u64 = 1 << 32;
    /// The I/O APIC and the local APICs, where KVM's interrupt chip has them.
    pub const IO_APIC: u32 = 0xfec0_0000;
    pub const LOCAL_APIC: u32 = 0xfee0_0000;
    /// Three pages that KVM needs on Intel without unrestricted guest (KVM_SET_TSS_ADDR).
    pub const KVM_TSS: usize = 0xfffb_d000;
}

/// Smallest and largest memory of a guest, in MiB.
pub const MIN_MIB: u64 = 4;
pub const MAX_MIB: u64 = 1 << 22;

/// The RAM ranges of a guest with `mib` MiB.
pub fn ram_ranges(mib: u64) -> Result<Vec<(GuestAddress, usize)>> {
    if !(MIN_MIB..=MAX_MIB).contains(&mib) {
        return Err(Error::BadConfiguration(format!(
            "mem_size_mib is {mib}; it must be between {MIN_MIB} and {MAX_MIB}"
        )));
    }
    let size = mib << 20;
    let low = size.min(layout::DEVICE_HOLE);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(layout::DEVICE_HOLE_END), (size - low) as usize));
    }
    Ok(ranges)
}

/// Maps host memory for a guest with `mib` MiB. Pages are taken when they are first touched, in
/// large ones where the host has them to give.
pub fn allocate(mib: u64, tracks_changes: bool) -> Result<GuestMemory> {
    let memory = map(&ram_ranges(mib)?, None, tracks_changes)?;
    for region in memory.iter() {
        advise_huge_pages(region.as_ptr(), region.len() as usize);
    }
    Ok(memory)
}

/// Maps `ranges`, which are in ascending order: anonymous memory, or the file's content, range after range from its beginning on. The file must be
/// as long as all of them, and stay so: a mapping beyond a file's end ends the process (SIGBUS).
pub fn map(ranges: &[(GuestAddress, usize)], file: Option<File>, tracks_changes: bool) -> Result<GuestMemory> {
    let failed = |why: &dyn std::fmt::Display| Error::Memory(format!("cannot be mapped: {why}"));
    let file = file.map(Arc::new);
    let mut offset = 0;
    let mut regions = Vec::with_capacity(ranges.len());
    for (start, size) in ranges {
        let page = const { NonZeroUsize::new(PAGE).unwrap() };
        let bitmap = tracks_changes.then(|| AtomicBitmap::new(*size, page));
        let mut builder = MmapRegionBuilder::new_with_bitmap(*size, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(
                libc::MAP_PRIVATE | libc::MAP_NORESERVE | if file.is_some() { 0 } else { libc::MAP_ANONYMOUS },
            );
        if let Some(file) = &file {
            builder = builder.with_file_offset(FileOffset::from_arc(file.clone(), offset));
        }
        offset += *size as u64;
        let mapping = builder.build().map_err(|error| failed(&error))?;
        regions.push(GuestRegionMmap::new(mapping, *start).ok_or_else(|| failed(&"it wraps"))?);
    }
    GuestMemory::from_regions(regions).map_err(|error| failed(&error))
}

fn advise_huge_pages(start: *mut u8, length: usize) {
    // SAFETY: `start` and `length` are a mapping of our own, and the advice changes no content.
    // A refusal only means small pages.
    unsafe { libc::madvise(start.cast(), length, libc::MADV_HUGEPAGE) };
}

/// Gives the guest its memory: one slot a region, in their order.
pub fn attach(vm: &VmFd, memory: &GuestMemory) -> Result<()> {
    for (slot, region) in memory.iter().enumerate() {
        let slot_of_region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: if bitmap(region).is_some() { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        };
        // SAFETY: the range is a mapping of our own, and whoever holds the VM holds `memory` as long as a
        // vCPU may run (`vm::RunningVm`, `check_kvm::run`).
        unsafe { vm.set_user_memory_region(slot_of_region) }.map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// The first memory slot that [`attach`] does not take.
pub fn free_slot(memory: &GuestMemory) -> u32 {
    memory.num_regions() as u32
}

/// Where this process's changes of a region are noted; `None` if they are not tracked.
pub fn bitmap(region: &GuestRegionMmap<Option<AtomicBitmap>>) -> Option<&AtomicBitmap> {
    let mapping: &vm_memory::MmapRegion<_> = region;
    mapping.bitmap().as_ref()
}

/// First address after the RAM below the device hole.
pub fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory
        .iter()
        .filter(|region| region.start_addr().0 < layout::DEVICE_HOLE)
        .map(|region| region.start_addr().0 + region.len())
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ram_never_covers_the_device_hole_and_adds_up(mib in MIN_MIB..=65_536u64) {
            let ranges = ram_ranges(mib).unwrap();
            let total: u64 = ranges.iter().map(|(_, len)| *len as u64).sum();
            prop_assert_eq!(total, mib << 20);
            for (start, len) in ranges {
                let end = start.0 + len as u64;
                prop_assert!(end <= layout::DEVICE_HOLE || start.0 >= layout::DEVICE_HOLE_END);
            }
        }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert!(ram_ranges(0).is_err());
        assert!(ram_ranges(u64::MAX).is_err());
    }
}
