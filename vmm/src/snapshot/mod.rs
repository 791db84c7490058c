//! A VM on disk: what is saved, and how it becomes a VM again.
//!
//! A snapshot is two files. The *state* file (`file`, a page or two a vCPU) has the configuration, every vCPU (`vcpu`), KVM's interrupt controllers and clock
//! (`clock`) and the register windows of the devices. The *memory* file (`memory`) is the guest's RAM, which restored VMs map
//! privately: restoring costs the pages that are touched, and clones share all that they do not write.
//!
//! Saving needs a VM that is paused (`vm::RunningVm::pause`): no vCPU runs, every request was finished or put back into its ring, and only the main
//! thread is left to look. Memory comes last, as KVM itself writes to it when a vCPU is looked at. An interrupt that was on its way
//! from a device is not in the controllers yet: a device raises again whatever its driver has not acknowledged.
//!
//! Restoring (`load`, `builder::restore`) opens what is behind the devices anew: files and taps by name, as the configuration in the
//! snapshot or the request says. All of that, and the state file as a whole, is checked before a VM is made.
//!
//! # Who is believed
//!
//! A state file can be refused and nothing else (`file`), and a guest that goes on from nonsense is still only a guest. But the configuration in it
//! *names files and taps of the host*, as a configuration file does: whoever loads a stranger's snapshot does so in a jail.

mod clock;
mod file;
pub mod load;
mod memory;
mod pages;
mod vcpu;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use kvm_bindings::{KVM_NR_IRQCHIPS, kvm_irqchip};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::api::{SnapshotCreate, SnapshotType, VmConfig};
use crate::builder::MAX_VCPUS;
use crate::bus::{Bus, lock};
use crate::devices::i8042::KeyboardRegisters;
use crate::devices::serial::SerialRegisters;
use crate::devices::virtio::state::DeviceState;
use crate::error::{Error, Result};
use crate::metrics::PROCESS;
use crate::vm::{RunningVm, set_duration};
use clock::ClockState;
use file::{Flaw, Kind, MAX_LENGTH, Reader, Writer};
use memory::Changes;
pub use pages::PageSource;
use vcpu::{Shape, VcpuState};

const WHAT: &str = "snapshot";
/// The two legacy interrupt controllers and the I/O APIC.
const CHIPS: u16 = KVM_NR_IRQCHIPS as u16;

/// All of a VM but its memory.
pub struct State {
    pub config: VmConfig,
    pub vcpus: Vec<VcpuState>,
    pub devices: Devices,
    clock: ClockState,
    chips: Vec<kvm_irqchip>,
}

/// The devices' registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Devices {
    pub serial: SerialRegisters,
    pub keyboard: KeyboardRegisters,
    /// In the order of their windows.
    pub virtio: Vec<DeviceState>,
}

/// Saves a paused VM.
pub fn create(vm: &RunningVm, config: &VmConfig, request: &SnapshotCreate) -> Result<()> {
    let start = Instant::now();
    if !vm.is_paused() {
        return Err(Error::BadConfiguration("A snapshot can be made only of a microVM that is paused.".into()));
    }
    if request.snapshot_path == request.mem_file_path {
        return Err(Error::BadConfiguration("snapshot_path and mem_file_path must be two files".into()));
    }
    let state = State::save(vm, config)?.to_bytes()?;
    let changes = Changes::take(&vm.memory, &vm.fd)?;
    let saved = save_memory(vm, changes.as_ref(), request)
        .and_then(|()| memory::replace(&request.snapshot_path, WHAT, |file| file.write_all_at(&state, 0)));
    if let (Err(_), Some(changes)) = (&saved, &changes) {
        changes.put_back(&vm.memory);
    }
    saved?;
    let duration = match request.snapshot_type {
        SnapshotType::Full => &PROCESS.snapshot_full_us,
        SnapshotType::Diff => &PROCESS.snapshot_diff_us,
    };
    set_duration(duration, start);
    Ok(())
}

fn save_memory(vm: &RunningVm, changes: Option<&Changes>, request: &SnapshotCreate) -> Result<()> {
    match (request.snapshot_type, changes) {
        (SnapshotType::Full, _) => memory::write_full(&vm.memory, &request.mem_file_path),
        (SnapshotType::Diff, Some(changes)) => memory::write_changes(&vm.memory, changes, &request.mem_file_path),
        (SnapshotType::Diff, None) => Err(Error::BadConfiguration(
            "Diff snapshots are not possible: track_dirty_pages was not set when the microVM was started or loaded."
                .into(),
        )),
    }
}

