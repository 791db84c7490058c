//! The probe: a guest without an operating system, for measuring what a machine costs.
//!
//! From reset to the first packet there is nothing here but what this folder holds, so a time taken
//! on it is a time of the monitor, the network and the host. Protocols live in the library of this
//! package (no unsafe code, tested on the host); this program is the machine below them:
//!
//! * `boot`: the two dozen instructions of ring 0, the tables they load, and traps;
//! * `machine`: ports, serial line, clock, interrupt controllers, sleeping, reset;
//! * `virtio`: the transport, the queue and the drivers;
//! * `run`: the one loop that joins devices and protocols.
//!
//! Everything after `boot` runs in ring 3. That costs nothing on real hardware, and it is what makes
//! the probe run at native speed on a software KVM, which emulates ring 0 one instruction at a time.

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod boot;
mod machine;

use core::panic::PanicInfo;

/// The first Rust code, in ring 3, called once by `boot::entry` with the zero page's address.
extern "C" fn main(zero_page: u64) -> ! {
    machine::phase(machine::Phase::Init);
    boot::traps::install();
    machine::serial::line(format_args!("mallee probe {}", zero_page));

    machine::apic::enable();
    for _ in 0..3 {
        machine::apic::set_timer(100_000_000);
        boot::traps::sleep();
        let woken = boot::traps::take_wake();
        machine::apic::end_of_interrupt();
        machine::serial::line(format_args!("woke {woken}"));
    }
    unsafe { core::arch::asm!("mov [0x3fffffff0], rax") };
    machine::reset()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    machine::serial::line(format_args!("probe: {info}"));
    machine::reset()
}
