//! ACPI tables: how a guest finds its processors and devices, turns itself off and resets.
//!
//! The platform is *hardware-reduced* (ACPI 6.5, 4.1): no PM timer, no SCI, no legacy interrupt
//! controller or timer that a guest would wait for. The tables say so, and a guest then needs neither
//! PIT nor RTC, which is what allows leaving `KVM_CREATE_PIT2` out. The DSDT names every virtio-mmio
//! window as `LNRO0005`, because distribution kernels take them from nowhere else.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use crate::api::guest;
use crate::bus::port;
use crate::devices::{POWER_BUTTON_GSI, acpi_pm, i8042, serial, vmgenid};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, layout};

const OEM: [u8; 6] = *b"MALLEE";
const TABLE: [u8; 8] = *b"MICROVM ";
const REVISION: u32 = 1;
/// IAPC_BOOT_ARCH (ACPI 6.5, table 5.10): legacy devices, 8042, no VGA, no CMOS clock.
const LEGACY_DEVICES: u16 = 1 << 0;
const KEYBOARD_CONTROLLER: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;
/// Notification value of a pressed button (ACPI 6.5, 5.6.6), and of a new generation id.
const BUTTON_PRESSED: u8 = 0x80;
const GENERATION_CHANGED: u8 = 0x80;

/// Writes all tables for `vcpus` processors and `virtio_devices` windows; returns the RSDP's address.
pub fn write(memory: &GuestMemory, vcpus: u8, virtio_devices: usize) -> Result<u64> {
    let mut tables = Tables { memory, next: layout::ACPI + Rsdp::len() as u64 };
    let dsdt = tables.place(dsdt(vcpus, virtio_devices).as_slice())?;
    let fadt = tables.place_aml(&fadt(dsdt).finalize())?;
    let madt = tables.place_aml(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.place_aml(&xsdt)?;
    tables.put(layout::ACPI, &bytes(&Rsdp::new(OEM, xsdt)))?;
    Ok(layout::ACPI)
}

/// Places tables one after the other in the area kept for them.
struct Tables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Tables<'_> {
    fn place_aml(&mut self, table: &dyn Aml) -> Result<u64> {
        self.place(&bytes(table))
    }

    fn place(&mut self, table: &[u8]) -> Result<u64> {
        let address = self.next.next_multiple_of(64);
        self.next = address + table.len() as u64;
        if self.next > layout::ACPI_END {
            return Err(Error::Memory("the ACPI tables outgrew their place".into()));
        }
        self.put(address, table)?;
        Ok(address)
    }

    fn put(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|error| Error::Memory(format!("ACPI table: {error}")))
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn io_register(port: u16) -> GAS {
    GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::PerformanceServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Set: no fixed power button, it is a device of its own below.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (LEGACY_DEVICES | KEYBOARD_CONTROLLER | NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = io_register(port::RESET);
    fadt.reset_value = acpi_pm::RESET_VALUE;
    fadt.sleep_control_reg = io_register(port::SLEEP_CONTROL);
    fadt.sleep_status_reg = io_register(port::SLEEP_STATUS);
    fadt
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn dsdt(vcpus: u8, virtio_devices: usize) -> Sdt {
    let body = [
        processors(vcpus),
        virtio_windows(virtio_devices),
        serial_port(),
        keyboard(),
        power_button(),
        generation_id(),
        generic_events(),
        power_off(),
    ]
    .concat();
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// `\_SB.Cxxx`: processor devices, whose _UID ties them to the MADT.
fn processors(vcpus: u8) -> Vec<u8> {
    let mut aml = Vec::new();
    for id in 0..vcpus {
        Device::new(
            format!("_SB_.C{id:03}").as_str().into(),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
        )
        .to_aml_bytes(&mut aml);
    }
    aml
}

fn virtio_windows(count: usize) -> Vec<u8> {
    let mut aml = Vec::new();
    for index in 0..count {
        // At most 18 windows (see `devices::MAX_VIRTIO_DEVICES`), all below 4 GiB.
        let base = guest::VIRTIO_MMIO_BASE + index as u64 * guest::VIRTIO_MMIO_STRIDE;
        let gsi = guest::VIRTIO_MMIO_FIRST_GSI + index as u32;
        Device::new(
            format!("_SB_.V{index:03}").as_str().into(),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &(index as u32)),
                &Name::new("_CCA".into(), &aml::ONE),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, base as u32, guest::VIRTIO_MMIO_STRIDE as u32),
                        &Interrupt::new(true, true, false, false, gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(&mut aml);
    }
    aml
}

fn serial_port() -> Vec<u8> {
    bytes(&Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, serial::GSI),
                    &IO::new(guest::SERIAL_PORT, guest::SERIAL_PORT, 0, 8),
                ]),
            ),
        ],
    ))
}

fn keyboard() -> Vec<u8> {
    bytes(&Device::new(
        "_SB_.PS2_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0303")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(port::KEYBOARD_DATA, port::KEYBOARD_DATA, 1, 1),
                    &IO::new(port::KEYBOARD_COMMAND, port::KEYBOARD_COMMAND, 1, 1),
                    &Interrupt::new(true, true, false, false, i8042::GSI),
                ]),
            ),
        ],
    ))
}

/// The power button.
fn power_button() -> Vec<u8> {
    bytes(&Device::new(
        "_SB_.PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &aml::ZERO)],
    ))
}

/// Where the generation id is (low half of the address, high half); drivers go by either name.
fn generation_id() -> Vec<u8> {
    bytes(&Device::new(
        "_SB_.VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("ADDR".into(), &Package::new(vec![&(layout::GENERATION_ID as u32), &aml::ZERO])),
        ],
    ))
}

/// The generic event device (ACPI 6.5, 5.6.9), whose interrupts press the button and tell of a new generation.
fn generic_events() -> Vec<u8> {
    let (button, generation) = (POWER_BUTTON_GSI, vmgenid::GSI);
    bytes(&Device::new(
        "_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, button),
                    &Interrupt::new(true, true, false, false, generation),
                ]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &If::new(
                        &Equal::new(&Arg(0), &button),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &BUTTON_PRESSED)],
                    ),
                    &If::new(
                        &Equal::new(&Arg(0), &generation),
                        vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &GENERATION_CHANGED)],
                    ),
                ],
            ),
        ],
    ))
}

/// `\_S5`: the value that means power-off in the sleep control register.
fn power_off() -> Vec<u8> {
    bytes(&Name::new("_S5_".into(), &Package::new(vec![&acpi_pm::SLEEP_TYPE_S5])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let table = read(memory, address, length as usize);
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
        table
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
        let memory = crate::memory::allocate(16, false).unwrap();
        let rsdp = write(&memory, 32, 18).unwrap();
        assert_eq!(read(&memory, rsdp, 8), b"RSD PTR ");
        let xsdt = table(&memory, memory.read_obj(GuestAddress(rsdp + 24)).unwrap());
        let signatures: Vec<Vec<u8>> = xsdt[36..]
            .chunks(8)
            .map(|address| u64::from_le_bytes(address.try_into().unwrap()))
            .map(|address| table(&memory, address)[..4].to_vec())
            .collect();
        assert_eq!(signatures, [b"FACP".to_vec(), b"APIC".to_vec()]);
        let fadt = table(&memory, u64::from_le_bytes(xsdt[36..44].try_into().unwrap()));
        let dsdt = table(&memory, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert_eq!(dsdt.windows(8).filter(|window| window == b"LNRO0005").count(), 18);
        assert!(dsdt.windows(8).any(|window| window == b"VMGENCTR"));
    }
}
