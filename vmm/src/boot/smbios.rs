//! SMBIOS tables (DMTF DSP0134 3.x): who made the machine, and its UUID and serial number.
//!
//! The identity is what cloud software in the guest goes by: cloud-init takes the platform for EC2
//! when both begin with `ec2`.

use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

use crate::api::Identity;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, layout};

const ENTRY_POINT_LENGTH: usize = 24;
const BIOS_INFORMATION: u8 = 0;
const SYSTEM_INFORMATION: u8 = 1;
const END_OF_TABLE: u8 = 127;
/// BIOS characteristics, extension byte 2: "the SMBIOS table describes a virtual machine".
const VIRTUAL_MACHINE: u8 = 1 << 4;
/// BIOS characteristics bit 3: "characteristics are not supported".
const NO_CHARACTERISTICS: u64 = 1 << 3;
const WAKE_UP_POWER_SWITCH: u8 = 6;
const MAX_SERIAL: usize = 64;

/// Writes the tables. Without an identity the UUID is the "not set" value and the serial is empty.
pub fn write(memory: &GuestMemory, identity: Option<&Identity>) -> Result<()> {
    let tables = tables(identity)?;
    let address = layout::SMBIOS + 32;
    let put = |address: u64, bytes: &[u8]| {
        memory.write_slice(bytes, GuestAddress(address)).map_err(|error| Error::Memory(format!("SMBIOS: {error}")))
    };
    put(address, &tables)?;
    put(layout::SMBIOS, &entry_point(address, tables.len() as u32))
}

/// The 64-bit entry point (DSP0134, 5.2.2).
fn entry_point(address: u64, length: u32) -> [u8; ENTRY_POINT_LENGTH] {
    let mut entry = [0u8; ENTRY_POINT_LENGTH];
    entry[..5].copy_from_slice(b"_SM3_");
    entry[6] = ENTRY_POINT_LENGTH as u8;
    (entry[7], entry[8], entry[9]) = (3, 2, 0);
    entry[10] = 1;
    entry[12..16].copy_from_slice(&length.to_le_bytes());
    entry[16..24].copy_from_slice(&address.to_le_bytes());
    entry[5] = entry.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    entry
}

fn tables(identity: Option<&Identity>) -> Result<Vec<u8>> {
    let mut tables = Vec::new();
    let mut bios = vec![1, 2, 0, 0, 3, 0];
    bios.extend(NO_CHARACTERISTICS.to_le_bytes());
    bios.extend([0, VIRTUAL_MACHINE, 0xff, 0xff, 0xff, 0xff]);
    structure(&mut tables, BIOS_INFORMATION, &bios, &["Mallee", env!("CARGO_PKG_VERSION"), "01/01/2026"]);
    let (uuid, serial) = match identity {
        Some(identity) => (parse_uuid(identity)?, parse_serial(identity)?),
        None => (Uuid::nil(), ""),
    };
    let mut system = vec![1, 2, 0, if serial.is_empty() { 0 } else { 3 }];
    // Since SMBIOS 2.6 the first three fields of the UUID are little-endian.
    system.extend(uuid.to_bytes_le());
    system.extend([WAKE_UP_POWER_SWITCH, 0, 0]);
    structure(&mut tables, SYSTEM_INFORMATION, &system, &["Mallee", "mallee-vmm", serial]);
    structure(&mut tables, END_OF_TABLE, &[], &[]);
    Ok(tables)
}

/// One structure: header, formatted area, strings, each with a NUL, and one more NUL at the end.
fn structure(tables: &mut Vec<u8>, kind: u8, formatted: &[u8], strings: &[&str]) {
    let handle = u16::from(kind);
    tables.extend([kind, 4 + formatted.len() as u8]);
    tables.extend(handle.to_le_bytes());
    tables.extend(formatted);
    for string in strings.iter().filter(|string| !string.is_empty()) {
        tables.extend(string.as_bytes());
        tables.push(0);
    }
    if strings.is_empty() {
        tables.push(0);
    }
    tables.push(0);
}

fn parse_uuid(identity: &Identity) -> Result<Uuid> {
    Uuid::parse_str(&identity.uuid)
        .map_err(|error| Error::BadConfiguration(format!("identity.uuid {:?}: {error}", identity.uuid)))
}

fn parse_serial(identity: &Identity) -> Result<&str> {
    let serial = identity.serial.as_str();
    if serial.len() > MAX_SERIAL || !serial.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Error::BadConfiguration(format!(
            "identity.serial {serial:?} must be at most {MAX_SERIAL} printable ASCII characters without spaces"
        )));
    }
    Ok(serial)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(uuid: &str, serial: &str) -> Identity {
        Identity { uuid: uuid.into(), serial: serial.into() }
    }

    #[test]
    fn the_uuid_is_stored_with_its_first_fields_little_endian() {
        let tables = tables(Some(&identity("ec2e1916-9099-7caf-fd21-012345abcdef", "ec2x"))).unwrap();
        let uuid = [0x16, 0x19, 0x2e, 0xec, 0x99, 0x90, 0xaf, 0x7c, 0xfd, 0x21];
        assert!(tables.windows(uuid.len()).any(|window| window == uuid));
        assert!(tables.windows(5).any(|window| window == b"ec2x\0"));
        assert!(tables.ends_with(&[127, 4, 127, 0, 0, 0]));
    }

    #[test]
    fn the_entry_point_sums_to_zero() {
        let sum = entry_point(0xf0020, 123).iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
    }

    #[test]
    fn a_malformed_identity_is_refused() {
        assert!(tables(Some(&identity("not-a-uuid", "x"))).is_err());
        assert!(tables(Some(&identity("ec2e1916-9099-7caf-fd21-012345abcdef", "a\nb"))).is_err());
    }
}
