//! The first serial port: a 16550A (register model from `vm-superio`) and where its output goes.
//!
//! A guest's console writes byte by byte, and each byte is an exit already; writing each to the host
//! at once would double its cost. So a byte after a pause is written at once and opens a window of
//! [`WINDOW`]; what comes within it is held until a line ends, the buffer is full or the window
//! closes. A sign of life arrives without delay, a prompt as soon as a person could tell, and a talkative
//! boot costs one system call a line.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{self, NoEvents};
use vm_superio::{Serial, SerialState};
use vmm_sys_util::timerfd::TimerFd;

use super::IrqLine;
use crate::api::EventKind;
use crate::backends::console::Console;
use crate::events::Events;
use crate::metrics::PROCESS;

/// Interrupt of the first serial port.
pub const GSI: u32 = 4;
const WINDOW: Duration = Duration::from_millis(20);
/// The shortest time that a timer takes; zero would stop it.
const AT_ONCE: Duration = Duration::from_nanos(1);
const BUFFER: usize = 4096;

pub struct SerialPort {
    uart: Serial<IrqLine, NoEvents, Output>,
}

impl SerialPort {
    pub fn new(irq: IrqLine, console: Console, events: Arc<Events>) -> io::Result<Self> {
        Self::restore(irq, console, events, &SerialState::default().into())
    }

    /// A port that is what the saved one was. What that had to interrupt for, this one interrupts for again.
    pub fn restore(
        irq: IrqLine,
        console: Console,
        events: Arc<Events>,
        registers: &SerialRegisters,
    ) -> io::Result<Self> {
        let output = Output {
            console,
            buffer: Vec::with_capacity(BUFFER),
            timer: TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?,
            window_is_open: false,
            rotation_is_asked_for: false,
            events: Some(events),
        };
        let uart = Serial::from_state(&registers.into(), irq, NoEvents, output).map_err(|error| match error {
            serial::Error::Trigger(error) | serial::Error::IOError(error) => error,
            serial::Error::FullFifo => io::Error::other("more input than the FIFO takes"),
        })?;
        Ok(SerialPort { uart })
    }

    pub fn save(&self) -> SerialRegisters {
        SerialRegisters::from(self.uart.state())
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

    /// Writes what is held, closes the window, and begins a new file where the present one is full. For the main thread: a vCPU's
    /// may not open files.
    pub fn flush(&mut self) {
        let output = self.uart.writer_mut();
        output.close_window();
        output.console.rotate();
    }
}

/// The port in a snapshot: registers, and input that the guest has not read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialRegisters {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl From<SerialState> for SerialRegisters {
    fn from(state: SerialState) -> Self {
        SerialRegisters {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }
}

impl From<&SerialRegisters> for SerialState {
    fn from(registers: &SerialRegisters) -> Self {
        SerialState {
            baud_divisor_low: registers.baud_divisor[0],
            baud_divisor_high: registers.baud_divisor[1],
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            in_buffer: registers.input.clone(),
        }
    }
}

/// Line buffer in front of the console.
struct Output {
    console: Console,
    buffer: Vec<u8>,
    timer: TimerFd,
    window_is_open: bool,
    /// The timer was set for the sake of the console's file.
    rotation_is_asked_for: bool,
    /// Taken when the first byte has been reported.
    events: Option<Arc<Events>>,
}

impl Output {
    fn drain(&mut self) {
        if !self.buffer.is_empty() {
            self.console.write(&self.buffer);
            PROCESS.serial_written.add(self.buffer.len() as u64);
            self.buffer.clear();
        }
    }

    /// Without a timer there is no window, and every byte is written at once.
    fn open_window(&mut self, length: Duration) {
        self.window_is_open = self.timer.reset(length, None).is_ok();
    }

    fn close_window(&mut self) {
        if self.window_is_open {
            // An expired timer is cleared as one that runs is, and is not readable any more.
            let _ = self.timer.clear();
            self.window_is_open = false;
            self.rotation_is_asked_for = false;
        }
        self.drain();
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(events) = self.events.take() {
            events.emit(EventKind::FirstSerialByte);
        }
        self.buffer.extend_from_slice(bytes);
        if !self.window_is_open {
            self.drain();
            self.open_window(WINDOW);
        } else if bytes.last() == Some(&b'\n') || self.buffer.len() >= BUFFER {
            self.drain();
        }
        if self.console.is_rotation_due() && !self.rotation_is_asked_for {
            // The main thread waits for the timer.
            self.open_window(AT_ONCE);
            self.rotation_is_asked_for = self.window_is_open;
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
    fn a_byte_after_a_pause_is_written_at_once_then_whole_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let console = Console::file(&path, 1 << 20).unwrap();
        let events = Arc::new(Events::open(None).unwrap());
        let irq = IrqLine(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut port = SerialPort::new(irq, console, events).unwrap();
        // The timer of this port is looked at by nobody but the test.
        for (written, seen) in [("o", "o"), ("ne", "o"), ("\ntw", "one\n")] {
            port.write(0, written.as_bytes());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), seen);
        }
        port.flush();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntw");
        port.write(0, b"o");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo");
    }
}
