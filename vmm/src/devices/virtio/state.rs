//! A virtio device in a snapshot: its register window, where its queues stand, and the configuration space as its driver knows it.
//!
//! There is nothing in it that a driver could not have written to the window itself, and it is checked as that would have been: features
//! against what is offered now, queues over their whole extent when the device becomes active again (`MmioTransport::activate`). What is
//! behind the device (a file, a tap, a socket) is not in it: it is opened anew, by the configuration.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use super::QueuePosition;
use super::mmio::{Activity, MmioTransport, QueueRegisters};

const KNOWN_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;
const KNOWN_INTERRUPTS: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// Virtio device id, and what the configuration calls it.
    pub id: u32,
    pub name: String,
    status: u32,
    needs_reset: bool,
    interrupt_status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    generation: u32,
    queues: Vec<QueueRegisters>,
    config: Vec<u8>,
    /// What the driver has set by requests (`VirtioDevice::settings`).
    #[serde(default, skip_serializing_if = "Value::is_null")]
    settings: Value,
    /// Where the queues in use stand; `None` if the device does not work.
    positions: Option<Vec<QueuePosition>>,
}

impl MmioTransport {
    /// To be called while the device is paused (`MmioTransport::pause`), or has not been active.
    pub fn save(&self) -> DeviceState {
        DeviceState {
            id: self.device.id(),
            name: self.device.name().to_owned(),
            status: self.status,
            needs_reset: self.interrupt.is_reset_needed(),
            interrupt_status: self.interrupt.reasons().load(Ordering::Acquire),
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            generation: self.generation,
            queues: self.queues.clone(),
            config: self.device.config().to_vec(),
            settings: self.device.settings(),
            positions: match &self.activity {
                Activity::Paused(positions) => Some(positions.clone()),
                Activity::Idle | Activity::Pending | Activity::Active => None,
            },
        }
    }

