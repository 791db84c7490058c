//! The serial console, write only.
//!
//! A byte is one exit of the virtual CPU (27 µs on a software KVM), so lines are few and short, and
//! the transmitter's state is not asked for: an emulated one is always ready.

use core::fmt::{self, Write};

use super::port;

/// The first serial port: `mallee_vmm::api::guest::SERIAL_PORT`.
const PORT: u16 = 0x3f8;

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        bytes(text.as_bytes());
        Ok(())
    }
}

pub fn bytes(bytes: &[u8]) {
    for byte in bytes {
        // SAFETY: the port is the transmit register of a 16550, which touches no memory.
        unsafe { port::write8(PORT, *byte) };
    }
}

/// Writes a line and its end, at once. Others should go through [`super::console`].
pub fn line(text: fmt::Arguments<'_>) {
    // A serial line has no errors to tell of.
    let _ = Serial.write_fmt(text);
    let _ = Serial.write_str("\r\n");
}
