//! The entry point and everything that happens in ring 0 before Rust runs.
//!
//! The Linux 64-bit boot protocol (kernel document x86/boot, "64-bit boot protocol") enters here in
//! long mode with interrupts off and the zero page's address in `rsi`. A software KVM emulates
//! ring 0 at about a million instructions a second and gives up on many, so ring 0 does only what
//! ring 3 cannot: load the tables, which are complete in the image, and leave.

use core::arch::global_asm;

/// Selectors of the descriptor table below; those of ring 0 are the boot protocol's.
pub mod selector {
    pub const KERNEL_CODE: u16 = 0x10;
    pub const USER_DATA: u16 = 0x20 | 3;
    pub const USER_CODE: u16 = 0x28 | 3;
    pub const TASK: u16 = 0x30;
}

/// Size of the stack that all of ring 3 runs on, in bytes.
const STACK_SIZE: usize = 64 * 1024;
/// Size of the stack that traps and interrupts enter on, in bytes. A trap's frame is all it holds.
const TRAP_STACK_SIZE: usize = 1024;

/// Ports from 0 that ring 3 may use, by the task state segment's bitmap. A software KVM does not keep the
/// I/O privilege level that `iretq` is given; the bitmap is honoured everywhere. Its size is also
/// in the descriptor's limit (`probe.ld`).
const PORTS: u32 = 0x1000;
/// CR4: PAE as it was, and SSE with its exceptions (OSFXSR, OSXMMEXCPT) because compiled code uses it.
const CR4: u32 = 1 << 5 | 1 << 9 | 1 << 10;
/// CR0: paging, protection, numeric errors by exception, `wait` watches TS; caches on, EM and TS off.
const CR0: u32 = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1;
/// RFLAGS in ring 3: interrupts off (a software KVM turns them on all the same); bit 1 is always set.
const RFLAGS: u32 = 1 << 1;

global_asm!(
    r#"
    .section .text.boot, "ax"
    .global _start
_start:
    mov eax, offset probe_pml4
    mov cr3, rax
    mov eax, {cr4}
    mov cr4, rax
    mov eax, {cr0}
    mov cr0, rax
    lgdt [probe_gdt_pointer]
    lidt [probe_idt_pointer]
    mov eax, {task}
    ltr ax
    mov esp, offset probe_first_frame
    iretq

# Ring 3. The frame left the stack empty and aligned, as a call wants it.
probe_user_start:
    xor ebp, ebp
    mov rdi, rsi
    call {main}
    ud2

    .section .data.boot, "aw"
    .balign 16
probe_gdt:
    .quad 0
    .quad 0
    .quad 0x00af9b000000ffff        # 0x10 ring-0 code, 64-bit
    .quad 0x00cf93000000ffff        # 0x18 ring-0 data
    .quad 0x00cff3000000ffff        # 0x20 ring-3 data
    .quad 0x00affb000000ffff        # 0x28 ring-3 code, 64-bit
    .quad probe_tss_descriptor      # 0x30 task state segment, from probe.ld
    .quad 0
probe_gdt_end:

    .balign 8
    .global probe_tss
probe_tss:
    .long 0
    .quad probe_trap_stack_top      # RSP0: where traps from ring 3 enter
    .fill 0x66 - 12, 1, 0
    .word 0x68                      # where the I/O bitmap begins
    .fill {ports} / 8, 1, 0         # a clear bit allows a port
    .byte 0xff                      # the processor reads one byte further

    .balign 8
probe_first_frame:
    .quad probe_user_start
    .quad {user_code}
    .quad {rflags}
    .quad probe_stack_top
    .quad {user_data}

probe_gdt_pointer:
    .word probe_gdt_end - probe_gdt - 1
    .quad probe_gdt

probe_idt_pointer:
    .word 256 * 16 - 1
    .quad probe_idt

    .section .bss.boot, "aw", @nobits
    .balign 16
probe_stack:
    .skip {stack_size}
probe_stack_top:
probe_trap_stack:
    .skip {trap_stack_size}
    .global probe_trap_stack_top
probe_trap_stack_top:
    .text
"#,
    ports = const PORTS,
    cr4 = const CR4,
    cr0 = const CR0,
    rflags = const RFLAGS,
    task = const selector::TASK,
    user_code = const selector::USER_CODE,
    user_data = const selector::USER_DATA,
    stack_size = const STACK_SIZE,
    trap_stack_size = const TRAP_STACK_SIZE,
    main = sym crate::main,
);
