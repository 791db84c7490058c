//! Memory that devices read and write: a buffer for each descriptor of a queue.

use core::cell::UnsafeCell;

use mallee_probe::ring;

/// `N` buffers of `SIZE` bytes. Buffer *n* belongs to whoever has slot *n* of the queue.
#[repr(C, align(64))]
pub struct Buffers<const N: usize, const SIZE: usize>(UnsafeCell<[[u8; SIZE]; N]>);

// SAFETY: there is one processor and one flow of control. The devices are the others, and
// which buffer is whose is what `Pool` keeps.
unsafe impl<const N: usize, const SIZE: usize> Sync for Buffers<N, SIZE> {}

impl<const N: usize, const SIZE: usize> Buffers<N, SIZE> {
    pub const fn new() -> Self {
        Buffers(UnsafeCell::new([[0; SIZE]; N]))
    }
}

/// The one owner of some buffers.
pub struct Pool<const N: usize, const SIZE: usize>(*mut [u8; SIZE]);

impl<const N: usize, const SIZE: usize> Pool<N, SIZE> {
    /// # Safety
    /// There must be no other pool over `buffers`.
    pub const unsafe fn new(buffers: &'static Buffers<N, SIZE>) -> Self {
        Pool(buffers.0.get().cast())
    }

    /// The buffer of a slot, as it is given to the device.
    pub fn describe(&self, slot: u16, length: usize, writable: bool) -> ring::Buffer {
        let address = self.pointer(slot) as u64;
        // A buffer is a few kilobytes at most.
        ring::Buffer { address, length: length.min(SIZE) as u32, writable }
    }

    /// The bytes of a slot's buffer.
    ///
    /// # Safety
    /// The slot must not be the device's: it was never offered, or has been taken back.
    pub unsafe fn bytes(&mut self, slot: u16) -> &mut [u8; SIZE] {
        // SAFETY: in bounds (see `pointer`), alive for ever, borrowed from the only owner, and the
        // caller vouches that the device has no claim to it.
        unsafe { &mut *self.pointer(slot) }
    }

    fn pointer(&self, slot: u16) -> *mut [u8; SIZE] {
        assert!(usize::from(slot) < N);
        // SAFETY: the slot is within the array.
        unsafe { self.0.add(slot.into()) }
    }
}
