//! Virtio 1.2 devices behind the MMIO transport.
//!
//! * `mmio` is the register window: a driver negotiates features and places its queues there.
//! * `queue` is the split virtqueue as a device uses it; `iovec` the guest buffers of one request.
//! * `worker` is the thread that a device becomes between DRIVER_OK and reset.
//! * `block`, `net`, `rng` are the devices.
//!
//! The cut between transport and device is [`VirtioDevice`]: before activation a device only describes
//! itself, afterwards its worker owns the queues and the backend, and nothing is shared with the vCPUs but
//! the [`Interrupt`].

pub mod block;
pub mod iovec;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod worker;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use std::sync::Arc;

use crate::memory::GuestMemory;
use crate::metrics::DeviceMetrics;
use queue::VirtQueue;

/// What the transport offers for every device.
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device type, as the transport sees it.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.2, 5).
    fn id(&self) -> u32;

    /// What the configuration calls the device, where there may be several of its kind.
    fn name(&self) -> &str {
        ""
    }

    /// Feature bits of the device type, without the transport's own.
    fn features(&self) -> u64;

    /// Largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> &'static [u16];

    /// The configuration space. None of ours can be written by the driver.
    fn config(&self) -> &[u8];

    /// Starts the worker. An error leaves the device as it was.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// Ends the worker and takes the backend back. Does nothing if there is none.
    fn reset(&mut self);
}

/// What a worker gets: all of it is frozen until the device is reset.
pub struct Activation {
    /// The features that the driver accepted.
    pub features: u64,
    pub queues: Vec<ActiveQueue>,
    pub interrupt: Arc<Interrupt>,
    /// The mapping that the queues and their requests point into.
    pub memory: GuestMemory,
    /// Where the device counts; each queue has its own within it.
    #[allow(dead_code)] // for devices that count what is theirs alone
    pub metrics: Arc<DeviceMetrics>,
}

impl Activation {
    pub fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }
}

/// A queue with the eventfd that its driver kicks.
pub struct ActiveQueue {
    pub queue: VirtQueue,
    pub kick: EventFd,
}

impl ActiveQueue {
    /// Takes note of the driver's kicks so far.
    pub fn take_kick(&self) {
        if self.kick.read().is_ok() {
            self.queue.metrics().kicks.increment();
        }
    }
}

/// The way from a device to its driver: interrupt line and the reason for it.
pub struct Interrupt {
    line: EventFd,
    status: AtomicU32,
    needs_reset: AtomicBool,
}

impl Interrupt {
    pub fn new() -> io::Result<Self> {
        Ok(Interrupt {
            line: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        })
    }

    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Used buffers are there.
    pub fn queue(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The driver has broken the rules or the host the backend: nothing more happens until a reset
    /// (virtio 1.2, 2.1.2).
    pub fn need_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::AcqRel);
        if let Err(error) = self.line.write(1) {
            tracing::warn!(%error, "virtio interrupt");
        }
    }

    fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }
}