    /// Makes a new device what the saved one was, paused. An error says why it cannot be.
    pub fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        self.check(state)?;
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.generation = state.generation;
        self.queues.clone_from(&state.queues);
        self.interrupt.restore(state.interrupt_status, state.needs_reset);
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.device.adopt_settings(&state.settings).map_err(|why| format!("virtio device {}: {why}", state.id))?;
            self.device.adopt(&state.config);
            if self.device.config() != state.config {
                // Another MAC, another capacity.
                self.config_changed();
            }
        }
        self.activity = state.positions.clone().map_or(Activity::Idle, Activity::Paused);
        self.show();
        Ok(())
    }

    fn check(&self, state: &DeviceState) -> Result<(), String> {
        let name = |id, name: &str| format!("virtio device {id} {name:?}");
        let here = name(self.device.id(), self.device.name());
        if here != name(state.id, &state.name) {
            return Err(format!("{} is in the place of {here}", name(state.id, &state.name)));
        }
        let has = |bits| state.status & bits == bits;
        if state.status & !KNOWN_STATUS != 0 || state.interrupt_status & !KNOWN_INTERRUPTS != 0 {
            return Err(format!("{here} has an impossible status"));
        }
        let lacking = state.driver_features & !self.offered();
        if has(VIRTIO_CONFIG_S_FEATURES_OK) && lacking != 0 {
            return Err(format!("{here}: the guest uses features {lacking:#x}, which are not there on this host"));
        }
        let sizes = self.queues.iter().map(|queue| queue.max_size);
        if !sizes.eq(state.queues.iter().map(|queue| queue.max_size)) {
            return Err(format!("{here} has other queues"));
        }
        let in_use = self.device.queues_in_use(state.driver_features);
        match &state.positions {
            Some(positions) if !has(VIRTIO_CONFIG_S_DRIVER_OK) || state.needs_reset || positions.len() != in_use => {
                Err(format!("{here} cannot be at work"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;
    use virtio_bindings::virtio_mmio::*;
    use vmm_sys_util::eventfd::EventFd;

    use super::super::mmio::Wiring;
    use super::super::queue::testing::memory;
    use super::super::window::Window;
    use super::super::{Activation, VirtioDevice};
    use super::*;

    struct NoWiring;

    impl Wiring for NoWiring {
        fn connect(&self, _: &[EventFd], _: &EventFd) -> crate::error::Result<()> {
            Ok(())
        }
    }

    /// Remembers where its queue was when it was activated; its driver may write the last byte of its configuration space.
    #[derive(Default)]
    struct Device {
        active: Arc<Mutex<Option<(QueuePosition, bool)>>>,
        config: [u8; 2],
        features: u64,
    }

    impl VirtioDevice for Device {
        fn id(&self) -> u32 {
            4
        }
        fn name(&self) -> &str {
            "d"
        }
        fn features(&self) -> u64 {
            self.features
        }
        fn queue_sizes(&self) -> &[u16] {
            &[256]
        }
        fn config(&self) -> &[u8] {
            &self.config
        }
        fn adopt(&mut self, config: &[u8]) {
            self.config[1] = config[1];
        }
        fn activate(&mut self, activation: Activation) -> std::io::Result<()> {
            let position = activation.queues[0].queue.position();
            *self.active.lock().unwrap() = Some((position, activation.is_resumed));
            Ok(())
        }
        fn deactivate(&mut self) -> Vec<QueuePosition> {
            let position = QueuePosition { next_available: 7, next_used: 5 };
            self.active.lock().unwrap().take().map_or(Vec::new(), |_| vec![position])
        }
    }

    fn transport(device: Device) -> MmioTransport {
        MmioTransport::new(Box::new(device), memory(), Window::alone(), Box::new(NoWiring)).unwrap()
    }

    fn read(transport: &MmioTransport, register: u32) -> u32 {
        let mut bytes = [0; 4];
        transport.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// One whose driver is ready, paused and saved.
    fn saved() -> DeviceState {
        let mut transport = transport(Device { config: [1, 2], features: 1, ..Device::default() });
        for (register, value) in [
            (VIRTIO_MMIO_STATUS, 1),
            (VIRTIO_MMIO_STATUS, 3),
            (VIRTIO_MMIO_DRIVER_FEATURES, 1),
            (VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
            (VIRTIO_MMIO_DRIVER_FEATURES, 1),
            (VIRTIO_MMIO_STATUS, 11),
            (VIRTIO_MMIO_QUEUE_NUM, 16),
            (VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000),
            (VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000),
            (VIRTIO_MMIO_QUEUE_READY, 1),
            (VIRTIO_MMIO_STATUS, 15),
        ] {
            transport.write(register.into(), &u32::to_le_bytes(value));
        }
        transport.interrupt.queue();
        transport.pause();
        transport.save()
    }

    #[test]
    fn a_restored_device_goes_on_where_its_queue_was_and_interrupts_for_what_was_not_seen() {
        let active = Arc::new(Mutex::new(None));
        let mut transport = transport(Device { active: active.clone(), config: [1, 0], features: 1 });
        transport.restore(&saved()).unwrap();
        assert_eq!(*active.lock().unwrap(), None);
        assert_eq!(transport.interrupt.line().read().unwrap(), 1);
        assert_eq!(read(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
        assert_eq!(transport.save(), saved());
        transport.resume();
        let position = QueuePosition { next_available: 7, next_used: 5 };
        assert_eq!(*active.lock().unwrap(), Some((position, true)));
        assert_eq!(read(&transport, VIRTIO_MMIO_STATUS), 15);
    }

    #[test]
    fn a_driver_is_told_of_another_configuration_and_keeps_what_it_wrote_itself() {
        let mut transport = transport(Device { config: [9, 0], features: 3, ..Device::default() });
        transport.restore(&saved()).unwrap();
        assert_eq!(transport.device.config(), [9, 2]);
        assert_eq!(read(&transport, VIRTIO_MMIO_CONFIG_GENERATION), 1);
        let both = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
        assert_eq!(read(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), both);
    }

    #[test]
    fn what_no_driver_could_have_written_is_refused() {
        let refused = |change: &dyn Fn(&mut DeviceState), features| {
            let mut state = saved();
            change(&mut state);
            transport(Device { features, ..Device::default() }).restore(&state).unwrap_err()
        };
        assert!(refused(&|_| {}, 0).contains("features 0x1"));
        refused(&|state| state.id = 5, 1);
        refused(&|state| state.name.push('x'), 1);
        refused(&|state| state.status |= 1 << 20, 1);
        refused(&|state| state.interrupt_status = 4, 1);
        refused(&|state| state.queues.clear(), 1);
        refused(&|state| state.queues[0].max_size = 512, 1);
        refused(&|state| state.status = 11, 1);
        refused(&|state| state.needs_reset = true, 1);
        refused(&|state| state.positions = Some(Vec::new()), 1);
        refused(&|state| state.settings = serde_json::json!({ "pairs": 2 }), 1);
    }

    proptest! {
        #[test]
        fn no_registers_panic_and_a_false_queue_needs_a_reset(
            size: u16, ready: bool, addresses: [u64; 3], available: u16, used: u16,
        ) {
            let mut state = saved();
            let queue = &mut state.queues[0];
            (queue.size, queue.ready) = (size, ready);
            [queue.descriptors, queue.available, queue.used] = addresses;
            state.positions = Some(vec![QueuePosition { next_available: available, next_used: used }]);
            let mut transport = transport(Device { features: 1, ..Device::default() });
            transport.restore(&state).unwrap();
            transport.resume();
            let is_whole = ready && size.is_power_of_two() && size <= 256 && addresses.iter().all(|it| *it < 0x10_0000);
            prop_assert!(is_whole || read(&transport, VIRTIO_MMIO_STATUS) & 64 != 0);
        }
    }
}
