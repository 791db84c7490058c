//! Loading of kernels: ELF `vmlinux` and bzImage, told apart by their magic numbers.
//!
//! Both are entered by the 64-bit boot protocol (Documentation/arch/x86/boot.rst, "64-bit Boot
//! Protocol"): long mode, flat segments, paging on, RSI at the zero page. An ELF that is not Linux
//! is entered the same way and may ignore the zero page. An ELF that names a 32-bit entry in a note (XEN_ELFNOTE_PHYS32_ENTRY)
//! can be entered there by the PVH protocol instead, if the configuration says so.

use std::fs::File;
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::GuestAddress;

use super::image::Image;
use crate::api::BootProtocol;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, layout, low_ram_end};

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// `HdrS` at offset 0x202 of a bzImage.
const SETUP_MAGIC: [u8; 4] = *b"HdrS";
const SETUP_HEADER: usize = 0x1f1;
/// The 64-bit entry of a bzImage is this far from where its protected-mode part was loaded.
const ENTRY_64: u64 = 0x200;
/// XLF_KERNEL_64 of `xloadflags`: the kernel has that entry.
const XLF_KERNEL_64: u16 = 1;

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// Where the boot CPU begins.
    pub entry: GuestAddress,
    /// First address that the kernel does not need, now or while it unpacks itself.
    pub end: u64,
    /// A bzImage's own setup header; none for an ELF.
    pub setup_header: Option<setup_header>,
    /// How it is entered.
    pub protocol: BootProtocol,
}

/// Loads the kernel at `path`, to be entered by `protocol`.
pub fn load(memory: &GuestMemory, path: &Path, protocol: BootProtocol) -> Result<LoadedKernel> {
    let file = File::open(path).map_err(Error::file("kernel image", path))?;
    let metadata = file.metadata().map_err(Error::file("kernel image", path))?;
    if !metadata.is_file() {
        return Err(unusable(path, "it is not a regular file"));
    }
    let mut image = Image::new(file, metadata.len()).map_err(Error::file("kernel image", path))?;
    let loaded = match kind(image.head()) {
        Some(Kind::Elf) => load_elf(memory, &mut image, path, protocol)?,
        Some(Kind::BzImage) if protocol == BootProtocol::Pvh => {
            return Err(unusable(path, "it is a bzImage, which has no PVH entry; give the ELF vmlinux that it holds"));
        }
        Some(Kind::BzImage) => load_bzimage(memory, &mut image, path)?,
        None => {
            return Err(unusable(path, "it is neither an ELF vmlinux nor a bzImage (is it complete?)"));
        }
    };
    let ram_end = low_ram_end(memory);
    if loaded.end > ram_end {
        return Err(unusable(path, &format!("it needs memory up to {:#x}, the guest has {ram_end:#x}", loaded.end)));
    }
    Ok(loaded)
}

enum Kind {
    Elf,
    BzImage,
}

fn kind(head: &[u8]) -> Option<Kind> {
    if head.starts_with(&ELF_MAGIC) {
        return Some(Kind::Elf);
    }
    (head.get(0x202..0x206) == Some(&SETUP_MAGIC)).then_some(Kind::BzImage)
}

fn load_elf(memory: &GuestMemory, image: &mut Image, path: &Path, protocol: BootProtocol) -> Result<LoadedKernel> {
    let result =
        Elf::load(memory, None, image, Some(GuestAddress(layout::HIGH_RAM))).map_err(|error| broken(path, error))?;
    if result.kernel_end == 0 {
        return Err(unusable(path, "it is an ELF file with nothing to load"));
    }
    let entry = match (protocol, result.pvh_boot_cap) {
        (BootProtocol::Linux, _) => result.kernel_load,
        (BootProtocol::Pvh, PvhBootCapability::PvhEntryPresent(entry)) => entry,
        (BootProtocol::Pvh, _) => {
            return Err(unusable(
                path,
                "it names no PVH entry (XEN_ELFNOTE_PHYS32_ENTRY; Linux has it with CONFIG_PVH)",
            ));
        }
    };
    Ok(LoadedKernel { entry, end: result.kernel_end, setup_header: None, protocol })
}

fn load_bzimage(memory: &GuestMemory, image: &mut Image, path: &Path) -> Result<LoadedKernel> {
    refuse_truncated_bzimage(image, path)?;
    let result =
        BzImage::load(memory, Some(GuestAddress(layout::BZIMAGE)), image, Some(GuestAddress(layout::HIGH_RAM)))
            .map_err(|error| broken(path, error))?;
    let KernelLoaderResult { setup_header: Some(header), kernel_load, kernel_end, .. } = result else {
        return Err(unusable(path, "its setup header is missing"));
    };
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(unusable(path, "it is a 32-bit kernel"));
    }
    // While it unpacks itself the kernel uses `init_size` bytes from its final place on.
    let unpacked = header.pref_address.max(kernel_load.0).saturating_add(header.init_size.into());
    Ok(LoadedKernel {
        entry: GuestAddress(kernel_load.0 + ENTRY_64),
        end: kernel_end.max(unpacked),
        setup_header: Some(header),
        protocol: BootProtocol::Linux,
    })
}

