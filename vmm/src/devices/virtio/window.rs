//! What a driver reads of its devices: memory, one page a register window.
//!
//! A driver of virtio-mmio asks for the reason of each interrupt and acknowledges it (virtio 1.2, 4.2.2.2), and each of the two would be an
//! exit to a vCPU's thread: more than the interrupt itself costs. So the windows are a read-only memory slot (KVM_MEM_READONLY,
//! Documentation/virt/kvm/api.rst, as a flash chip is): the guest reads by itself, and only its writes come to us. What the registers say is
//! stored here, by the transport after each write, and by whoever raises an interrupt (`Interrupt`); a read that comes as an exit (a KVM without
//! such slots, `--trace-exits`) is answered from the same bytes.
//!
//! What may not happen here: a register whose reading has an effect, or a number of the host's that a guest should not have. It sees all of the page,
//! in any width and at any time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use crate::api::guest::{VIRTIO_MMIO_BASE, VIRTIO_MMIO_STRIDE};

const SIZE: usize = VIRTIO_MMIO_STRIDE as usize;
const CONFIG: usize = VIRTIO_MMIO_CONFIG as usize;

/// The windows of all devices, one after the other.
pub struct Windows(Arc<MmapRegion<()>>);

impl Windows {
    /// `count` windows of zeroes; at least one.
    pub fn new(count: usize) -> io::Result<Self> {
        MmapRegion::new(SIZE * count).map(|pages| Windows(Arc::new(pages))).map_err(io::Error::other)
    }

    /// The window of device `index`, which must be one of those that there are.
    pub fn window(&self, index: usize) -> Window {
        let start = index * SIZE;
        assert!(start < self.0.size(), "as many windows as devices were made");
        Window { pages: self.0.clone(), start }
    }

    /// Lets guests read them, as memory slot `slot`. They must be there as long as a vCPU may run: the bus, which has their transports, is.
    /// An error says that each read will be an exit.
    pub fn show(&self, vm: &VmFd, slot: u32) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: VIRTIO_MMIO_BASE,
            memory_size: self.0.size() as u64,
            userspace_addr: self.0.as_ptr() as u64,
            flags: KVM_MEM_READONLY,
        };
        // SAFETY: the range is a mapping of our own, of that size. Each transport holds it, a vCPU's thread holds the bus with the transports, and
        // whoever holds the VM joins these threads before the bus goes (`vm::RunningVm`).
        unsafe { vm.set_user_memory_region(region) }
    }
}

/// A device's window, as it is read.
#[derive(Clone)]
pub struct Window {
    pages: Arc<MmapRegion<()>>,
    start: usize,
}

impl Window {
    /// One that no guest reads by itself.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn alone() -> Self {
        Windows::new(1).expect("a page of memory").window(0)
    }

    /// A register: its offset is that of an aligned word in the window (virtio 1.2, 4.2.2).
    pub fn register(&self, offset: u32) -> &AtomicU32 {
        self.pages
            .get_atomic_ref(self.start + (offset as usize & (SIZE - 4)))
            .expect("a word within a window is aligned and in the mapping")
    }

    pub fn set(&self, register: u32, value: u32) {
        self.register(register).store(value, Ordering::Release);
    }

    /// Stores the configuration space; what does not fit is nowhere.
    pub fn set_config(&self, config: &[u8]) {
        let config = &config[..config.len().min(SIZE - CONFIG)];
        self.pages.as_volatile_slice().write_slice(config, self.start + CONFIG).expect("it ends with the window");
    }

    /// What a guest reads at `offset`; zeroes beyond the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let offset = usize::try_from(offset).unwrap_or(SIZE).min(SIZE);
        let length = data.len().min(SIZE - offset);
        let pages = self.pages.as_volatile_slice();
        pages.read_slice(&mut data[..length], self.start + offset).expect("it ends with the window");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_a_page_of_its_own_and_nothing_is_read_beyond_it() {
        let windows = Windows::new(2).unwrap();
        let (first, second) = (windows.window(0), windows.window(1));
        first.set_config(&[7; 2 * SIZE]);
        second.set(0, 0x0403_0201);
        let mut read = [9; 8];
        first.read(SIZE as u64 - 2, &mut read);
        assert_eq!(read, [7, 7, 0, 0, 0, 0, 0, 0]);
        second.read(1, &mut read[..2]);
        assert_eq!(read[..2], [2, 3]);
        second.read(u64::MAX, &mut read);
        assert_eq!(read, [0; 8]);
    }
}
