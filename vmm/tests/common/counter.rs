//! A guest that counts, a line for each number, and goes on counting through whatever is done to its VM.
//!
//! Its lines are `COUNT OTHER`: its own count, each one more than the line before, and that of the second vCPU (0 if there is none), which counts in memory
//! as fast as it can. Before each line it reads a device's register (the magic number of virtio window 0, or all ones) and compares it with what
//! it read first: a read that gets lost shows as a line `?`, the last.
//!
//! The boot vCPU goes to ring 3 and wakes the other by INIT and SIPI through its local APIC, which that one leaves real mode after. [`HALTING`]: instead it writes one line and
//! halts for ever.

use std::arch::global_asm;
use std::path::Path;

/// Where the guest is linked to and loaded.
const LOAD: u64 = 0x20_0000;
/// How the guest goes on, in its first byte.
pub const COUNTING: u8 = 0;
pub const HALTING: u8 = 1;
/// Guest-physical addresses of the two counts.
pub const COUNT: u64 = LOAD + 8;
pub const OTHER_COUNT: u64 = LOAD + 16;
/// Where its code begins: `mov`, `xor` and `mov` of 5, 2 and 5 bytes, then `rep stosq`, in ring 0.
pub const ENTRY: u64 = LOAD + 24;

global_asm!(
    ".balign 16",
    "counter_begin:",
    ".quad 0, 0, 0", // mode, count, other count
    // Page tables at 0x300000: the first 6 MiB one to one, and the 2 MiB around virtio window 0 and the local APIC.
    "mov $0x300000, %edi",
    "xor %eax, %eax",
    "mov $0x800, %ecx",
    "rep stosq",
    "movq $0x301007, 0x300000",
    "movq $0x302007, 0x301000",
    "movq $0x303007, 0x301018",
    "movq $0x000087, 0x302000",
    "movq $0x200087, 0x302008",
    "movq $0x400087, 0x302010",
    "mov $0xd0000087, %eax",
    "mov %rax, 0x303400",
    "mov $0xfee00087, %eax",
    "mov %rax, 0x303fb8",
    "mov $0x300000, %eax",
    "mov %rax, %cr3",
    "lgdt 30f(%rip)",
    "cmpb $1, counter_begin(%rip)",
    "je 20f",
    // Trampoline for the other vCPU.
    "lea 40f(%rip), %rsi",
    "mov $0x10000, %edi",
    "mov $(49f - 40f), %ecx",
    "rep movsb",
    // To ring 3 with IOPL 3.
    "mov $0x400000, %esp",
    "pushq $0x1b",
    "pushq $0x3f0000",
    "pushq $0x3002",
    "pushq $0x23",
    "lea 1f(%rip), %rax",
    "pushq %rax",
    "iretq",
    "1:",
    "mov $0xfee00000, %ebp",
    "movl $0x01000000, 0x310(%rbp)", // to APIC id 1
    "movl $0x00004500, 0x300(%rbp)", // INIT
    "movl $0x01000000, 0x310(%rbp)",
    "movl $0x00004610, 0x300(%rbp)", // SIPI, page 0x10
    "mov $0xd0000000, %ebp",
    "mov (%rbp), %r8d",
    "mov $0x3f8, %edx",
    "2:",
    "mov (%rbp), %eax",
    "cmp %eax, %r8d",
    "jne 9f",
    "incq counter_begin+8(%rip)",
    "mov counter_begin+8(%rip), %edi",
    "call 10f",
    "mov $0x20, %al",
    "outb %al, %dx",
    "mov counter_begin+16(%rip), %edi",
    "call 10f",
    "mov $0x0a, %al",
    "outb %al, %dx",
    "jmp 2b",
    "9:",
    "mov $0x3f, %al",
    "outb %al, %dx",
    "mov $0x0a, %al",
    "outb %al, %dx",
    "8: jmp 8b",
    // Writes EDI as eight hexadecimal digits.
    "10:",
    "lea 19f(%rip), %rbx",
    "mov $8, %ecx",
    "11:",
    "rol $4, %edi",
    "mov %edi, %eax",
    "and $15, %eax",
    "movb (%rbx, %rax), %al",
    "outb %al, %dx",
    "dec %ecx",
    "jnz 11b",
    "ret",
    "19: .ascii \"0123456789abcdef\"",
    // Halts.
    "20:",
    "mov $0x400000, %esp",
    "mov $0x3f8, %edx",
    "xor %edi, %edi",
    "call 10b",
    "mov $0x0a, %al",
    "outb %al, %dx",
    "21: hlt",
    "jmp 21b",
    ".balign 16",
    "29: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff",
    "30: .word 39",
    ".quad 0x200000 + (29b - counter_begin)",
    // The other vCPU, in real mode at 0x10000: straight to long mode.
    ".code16",
    "40:",
    "cli",
    ".byte 0x2e, 0x66, 0x0f, 0x01, 0x16", // lgdtl %cs:(…)
    ".word 48f - 40b",
    "mov %cr4, %eax",
    "or $0x20, %eax",
    "mov %eax, %cr4",
    "mov $0x300000, %eax",
    "mov %eax, %cr3",
    "mov $0xc0000080, %ecx",
    "rdmsr",
    "or $0x100, %eax",
    "wrmsr",
    "mov %cr0, %eax",
    "or $0x80000001, %eax",
    "mov %eax, %cr0",
    ".byte 0x66, 0xea", // ljmpl $8, …
    ".long 0x200000 + (50f - counter_begin)",
    ".word 8",
    "48: .word 39",
    ".long 0x200000 + (29b - counter_begin)",
    "49:",
    ".code64",
    "50:",
    "mov $0x3e0000, %esp",
    "pushq $0x1b",
    "pushq $0x3d0000",
    "pushq $0x3002",
    "pushq $0x23",
    "lea 51f(%rip), %rax",
    "pushq %rax",
    "iretq",
    "51: incq counter_begin+16(%rip)",
    "jmp 51b",
    "counter_end:",
    options(att_syntax)
);

unsafe extern "C" {
    static counter_begin: u8;
    static counter_end: u8;
}

/// Writes the guest as an ELF file with one segment.
pub fn write(path: &Path, mode: u8) {
    let (begin, end) = (&raw const counter_begin, &raw const counter_end);
    // SAFETY: the two symbols bound one piece of read-only memory, defined above.
    let mut code = unsafe { std::slice::from_raw_parts(begin, end.offset_from(begin) as usize) }.to_vec();
    code[0] = mode;
    let size = code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2u8, 0, 62, 0, 1, 0, 0, 0]);
    for word in [ENTRY, 64, 0] {
        elf.extend(u64::to_le_bytes(word));
    }
    for half in [0u16, 0, 64, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend([1u8, 0, 0, 0, 7, 0, 0, 0]);
    for word in [120, LOAD, LOAD, size, size, 4096] {
        elf.extend(u64::to_le_bytes(word));
    }
    elf.extend(code);
    std::fs::write(path, elf).unwrap();
}

/// `incq COUNT(%rip)`, of which the instruction is seven bytes long.
pub const INCREMENT: [u8; 3] = [0x48, 0xff, 0x05];

/// The counts of a line; `None` for one that is not whole or not one.
pub fn parse(line: &str) -> Option<(u64, u64)> {
    let (count, other) = line.split_once(' ')?;
    let number = |text: &str| (text.len() == 8).then(|| u64::from_str_radix(text, 16).ok()).flatten();
    Some((number(count)?, number(other)?))
}
