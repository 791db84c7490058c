//! What GDB wants to be stopped at.
//!
//! A *software* breakpoint is an `int3` (one byte) in the place of an instruction, in guest memory: as many as one likes, and only where there is
//! memory already. A *hardware* breakpoint or watchpoint is in the processor (`debug_registers`).
//! KVM gives the exceptions of either to the debugger (KVM_SET_GUEST_DEBUG).

use std::collections::BTreeMap;

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug,
};
use vm_memory::{Bytes, GuestAddress};

use super::debug_registers::DebugRegisters;
use crate::memory::GuestMemory;

const INT3: u8 = 0xcc;

#[derive(Default)]
pub struct Breakpoints {
    /// By guest-physical address: two names of a page are one place. What was there, and how often it was asked for.
    software: BTreeMap<u64, (u8, usize)>,
    pub hardware: DebugRegisters,
}

impl Breakpoints {
    /// False where there is no memory.
    pub fn add_software(&mut self, memory: &GuestMemory, physical: u64) -> bool {
        if let Some((_, count)) = self.software.get_mut(&physical) {
            *count += 1;
            return true;
        }
        let Ok(original) = memory.read_obj::<u8>(GuestAddress(physical)) else { return false };
        if memory.write_obj(INT3, GuestAddress(physical)).is_err() {
            return false;
        }
        self.software.insert(physical, (original, 1));
        true
    }

    /// False if there was none.
    pub fn remove_software(&mut self, memory: &GuestMemory, physical: u64) -> bool {
        let Some((original, count)) = self.software.get_mut(&physical) else { return false };
        *count -= 1;
        if *count == 0 {
            put_back(memory, physical, *original);
            self.software.remove(&physical);
        }
        true
    }

    pub fn has_software(&self, physical: u64) -> bool {
        self.software.contains_key(&physical)
    }

    /// Shows memory as the guest wrote it: `bytes` were read at `physical`.
    pub fn hide(&self, physical: u64, bytes: &mut [u8]) {
        for (address, (original, _)) in self.software.range(physical..physical.saturating_add(bytes.len() as u64)) {
            bytes[(address - physical) as usize] = *original;
        }
    }

    /// Keeps what was written by GDB from being forgotten with the breakpoint that it was written under.
    pub fn write(&mut self, memory: &GuestMemory, physical: u64, bytes: &[u8]) -> bool {
        if memory.write_slice(bytes, GuestAddress(physical)).is_err() {
            return false;
        }
        let range = physical..physical.saturating_add(bytes.len() as u64);
        for (address, (original, _)) in self.software.range_mut(range) {
            *original = bytes[(address - physical) as usize];
            let _ = memory.write_obj(INT3, GuestAddress(*address));
        }
        true
    }

    /// Takes all away.
    pub fn clear(&mut self, memory: &GuestMemory) {
        for (physical, (original, _)) in std::mem::take(&mut self.software) {
            put_back(memory, physical, original);
        }
        self.hardware = DebugRegisters::default();
    }

    /// How KVM is to debug a vCPU that goes on.
    pub fn control(&self, steps: bool, gives_int3: bool) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, ..Default::default() };
        if steps {
            debug.control |= KVM_GUESTDBG_SINGLESTEP;
        }
        if gives_int3 {
            debug.control |= KVM_GUESTDBG_INJECT_BP;
        }
        self.hardware.control(&mut debug);
        debug
    }
}

fn put_back(memory: &GuestMemory, physical: u64, original: u8) {
    // It was there when the breakpoint was made, and guest memory stays.
    let _ = memory.write_obj(original, GuestAddress(physical));
}

#[cfg(test)]
mod tests {
    use super::super::debug_registers::Event;
    use super::*;
    use crate::devices::virtio::queue::testing::memory;
    use kvm_bindings::KVM_GUESTDBG_USE_HW_BP;

    #[test]
    fn software_breakpoints_are_in_memory_and_not_in_what_is_shown() {
        let memory = memory();
        memory.write_slice(&[1, 2, 3, 4], GuestAddress(0x1000)).unwrap();
        let mut breakpoints = Breakpoints::default();
        assert!(breakpoints.add_software(&memory, 0x1001) && breakpoints.add_software(&memory, 0x1001));
        assert!(!breakpoints.add_software(&memory, 1 << 40));
        let mut bytes = [0; 4];
        memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        assert_eq!(bytes, [1, INT3, 3, 4]);
        breakpoints.hide(0x1000, &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4]);
        assert!(breakpoints.write(&memory, 0x1000, &[5, 6]));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1001)).unwrap(), INT3);
        assert!(breakpoints.remove_software(&memory, 0x1001) && breakpoints.has_software(0x1001));
        assert!(breakpoints.remove_software(&memory, 0x1001) && !breakpoints.remove_software(&memory, 0x1001));
        memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        assert_eq!(bytes, [5, 6, 3, 4]);
    }

    #[test]
    fn kvm_is_told_of_steps_and_of_hardware_only_where_there_are_any() {
        let mut breakpoints = Breakpoints::default();
        let always = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
        assert_eq!(breakpoints.control(false, false).control, always);
        assert!(breakpoints.hardware.add(Event::Write, 0x1000, 8));
        let debug = breakpoints.control(true, true);
        let wanted = always | KVM_GUESTDBG_USE_HW_BP | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_INJECT_BP;
        assert_eq!((debug.control, debug.arch.debugreg[0]), (wanted, 0x1000));
    }
}
