//! The smallest guests: [`elf`] writes one byte to the serial port and halts for ever; [`waiting_elf`] does so again as soon as it finds itself in a clone.
//!
//! An ELF file of one page. The instructions mean the same in protected and in long mode, so the
//! same entry serves monitors that start an ELF by PVH (32 bits; QEMU, Cloud Hypervisor) and by the
//! Linux 64-bit protocol.

/// Guest-physical address of the code: where Linux's own kernel lies.
pub const LOAD_ADDRESS: u64 = 0x10_0000;

/// What the guest writes (ASCII's ACK): some monitors write of themselves on the same output, and this is in no text.
pub const BYTE: u8 = 0x06;

const CODE: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, BYTE, // mov al, BYTE
    0xee, // out dx, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to hlt
];

/// Says [`BYTE`], looks at the VM's generation id (the page that `mallee-vmm`'s DSDT names) until it is another, says [`BYTE`] once more, halts.
const WAITING: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xbb, 0x00, 0xf0, 0x0e, 0x00, // mov ebx, 0xef000
    0x8b, 0x0b, // mov ecx, [rbx]
    0xb0, BYTE, // mov al, BYTE
    0xee, // out dx, al
    0x3b, 0x0b, // cmp ecx, [rbx]
    0x74, 0xfc, // je to cmp
    0xee, // out dx, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to hlt
];

/// The code alone, for whoever places it himself.
pub fn code() -> &'static [u8] {
    CODE
}

const HEADER_SIZE: u64 = 64;
const PROGRAM_HEADER_SIZE: u64 = 56;
const PAGE: u64 = 0x1000;

/// The whole ELF file.
pub fn elf() -> Vec<u8> {
    file_of(CODE)
}

/// The ELF file of the guest that waits to be cloned.
pub fn waiting_elf() -> Vec<u8> {
    file_of(WAITING)
}

fn file_of(code: &[u8]) -> Vec<u8> {
    let note = note();
    let note_offset = HEADER_SIZE + 2 * PROGRAM_HEADER_SIZE;
    let mut file = header();
    program_header(&mut file, PT_LOAD, 5, PAGE, LOAD_ADDRESS, code.len() as u64);
    program_header(&mut file, PT_NOTE, 4, note_offset, 0, note.len() as u64);
    file.extend(note);
    file.resize(PAGE as usize, 0);
    file.extend(code);
    file
}

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

fn header() -> Vec<u8> {
    // 64 bits, little endian, version 1; an executable for x86-64.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    file.extend(LOAD_ADDRESS.to_le_bytes());
    file.extend(HEADER_SIZE.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for half in [HEADER_SIZE as u16, PROGRAM_HEADER_SIZE as u16, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file
}

fn program_header(file: &mut Vec<u8>, kind: u32, flags: u32, offset: u64, address: u64, size: u64) {
    file.extend(kind.to_le_bytes());
    file.extend(flags.to_le_bytes());
    for word in [offset, address, address, size, size, 4] {
        file.extend(word.to_le_bytes());
    }
}

/// XEN_ELFNOTE_PHYS32_ENTRY: the 32-bit entry of a PVH kernel (Xen's public/elfnote.h, number 18).
fn note() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend((LOAD_ADDRESS as u32).to_le_bytes());
    note
}

#[cfg(test)]
mod tests {
    use object::{Object, ObjectSegment};

    use super::*;

    #[test]
    fn the_file_is_an_elf_whose_code_lies_at_its_entry() {
        let bytes = elf();
        let file = object::File::parse(&*bytes).unwrap();
        assert_eq!(file.entry(), LOAD_ADDRESS);
        let segment = file.segments().next().unwrap();
        assert_eq!(segment.address(), LOAD_ADDRESS);
        assert_eq!(segment.data().unwrap(), CODE);
    }
}
