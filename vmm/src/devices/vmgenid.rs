//! The VM's generation: 16 random bytes in guest memory that are others in every VM that goes on from a snapshot (Microsoft, "Virtual Machine Generation
//! ID", 2012). A guest that is told so mixes them into its random numbers, which its clones would otherwise all draw the same.
//!
//! The bytes have a page of their own among the firmware's, which the DSDT names (`boot::acpi`). The notification comes through the generic event device, like the
//! power button's.

use kvm_ioctls::VmFd;
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

use crate::error::{Error, Result};
use crate::memory::{GuestMemory, layout};

/// Interrupt of the notification: the pin of a second serial port, which there is not.
pub const GSI: u32 = 3;

/// Gives the guest an id that no other has.
pub fn renew(memory: &GuestMemory) -> Result<()> {
    memory
        .write_slice(Uuid::new_v4().as_bytes(), GuestAddress(layout::GENERATION_ID))
        .map_err(|error| Error::Memory(format!("generation id: {error}")))
}

/// Tells a guest, whose vCPUs and interrupt controllers are as it left them, that its id is new.
pub fn notify(vm: &VmFd) -> Result<()> {
    for level in [true, false] {
        vm.set_irq_line(GSI, level).map_err(Error::kvm("KVM_IRQ_LINE"))?;
    }
    Ok(())
}
