//! The program `mallee-vmm`. Everything is in the library; see `cli`.
//!
//! It is entered as a C program is: what the standard library does before an ordinary `main` (a signal stack and a guard for
//! stack overflows, found by reading `/proc/self/maps`; a look at descriptors 0 to 2) costs a fifth of the system calls
//! of a whole start. A stack overflow still hits the guard page, and ends the process without a message.

#![no_main]

/// Called by the C runtime, once.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> std::ffi::c_int {
    mallee_vmm::cli::main()
}
