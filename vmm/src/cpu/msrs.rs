//! Model-specific registers that do not start as a kernel expects them. All others keep the reset
//! value KVM gave them.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::{Error, Result};

const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, default type write-back (Intel SDM vol. 3, 12.11.2.1). Firmware would have done this.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets them. A KVM that refuses one is tolerated: each only costs the guest a warning or speed.
pub fn set(vcpu: &VcpuFd) -> Result<()> {
    let entries = [(IA32_MISC_ENABLE, FAST_STRINGS), (MTRR_DEF_TYPE, MTRR_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::Memory("the list of MSRs is too long".into()))?;
    let taken = vcpu.set_msrs(&msrs).map_err(Error::kvm("KVM_SET_MSRS"))?;
    if let Some(refused) = entries.get(taken) {
        tracing::warn!(msr = format!("{:#x}", refused.index), "KVM refused an MSR");
    }
    Ok(())
}
