//! The zero page (`struct boot_params`) and the command line: what Linux's 64-bit boot protocol
//! hands to the kernel (Documentation/arch/x86/boot.rst and zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::initrd::LoadedInitrd;
use super::kernel::LoadedKernel;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, layout};

/// E820 types (arch/x86/include/uapi/asm/bootparam.h).
pub(super) const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "Undefined" of the boot loader ids.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// CAN_USE_HEAP is not set: there is no real-mode part. LOADED_HIGH is.
const LOADED_HIGH: u8 = 1;
/// An ELF kernel has no header of its own; these are what a current kernel's says.
const ELF_KERNEL_ALIGNMENT: u32 = 0x20_0000;

/// Writes command line and zero page.
pub fn write(
    memory: &GuestMemory,
    kernel: &LoadedKernel,
    initrd: Option<LoadedInitrd>,
    cmdline: &str,
    rsdp: u64,
) -> Result<()> {
    write_cmdline(memory, cmdline)?;
    let mut params =
        boot_params { acpi_rsdp_addr: rsdp, hdr: header(kernel, initrd, cmdline.len()), ..Default::default() };
    for (entry, (addr, size, type_)) in params.e820_table.iter_mut().zip(e820(memory)) {
        *entry = boot_e820_entry { addr, size, r#type: type_ };
        params.e820_entries += 1;
    }
    memory
        .write_obj(params, GuestAddress(layout::ZERO_PAGE))
        .map_err(|error| Error::Memory(format!("zero page: {error}")))
}

pub(super) fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<()> {
    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(Error::BadConfiguration(format!(
            "boot_args has {} bytes; at most {} are possible",
            cmdline.len(),
            layout::CMDLINE_MAX - 1
        )));
    }
    if cmdline.contains('\0') {
        return Err(Error::BadConfiguration("boot_args contains a NUL byte".into()));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(|error| Error::Memory(format!("command line: {error}")))
}

fn header(kernel: &LoadedKernel, initrd: Option<LoadedInitrd>, cmdline_length: usize) -> setup_header {
    let mut header = kernel.setup_header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        loadflags: LOADED_HIGH,
        kernel_alignment: ELF_KERNEL_ALIGNMENT,
        ..Default::default()
    });
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = layout::CMDLINE as u32;
    header.cmdline_size = cmdline_length as u32;
    if let Some(initrd) = initrd {
        // Both are below the device hole, and so below 4 GiB.
        header.ramdisk_image = initrd.address as u32;
        header.ramdisk_size = initrd.size as u32;
    }
    header
}

/// (start, length, type) in ascending order.
pub(super) fn e820(memory: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::LOW_RAM_END, layout::HIGH_RAM - layout::LOW_RAM_END, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_RAM);
        let end = region.start_addr().0 + region.len();
        map.push((start, end - start, E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_has_no_overlap_and_ends_with_ram() {
        for mib in [16, 128, 4096] {
            let map = e820(&crate::memory::allocate(mib, false).unwrap());
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{map:x?}");
            }
            assert_eq!(map.last().unwrap().2, E820_RAM);
        }
    }

    #[test]
    fn command_lines_that_do_not_fit_are_refused() {
        let memory = crate::memory::allocate(16, false).unwrap();
        assert!(write_cmdline(&memory, &"x".repeat(layout::CMDLINE_MAX)).is_err());
        assert!(write_cmdline(&memory, "a\0b").is_err());
        write_cmdline(&memory, &"x".repeat(layout::CMDLINE_MAX - 1)).unwrap();
    }
}
