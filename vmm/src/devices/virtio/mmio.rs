//! The register window of a virtio device (virtio 1.2, 4.2.2), version 2.
//!
//! What a driver may write depends on how far it has come, and the order is enforced: features until
//! FEATURES_OK, queues between FEATURES_OK and DRIVER_OK, nothing but notifications, acknowledgements and reset
//! afterwards. A worker therefore never sees a queue change under its hands.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::VirtQueue;
use super::window::Window;
use super::{Activation, ActiveQueue, Interrupt, QueuePosition, TRANSPORT_FEATURES, VirtioDevice};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::metrics::{self, DeviceMetrics};

/// "virt" in little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "MALL": ours.
const VENDOR: u32 = 0x4c4c_414d;
/// Length of a shared memory region that does not exist.
const NO_SHARED_MEMORY: u32 = u32::MAX;

/// Connects a window's notifications and interrupt to KVM.
pub trait Wiring: Send {
    /// Called once, when the device is first activated: what a guest never uses costs nothing. From then on a driver's acknowledgement of used
    /// buffers need not come to the window.
    fn connect(&self, kicks: &[EventFd], interrupt: &EventFd) -> Result<()>;

    /// Called by a vCPU's thread on DRIVER_OK. True: somebody will call [`MmioTransport::activate_pending`] soon, and the vCPU
    /// goes on. A vCPU's thread may not start a worker itself, as what it may not do its children may not either.
    fn defers_activation(&self) -> bool {
        false
    }
}

/// A queue as the driver describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QueueRegisters {
    pub max_size: u16,
    pub size: u16,
    pub ready: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        QueueRegisters { max_size, size: max_size, ready: false, descriptors: 0, available: 0, used: 0 }
    }
}

/// What of the device works.
pub(super) enum Activity {
    /// The driver is not ready, or has broken something.
    Idle,
    /// DRIVER_OK was written, and the worker is still to be started.
    Pending,
    Active,
    /// Stopped by us, to go on from these positions; the driver has not noticed.
    Paused(Vec<QueuePosition>),
}

pub struct MmioTransport {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) memory: GuestMemory,
    wiring: Box<dyn Wiring>,
    wired: bool,
    pub(super) activity: Activity,
    pub(super) interrupt: Arc<Interrupt>,
    window: Window,
    kicks: Vec<EventFd>,
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<QueueRegisters>,
    /// Grows with each change of the configuration space (virtio 1.2, 4.2.2).
    pub(super) generation: u32,
    metrics: Arc<DeviceMetrics>,
}

