//! The first serial port: a 16550A (register model from `vm-superio`) and where its output goes.
//!
//! A guest's console writes byte by byte, and each byte is an exit already; writing each to the host
//! at once would double its cost. Output is held until a line ends, the buffer is full or
//! [`FLUSH_AFTER`] has passed, whichever comes first: a prompt without a newline is seen as
//! soon as a person could tell.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vm_superio::Serial;
use vmm_sys_util::timerfd::TimerFd;

use super::IrqLine;
use crate::api::EventKind;
use crate::backends::console::Console;
use crate::events::Events;

/// Interrupt of the first serial port.
pub const GSI: u32 = 4;
const FLUSH_AFTER: Duration = Duration::from_millis(20);
const BUFFER: usize = 4096;

pub struct SerialPort {
    uart: Serial<IrqLine, vm_superio::serial::NoEvents, Output>,
}

impl SerialPort {
    pub fn new(irq: IrqLine, console: Console, events: Arc<Events>) -> io::Result<Self> {
        let output = Output {
            console,
            buffer: Vec::with_capacity(BUFFER),
            timer: TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?,
            armed: false,
            events: Some(events),
        };
        Ok(SerialPort { uart: Serial::new(irq, output) })
    }

    pub fn read(&mut self, offset: u8, data: &mut [u8]) {
        for byte in data {
            *byte = self.uart.read(offset);
        }
    }

    /// `data` has more than one byte for a string instruction (`rep outsb`).
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        for byte in data {
            if let Err(error) = self.uart.write(offset, *byte) {
                tracing::warn!(%error, "serial port");
            }
        }
    }

    /// How many bytes of input the guest's FIFO can take now.
    pub fn input_room(&self) -> usize {
        self.uart.fifo_capacity()
    }

    /// Input from the host; what exceeds [`Self::input_room`] is lost.
    pub fn input(&mut self, bytes: &[u8]) {
        let _ = self.uart.enqueue_raw_bytes(bytes);
    }

    /// The timer to wait on; call [`Self::flush`] when it expires.
    pub fn timer_fd(&self) -> RawFd {
        self.uart.writer().timer.as_raw_fd()
    }

    pub fn flush(&mut self) {
        self.uart.writer_mut().drain();
    }
}

/// Line buffer in front of the console.
struct Output {
    console: Console,
    buffer: Vec<u8>,
    timer: TimerFd,
    armed: bool,
    /// Taken when the first byte has been reported.
    events: Option<Arc<Events>>,
}

impl Output {
    fn drain(&mut self) {
        if self.armed {
            let _ = self.timer.clear();
            self.armed = false;
        }
        self.console.write(&self.buffer);
        self.buffer.clear();
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(events) = self.events.take() {
            events.emit(EventKind::FirstSerialByte);
        }
        self.buffer.extend_from_slice(bytes);
        if bytes.last() == Some(&b'\n') || self.buffer.len() >= BUFFER {
            self.drain();
        } else if !self.armed {
            let armed = self.timer.reset(FLUSH_AFTER, None);
            self.armed = armed.is_ok();
        }
        Ok(bytes.len())
    }

    /// Called by the register model after each byte; see the module's text for why nothing is done.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[test]
    fn a_line_is_written_at_its_end_and_a_prompt_when_flushed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let console = Console::file(&path, 1 << 20).unwrap();
        let events = Arc::new(Events::open(None).unwrap());
        let irq = IrqLine(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut port = SerialPort::new(irq, console, events).unwrap();
        port.write(0, b"one\ntw");
        assert_eq!(std::fs::read(&path).unwrap(), b"one\n");
        port.flush();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntw");
    }
}
