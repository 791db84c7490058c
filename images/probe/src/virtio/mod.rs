//! The virtio devices of the machine: finding them, and a driver for each kind that is used.

pub mod blk;
pub mod buffers;
pub mod mmio;
pub mod net;
pub mod rng;

/// Device types (virtio 1.2, section 5).
pub mod device_type {
    pub const NET: u32 = 1;
    pub const BLOCK: u32 = 2;
    pub const CONSOLE: u32 = 3;
    pub const ENTROPY: u32 = 4;
    pub const BALLOON: u32 = 5;
    pub const VSOCK: u32 = 19;
}

/// The first device of each kind that the probe drives.
#[derive(Default)]
pub struct Found {
    pub net: Option<mmio::Window>,
    pub block: Option<mmio::Window>,
    pub entropy: Option<mmio::Window>,
}

/// Looks at the windows one after the other, to the first that has no device in it.
pub fn scan() -> Found {
    let mut found = Found::default();
    for index in 0..mmio::WINDOWS_MAX {
        let Some(window) = mmio::Window::open(index) else { break };
        let place = match window.device_type() {
            device_type::NET => &mut found.net,
            device_type::BLOCK => &mut found.block,
            device_type::ENTROPY => &mut found.entropy,
            _ => continue,
        };
        place.get_or_insert(window);
    }
    found
}
