//! From a snapshot to a machine that is paused where the saved one was. Read [`restore`]: it is [`super::build`] without the boot.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::{Machine, assemble, devices, open_console};
use crate::bus::lock;
use crate::devices::vmgenid;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::snapshot::State;
use crate::snapshot::load::Loaded;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// Makes the VM of a snapshot.
pub fn restore(snapshot: &Loaded, events: &Arc<Events>) -> Result<Vm> {
    let Loaded { state, config, .. } = snapshot;
    let console = open_console(config)?;
    let devices = devices::open(config)?;
    if devices.len() != state.devices.virtio.len() {
        return Err(refused(&format!("{} virtio devices for {} saved", devices.len(), state.devices.virtio.len())));
    }
    let (memory, pages) = snapshot.map_memory()?;

    let Machine { kvm, vm, bus, activations, power_button } =
        assemble(&memory, devices, console, events, Some(&state.devices.serial))?;
    let elapsed = state.restore_vm(&vm)?;
    let vcpus = restore_vcpus(&vm, state, elapsed)?;
    if !lock(&bus.keyboard).restore(&state.devices.keyboard) {
        return Err(refused("more keys than a keyboard holds"));
    }
    for (device, state) in bus.virtio.iter().zip(&state.devices.virtio) {
        lock(device).restore(state).map_err(|why| refused(&why))?;
    }
    vmgenid::renew(&memory)?;
    vmgenid::notify(&vm)?;
    Ok(Vm { kvm, fd: vm, memory, pages, bus, vcpus, activations, power_button })
}

fn restore_vcpus(vm: &VmFd, state: &State, elapsed_ns: u64) -> Result<Vec<Vcpu>> {
    // All of them first: an interrupt that one has pending may be for another.
    let vcpus = (0..)
        .zip(&state.vcpus)
        .map(|(index, _)| {
            let fd = vm.create_vcpu(u64::from(index)).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
            Ok(Vcpu { index, fd })
        })
        .collect::<Result<Vec<_>>>()?;
    for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
        state.restore(vm, &vcpu.fd, elapsed_ns)?;
    }
    Ok(vcpus)
}

fn refused(why: &str) -> Error {
    Error::BadConfiguration(format!("the snapshot cannot be restored: {why}"))
}
