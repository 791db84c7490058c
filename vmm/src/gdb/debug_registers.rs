//! The processor's four debug registers (Intel SDM 3B, 18.2): hardware breakpoints and watchpoints share them.
//!
//! A register stops at an address of the guest's own, whatever memory is there or will be. One that watches does so at 1, 2, 4 or 8 bytes that lie at a
//! multiple of their number; other ranges take several registers. A processor can watch for writes, or for reads and writes; it
//! cannot watch for reads alone, and this file does not pretend that it could.
//!
//! What watches sees what a vCPU's own instructions do: not a device that writes to memory, and not an instruction that KVM carries out for the vCPU.

use kvm_bindings::{KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug};

const REGISTERS: usize = 4;
/// The most that a register watches (bytes).
const WIDEST: u64 = 8;
/// Bits of DR7 that are always set (18.2.4), and the one that makes enabled addresses exact.
const DR7: u64 = 1 << 10 | 1 << 9;

/// What a register stops at, as DR7's fields R/W0 to R/W3 say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Event {
    /// Before an instruction is executed.
    Execute = 0b00,
    /// After data was written.
    Write = 0b01,
    /// After data was read or written.
    Access = 0b11,
}

/// A register in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trap {
    pub event: Event,
    pub address: u64,
    /// Bytes; 1 for an instruction, whose first byte counts.
    length: u64,
}

#[derive(Debug, Default)]
pub struct DebugRegisters([Option<Trap>; REGISTERS]);

impl DebugRegisters {
    /// Has `event` at any of `length` bytes from `address` on stop a vCPU. False, and nothing is changed, if that needs more registers than
    /// are free.
    pub fn add(&mut self, event: Event, address: u64, length: u64) -> bool {
        let free: Vec<usize> = (0..REGISTERS).filter(|index| self.0[*index].is_none()).collect();
        // One more than there can be says enough of a long range.
        let traps: Vec<Trap> = traps(event, address, length).take(REGISTERS + 1).collect();
        if traps.is_empty() || traps.len() > free.len() {
            return false;
        }
        for (index, trap) in free.into_iter().zip(traps) {
            self.0[index] = Some(trap);
        }
        true
    }

    /// Takes back one [`Self::add`] of the same. False if there was none.
    pub fn remove(&mut self, event: Event, address: u64, length: u64) -> bool {
        let mut left = self.0;
        for trap in traps(event, address, length).take(REGISTERS + 1) {
            match left.iter_mut().find(|register| **register == Some(trap)) {
                Some(register) => *register = None,
                None => return false,
            }
        }
        let is_another = left != self.0;
        self.0 = left;
        is_another
    }

    /// Which of the registers in use a debug exception with this DR6 (18.2.3) is about. A processor may also name one that is not in use. Data first:
    /// the instruction that touched it is over, one that is to be executed meets its breakpoint again.
    pub fn met(&self, dr6: u64) -> Option<Trap> {
        let met = |index: &usize| dr6 & 1 << index != 0;
        let traps = || (0..REGISTERS).filter(met).filter_map(|index| self.0[index]);
        traps().find(|trap| trap.event != Event::Execute).or_else(|| traps().next())
    }

    /// Adds the registers to what KVM is told.
    pub fn control(&self, debug: &mut kvm_guest_debug) {
        let mut dr7 = DR7;
        for (index, trap) in self.0.iter().enumerate() {
            let Some(trap) = trap else { continue };
            debug.arch.debugreg[index] = trap.address;
            // Enabled for all tasks; event and length.
            dr7 |= 2 << (2 * index) | (trap.event as u64 | trap.length_field() << 2) << (16 + 4 * index);
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
        }
        debug.arch.debugreg[7] = dr7;
    }
}

impl Trap {
    /// DR7's LEN0 to LEN3.
    fn length_field(self) -> u64 {
        match self.length {
            8 => 0b10,
            bytes => bytes - 1,
        }
    }
}

