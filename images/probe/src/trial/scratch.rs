//! The memory that a trial's queues and buffers are in: bytes that the devices may do with what they like, reached by
//! offset, a volatile access each.
//!
//! Every queue has a place of its own for each of its three parts, large enough for the largest size that is tried
//! ([`QUEUE_SIZE`]); the buffers follow behind the last queue.

use core::cell::UnsafeCell;

/// Descriptors of a queue that is set up rightly: no device here has more.
pub const QUEUE_SIZE: u16 = 256;
/// Queues that a device is given at most.
pub const QUEUES: u16 = 8;
/// A page for the descriptors, one for the available ring, one for the used ring, and a spare one.
const QUEUE_STRIDE: usize = 4 * 4096;
const BUFFERS: usize = QUEUES as usize * QUEUE_STRIDE;
/// Bytes for buffers.
pub const BUFFERS_SIZE: usize = 256 * 1024;

#[repr(C, align(4096))]
struct Area(UnsafeCell<[u8; BUFFERS + BUFFERS_SIZE]>);

// SAFETY: there is one processor and one flow of control, and all accesses go through the volatile ones below: no reference to
// what a device writes is ever made.
unsafe impl Sync for Area {}

static AREA: Area = Area(UnsafeCell::new([0; BUFFERS + BUFFERS_SIZE]));

/// Where the parts of a queue are.
#[derive(Clone, Copy)]
pub struct Place {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

pub fn queue(index: u16) -> Place {
    let start = AREA.0.get() as u64 + u64::from(index % QUEUES) * QUEUE_STRIDE as u64;
    Place { descriptors: start, available: start + 4096, used: start + 2 * 4096 }
}

/// Address of the buffer space at `offset`, which wraps around.
pub fn buffer(offset: usize) -> u64 {
    AREA.0.get() as u64 + (BUFFERS + offset % BUFFERS_SIZE) as u64
}

/// Clears a queue's descriptors and rings.
pub fn clear(index: u16) {
    for offset in (0..QUEUE_STRIDE as u64).step_by(8) {
        write(queue(index).descriptors + offset, 0u64);
    }
}

/// Writes to an address that [`queue`] or [`buffer`] gave, or one close behind it.
pub fn write<T: Copy>(address: u64, value: T) {
    assert!(is_within(address, size_of::<T>()));
    // SAFETY: within the area, which belongs to the trial and its devices alone; any bytes are fine there.
    unsafe { (address as *mut T).write_unaligned(value) };
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

/// Reads 16 bits, which a device may be writing.
pub fn read16(address: u64) -> u16 {
    assert!(is_within(address, 2));
    // SAFETY: within the area and aligned, as rings are; volatile, since a device writes it meanwhile.
    unsafe { ((address & !1) as *const u16).read_volatile() }
}

fn is_within(address: u64, length: usize) -> bool {
    let start = AREA.0.get() as u64;
    address >= start && address + length as u64 <= start + (BUFFERS + BUFFERS_SIZE) as u64
}
