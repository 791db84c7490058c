//! From a configuration to a machine that is ready to run. Read [`build`]: it is the boot, in order.
//!
//! Whatever the configuration names is opened first. Only when all of it can be used is a VM made, so a wrong
//! path, a truncated kernel or a busy tap leaves nothing behind.

mod devices;
mod restore;

pub use devices::{queue_pairs, refuse_large_balloon};
pub use restore::restore;

use std::sync::{Arc, Mutex};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::{BootProtocol, BootSource, VmConfig};
use crate::backends::console::{self, Console};
use crate::boot::{acpi, initrd, kernel, pvh, reset_vector, smbios, zero_page};
use crate::bus::Bus;
use crate::cpu;
use crate::devices::boot_timer::BootTimer;
use crate::devices::i8042::{self, I8042};
use crate::devices::serial::{self, SerialPort, SerialRegisters};
use crate::devices::virtio::VirtioDevice;
use crate::devices::vmgenid;
use crate::devices::{IrqLine, POWER_BUTTON_GSI};
use crate::error::{Error, Result};
use crate::events::Events;
use crate::memory::{self, GuestMemory, layout};
use crate::vcpu::Vcpu;
use crate::vm::{Activations, Vm};

/// Largest number of vCPUs.
pub const MAX_VCPUS: u8 = 32;

/// Command line where the configuration gives none.
const DEFAULT_BOOT_ARGS: &str = "console=ttyS0 reboot=k panic=1 pci=off";

/// Builds the VM that `config` describes.
pub fn build(config: &VmConfig, events: &Arc<Events>) -> Result<Vm> {
    let boot = boot_source(config)?;
    let vcpu_count = vcpu_count(config)?;
    let console = open_console(config)?;
    let devices = devices::open(config)?;

    let memory = memory::allocate(config.machine_config.mem_size_mib, config.machine_config.track_dirty_pages)?;
    let kernel = kernel::load(&memory, &boot.kernel_image_path, boot.protocol.unwrap_or_default())?;
    let initrd = load_initrd(&memory, boot, &kernel)?;
    let rsdp = acpi::write(&memory, vcpu_count, devices.len())?;
    smbios::write(&memory, config.identity.as_ref())?;
    reset_vector::write(&memory)?;
    vmgenid::renew(&memory)?;
    let line = command_line(config, boot);
    match kernel.protocol {
        BootProtocol::Linux => zero_page::write(&memory, &kernel, initrd, &line, rsdp)?,
        BootProtocol::Pvh => pvh::write(&memory, initrd, &line, rsdp)?,
    }

    let Machine { kvm, vm, bus, activations, power_button } = assemble(&memory, devices, console, events, None)?;
    let vcpus = create_vcpus(&kvm, &vm, vcpu_count)?;
    cpu::regs::set_up_boot_cpu(&vcpus[0].fd, &memory, kernel.entry, kernel.protocol)?;
    Ok(Vm { kvm, fd: vm, memory, pages: None, bus, vcpus, activations, power_button })
}

/// A VM without vCPUs.
struct Machine {
    kvm: Kvm,
    vm: Arc<VmFd>,
    bus: Arc<Bus>,
    activations: Arc<Activations>,
    power_button: IrqLine,
}

/// Makes a VM of memory and devices. The serial port is a new one, or as it was saved.
fn assemble(
    memory: &GuestMemory,
    devices: Vec<Box<dyn VirtioDevice>>,
    console: Console,
    events: &Arc<Events>,
    serial: Option<&SerialRegisters>,
) -> Result<Machine> {
    let kvm = Kvm::new().map_err(Error::kvm("open /dev/kvm"))?;
    let vm = Arc::new(create_vm(&kvm, memory)?);
    let activations = Arc::new(Activations::new()?);
    let serial_irq = irq_line(&vm, serial::GSI)?;
    let serial = match serial {
        None => SerialPort::new(serial_irq, console, events.clone()),
        Some(registers) => SerialPort::restore(serial_irq, console, events.clone(), registers),
    };
    let bus = Arc::new(Bus {
        serial: Mutex::new(serial.map_err(Error::host("serial port"))?),
        keyboard: Mutex::new(I8042::new(irq_line(&vm, i8042::GSI)?)),
        boot_timer: BootTimer::new(events.clone()),
        virtio: devices::attach(devices, &vm, memory, memory::free_slot(memory), &activations)?,
    });
    let power_button = irq_line(&vm, POWER_BUTTON_GSI)?;
    Ok(Machine { kvm, vm, bus, activations, power_button })
}

