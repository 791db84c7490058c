//! A virtio-mmio window, set up step by step: unlike `virtio::mmio`'s, each step is one that can be left out or done wrongly.

use super::scratch::{self, QUEUE_SIZE, QUEUES};
use crate::machine::clock;
use crate::virtio::mmio::{Window, register, status};

/// How long a device may take to answer, in ticks of the counter: several seconds, however busy the host is.
const PATIENCE: u64 = 60_000_000_000;

/// Descriptor flags (virtio 1.2, 2.7.5).
pub mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

#[derive(Clone, Copy)]
pub struct Device {
    pub index: u32,
    pub window: Window,
    pub kind: u32,
    /// Number of queues, as far as there is memory for them.
    pub queues: u16,
}

impl Device {
    pub fn open(index: u32) -> Option<Device> {
        let window = Window::open(index)?;
        let queues = (0..QUEUES).take_while(|queue| largest(window, *queue) > 0).count() as u16;
        Some(Device { index, window, kind: window.device_type(), queues })
    }

    /// Brings it up by the rules, with all its features but `without`, and empty queues.
    pub fn start(&self, without: u64) -> Result<(), &'static str> {
        self.window.negotiate(!without).map_err(|_| "cannot agree on features")?;
        for queue in 0..self.queues {
            scratch::clear(queue);
            self.place(queue, self.size(queue), scratch::queue(queue));
        }
        self.window.start();
        Ok(())
    }

    /// Tells the device where a queue is.
    pub fn place(&self, queue: u16, size: u16, place: scratch::Place) {
        let window = self.window;
        window.write(register::QUEUE_SELECT, queue.into());
        window.write(register::QUEUE_SIZE, size.into());
        for (register, address) in [
            (register::QUEUE_DESCRIPTORS, place.descriptors),
            (register::QUEUE_AVAILABLE, place.available),
            (register::QUEUE_USED, place.used),
        ] {
            window.write(register, address as u32);
            window.write(register + 4, (address >> 32) as u32);
        }
        window.write(register::QUEUE_READY, 1);
    }

    /// The size that a queue is set up with.
    pub fn size(&self, queue: u16) -> u16 {
        largest(self.window, queue).min(QUEUE_SIZE.into()) as u16
    }

    pub fn describe(&self, queue: u16, slot: u16, descriptor: Descriptor) {
        scratch::write(scratch::queue(queue).descriptors + u64::from(slot % QUEUE_SIZE) * 16, descriptor);
    }

    /// Puts `head` into the available ring at `position`, without telling the device.
    pub fn offer(&self, queue: u16, position: u16, head: u16) {
        let slot = position % self.size(queue).max(1);
        scratch::write(scratch::queue(queue).available + 4 + 2 * u64::from(slot), head);
    }

    /// Sets the available index.
    pub fn advance(&self, queue: u16, index: u16) {
        scratch::write(scratch::queue(queue).available + 2, index);
    }

    pub fn kick(&self, queue: u16) {
        self.window.notify(queue);
    }

    /// How many requests were given back.
    pub fn used(&self, queue: u16) -> u16 {
        scratch::read16(scratch::queue(queue).used + 2)
    }

    pub fn needs_reset(&self) -> bool {
        self.window.read(register::STATUS) & status::NEEDS_RESET != 0
    }

    pub fn reset(&self) {
        self.window.reset();
    }

    /// Looks until `condition` holds; false if it does not for long.
    pub fn wait_until(&self, mut condition: impl FnMut() -> bool) -> bool {
        let begin = clock::ticks();
        loop {
            if condition() {
                return true;
            }
            if clock::ticks().wrapping_sub(begin) > PATIENCE {
                return false;
            }
            core::hint::spin_loop();
        }
    }
}

fn largest(window: Window, queue: u16) -> u32 {
    window.write(register::QUEUE_SELECT, queue.into());
    window.read(register::QUEUE_SIZE_MAX)
}
