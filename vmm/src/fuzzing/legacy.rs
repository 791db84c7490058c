//! The devices that are reached through ports: each takes any byte at any time.

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::backends::console::Console;
use crate::devices::IrqLine;
use crate::devices::i8042::I8042;
use crate::devices::serial::SerialPort;
use crate::events::Events;

#[derive(Debug, Arbitrary)]
enum Access {
    SerialRead { offset: u8, width: u8 },
    SerialWrite { offset: u8, data: [u8; 3] },
    SerialInput([u8; 5]),
    SerialFlush,
    KeyboardStatus,
    KeyboardRead,
    KeyboardWrite(u8),
    KeyboardCommand(u8),
    CtrlAltDel,
}

/// The serial port and the keyboard controller under any sequence of accesses.
pub fn legacy_devices(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let irq = || IrqLine(EventFd::new(EFD_NONBLOCK).unwrap());
    let log = super::folder().join("serial");
    let console = Console::file(&log, 1 << 20).unwrap();
    let mut serial = SerialPort::new(irq(), console, Arc::new(Events::open(None).unwrap())).unwrap();
    let mut keyboard = I8042::new(irq());
    while !input.is_empty() {
        match input.arbitrary().unwrap_or(Access::SerialFlush) {
            Access::SerialRead { offset, width } => serial.read(offset & 7, &mut vec![0; usize::from(width % 9)]),
            Access::SerialWrite { offset, data } => serial.write(offset & 7, &data),
            Access::SerialInput(bytes) => serial.input(&bytes[..serial.input_room().min(bytes.len())]),
            Access::SerialFlush => serial.flush(),
            Access::KeyboardStatus => drop(keyboard.read_status()),
            Access::KeyboardRead => drop(keyboard.read_data()),
            Access::KeyboardWrite(byte) => drop(keyboard.write_data(byte)),
            Access::KeyboardCommand(byte) => drop(keyboard.write_command(byte)),
            Access::CtrlAltDel => drop(keyboard.ctrl_alt_del()),
        }
    }
}