/// One for each register that a range needs.
fn traps(event: Event, address: u64, length: u64) -> impl Iterator<Item = Trap> {
    let mut left = length;
    let mut at = address;
    std::iter::from_fn(move || {
        let length = [WIDEST, 4, 2, 1].into_iter().find(|length| *length <= left && at.is_multiple_of(*length))?;
        let trap = Trap { event, address: at, length };
        left -= length;
        at = at.wrapping_add(length);
        Some(trap)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn told(registers: &DebugRegisters) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug::default();
        registers.control(&mut debug);
        debug
    }

    #[test]
    fn breakpoints_and_watchpoints_share_four_registers() {
        let mut registers = DebugRegisters::default();
        assert_eq!(told(&registers).control, 0);
        assert!(registers.add(Event::Execute, 0x101, 1) && registers.add(Event::Write, 0x108, 8));
        assert!(registers.add(Event::Access, 0x202, 2) && registers.add(Event::Write, 0x304, 4));
        assert!(!registers.add(Event::Execute, 9, 1));
        let debug = told(&registers);
        assert_eq!(debug.arch.debugreg[..4], [0x101, 0x108, 0x202, 0x304]);
        // Intel SDM 3B, figure 18-1: LEN and R/W of registers 3 to 0, GE and the reserved bit, G3 to G0.
        assert_eq!(debug.arch.debugreg[7], 0b1101_0111_1001_0000 << 16 | 0x600 | 0b1010_1010);
        assert_eq!(debug.control, KVM_GUESTDBG_USE_HW_BP);
        assert!(registers.remove(Event::Write, 0x108, 8) && !registers.remove(Event::Write, 0x108, 8));
        assert!(!registers.remove(Event::Access, 0x304, 4));
        assert_eq!(told(&registers).arch.debugreg[..4], [0x101, 0, 0x202, 0x304]);
        assert!(registers.add(Event::Execute, 9, 1));
    }

    #[test]
    fn a_range_that_one_register_cannot_watch_takes_several_or_is_refused_whole() {
        let mut registers = DebugRegisters::default();
        assert!(!registers.add(Event::Write, 0x1001, 16) && !registers.add(Event::Write, 0x1000, 1 << 40));
        assert!(!registers.add(Event::Write, 0x1000, 0) && !registers.remove(Event::Write, 0x1000, 0));
        assert_eq!(told(&registers).control, 0);
        assert!(registers.add(Event::Write, 0x1006, 12));
        assert_eq!(told(&registers).arch.debugreg[..4], [0x1006, 0x1008, 0x1010, 0]);
        assert!(!registers.remove(Event::Write, 0x1006, 16) && registers.remove(Event::Write, 0x1006, 12));
        assert_eq!(told(&registers).control, 0);
    }

    #[test]
    fn a_register_that_is_not_in_use_is_not_what_was_met() {
        let mut registers = DebugRegisters::default();
        registers.add(Event::Execute, 0x10, 1);
        registers.add(Event::Access, 0x20, 4);
        assert_eq!(registers.met(0b1100), None);
        assert_eq!(registers.met(0b1001).map(|trap| trap.address), Some(0x10));
        assert_eq!(registers.met(0b0011).map(|trap| (trap.event, trap.address)), Some((Event::Access, 0x20)));
    }

    proptest! {
        /// Pieces that the processor can watch, side by side, of exactly the range.
        #[test]
        fn a_range_is_covered_by_aligned_pieces(address: u64, length in 1u64..200) {
            let mut at = address;
            for trap in traps(Event::Write, address, length) {
                prop_assert_eq!(trap.address, at);
                prop_assert!(matches!(trap.length, 1 | 2 | 4 | 8) && at.is_multiple_of(trap.length));
                at = at.wrapping_add(trap.length);
            }
            prop_assert_eq!(at.wrapping_sub(address), length);
        }
    }
}
