//! Lines for the serial console that wait until there is nothing better to do.
//!
//! A byte on the serial line is an exit. A line of text between a question and its answer would be
//! most of the answer's time, so lines are kept and written when the guest is idle.

use core::fmt::{self, Write};

use mallee_probe::wire::Writer;

use super::serial;

/// What is kept; more is cut off.
const SIZE: usize = 4096;
/// Bytes written at a time before looking at the network again.
const STEP: usize = 16;

pub struct Console {
    text: [u8; SIZE],
    length: usize,
    written: usize,
}

impl Console {
    pub const fn new() -> Self {
        Console { text: [0; SIZE], length: 0, written: 0 }
    }

    pub fn line(&mut self, line: fmt::Arguments<'_>) {
        let mut writer = Writer::new(&mut self.text[self.length..]);
        // A `Writer` cuts off and does not fail.
        let _ = writer.write_fmt(line);
        let _ = writer.write_str("\r\n");
        self.length += writer.len();
    }

    /// Writes a little. False if there was nothing to write.
    pub fn step(&mut self) -> bool {
        let waiting = &self.text[self.written..self.length];
        let step = &waiting[..waiting.len().min(STEP)];
        serial::bytes(step);
        self.written += step.len();
        let wrote = !step.is_empty();
        if self.written == self.length {
            (self.written, self.length) = (0, 0);
        }
        wrote
    }

    /// Writes all of it.
    pub fn drain(&mut self) {
        while self.step() {}
    }
}