impl MmioTransport {
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        window: Window,
        wiring: Box<dyn Wiring>,
    ) -> Result<Self> {
        let sizes = device.queue_sizes();
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<std::io::Result<_>>()
            .map_err(Error::host("eventfd"))?;
        let metrics = metrics::device(device.id(), device.name(), sizes.len());
        let transport = MmioTransport {
            metrics,
            queues: sizes.iter().map(|size| QueueRegisters::new(*size)).collect(),
            device,
            memory,
            wiring,
            wired: false,
            activity: Activity::Idle,
            generation: 0,
            interrupt: Arc::new(Interrupt::new(window.clone()).map_err(Error::host("eventfd"))?),
            window,
            kicks,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
        };
        transport.show_identity();
        transport.show();
        Ok(transport)
    }

    /// What the window says once and for all.
    fn show_identity(&self) {
        for (register, value) in [
            (VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (VIRTIO_MMIO_VERSION, VERSION),
            (VIRTIO_MMIO_DEVICE_ID, self.device.id()),
            (VIRTIO_MMIO_VENDOR_ID, VENDOR),
            (VIRTIO_MMIO_SHM_LEN_LOW, NO_SHARED_MEMORY),
            (VIRTIO_MMIO_SHM_LEN_HIGH, NO_SHARED_MEMORY),
            (VIRTIO_MMIO_SHM_BASE_LOW, NO_SHARED_MEMORY),
            (VIRTIO_MMIO_SHM_BASE_HIGH, NO_SHARED_MEMORY),
        ] {
            self.window.set(register, value);
        }
    }

    /// What the window says, in any width.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.window.read(offset, data);
    }

    /// Has the window say what is so. The reasons of interrupts are not ours to say (`Interrupt`).
    pub(super) fn show(&self) {
        let queue = self.queues.get(self.queue_select as usize);
        let features = match self.device_features_select {
            0 => self.offered() as u32,
            1 => (self.offered() >> 32) as u32,
            _ => 0,
        };
        self.window.set(VIRTIO_MMIO_DEVICE_FEATURES, features);
        self.window.set(VIRTIO_MMIO_QUEUE_NUM_MAX, queue.map_or(0, |queue| queue.max_size.into()));
        self.window.set(VIRTIO_MMIO_QUEUE_READY, queue.map_or(0, |queue| queue.ready.into()));
        // Bits are only added but for a reset, and that a reset is needed is said there by others.
        self.window.register(VIRTIO_MMIO_STATUS).fetch_or(self.status, Ordering::AcqRel);
        self.window.set_config(self.device.config());
        // Last, and an interrupt follows: a driver that runs and has read in between is told to read again.
        self.window.set(VIRTIO_MMIO_CONFIG_GENERATION, self.generation);
    }

    /// Registers are written as 32 bits; the configuration space in any width.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            if self.has(VIRTIO_CONFIG_S_DRIVER) {
                self.device.write_config(offset, data);
            }
        } else if let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) {
            self.write_register(offset as u32, value);
        }
        self.show();
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            // These two reach us only if KVM did not take them (another width or reason, or not yet active).
            VIRTIO_MMIO_QUEUE_NOTIFY => self.kick(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue_register(register, value),
        }
    }

    pub(super) fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    pub(super) fn has(&self, status: u32) -> bool {
        self.status & status == status
    }

    fn accept_features(&mut self, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features &= !(u64::from(u32::MAX) << shift);
        self.driver_features |= u64::from(value) << shift;
    }

    fn kick(&self, queue: u32) {
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK)
            && let Some(kick) = self.kicks.get(queue as usize)
        {
            let _ = kick.write(1);
        }
    }

    fn write_queue_register(&mut self, register: u32, value: u32) {
        let configurable = self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.has(VIRTIO_CONFIG_S_DRIVER_OK);
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        if !configurable {
            return;
        }
        if register == VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value == 1;
            return;
        }
        if queue.ready {
            return;
        }
        match register {
            VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// A driver only ever adds bits, in their order, or writes zero to reset.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        for (bit, needed) in [
            (VIRTIO_CONFIG_S_ACKNOWLEDGE, 0),
            (VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_ACKNOWLEDGE),
            (VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER),
            (VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK),
            (VIRTIO_CONFIG_S_FAILED, 0),
        ] {
            let reached = value & bit != 0 && !self.has(bit) && self.has(needed);
            if reached && !self.has(VIRTIO_CONFIG_S_FAILED) && self.enter(bit) {
                self.status |= bit;
            }
        }
    }

    /// Does what reaching a status means; false if it is refused.
    fn enter(&mut self, status: u32) -> bool {
        match status {
            VIRTIO_CONFIG_S_FEATURES_OK => {
                self.driver_features & !self.offered() == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
            }
            VIRTIO_CONFIG_S_DRIVER_OK => {
                self.activity = Activity::Pending;
                if !self.wiring.defers_activation() {
                    self.activate_pending();
                }
                true
            }
            _ => true,
        }
    }

    /// Starts the worker of a device whose driver is ready; does nothing for any other.
    pub fn activate_pending(&mut self) {
        if matches!(self.activity, Activity::Pending) && self.activate_from(&[]) {
            self.metrics.activations.increment();
        }
    }

    /// Stops the device's work so that it can go on later as if nothing had been.
    pub fn pause(&mut self) {
        if matches!(self.activity, Activity::Active) {
            let positions = self.device.deactivate();
            let is_lost = positions.len() != self.device.queues_in_use(self.driver_features);
            if is_lost && !self.interrupt.is_reset_needed() {
                self.interrupt.need_reset();
            }
            self.activity = match self.interrupt.is_reset_needed() {
                true => Activity::Idle,
                false => Activity::Paused(positions),
            };
        }
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&mut self) {
        if let Activity::Paused(positions) = std::mem::replace(&mut self.activity, Activity::Idle) {
            self.activate_from(&positions);
        }
    }

    /// Has `change` do something to the device, if it is a `D`, while it does not work; `change` says whether the configuration space is
    /// another now. A device that is paused stays so. `None` if the device is of another type.
    pub fn change<D: VirtioDevice, T>(&mut self, change: impl FnOnce(&mut D) -> (bool, T)) -> Option<T> {
        self.device_as::<D>()?;
        let is_paused = matches!(self.activity, Activity::Paused(_));
        self.pause();
        let (is_config_changed, outcome) = change(self.device_as::<D>()?);
        if !is_paused {
            self.resume();
        }
        if is_config_changed {
            self.config_changed();
        }
        Some(outcome)
    }

    /// Tells the driver, if there is one, that the configuration space is another.
    pub(super) fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.show();
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.interrupt.configuration();
        }
    }

    /// The device, if it is a `D`. It may be at work.
    pub fn device_as<D: VirtioDevice>(&mut self) -> Option<&mut D> {
        let device: &mut dyn std::any::Any = &mut *self.device;
        device.downcast_mut()
    }

    /// What the configuration calls the device.
    pub fn device_name(&self) -> &str {
        self.device.name()
    }

    /// Makes the device active with its queues at `positions` (at their beginning where there are none); false if it cannot be.
    fn activate_from(&mut self, positions: &[QueuePosition]) -> bool {
        match self.activate(positions) {
            Ok(()) => {
                self.activity = Activity::Active;
                true
            }
            Err(why) => {
                tracing::warn!(device = self.device.id(), %why, "device not activated");
                self.activity = Activity::Idle;
                self.interrupt.need_reset();
                self.metrics.needs_reset.increment();
                false
            }
        }
    }

    fn activate(&mut self, positions: &[QueuePosition]) -> std::result::Result<(), String> {
        let mut queues = Vec::with_capacity(self.queues.len());
        let in_use = self.device.queues_in_use(self.driver_features);
        for (index, (registers, kick)) in self.queues.iter().zip(&self.kicks).enumerate().take(in_use) {
            let mut queue = self.freeze(registers)?.counted_in(self.metrics.queue(index));
            queue.go_to(positions.get(index).copied().unwrap_or_default());
            // A kick from before belongs to no queue.
            let _ = kick.read();
            let kick = kick.try_clone().map_err(|error| error.to_string())?;
            queues.push(ActiveQueue { queue, kick });
        }
        if !self.wired {
            self.wiring.connect(&self.kicks, self.interrupt.line()).map_err(|error| error.to_string())?;
            self.wired = true;
        }
        self.interrupt.begin();
        // A driver may have made buffers available before DRIVER_OK, or while the device was paused, and kick no more.
        for queue in &queues {
            let _ = queue.kick.write(1);
        }
        self.device
            .activate(Activation {
                features: self.driver_features,
                is_resumed: !positions.is_empty(),
                queues,
                interrupt: self.interrupt.clone(),
                memory: self.memory.clone(),
                metrics: self.metrics.clone(),
            })
            .map_err(|error| error.to_string())
    }

    /// Checks a queue's whole extent and makes it what a worker uses.
    fn freeze(&self, registers: &QueueRegisters) -> std::result::Result<VirtQueue, String> {
        let mut queue = Queue::new(registers.max_size).map_err(|error| error.to_string())?;
        queue
            .try_set_size(registers.size)
            .and_then(|()| queue.try_set_desc_table_address(GuestAddress(registers.descriptors)))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(registers.available)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(registers.used)))
            .map_err(|error| error.to_string())?;
        queue.set_ready(registers.ready);
        queue.set_event_idx(self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        if !queue.is_valid(&self.memory) {
            return Err("a queue is not ready, or not wholly in guest memory".into());
        }
        Ok(VirtQueue::new(queue, self.memory.clone()))
    }

    fn reset(&mut self) {
        self.device.deactivate();
        self.activity = Activity::Idle;
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
        self.interrupt.reset();
    }

    /// Ends the device's work for good.
    pub fn stop(&mut self) {
        self.device.deactivate();
        self.activity = Activity::Idle;
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::queue::testing::memory;
    use proptest::prelude::*;
    use std::sync::Mutex;
    use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;

    struct NoWiring;

    impl Wiring for NoWiring {
        fn connect(&self, _: &[EventFd], _: &EventFd) -> Result<()> {
            Ok(())
        }
    }

    /// Notes whether it is active, and with what.
    #[derive(Clone, Default)]
    struct Recorder(Arc<Mutex<Option<u64>>>);

    impl VirtioDevice for Recorder {
        fn id(&self) -> u32 {
            4
        }
        fn features(&self) -> u64 {
            0b101
        }
        fn queue_sizes(&self) -> &[u16] {
            &[256, 64]
        }
        fn config(&self) -> &[u8] {
            &[1, 2, 3, 4, 5]
        }
        fn activate(&mut self, activation: Activation) -> std::io::Result<()> {
            let before = self.0.lock().unwrap().replace(activation.features);
            assert_eq!(before, None, "activated twice");
            Ok(())
        }
        fn deactivate(&mut self) -> Vec<QueuePosition> {
            let position = QueuePosition { next_available: 7, next_used: 5 };
            self.0.lock().unwrap().take().map_or(Vec::new(), |_| vec![position; 2])
        }
    }

    struct Deferred;

    impl Wiring for Deferred {
        fn connect(&self, _: &[EventFd], _: &EventFd) -> Result<()> {
            Ok(())
        }
        fn defers_activation(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_deferred_activation_comes_once_and_not_after_a_reset() {
        let device = Recorder::default();
        let mut transport =
            MmioTransport::new(Box::new(device.clone()), memory(), Window::alone(), Box::new(Deferred)).unwrap();
        for reset_in_between in [true, false] {
            negotiate(&mut transport);
            place_queues(&mut transport);
            write(&mut transport, VIRTIO_MMIO_STATUS, 15);
            assert_eq!(*device.0.lock().unwrap(), None);
            if reset_in_between {
                write(&mut transport, VIRTIO_MMIO_STATUS, 0);
            }
            transport.activate_pending();
            transport.activate_pending();
            assert_eq!(device.0.lock().unwrap().is_some(), !reset_in_between);
        }
    }

    fn transport() -> (MmioTransport, Recorder) {
        let device = Recorder::default();
        let transport =
            MmioTransport::new(Box::new(device.clone()), memory(), Window::alone(), Box::new(NoWiring)).unwrap();
        (transport, device)
    }

    fn write(transport: &mut MmioTransport, register: u32, value: u32) {
        transport.write(register.into(), &value.to_le_bytes());
    }

    fn read(transport: &MmioTransport, register: u32) -> u32 {
        let mut bytes = [0; 4];
        transport.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn negotiate(transport: &mut MmioTransport) {
        for status in [1, 3] {
            write(transport, VIRTIO_MMIO_STATUS, status);
        }
        write(transport, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        write(transport, VIRTIO_MMIO_DRIVER_FEATURES, 1);
        write(transport, VIRTIO_MMIO_STATUS, 11);
    }

    fn place_queues(transport: &mut MmioTransport) {
        for queue in 0..2u32 {
            write(transport, VIRTIO_MMIO_QUEUE_SEL, queue);
            write(transport, VIRTIO_MMIO_QUEUE_NUM, 16);
            let base = 0x1_0000 * (queue + 1);
            write(transport, VIRTIO_MMIO_QUEUE_DESC_LOW, base);
            write(transport, VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x1000);
            write(transport, VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x2000);
            write(transport, VIRTIO_MMIO_QUEUE_READY, 1);
        }
    }

    #[test]
    fn a_driver_that_keeps_to_the_order_activates_the_device() {
        let (mut transport, device) = transport();
        assert_eq!(read(&transport, VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
        negotiate(&mut transport);
        place_queues(&mut transport);
        write(&mut transport, VIRTIO_MMIO_STATUS, 15);
        assert_eq!(read(&transport, VIRTIO_MMIO_STATUS), 15);
        assert_eq!(*device.0.lock().unwrap(), Some(1 << 32));
        write(&mut transport, VIRTIO_MMIO_STATUS, 0);
        assert_eq!(*device.0.lock().unwrap(), None);
        assert_eq!(read(&transport, VIRTIO_MMIO_STATUS), 0);
    }

    #[test]
    fn queues_are_frozen_once_the_driver_is_ready() {
        let (mut transport, _) = transport();
        negotiate(&mut transport);
        place_queues(&mut transport);
        write(&mut transport, VIRTIO_MMIO_STATUS, 15);
        let frozen = format!("{:?}", transport.queues);
        for register in [VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_DESC_LOW] {
            write(&mut transport, register, 0);
        }
        assert_eq!(format!("{:?}", transport.queues), frozen);
    }

    #[test]
    fn features_that_were_not_offered_are_not_accepted() {
        let (mut transport, device) = transport();
        write(&mut transport, VIRTIO_MMIO_STATUS, 3);
        write(&mut transport, VIRTIO_MMIO_DRIVER_FEATURES, 0b10);
        write(&mut transport, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        write(&mut transport, VIRTIO_MMIO_DRIVER_FEATURES, 1);
        write(&mut transport, VIRTIO_MMIO_STATUS, 11);
        assert_eq!(read(&transport, VIRTIO_MMIO_STATUS), 3);
        write(&mut transport, VIRTIO_MMIO_STATUS, 15);
        assert_eq!(*device.0.lock().unwrap(), None);
    }

    #[test]
    fn a_queue_outside_of_memory_leaves_the_device_in_need_of_reset() {
        let (mut transport, device) = transport();
        negotiate(&mut transport);
        place_queues(&mut transport);
        write(&mut transport, VIRTIO_MMIO_QUEUE_READY, 0);
        write(&mut transport, VIRTIO_MMIO_QUEUE_USED_HIGH, 1);
        write(&mut transport, VIRTIO_MMIO_QUEUE_READY, 1);
        write(&mut transport, VIRTIO_MMIO_STATUS, 15);
        assert_ne!(read(&transport, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
        assert_eq!(read(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
        assert_eq!(*device.0.lock().unwrap(), None);
    }

    #[test]
    fn the_configuration_space_is_read_in_any_width_and_ends_in_zeroes() {
        let (transport, _) = transport();
        let mut bytes = [9; 8];
        transport.read(u64::from(VIRTIO_MMIO_CONFIG) + 3, &mut bytes);
        assert_eq!(bytes, [4, 5, 0, 0, 0, 0, 0, 0]);
        let mut byte = [9];
        transport.read(u64::from(VIRTIO_MMIO_CONFIG), &mut byte);
        assert_eq!(byte, [1]);
    }

    #[test]
    fn a_change_is_made_while_the_device_does_not_work_and_queues_go_on_where_they_were() {
        let (mut transport, device) = transport();
        negotiate(&mut transport);
        place_queues(&mut transport);
        write(&mut transport, VIRTIO_MMIO_STATUS, 15);
        let before = read(&transport, VIRTIO_MMIO_CONFIG_GENERATION);
        let was_active = transport.change(|device: &mut Recorder| (true, device.0.lock().unwrap().is_some()));
        assert_eq!(was_active, Some(false));
        assert_eq!(*device.0.lock().unwrap(), Some(1 << 32));
        assert_eq!(read(&transport, VIRTIO_MMIO_CONFIG_GENERATION), before + 1);
        assert_eq!(read(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG | VIRTIO_MMIO_INT_VRING);
        transport.pause();
        assert_eq!(transport.change(|_: &mut Recorder| (false, ())), Some(()));
        let Activity::Paused(positions) = &transport.activity else { panic!("not paused") };
        assert_eq!(positions[1], QueuePosition { next_available: 7, next_used: 5 });
        write(&mut transport, VIRTIO_MMIO_STATUS, 0);
        transport.resume();
        assert_eq!(*device.0.lock().unwrap(), None, "a driver that has reset the device stays in charge");
    }

    proptest! {
        #[test]
        fn no_sequence_of_accesses_panics_or_activates_twice(
            accesses in proptest::collection::vec((0u32..0x110, any::<u32>(), 1usize..9, any::<bool>()), 0..200),
        ) {
            let (mut transport, _) = transport();
            for (offset, value, width, status) in accesses {
                // Status writes are what moves the state; make them frequent and plausible.
                let (offset, value) = if status { (VIRTIO_MMIO_STATUS, value & 0xf) } else { (offset, value) };
                let bytes = [value.to_le_bytes(), value.to_le_bytes()].concat();
                transport.write(offset.into(), &bytes[..if status { 4 } else { width }]);
                let mut data = [0; 8];
                transport.read(offset.into(), &mut data[..width]);
            }
        }
    }
}