impl State {
    fn save(vm: &RunningVm, config: &VmConfig) -> Result<Self> {
        let shape = Shape::of(&vm.kvm, &vm.fd)?;
        Ok(State {
            // It boots no more.
            config: VmConfig { boot_source: None, logger: None, metrics: None, ..config.clone() },
            vcpus: vm.vcpus().map(|vcpu| vcpu.look(|fd| VcpuState::save(fd, &shape))).collect::<Result<_>>()?,
            devices: Devices::save(&vm.bus),
            clock: ClockState::save(&vm.fd)?,
            chips: (0..CHIPS).map(|id| save_chip(&vm.fd, id)).collect::<Result<_>>()?,
        })
    }

    /// Sets what belongs to the VM as a whole; how much time has passed for the guest (ns).
    pub fn restore_vm(&self, vm: &VmFd) -> Result<u64> {
        for chip in &self.chips {
            vm.set_irqchip(chip).map_err(Error::kvm("KVM_SET_IRQCHIP"))?;
        }
        self.clock.restore(vm)
    }

    fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut writer = Writer::new();
        let told =
            writer.json(Kind::Configuration, &self.config).and_then(|()| writer.json(Kind::Devices, &self.devices));
        told.map_err(|error| Error::Host { what: WHAT, source: error.into() })?;
        self.clock.write(&mut writer);
        for (index, chip) in (0..).zip(&self.chips) {
            writer.record(Kind::InterruptController, index, chip);
        }
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            vcpu.write(index, &mut writer);
        }
        Ok(writer.finish())
    }

    fn from_bytes(bytes: &[u8]) -> std::result::Result<Self, Flaw> {
        let mut reader = Reader::new(bytes)?;
        let config: VmConfig = reader.json(Kind::Configuration)?;
        let vcpus = config.machine_config.vcpu_count;
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(Flaw::Content(Kind::Configuration, 0, format!("{vcpus} vCPUs")));
        }
        let state = State {
            vcpus: (0..vcpus.into())
                .map(|index| VcpuState::read(index, &mut reader))
                .collect::<std::result::Result<_, _>>()?,
            devices: reader.json(Kind::Devices)?,
            clock: ClockState::read(&mut reader)?,
            chips: (0..CHIPS)
                .map(|id| reader.record(Kind::InterruptController, id))
                .collect::<std::result::Result<_, _>>()?,
            config,
        };
        reader.finish()?;
        match (0..).zip(&state.chips).find(|(id, chip)| chip.chip_id != *id) {
            Some((id, chip)) => {
                let why = format!("it is that of controller {}", chip.chip_id);
                Err(Flaw::Content(Kind::InterruptController, id as u16, why))
            }
            None => Ok(state),
        }
    }

    /// Reads a state file.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = Error::file(WHAT, path);
        let mut bytes = Vec::new();
        File::open(path)
            // One more byte than any has: a longer one does not have the length that it says.
            .and_then(|file| file.take(MAX_LENGTH + 1).read_to_end(&mut bytes))
            .map_err(&failed)?;
        State::from_bytes(&bytes)
            .map_err(|flaw| Error::BadConfiguration(format!("snapshot {} is refused: {flaw}", path.display())))
    }
}

/// Reads a file with these sections. For fuzz targets.
#[cfg(feature = "fuzzing")]
pub fn parse(sections: &[u8], count: u32) {
    let _ = State::from_bytes(sections);
    let _ = State::from_bytes(&file::seal(sections, count));
}

impl Devices {
    fn save(bus: &Bus) -> Self {
        Devices {
            serial: lock(&bus.serial).save(),
            keyboard: lock(&bus.keyboard).save(),
            virtio: bus.virtio.iter().map(|device| lock(device).save()).collect(),
        }
    }
}

fn save_chip(vm: &VmFd, id: u16) -> Result<kvm_irqchip> {
    let mut chip = kvm_irqchip { chip_id: id.into(), ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
    Ok(chip)
}

#[cfg(test)]
mod tests;
