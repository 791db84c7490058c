//! Dispatch of the accesses that a vCPU could not do on its own.
//!
//! The map is fixed when the VM is built, so it is a `match`, not a search. Each device has a lock of
//! its own; none is held while another is taken. Ports and windows that nobody owns read as all ones and
//! swallow what is written, as an empty bus does.

use std::sync::{Mutex, MutexGuard};

use crate::api::guest;
use crate::devices::boot_timer::BootTimer;
use crate::devices::i8042::I8042;
use crate::devices::serial::SerialPort;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::{MachineRequest, acpi_pm};

/// I/O ports beside those in [`guest`].
pub mod port {
    pub const KEYBOARD_DATA: u16 = 0x60;
    pub const KEYBOARD_COMMAND: u16 = 0x64;
    pub const SLEEP_CONTROL: u16 = 0x600;
    pub const SLEEP_STATUS: u16 = 0x601;
    pub const RESET: u16 = 0x602;
}

const SERIAL_FIRST: u16 = guest::SERIAL_PORT;
const SERIAL_LAST: u16 = guest::SERIAL_PORT + 7;

pub struct Bus {
    pub serial: Mutex<SerialPort>,
    pub keyboard: Mutex<I8042>,
    pub boot_timer: BootTimer,
    /// Window *n* is at `VIRTIO_MMIO_BASE` plus *n* times `VIRTIO_MMIO_STRIDE`.
    pub virtio: Vec<Mutex<MmioTransport>>,
}

impl Bus {
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL_FIRST..=SERIAL_LAST => {
                lock(&self.serial).read((port - SERIAL_FIRST) as u8, data);
            }
            port::KEYBOARD_DATA => data.fill(lock(&self.keyboard).read_data()),
            port::KEYBOARD_COMMAND => data.fill(lock(&self.keyboard).read_status()),
            port::SLEEP_CONTROL..=port::RESET => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// Returns what the write asks of the whole machine, if anything.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Option<MachineRequest> {
        let value = *data.first()?;
        match port {
            SERIAL_FIRST..=SERIAL_LAST => {
                lock(&self.serial).write((port - SERIAL_FIRST) as u8, data);
                None
            }
            guest::BOOT_TIMER_PORT => {
                self.boot_timer.write(value);
                None
            }
            port::KEYBOARD_DATA => lock(&self.keyboard).write_data(value),
            port::KEYBOARD_COMMAND => lock(&self.keyboard).write_command(value),
            port::SLEEP_CONTROL => acpi_pm::write_sleep_control(value),
            port::RESET => acpi_pm::write_reset(value),
            _ => None,
        }
    }

    pub fn read_mmio(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((device, offset)) => lock(device).read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub fn write_mmio(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.window(address) {
            lock(device).write(offset, data);
        }
    }

    fn window(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let offset = address.checked_sub(guest::VIRTIO_MMIO_BASE)?;
        let index = usize::try_from(offset / guest::VIRTIO_MMIO_STRIDE).ok()?;
        Some((self.virtio.get(index)?, offset % guest::VIRTIO_MMIO_STRIDE))
    }
}

/// A device whose other user panicked is still only a device: its state is whatever the guest made it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
