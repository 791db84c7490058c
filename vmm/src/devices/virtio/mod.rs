//! Virtio 1.2 devices behind the MMIO transport.
//!
//! * `mmio` is the register window: a driver negotiates features and places its queues there; `window` is what of it is read, `state` what a snapshot has.
//! * `queue` is the split virtqueue as a device uses it; `iovec` the guest buffers of one request.
//! * `worker` is the thread that a device becomes between DRIVER_OK and reset.
//! * `block`, `net`, `rng`, `vsock`, `balloon`, `console` are the devices.
//!
//! A device stops and goes on without its driver noticing: [`VirtioDevice::deactivate`] tells where the queues stand, and the
//! transport activates it again from there. Snapshots and every change of a running device are made between the two.
//!
//! The cut between transport and device is [`VirtioDevice`]: before activation a device only describes
//! itself, afterwards its worker owns the queues and the backend, and nothing is shared with the vCPUs but
//! the [`Interrupt`].

pub mod balloon;
pub mod block;
pub mod console;
pub mod iovec;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod state;
pub mod vsock;
pub mod window;
pub mod worker;

use std::any::Any;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use std::sync::Arc;

use crate::memory::GuestMemory;
use crate::metrics::DeviceMetrics;
use queue::VirtQueue;
use window::Window;

/// What the transport offers for every device.
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device type, as the transport sees it. Every one is reached by its own type through `Any`.
pub trait VirtioDevice: Any + Send {
    /// Device id (virtio 1.2, 5).
    fn id(&self) -> u32;

    /// What the configuration calls the device, where there may be several of its kind.
    fn name(&self) -> &str {
        ""
    }

    /// Feature bits of the device type, without the transport's own.
    fn features(&self) -> u64;

    /// Largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// How many of these, from the first on, a driver with these features sets up. All of them, but for devices some of whose queues
    /// come with a feature.
    fn queues_in_use(&self, _features: u64) -> usize {
        self.queue_sizes().len()
    }

    /// The configuration space.
    fn config(&self) -> &[u8];

    /// The driver wrote to the configuration space. Most of ours cannot be written.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver runs already: it was restored, and knows the configuration space as `config`. The device keeps what of it the driver
    /// has written, and only that.
    fn adopt(&mut self, _config: &[u8]) {}

    /// What the driver has set by requests to the device, and relies on while it runs: a snapshot keeps it.
    fn settings(&self) -> Value {
        Value::Null
    }

    /// Takes what [`Self::settings`] said of a device whose driver runs on. An error says why it cannot be so.
    fn adopt_settings(&mut self, settings: &Value) -> Result<(), String> {
        match settings {
            Value::Null => Ok(()),
            _ => Err(format!("it has no settings such as {settings}")),
        }
    }

    /// Starts the worker. An error leaves the device as it was.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// Ends the workers and takes the backend back. No request is left half done: one that was taken from a queue is finished
    /// or put back. Says where each queue stands, in their order; nothing if the device is not active, or cannot be active
    /// again before a reset because its driver broke a queue.
    fn deactivate(&mut self) -> Vec<QueuePosition>;
}

/// How far a queue has come: what of the rings' counters only the device has (virtio 1.2, 2.7.6 and 2.7.8).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueuePosition {
    /// Index of the available ring's entry that is taken next.
    pub next_available: u16,
    /// Index of the used ring's entry that is written next.
    pub next_used: u16,
}

/// What a worker gets: all of it is frozen until the device is reset.
pub struct Activation {
    /// The features that the driver accepted.
    pub features: u64,
    /// The queues go on where they were stopped, and the driver has noticed nothing. Otherwise it begins.
    pub is_resumed: bool,
    pub queues: Vec<ActiveQueue>,
    pub interrupt: Arc<Interrupt>,
    /// The mapping that the queues and their requests point into.
    pub memory: GuestMemory,
    /// Where the device counts; each queue has its own within it.
    pub metrics: Arc<DeviceMetrics>,
}

impl Activation {
    pub fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// Takes the first `N` queues of those that are left.
    pub fn take_queues<const N: usize>(&mut self) -> io::Result<[ActiveQueue; N]> {
        let taken: Vec<_> = self.queues.drain(..N.min(self.queues.len())).collect();
        taken.try_into().map_err(|_| io::ErrorKind::InvalidInput.into())
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
///
/// As long as the device works, "used buffers" is always a reason: KVM takes the acknowledgement (`builder::devices`), vhost raises the line without a
/// word to us, and a driver must put up with an interrupt for which it finds nothing (virtio 1.2, 2.3). Only what else there is comes and goes.
pub struct Interrupt {
    line: EventFd,
    /// Holds the reasons, and whether a reset is needed.
    window: Window,
}

impl Interrupt {
    pub fn new(window: Window) -> io::Result<Self> {
        Ok(Interrupt { line: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, window })
    }

    /// Of a device without a transport.
    #[cfg(test)]
    pub fn alone() -> Self {
        Self::new(Window::alone()).unwrap()
    }

    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// From here on until a reset there may be used buffers.
    fn begin(&self) {
        self.reasons().fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::AcqRel);
    }

    /// Used buffers are there.
    pub fn queue(&self) {
        if let Err(error) = self.line.write(1) {
            tracing::warn!(%error, "virtio interrupt");
        }
    }

    /// The configuration space has changed.
    pub fn configuration(&self) {
        self.reasons().fetch_or(VIRTIO_MMIO_INT_CONFIG, Ordering::AcqRel);
        self.queue();
    }

    /// The driver has broken the rules or the host the backend: nothing more happens until a reset
    /// (virtio 1.2, 2.1.2).
    pub fn need_reset(&self) {
        self.status().fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::AcqRel);
        self.configuration();
    }

    fn acknowledge(&self, reasons: u32) {
        self.reasons().fetch_and(!(reasons & VIRTIO_MMIO_INT_CONFIG), Ordering::AcqRel);
    }

    fn is_reset_needed(&self) -> bool {
        self.status().load(Ordering::Acquire) & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    /// The device does not work, and its driver begins again.
    fn reset(&self) {
        self.status().store(0, Ordering::Release);
        self.reasons().store(0, Ordering::Release);
    }

    /// What may not have been seen is raised again: the line may have been on its way when it was saved.
    fn restore(&self, reasons: u32, needs_reset: bool) {
        self.reset();
        self.reasons().store(reasons, Ordering::Release);
        if needs_reset {
            self.status().store(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::Release);
        }
        if reasons != 0 {
            self.queue();
        }
    }

    fn reasons(&self) -> &AtomicU32 {
        self.window.register(VIRTIO_MMIO_INTERRUPT_STATUS)
    }

    fn status(&self) -> &AtomicU32 {
        self.window.register(VIRTIO_MMIO_STATUS)
    }
}
