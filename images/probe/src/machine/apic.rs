//! The local APIC (timer, end of interrupt) and the I/O APIC (routes of device interrupts).
//!
//! Both are reached through their memory windows, from ring 3. Registers: Intel SDM volume 3,
//! table 11-1, and the 82093AA data sheet, section 3.

use crate::boot::traps::{SPURIOUS, TIMER, WAKE};

const LOCAL: u64 = 0xfee0_0000;
const LOCAL_ID: u64 = 0x20;
const END_OF_INTERRUPT: u64 = 0xb0;
const SPURIOUS_VECTOR: u64 = 0xf0;
const TIMER_VECTOR: u64 = 0x320;
const LINT0: u64 = 0x350;
const TIMER_INITIAL: u64 = 0x380;
const TIMER_CURRENT: u64 = 0x390;
const TIMER_DIVIDE: u64 = 0x3e0;

/// Spurious-interrupt register: the APIC is enabled.
const ENABLE: u32 = 1 << 8;
/// A local vector table entry that lets nothing in.
const MASKED: u32 = 1 << 16;
/// The timer's clock is divided by this, so that it can wait for a minute.
pub const DIVISOR: u32 = 16;
/// Divide configuration register: by 16.
const DIVIDE_BY_16: u32 = 0b0011;

const IO_SELECT: u64 = 0xfec0_0000;
const IO_WINDOW: u64 = 0xfec0_0010;
const IO_REDIRECTION: u32 = 0x10;

/// Enables the local APIC and its timer in one-shot mode, and shuts the way by which the old 8259 would
/// interrupt with vectors that are the processor's own.
pub fn enable() {
    write(LOCAL + LINT0, MASKED);
    write(LOCAL + SPURIOUS_VECTOR, ENABLE | u32::from(SPURIOUS));
    write(LOCAL + TIMER_DIVIDE, DIVIDE_BY_16);
    write(LOCAL + TIMER_VECTOR, u32::from(TIMER));
}

/// Routes a global system interrupt, edge triggered and active high, to this processor.
pub fn route(gsi: u32) {
    let here = read(LOCAL + LOCAL_ID) & 0xff00_0000;
    let entry = IO_REDIRECTION + 2 * gsi;
    write(IO_SELECT, entry + 1);
    write(IO_WINDOW, here);
    write(IO_SELECT, entry);
    write(IO_WINDOW, u32::from(WAKE));
}

/// Lets the timer interrupt once after `ticks`; 0 stops it.
pub fn set_timer(ticks: u32) {
    write(LOCAL + TIMER_INITIAL, ticks);
}

/// What is left of the timer's ticks.
pub fn timer_left() -> u32 {
    read(LOCAL + TIMER_CURRENT)
}

/// Ends the interrupt in service. Without one it does nothing.
pub fn end_of_interrupt() {
    write(LOCAL + END_OF_INTERRUPT, 0);
}

fn read(address: u64) -> u32 {
    // SAFETY: the address is a register of an APIC, mapped by the page tables; reading has no effect
    // on memory.
    unsafe { (address as *const u32).read_volatile() }
}

fn write(address: u64, value: u32) {
    // SAFETY: as above. An interrupt is the only thing that can follow, and its handler only wakes.
    unsafe { (address as *mut u32).write_volatile(value) };
}
