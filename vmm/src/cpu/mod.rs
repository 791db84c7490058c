//! The state a vCPU starts with: CPUID, model-specific registers, local APIC, and, for the boot CPU,
//! the registers and tables of the 64-bit boot protocol.

pub mod cpuid;
pub mod lapic;
pub mod msrs;
pub mod regs;
