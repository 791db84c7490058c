//! The processor's reset vector, where a BIOS would begin (F000:FFF0).
//!
//! There is no firmware, but a kernel may go there: Linux takes a hardware-reduced ACPI machine for
//! one with EFI, and where that does not answer it reboots by jumping to the BIOS in real mode
//! (arch/x86/kernel/reboot.c, `reboot_init` and BOOT_BIOS). In empty memory that would spin for ever; a few
//! bytes of code pull the reset line instead.

use vm_memory::{Bytes, GuestAddress};

use crate::error::{Error, Result};
use crate::memory::{GuestMemory, layout};

/// Real mode: `mov $0xfe, %al; out %al, $0x64; 1: hlt; jmp 1b`.
const PULL_RESET: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

pub fn write(memory: &GuestMemory) -> Result<()> {
    memory
        .write_slice(&PULL_RESET, GuestAddress(layout::RESET_VECTOR))
        .map_err(|error| Error::Memory(format!("reset vector: {error}")))
}
