//! The virtio devices of the machine: finding them, and a driver for each kind that is used.

pub mod blk;
pub mod buffers;
pub mod mmio;
pub mod net;
pub mod rng;

use mallee_probe::windows::Place;

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

/// Looks at the windows that were named; without any at ours, one after the other, to the first that has no device in it.
pub fn scan(named: impl Iterator<Item = Place>) -> Found {
    let mut named = named.peekable();
    let ours = if named.peek().is_some() { 0 } else { mmio::WINDOWS_MAX };
    let mut found = Found::default();
    for window in named.filter_map(mmio::Window::at).chain((0..ours).map_while(mmio::Window::open)) {
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
