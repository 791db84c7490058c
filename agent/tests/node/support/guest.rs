//! Guests of a few instructions: ELF kernels that run on software KVM and on real hardware alike.

/// Where the kernel is loaded and entered (1 MiB, as Linux).
const ADDRESS: u64 = 0x10_0000;

const SERIAL: u16 = 0x3f8;
const BOOT_TIMER: u16 = mallee_vmm::api::guest::BOOT_TIMER_PORT;
/// ACPI's sleep control register as the VMM places it, and "sleep type 5, enable" (ACPI 6.5, 4.8.3.7).
const SLEEP_CONTROL: (u16, u8) = (0x600, 5 << 2 | 1 << 5);

/// Says "up", reports its first phase, and halts for ever.
pub fn idle() -> Vec<u8> {
    kernel(&[says(b"up\n"), writes(BOOT_TIMER, mallee_vmm::api::guest::phase::INIT)].concat())
}

/// Says "bye" and powers itself off.
pub fn powers_itself_off() -> Vec<u8> {
    kernel(&[says(b"bye\n"), writes(SLEEP_CONTROL.0, SLEEP_CONTROL.1)].concat())
}

fn says(text: &[u8]) -> Vec<u8> {
    text.iter().flat_map(|byte| writes(SERIAL, *byte)).collect()
}

/// mov dx, port; mov al, value; out dx, al
fn writes(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// An ELF file with `code`, then: cli; hlt; jmp to the cli.
fn kernel(code: &[u8]) -> Vec<u8> {
    let code = [code, &[0xfa, 0xf4, 0xeb, 0xfc]].concat();
    let offset: u64 = 64 + 56;
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend_from_slice(&2u16.to_le_bytes()); // ET_EXEC
    elf.extend_from_slice(&62u16.to_le_bytes()); // EM_X86_64
    elf.extend_from_slice(&1u32.to_le_bytes());
    elf.extend_from_slice(&ADDRESS.to_le_bytes()); // e_entry
    elf.extend_from_slice(&64u64.to_le_bytes()); // e_phoff
    elf.extend_from_slice(&0u64.to_le_bytes()); // e_shoff
    elf.extend_from_slice(&0u32.to_le_bytes()); // e_flags
    for half in [64u16, 56, 1, 0, 0, 0] {
        // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
        elf.extend_from_slice(&half.to_le_bytes());
    }
    elf.extend_from_slice(&1u32.to_le_bytes()); // PT_LOAD
    elf.extend_from_slice(&5u32.to_le_bytes()); // readable, executable
    for word in [offset, ADDRESS, ADDRESS, code.len() as u64, code.len() as u64, 0] {
        // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&code);
    elf
}
