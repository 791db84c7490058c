//! The MMIO transport (virtio 1.2, section 4.2), from a window to a device that is ready.
//!
//! Each access to a register is an exit of the virtual CPU, so registers are touched as often as the
//! specification asks and not once more.

use core::fmt;

use mallee_probe::ring::{Queue, Rings};
use mallee_probe::windows::Place;

use crate::machine::apic;

/// Guest-physical address of the first window: `mallee_vmm::api::guest::VIRTIO_MMIO_BASE`.
pub const WINDOWS: u64 = 0xd000_0000;
/// Distance between windows: `mallee_vmm::api::guest::VIRTIO_MMIO_STRIDE`.
pub const STRIDE: u64 = 0x1000;
/// Interrupt of the first window: `mallee_vmm::api::guest::VIRTIO_MMIO_FIRST_GSI`.
const FIRST_GSI: u32 = 5;
/// Windows that are looked at: as many as an I/O APIC has pins left.
pub const WINDOWS_MAX: u32 = 19;

/// Registers (table 4.1).
pub mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_TYPE: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESCRIPTORS: u64 = 0x080;
    pub const QUEUE_AVAILABLE: u64 = 0x090;
    pub const QUEUE_USED: u64 = 0x0a0;
    pub const CONFIGURATION: u64 = 0x100;
}

/// Device status (section 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 0x40;
}

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;

/// Feature bits of every device (section 6).
pub const EVENT_INDEX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// A window with a device in it.
#[derive(Clone, Copy)]
pub struct Window {
    place: Place,
    device_type: u32,
}

/// Why a device is not used.
#[derive(Debug)]
pub enum Error {
    /// It is of another version than 1.x, or does not accept what was chosen of its features.
    Features,
    /// It has fewer descriptors in this queue than the driver needs, or no such queue.
    Queue(u16),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Features => f.write_str("cannot agree on features"),
            Error::Queue(index) => write!(f, "queue {index} is too small"),
        }
    }
}

impl Window {
    /// Window `index` of those that our monitor gives out. `None` without a device of the current version.
    pub fn open(index: u32) -> Option<Window> {
        Window::at(Place { address: WINDOWS + u64::from(index) * STRIDE, gsi: FIRST_GSI + index })
    }

    /// The window at `place`.
    pub fn at(place: Place) -> Option<Window> {
        let mut window = Window { place, device_type: 0 };
        if window.read(register::MAGIC) != MAGIC || window.read(register::VERSION) != VERSION {
            return None;
        }
        window.device_type = window.read(register::DEVICE_TYPE);
        Some(window)
    }

    pub fn device_type(self) -> u32 {
        self.device_type
    }

    /// A 32-bit word of the device's own configuration.
    pub fn configuration(self, offset: u64) -> u32 {
        self.read(register::CONFIGURATION + offset)
    }

    /// Begins initialisation (section 3.1.1, steps 1 to 6): of `wanted`, the features that there are.
    pub fn negotiate(self, wanted: u64) -> Result<u64, Error> {
        self.write(register::STATUS, 0);
        // Each step for itself: there are monitors that take no two at once.
        self.write(register::STATUS, status::ACKNOWLEDGE);
        self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.write(register::DEVICE_FEATURES_SELECT, half);
            offered |= u64::from(self.read(register::DEVICE_FEATURES)) << (32 * half);
        }
        if offered & VERSION_1 == 0 {
            return Err(Error::Features);
        }
        let chosen = offered & (wanted | VERSION_1);
        for half in 0..2 {
            self.write(register::DRIVER_FEATURES_SELECT, half);
            self.write(register::DRIVER_FEATURES, (chosen >> (32 * half)) as u32);
        }
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(register::STATUS, ready);
        if self.read(register::STATUS) & status::FEATURES_OK == 0 {
            return Err(Error::Features);
        }
        Ok(chosen)
    }

    /// Hands a queue's memory to the device.
    pub fn set_up_queue<const N: usize>(
        self,
        index: u16,
        rings: &'static Rings<N>,
        features: u64,
    ) -> Result<Queue<N>, Error> {
        self.write(register::QUEUE_SELECT, index.into());
        if (self.read(register::QUEUE_SIZE_MAX) as usize) < N {
            return Err(Error::Queue(index));
        }
        let queue = Queue::new(rings, features & EVENT_INDEX != 0);
        self.write(register::QUEUE_SIZE, N as u32);
        let [descriptors, available, used] = queue.addresses();
        for (register, address) in [
            (register::QUEUE_DESCRIPTORS, descriptors),
            (register::QUEUE_AVAILABLE, available),
            (register::QUEUE_USED, used),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
        Ok(queue)
    }

    /// Ends initialisation: the device is live.
    pub fn start(self) {
        let running = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.write(register::STATUS, running);
    }

    /// Stops the device; its memory is the driver's again.
    pub fn reset(self) {
        self.write(register::STATUS, 0);
        while self.read(register::STATUS) != 0 {
            core::hint::spin_loop();
        }
    }

    pub fn notify(self, queue: u16) {
        self.write(register::QUEUE_NOTIFY, queue.into());
    }

    /// Lets the device's interrupt wake the guest.
    pub fn route_interrupt(self) {
        apic::route(self.place.gsi);
    }

    /// Takes note of the device's interrupt, as it wants (section 4.2.2.2). On monitors that answer each access, two exits.
    pub fn acknowledge_interrupt(self) {
        let pending = self.read(register::INTERRUPT_STATUS);
        if pending != 0 {
            self.write(register::INTERRUPT_ACKNOWLEDGE, pending);
        }
    }

    fn address(self, register: u64) -> u64 {
        self.place.address + register
    }

    /// Reads a register.
    pub fn read(self, register: u64) -> u32 {
        // SAFETY: the page tables map all windows; reading a register touches no memory.
        unsafe { (self.address(register) as *const u32).read_volatile() }
    }

    /// Writes a register.
    pub fn write(self, register: u64, value: u32) {
        // SAFETY: as above. What makes the device touch memory is the queues' contents, and those
        // name only buffers of `virtio::buffers` and `trial::scratch`, or none that are RAM.
        unsafe { (self.address(register) as *mut u32).write_volatile(value) };
    }
}