fn boot_source(config: &VmConfig) -> Result<&BootSource> {
    config
        .boot_source
        .as_ref()
        .ok_or_else(|| Error::BadConfiguration("no boot source: give boot-source with a kernel_image_path".into()))
}

fn vcpu_count(config: &VmConfig) -> Result<u8> {
    let machine = &config.machine_config;
    if machine.smt {
        return Err(Error::BadConfiguration("smt: only false is served".into()));
    }
    if !(1..=MAX_VCPUS).contains(&machine.vcpu_count) {
        return Err(Error::BadConfiguration(format!(
            "vcpu_count is {}; it must be between 1 and {MAX_VCPUS}",
            machine.vcpu_count
        )));
    }
    Ok(machine.vcpu_count)
}

fn open_console(config: &VmConfig) -> Result<Console> {
    match &config.serial {
        None => Ok(Console::StandardOutput),
        Some(serial) => {
            let limit = serial.size_limit.unwrap_or(console::DEFAULT_LIMIT);
            Console::file(&serial.serial_out_path, limit).map_err(Error::file("serial output", &serial.serial_out_path))
        }
    }
}

fn load_initrd(
    memory: &GuestMemory,
    boot: &BootSource,
    kernel: &kernel::LoadedKernel,
) -> Result<Option<initrd::LoadedInitrd>> {
    let highest = kernel.setup_header.map(|header| header.initrd_addr_max);
    boot.initrd_path.as_deref().map(|path| initrd::load(memory, path, kernel.end, highest)).transpose()
}

/// As given, and with the root device where a drive is marked as such and the line names none.
fn command_line(config: &VmConfig, boot: &BootSource) -> String {
    let mut line = boot.boot_args.clone().unwrap_or_else(|| DEFAULT_BOOT_ARGS.to_owned());
    let names_root = line.split_whitespace().any(|word| word.starts_with("root="));
    if let Some(root) = config.drives.iter().find(|drive| drive.is_root_device)
        && !names_root
    {
        let mode = if root.is_read_only { "ro" } else { "rw" };
        line.push_str(&format!(" root=/dev/vda {mode}"));
    }
    line
}

/// A VM with its memory and interrupt controllers. No PIT: nothing needs it (see `boot::acpi`), and
/// creating one takes longer than all of the rest.
fn create_vm(kvm: &Kvm, memory: &GuestMemory) -> Result<VmFd> {
    let vm = kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
    memory::attach(&vm, memory)?;
    vm.set_tss_address(layout::KVM_TSS).map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
    Ok(vm)
}

/// An interrupt line of the VM's I/O APIC.
fn irq_line(vm: &VmFd, gsi: u32) -> Result<IrqLine> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::host("eventfd"))?;
    vm.register_irqfd(&event, gsi).map_err(Error::kvm("KVM_IRQFD"))?;
    Ok(IrqLine(event))
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8) -> Result<Vec<Vcpu>> {
    let template = cpu::cpuid::Template::new(kvm, count)?;
    let mut vcpus = Vec::with_capacity(count.into());
    let mut tsc_khz = None;
    for index in 0..count {
        let fd = vm.create_vcpu(index.into()).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
        if index == 0 {
            tsc_khz = fd.get_tsc_khz().ok().filter(|khz| *khz > 0);
        }
        set_up(&fd, &template, index, tsc_khz)?;
        vcpus.push(Vcpu { index, fd });
    }
    Ok(vcpus)
}

fn set_up(fd: &VcpuFd, template: &cpu::cpuid::Template, index: u8, tsc_khz: Option<u32>) -> Result<()> {
    fd.set_cpuid2(&template.for_vcpu(index, tsc_khz)?).map_err(Error::kvm("KVM_SET_CPUID2"))?;
    cpu::msrs::set(fd)?;
    cpu::lapic::set(fd)
}
