//! The compressed kernel inside a `bzImage`.
//!
//! A `vmlinuz` is a small real-mode part, then a program that decompresses the kernel proper, which it carries
//! as its payload. A monitor that boots ELF images saves the guest that work. Where the payload lies is said in the
//! setup header since boot protocol 2.08 (Documentation/arch/x86/boot.rst in the kernel's source); how it is
//! compressed shows its first bytes.

use std::io::Read;

/// Offsets in the setup header.
const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// The first version with the payload's members.
const LEAST_VERSION: u16 = 0x0208;
/// No kernel is larger; a damaged stream must not eat all memory.
const LARGEST_KERNEL: u64 = 512 << 20;

#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    #[error("it is cut off: {what} would lie at byte {at}, but there are only {length} bytes")]
    CutOff { what: &'static str, at: usize, length: usize },
    #[error("it is no bzImage: {0}")]
    NoBzImage(&'static str),
    #[error("its boot protocol {}.{:02} does not say where the payload is (2.08 does)", .0 >> 8, .0 & 0xff)]
    TooOld(u16),
    #[error("its payload begins with {0:02x?}, which is no compression known here (gzip, xz, zstd, lz4)")]
    UnknownCompression(Vec<u8>),
    #[error("its {format} payload cannot be decompressed: {detail}")]
    Damaged { format: &'static str, detail: String },
    #[error("its decompressed payload is no ELF image")]
    NoElf,
}

/// The ELF image in `bzimage`, as the kernel's build made it.
pub fn extract_vmlinux(bzimage: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let payload = find(bzimage)?;
    let kernel = decompress(payload)?;
    if kernel.starts_with(b"\x7fELF") { Ok(kernel) } else { Err(PayloadError::NoElf) }
}

/// The payload, still compressed.
fn find(bzimage: &[u8]) -> Result<&[u8], PayloadError> {
    if word(bzimage, BOOT_FLAG)? != 0xaa55 {
        return Err(PayloadError::NoBzImage("the boot flag 0xaa55 is not there"));
    }
    if slice(bzimage, "the header's magic", HEADER_MAGIC, 4)? != b"HdrS" {
        return Err(PayloadError::NoBzImage("the magic \"HdrS\" is not there"));
    }
    let version = word(bzimage, VERSION)?;
    if version < LEAST_VERSION {
        return Err(PayloadError::TooOld(version));
    }
    let sectors = match slice(bzimage, "setup_sects", SETUP_SECTS, 1)?[0] {
        // For compatibility zero means four.
        0 => 4,
        sectors => usize::from(sectors),
    };
    let protected_mode_part = (sectors + 1) * 512;
    let start = protected_mode_part.saturating_add(long(bzimage, PAYLOAD_OFFSET)?);
    slice(bzimage, "the payload's end", start, long(bzimage, PAYLOAD_LENGTH)?)
}

/// The kernel's build appends the decompressed size, 4 bytes, to every format but gzip (which ends
/// with it anyway); decoders stop at their own end or must not see it.
fn decompress(payload: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let without_size = &payload[..payload.len().saturating_sub(4)];
    match payload {
        [0x1f, 0x8b, ..] => read("gzip", flate2::read::GzDecoder::new(payload)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => read("xz", lzma_rust2::XzReader::new(without_size, false)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder =
                ruzstd::decoding::StreamingDecoder::new(without_size).map_err(|error| damaged("zstd", error))?;
            read("zstd", decoder)
        }
        // The old frame format, which the kernel uses.
        [0x02, 0x21, 0x4c, 0x18, ..] => read("lz4", lz4_flex::frame::FrameDecoder::new(without_size)),
        other => Err(PayloadError::UnknownCompression(other.iter().take(6).copied().collect())),
    }
}

fn read(format: &'static str, decoder: impl Read) -> Result<Vec<u8>, PayloadError> {
    let mut kernel = Vec::new();
    let mut bounded = decoder.take(LARGEST_KERNEL + 1);
    bounded.read_to_end(&mut kernel).map_err(|error| damaged(format, error))?;
    if kernel.len() as u64 > LARGEST_KERNEL {
        return Err(damaged(format, "it would be larger than any kernel"));
    }
    Ok(kernel)
}

fn damaged(format: &'static str, detail: impl ToString) -> PayloadError {
    PayloadError::Damaged { format, detail: detail.to_string() }
}

fn slice<'a>(bytes: &'a [u8], what: &'static str, at: usize, length: usize) -> Result<&'a [u8], PayloadError> {
    let end = at.saturating_add(length);
    bytes.get(at..end).ok_or(PayloadError::CutOff { what, at: end, length: bytes.len() })
}

fn word(bytes: &[u8], at: usize) -> Result<u16, PayloadError> {
    let word = slice(bytes, "the setup header", at, 2)?;
    Ok(u16::from_le_bytes([word[0], word[1]]))
}

fn long(bytes: &[u8], at: usize) -> Result<usize, PayloadError> {
    let long = slice(bytes, "the setup header", at, 4)?;
    Ok(u32::from_le_bytes([long[0], long[1], long[2], long[3]]) as usize)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    const KERNEL: &[u8] = b"\x7fELF and then the rest of a kernel, kernel, kernel, kernel";

    /// A bzImage with one setup sector and `payload` at offset 0x20 of the protected-mode part.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 1024 + 0x20];
        bytes[SETUP_SECTS] = 1;
        bytes[BOOT_FLAG..BOOT_FLAG + 2].copy_from_slice(&0xaa55u16.to_le_bytes());
        bytes[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        bytes[VERSION..VERSION + 2].copy_from_slice(&0x020fu16.to_le_bytes());
        bytes[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&0x20u32.to_le_bytes());
        let length = payload.len() as u32;
        bytes[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        bytes.extend(payload);
        bytes.extend([0xee; 64]);
        bytes
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    /// The kernel's lz4: old magic, then blocks of at most 8 MiB with their compressed size before them.
    fn lz4(content: &[u8]) -> Vec<u8> {
        let block = lz4_flex::block::compress(content);
        let mut bytes = vec![0x02, 0x21, 0x4c, 0x18];
        bytes.extend((block.len() as u32).to_le_bytes());
        bytes.extend(block);
        bytes
    }

    fn with_size(mut payload: Vec<u8>, content: &[u8]) -> Vec<u8> {
        payload.extend((content.len() as u32).to_le_bytes());
        payload
    }

    #[test]
    fn gzip_and_lz4_as_kernels_have_them() {
        assert_eq!(extract_vmlinux(&bzimage(&gzip(KERNEL))).unwrap(), KERNEL);
        assert_eq!(extract_vmlinux(&bzimage(&with_size(lz4(KERNEL), KERNEL))).unwrap(), KERNEL);
    }

    #[test]
    fn zstd_as_kernels_have_it() {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let packed = ruzstd::encoding::compress_to_vec(KERNEL, level);
        assert_eq!(extract_vmlinux(&bzimage(&with_size(packed, KERNEL))).unwrap(), KERNEL);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |bytes: &[u8]| extract_vmlinux(bytes).unwrap_err().to_string();
        assert!(error(b"MZ").contains("cut off"));
        assert!(error(&[0; 4096]).contains("0xaa55"));
        assert!(error(&bzimage(b"plain")).contains("no compression known"));
        assert!(error(&bzimage(&gzip(b"no elf"))).contains("no ELF"));
        let mut old = bzimage(&gzip(KERNEL));
        old[VERSION] = 7;
        assert!(error(&old).contains("2.07"), "{}", error(&old));
    }

    proptest! {
        #[test]
        fn a_cut_off_image_is_an_error(keep in 0usize..1100) {
            let whole = bzimage(&gzip(KERNEL));
            let end = whole.len() - 64;
            prop_assert!(extract_vmlinux(&whole[..keep.min(end - 1)]).is_err());
        }

        #[test]
        fn a_damaged_image_is_survived(
            damage in proptest::collection::vec((0usize..1200, any::<u8>()), 1..8),
            use_lz4: bool,
        ) {
            let mut bytes = bzimage(&if use_lz4 { with_size(lz4(KERNEL), KERNEL) } else { gzip(KERNEL) });
            for (at, value) in damage {
                if let Some(byte) = bytes.get_mut(at) { *byte = value; }
            }
            let _ = extract_vmlinux(&bytes);
        }
    }
}
