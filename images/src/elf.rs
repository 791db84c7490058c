//! What a program needs to run: its loader and its libraries, and theirs.

use std::path::Path;

use object::elf::{DT_NEEDED, DT_NULL, DT_STRTAB, FileHeader64, PT_DYNAMIC, PT_INTERP, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, ReadRef};

use crate::error::Error;

/// The loader's path and the names of the shared libraries, as the file itself has them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    pub interpreter: Option<String>,
    pub libraries: Vec<String>,
}

/// Reads what the ELF file `bytes` needs. A static one needs nothing.
pub fn needs(path: &Path, bytes: &[u8]) -> Result<Needs, Error> {
    parse(bytes).map_err(|error| Error::Elf { path: path.to_owned(), detail: error.to_string() })
}

fn parse(bytes: &[u8]) -> object::Result<Needs> {
    let header = FileHeader64::<Endianness>::parse(bytes)?;
    let endian = header.endian()?;
    let segments = header.program_headers(endian, bytes)?;
    let mut needs = Needs::default();
    for segment in segments {
        if segment.p_type(endian) == PT_INTERP {
            let name = segment.data(endian, bytes).unwrap_or_default();
            let name = name.strip_suffix(&[0]).unwrap_or(name);
            needs.interpreter = String::from_utf8(name.to_vec()).ok();
        }
        if segment.p_type(endian) == PT_DYNAMIC
            && let Some(entries) = segment.dynamic(endian, bytes)?
        {
            let strings = entries
                .iter()
                .take_while(|entry| entry.d_tag.get(endian) != DT_NULL)
                .find(|entry| entry.d_tag.get(endian) == DT_STRTAB)
                .and_then(|entry| file_offset(segments, endian, entry.d_val.get(endian)));
            let Some(strings) = strings else { continue };
            needs.libraries = entries
                .iter()
                .take_while(|entry| entry.d_tag.get(endian) != DT_NULL)
                .filter(|entry| entry.d_tag.get(endian) == DT_NEEDED)
                .filter_map(|entry| string(bytes, strings, entry.d_val.get(endian)))
                .collect();
        }
    }
    Ok(needs)
}

fn file_offset(segments: &[object::elf::ProgramHeader64<Endianness>], endian: Endianness, address: u64) -> Option<u64> {
    segments.iter().filter(|segment| segment.p_type(endian) == PT_LOAD).find_map(|segment| {
        let into = address.checked_sub(segment.p_vaddr(endian))?;
        (into < segment.p_filesz(endian)).then(|| segment.p_offset(endian).checked_add(into))?
    })
}

fn string(bytes: &[u8], table: u64, at: u64) -> Option<String> {
    let start = table.checked_add(at)?;
    let name = bytes.read_bytes_at_until(start..bytes.len() as u64, 0).ok()?;
    String::from_utf8(name.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn this_test_program_needs_its_loader_and_libc() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let needs = parse(&bytes).unwrap();
        assert!(needs.interpreter.unwrap().contains("ld-linux"));
        assert!(needs.libraries.iter().any(|name| name == "libc.so.6"), "{:?}", needs.libraries);
    }

    #[test]
    fn something_else_is_refused() {
        assert!(parse(b"#!/bin/sh\n").is_err());
        assert!(parse(b"").is_err());
    }

    proptest! {
        #[test]
        fn a_cut_off_program_is_survived(length in 0usize..20_000) {
            let bytes = std::fs::read("/proc/self/exe").unwrap();
            let _ = parse(&bytes[..length.min(bytes.len())]);
        }
    }
}