/// The loader takes whatever the file has; the header says how much there should be.
fn refuse_truncated_bzimage(image: &Image, path: &Path) -> Result<()> {
    let Some(header) = image.head().get(SETUP_HEADER..).and_then(|head| head.first_chunk::<7>()) else {
        return Err(unusable(path, "it is truncated before its setup header"));
    };
    let setup_sectors = match header[0] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    // `syssize`, at offset 0x1f4, is in units of 16 bytes.
    let syssize = u32::from_le_bytes([header[3], header[4], header[5], header[6]]);
    let expected = (setup_sectors + 1) * 512 + u64::from(syssize) * 16;
    let size = image.size();
    if size + 15 < expected {
        return Err(unusable(path, &format!("it is truncated: {size} bytes of {expected}")));
    }
    Ok(())
}

fn unusable(path: &Path, why: &str) -> Error {
    Error::BadConfiguration(format!("kernel image {} cannot be booted: {why}", path.display()))
}

fn broken(path: &Path, error: linux_loader::loader::Error) -> Error {
    unusable(path, &format!("{error} (it is damaged or truncated, or does not fit into the guest's memory)"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ExitReason;
    use proptest::prelude::*;
    use std::io::Write;

    fn load_bytes(bytes: &[u8]) -> Result<LoadedKernel> {
        load_by(BootProtocol::Linux, bytes)
    }

    fn load_by(protocol: BootProtocol, bytes: &[u8]) -> Result<LoadedKernel> {
        let memory = crate::memory::allocate(64, false).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        load(&memory, file.path(), protocol)
    }

    fn bzimage(payload: usize) -> Vec<u8> {
        let mut image = vec![0u8; 1024 + payload];
        image[0x1f1] = 1;
        image[0x1f4..0x1f8].copy_from_slice(&((payload / 16) as u32).to_le_bytes());
        image[0x202..0x206].copy_from_slice(&SETUP_MAGIC);
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x211] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x236] = 1;
        image[0x258..0x260].copy_from_slice(&layout::BZIMAGE.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image
    }

    #[test]
    fn a_bzimage_is_entered_at_its_64_bit_entry() {
        let kernel = load_bytes(&bzimage(4096)).unwrap();
        assert_eq!(kernel.entry.0, layout::BZIMAGE + 0x200);
        assert_eq!(kernel.end, layout::BZIMAGE + 0x10_0000);
        assert!(kernel.setup_header.is_some());
    }

    /// One segment of four bytes at 2 MiB, and a note (if there is one) after it.
    fn elf(note: &[u8]) -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        elf.extend([2u8, 0, 62, 0, 1, 0, 0, 0]);
        [0x20_0000u64, 64, 0].iter().for_each(|word| elf.extend(word.to_le_bytes()));
        [0u16, 0, 64, 56, 2, 0, 0, 0].iter().for_each(|half| elf.extend(half.to_le_bytes()));
        let content = 64 + 2 * 56;
        for (kind, offset, size) in [(1u64, content, 4), (4, content + 4, note.len() as u64)] {
            let at = if kind == 1 { 0x20_0000 } else { 0 };
            [kind | 7 << 32, offset, at, at, size, size, 4].iter().for_each(|word| elf.extend(word.to_le_bytes()));
        }
        elf.extend([0xf4; 4]);
        elf.extend(note);
        elf
    }

    /// Name of 4 bytes, description of 4 bytes.
    fn note(kind: u32, name: &[u8; 4], entry: u32) -> Vec<u8> {
        let words = [4u32.to_le_bytes(), 4u32.to_le_bytes(), kind.to_le_bytes(), *name, entry.to_le_bytes()];
        words.concat()
    }

    #[test]
    fn an_elf_is_entered_where_the_protocol_says() {
        let both = [note(1, b"GNU\0", 7), note(18, b"Xen\0", 0x20_0002)].concat();
        let entry = |protocol| load_by(protocol, &elf(&both)).unwrap().entry.0;
        assert_eq!((entry(BootProtocol::Linux), entry(BootProtocol::Pvh)), (0x20_0000, 0x20_0002));
    }

    #[test]
    fn a_kernel_without_a_pvh_entry_is_refused_where_it_is_asked_for() {
        for image in [elf(&note(1, b"GNU\0", 7)), bzimage(4096)] {
            let error = load_by(BootProtocol::Pvh, &image).unwrap_err();
            assert_eq!(error.reason(), ExitReason::BadConfiguration);
            assert!(error.to_string().contains("PVH"), "{error}");
        }
    }

    #[test]
    fn a_truncated_bzimage_is_refused_with_its_sizes() {
        let image = bzimage(65536);
        let error = load_bytes(&image[..image.len() / 2]).unwrap_err();
        assert_eq!(error.reason(), ExitReason::BadConfiguration);
        assert!(error.to_string().contains("truncated"), "{error}");
    }

    #[test]
    fn what_is_not_a_kernel_is_refused() {
        for bytes in [&b""[..], b"hello", &[0; 4096], &ELF_MAGIC] {
            assert_eq!(load_bytes(bytes).unwrap_err().reason(), ExitReason::BadConfiguration);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_image_panics_the_loader(mut bytes in proptest::collection::vec(any::<u8>(), 0..2048), elf: bool) {
            if elf && bytes.len() > 20 {
                bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
            } else if bytes.len() > 0x206 {
                bytes[0x202..0x206].copy_from_slice(&SETUP_MAGIC);
            }
            let _ = load_bytes(&bytes);
            let _ = load_by(BootProtocol::Pvh, &bytes);
        }
    }
}
