//! The local APIC's two interrupt inputs as firmware would leave them (MultiProcessor Specification
//! 1.4, 3.6.2): LINT0 for the legacy interrupt controller, LINT1 for NMIs.

use kvm_ioctls::VcpuFd;

use crate::error::{Error, Result};

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_MODE: u32 = 0b111 << 8;
const MODE_NMI: u32 = 0b100 << 8;
const MODE_EXTINT: u32 = 0b111 << 8;

pub fn set(vcpu: &VcpuFd) -> Result<()> {
    let mut lapic = vcpu.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?;
    for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        let bytes: [u8; 4] = std::array::from_fn(|i| lapic.regs[register + i] as u8);
        let value = u32::from_le_bytes(bytes) & !DELIVERY_MODE | mode;
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            lapic.regs[register + i] = byte as _;
        }
    }
    vcpu.set_lapic(&lapic).map_err(Error::kvm("KVM_SET_LAPIC"))
}
