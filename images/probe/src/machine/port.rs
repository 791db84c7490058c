//! Port input and output, allowed in ring 3 by the I/O privilege level.

use core::arch::asm;

/// # Safety
/// The device behind `port` must do nothing to memory that Rust owns.
pub unsafe fn write8(port: u16, value: u8) {
    // SAFETY: a port write touches no memory of this program; the caller vouches for the device.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}
