//! What interrupts and traps do: wake a sleeper, or end the guest with a report.
//!
//! The interrupt table is filled in from ring 3, where instructions are cheap. Three kinds of gate:
//!
//! * exceptions: ring 0 hands vector and addresses to ring 3, into [`report`], and the guest ends;
//! * [`WAKE`] and [`TIMER`]: note that an interrupt came, and return to where it came;
//! * the breakpoint exception, which is how ring 3 asks to sleep (`int3`): `sti; hlt`.
//!
//! **No wake-up is lost.** Real hardware keeps ring 3's interrupts off, so an interrupt waits until `hlt`;
//! a software KVM keeps them on, so it may come at any time before. Therefore the sleeping gate
//! looks at the note with interrupts off and sleeps only without one, and `sti` lets nothing in before
//! the `hlt` that follows it (Intel SDM volume 2, STI).
//!
//! Why a breakpoint: `int n` from ring 3 is refused by software KVM, which passes exceptions on.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU8, Ordering};

use super::entry::selector;
use crate::machine;

/// Vector of every device interrupt.
pub const WAKE: u8 = 0x30;
/// Vector of the local APIC's timer.
pub const TIMER: u8 = 0x31;
/// Vector of the local APIC's spurious interrupt; its low four bits are set, as old APICs want it.
pub const SPURIOUS: u8 = 0x3f;
/// The breakpoint exception.
const BREAKPOINT: u8 = 3;

/// Present 64-bit interrupt gate for the processor's own use (DPL 0).
const GATE: u64 = 0x8e00;
/// The same, which an `int3` of ring 3 may pass (DPL 3).
const USER_GATE: u64 = 0xee00;

/// Exceptions that push an error code (Intel SDM volume 3, table 6-1), a bit each.
const ERROR_CODES: u32 = 1 << 8 | 0b11111 << 10 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;

/// Bytes between the entries of two exceptions.
const STUB_SIZE: u64 = 16;

/// Not zero from an interrupt's arrival until [`take_wake`].
static WOKEN: AtomicU8 = AtomicU8::new(0);
/// Not zero from the timer's interrupt until [`take_timer`].
static TIMER_FIRED: AtomicU8 = AtomicU8::new(0);

global_asm!(
    r#"
    .text
    .balign 16
# One entry per exception, each of which leaves [vector, error code, frame] on the trap stack.
    .global probe_exceptions
probe_exceptions:
    .set probe_vector, 0
    .rept 32
    .balign {stub_size}
    .if (({error_codes} >> probe_vector) & 1) == 0
    push 0
    .endif
    push probe_vector
    jmp probe_exception
    .set probe_vector, probe_vector + 1
    .endr

# Back to ring 3 with what is known as arguments. The faulting code is not returned to.
probe_exception:
    pop rdi                         # vector
    pop rsi                         # error code
    pop rdx                         # instruction pointer
    mov rcx, cr2
    mov esp, offset probe_report_frame
    iretq

    .global probe_sleep
probe_sleep:
    cmp byte ptr [{woken}], 0
    jne 2f
    sti
    hlt
2:  iretq

# The frame of ring 3 is the first on the trap stack, whether the interrupt came in ring 3 or to the
# sleeper in ring 0: return straight to it, with every register as it was.
    .global probe_timer
probe_timer:
    mov byte ptr [{timer}], 1
    .global probe_wake
probe_wake:
    mov byte ptr [{woken}], 1
    mov esp, offset probe_trap_stack_top - 40
    iretq

    .section .data.boot, "aw"
    .balign 8
probe_report_frame:
    .quad {report}
    .quad {user_code}
    .quad 2
    .quad probe_report_stack_top - 8
    .quad {user_data}

    .section .bss.boot, "aw", @nobits
    .balign 4096
    .global probe_idt
probe_idt:
    .skip 256 * 16
probe_report_stack:
    .skip 8192
probe_report_stack_top:
    .text
"#,
    stub_size = const STUB_SIZE,
    error_codes = const ERROR_CODES,
    woken = sym WOKEN,
    timer = sym TIMER_FIRED,
    report = sym report,
    user_code = const selector::USER_CODE,
    user_data = const selector::USER_DATA,
);

unsafe extern "C" {
    static mut probe_idt: [[u64; 2]; 256];
    static probe_exceptions: u8;
    static probe_timer: u8;
    static probe_wake: u8;
    static probe_sleep: u8;
}

/// Fills in the interrupt table. To be called once, before anything sleeps.
pub fn install() {
    let exceptions = &raw const probe_exceptions as u64;
    for vector in 0..32u8 {
        set_gate(vector, exceptions + u64::from(vector) * STUB_SIZE, GATE);
    }
    set_gate(BREAKPOINT, &raw const probe_sleep as u64, USER_GATE);
    set_gate(WAKE, &raw const probe_wake as u64, GATE);
    set_gate(TIMER, &raw const probe_timer as u64, GATE);
    set_gate(SPURIOUS, &raw const probe_wake as u64, GATE);
}

/// Sleeps until an interrupt comes; not at all if one came since the last [`take_wake`].
pub fn sleep() {
    // SAFETY: the gate returns behind the instruction with all registers as they were. Flags may
    // change, memory may (an interrupt means that a device wrote some).
    unsafe { asm!("int3") };
}

/// Whether an interrupt came since the last call.
pub fn take_wake() -> bool {
    take(&WOKEN)
}

/// Whether the timer's interrupt was among them.
pub fn take_timer() -> bool {
    take(&TIMER_FIRED)
}

/// Not a read-modify-write: no second interrupt comes before the first is ended.
fn take(note: &AtomicU8) -> bool {
    let came = note.load(Ordering::Acquire) != 0;
    if came {
        note.store(0, Ordering::Release);
    }
    came
}

/// Writes one 64-bit gate (Intel SDM volume 3, figure 6-8).
fn set_gate(vector: u8, handler: u64, kind: u64) {
    let selector = u64::from(selector::KERNEL_CODE) << 16;
    let low = handler & 0xffff | selector | kind << 32 | (handler >> 16 & 0xffff) << 48;
    // SAFETY: the table has 256 entries and only this function, on the one processor that runs,
    // writes it.
    unsafe { (&raw mut probe_idt[vector as usize]).write_volatile([low, handler >> 32]) };
}

/// Ends the guest after an exception. Runs in ring 3 on a stack of its own.
extern "C" fn report(vector: u64, error_code: u64, instruction: u64, address: u64) -> ! {
    machine::serial::line(format_args!(
        "probe: exception {vector}, error code {error_code:#x}, at {instruction:#x}, address {address:#x}"
    ));
    machine::reset()
}
