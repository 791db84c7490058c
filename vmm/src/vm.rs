//! A running VM: what must live as long as the guest does, and how it is stopped in order.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::{Bus, lock};
use crate::devices::IrqLine;
use crate::devices::virtio::VirtioDevice;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::vcpu::{ExitSignal, RunningVcpu, Vcpu};

/// How a vCPU's thread, which may start no thread, has the main thread start a device's worker.
pub struct Activations(EventFd);

impl Activations {
    pub fn new() -> Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Activations).map_err(Error::host("eventfd"))
    }

    /// Becomes readable when a driver is ready.
    pub fn event(&self) -> &EventFd {
        &self.0
    }

    pub fn ask(&self) {
        if let Err(error) = self.0.write(1) {
            tracing::error!(%error, "cannot ask for a device's worker");
        }
    }

    fn take(&self) {
        let _ = self.0.read();
    }
}

/// A VM that is built and has not run.
pub struct Vm {
    pub fd: Arc<VmFd>,
    pub memory: GuestMemory,
    pub bus: Arc<Bus>,
    pub vcpus: Vec<Vcpu>,
    pub power_button: IrqLine,
    pub activations: Arc<Activations>,
}

/// A VM whose vCPUs run.
pub struct RunningVm {
    vcpus: Vec<RunningVcpu>,
    pub bus: Arc<Bus>,
    pub power_button: IrqLine,
    pub activations: Arc<Activations>,
    // Dropped last: vCPUs and workers use them.
    _memory: GuestMemory,
    _fd: Arc<VmFd>,
}

impl Vm {
    /// Starts all vCPUs. Those beside the first wait inside KVM until the guest wakes them.
    pub fn start(self, exit: &Arc<ExitSignal>) -> Result<RunningVm> {
        let mut running = RunningVm {
            vcpus: Vec::with_capacity(self.vcpus.len()),
            bus: self.bus,
            power_button: self.power_button,
            activations: self.activations,
            _memory: self.memory,
            _fd: self.fd,
        };
        for vcpu in self.vcpus {
            match vcpu.start(running.bus.clone(), exit.clone()) {
                Ok(vcpu) => running.vcpus.push(vcpu),
                Err(error) => {
                    running.stop();
                    return Err(error);
                }
            }
        }
        Ok(running)
    }
}

impl RunningVm {
    /// Starts the workers of devices whose drivers are ready.
    pub fn activate_devices(&self) {
        self.activations.take();
        for device in &self.bus.virtio {
            lock(device).activate_pending();
        }
    }

    /// Has `change` do something to the device of type `D` that the configuration calls `name`, while it does not work; `change` says
    /// whether the configuration space is another now. `None` if there is no such device.
    #[allow(dead_code)] // for changes of a running VM and snapshots
    pub fn change_device<D: VirtioDevice, T>(&self, name: &str, change: impl FnOnce(&mut D) -> (bool, T)) -> Option<T> {
        self.bus
            .virtio
            .iter()
            .map(lock)
            .find_map(|mut device| {
                let is_meant = device.device_name() == name && device.device_as::<D>().is_some();
                is_meant.then_some(device)
            })?
            .change(change)
    }

    /// Looks at the device of type `D`, which may be at work. `None` if there is no such device.
    pub fn device<D: VirtioDevice, T>(&self, look: impl FnOnce(&mut D) -> T) -> Option<T> {
        let mut device =
            self.bus.virtio.iter().map(lock).find_map(|mut it| it.device_as::<D>().is_some().then_some(it))?;
        device.device_as::<D>().map(look)
    }

    /// Stops the vCPUs, then the devices, so that no request comes after its device is gone, and writes
    /// out what the console holds.
    pub fn stop(self) {
        for vcpu in self.vcpus {
            vcpu.stop();
        }
        for device in &self.bus.virtio {
            lock(device).stop();
        }
        lock(&self.bus.serial).flush();
    }
}
