//! What the guest sees: the few legacy devices a PC kernel expects, and virtio.
//!
//! A device here decodes registers and descriptors. It never opens a file or a tap: that is
//! `backends`' work, done before the VM exists.

pub mod acpi_pm;
pub mod boot_timer;
pub mod i8042;
pub mod serial;
pub mod virtio;
pub mod vmgenid;

use std::io;

use vmm_sys_util::eventfd::EventFd;

use crate::api::guest;

/// Interrupt of the generic event device that stands for the power button: the I/O APIC's last pin.
pub const POWER_BUTTON_GSI: u32 = 23;
/// Virtio devices have the pins from 5 up to the one before the power button's.
pub const MAX_VIRTIO_DEVICES: usize = (POWER_BUTTON_GSI - guest::VIRTIO_MMIO_FIRST_GSI) as usize;

/// What a guest can ask of its machine by writing to a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineRequest {
    PowerOff,
    Reset,
}

/// An edge-triggered interrupt line that KVM listens to (irqfd).
pub struct IrqLine(pub EventFd);

impl vm_superio::Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
