//! A running VM: what must live as long as the guest does, and how it is paused and stopped in order.
//!
//! Paused, nothing of the VM changes but by the main thread: the vCPUs' threads wait at the gate, and no device has a worker. vCPUs stop first and go on last,
//! as a vCPU may be waiting for a device that is being reset. A device's requests are finished or put back
//! into their rings before it has stopped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::{Bus, lock};
use crate::devices::IrqLine;
use crate::devices::virtio::VirtioDevice;
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::gdb;
use crate::memory::GuestMemory;
use crate::metrics::{Counter, PROCESS};
use crate::snapshot::PageSource;
use crate::vcpu::{ExitSignal, RunningVcpu, Vcpu};

/// How long a pause waits for the vCPUs. They come within a millisecond, or a little more on a host that has more to do than processors;
/// only a device whose host side hangs holds one up for longer.
const PATIENCE: Duration = Duration::from_secs(10);

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
    pub kvm: Kvm,
    pub fd: Arc<VmFd>,
    pub memory: GuestMemory,
    /// Who gives the memory its pages, if not the kernel.
    pub pages: Option<PageSource>,
    pub bus: Arc<Bus>,
    pub vcpus: Vec<Vcpu>,
    pub power_button: IrqLine,
    pub activations: Arc<Activations>,
}

/// A VM whose vCPUs run, or are paused.
pub struct RunningVm {
    vcpus: Vec<RunningVcpu>,
    gate: Arc<Gate>,
    is_paused: bool,
    pub bus: Arc<Bus>,
    pub power_button: IrqLine,
    pub activations: Arc<Activations>,
    /// Asked what a vCPU has when one is saved.
    pub kvm: Kvm,
    // Dropped last: vCPUs and workers use them.
    pub memory: GuestMemory,
    pub pages: Option<PageSource>,
    pub fd: Arc<VmFd>,
}

impl Vm {
    /// Starts all vCPUs. Those beside the first wait inside KVM until the guest wakes them.
    pub fn start(self, exit: &Arc<ExitSignal>) -> Result<RunningVm> {
        self.start_threads(exit, true)
    }

    /// Starts the threads of all vCPUs, which wait until [`RunningVm::resume`].
    pub fn start_paused(self, exit: &Arc<ExitSignal>) -> Result<RunningVm> {
        self.start_threads(exit, false)
    }

    fn start_threads(self, exit: &Arc<ExitSignal>, runs: bool) -> Result<RunningVm> {
        let mut running = RunningVm {
            vcpus: Vec::with_capacity(self.vcpus.len()),
            gate: Arc::new(Gate::new(runs)),
            is_paused: !runs,
            bus: self.bus,
            power_button: self.power_button,
            activations: self.activations,
            kvm: self.kvm,
            memory: self.memory,
            pages: self.pages,
            fd: self.fd,
        };
        if gdb::get().is_some() {
            // The debugger lets them go.
            running.gate.shut(u64::MAX);
        }
        for vcpu in self.vcpus {
            match vcpu.start(running.bus.clone(), exit.clone(), running.gate.clone()) {
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
    pub fn is_paused(&self) -> bool {
        self.is_paused
    }

    pub fn vcpus(&self) -> impl Iterator<Item = &RunningVcpu> {
        self.vcpus.iter()
    }

    pub fn gate(&self) -> Arc<Gate> {
        self.gate.clone()
    }

    /// Brings everything to a stand. An error leaves the VM running.
    pub fn pause(&mut self) -> Result<()> {
        if self.is_paused {
            return Ok(());
        }
        let start = Instant::now();
        self.gate.close(self.count(), PATIENCE, |index| self.kick(index)).map_err(|missing| {
            let why = format!("vCPU {} did not come out of its guest within {} s", missing.names(), PATIENCE.as_secs());
            Error::Host { what: "pause", source: std::io::Error::other(why) }
        })?;
        // A driver may have become ready just before.
        self.activate_devices();
        for device in &self.bus.virtio {
            lock(device).pause();
        }
        lock(&self.bus.serial).flush();
        self.is_paused = true;
        set_duration(&PROCESS.pause_us, start);
        Ok(())
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&mut self) {
        if !self.is_paused {
            return;
        }
        let start = Instant::now();
        for vcpu in &self.vcpus {
            // So that the guest's watchdogs do not take the pause for a hang. A guest without kvm-clock has none that could (EINVAL).
            let _ = vcpu.look(|fd| fd.kvmclock_ctrl());
        }
        for device in &self.bus.virtio {
            lock(device).resume();
        }
        self.is_paused = false;
        self.gate.open();
        set_duration(&PROCESS.resume_us, start);
    }

    /// At most 32 (`builder::MAX_VCPUS`).
    fn count(&self) -> u8 {
        self.vcpus.len() as u8
    }

    fn kick(&self, index: u8) {
        if let Some(vcpu) = self.vcpus.get(usize::from(index)) {
            vcpu.kick();
        }
    }

    /// Starts the workers of devices whose drivers are ready.
    pub fn activate_devices(&self) {
        self.activations.take();
        for device in &self.bus.virtio {
            lock(device).activate_pending();
        }
    }

    /// Has `change` do something to the device of type `D` that the configuration calls `name`, while it does not work; `change` says
    /// whether the configuration space is another now. `None` if there is no such device.
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
        if let Err(missing) = self.gate.end(self.count(), PATIENCE, |index| self.kick(index)) {
            // The process ends, and the thread with it.
            tracing::error!("vCPU {} does not end", missing.names());
            return;
        }
        for vcpu in self.vcpus {
            vcpu.join();
        }
        for device in &self.bus.virtio {
            lock(device).stop();
        }
        lock(&self.bus.serial).flush();
    }
}

/// Counts the microseconds since `start`.
pub fn set_duration(duration: &Counter, start: Instant) {
    duration.set(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
}
