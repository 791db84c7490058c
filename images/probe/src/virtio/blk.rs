//! The block device (virtio 1.2, section 5.2): its size, for the console. The probe has no use for a disk.

use super::mmio::Window;

const SECTOR: u64 = 512;

/// Size in bytes.
pub fn capacity(window: Window) -> u64 {
    let sectors = u64::from(window.configuration(4)) << 32 | u64::from(window.configuration(0));
    sectors.saturating_mul(SECTOR)
}
