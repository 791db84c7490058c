//! The machine apart from its virtio devices: ports, serial line, clock, interrupts, sleep, reset.

pub mod apic;
pub mod clock;
pub mod console;
pub mod idle;
pub mod port;
pub mod serial;

/// Port of the monitor's boot timer: `mallee_vmm::api::guest::BOOT_TIMER_PORT`.
const BOOT_TIMER_PORT: u16 = 0x3f0;
/// The keyboard controller's command port, and its command "pulse the reset line".
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;

/// Hardware-reduced ACPI's sleep control register as the monitor's tables have it, and what is written there:
/// sleep type 5, enable (ACPI 6.5, 4.8.3.7).
const SLEEP_CONTROL: u16 = 0x600;
const SLEEP_S5: u8 = 5 << 2 | 1 << 5;

/// Phases of the boot that the monitor puts a time to: `mallee_vmm::api::guest::phase`.
#[derive(Clone, Copy)]
#[repr(u8)]
pub enum Phase {
    /// The first own instruction in user mode.
    Init = 1,
    /// The network interface has its address.
    Network = 3,
    /// The metadata service was read.
    Metadata = 4,
}

/// Tells the monitor that a phase is reached. One exit.
pub fn phase(phase: Phase) {
    // SAFETY: the boot timer only takes a note of the byte; without one the write goes nowhere.
    unsafe { port::write8(BOOT_TIMER_PORT, phase as u8) };
}

/// Turns the machine off; resets it where that is not how.
pub fn power_off() -> ! {
    // SAFETY: as for the reset below.
    unsafe { port::write8(SLEEP_CONTROL, SLEEP_S5) };
    reset()
}

/// Resets the machine, which ends the monitor.
pub fn reset() -> ! {
    loop {
        // SAFETY: the reset is what is wanted; no state of the guest outlives it.
        unsafe { port::write8(I8042_COMMAND, I8042_RESET) };
    }
}
