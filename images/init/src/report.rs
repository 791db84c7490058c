//! What the boot tells the outside: phases on the monitor's boot timer port, lines on the console.

use std::fmt::Display;
use std::time::Duration;

use mallee_vmm::api::guest::{BOOT_TIMER_PORT, phase};
use nix::time::{ClockId, clock_gettime};

/// A point of the boot that the host is told about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Init,
    Root,
    Network,
    Metadata,
    Login,
    UserData,
}

impl Phase {
    fn byte(self) -> u8 {
        match self {
            Phase::Init => phase::INIT,
            Phase::Root => phase::ROOT,
            Phase::Network => phase::NETWORK,
            Phase::Metadata => phase::METADATA,
            Phase::Login => phase::LOGIN,
            Phase::UserData => phase::USER_DATA,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Phase::Init => "init",
            Phase::Root => "root",
            Phase::Network => "network",
            Phase::Metadata => "metadata",
            Phase::Login => "login",
            Phase::UserData => "user-data",
        }
    }
}

/// Reports that `phase` is reached: first to the port, since a line on an emulated serial console
/// takes longer than many a phase.
pub fn reached(phase: Phase, detail: impl Display) {
    write_boot_timer(phase.byte());
    line(format_args!("[{}] {detail}", phase.name()));
}

/// A line on the console, with the time since the kernel started.
pub fn line(text: impl Display) {
    println!("mallee-init: {:.3} {text}", uptime().as_secs_f64());
}

fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

fn write_boot_timer(value: u8) {
    // SAFETY: ioperm changes only which ports this thread may use.
    if unsafe { libc::ioperm(u64::from(BOOT_TIMER_PORT), 1, 1) } != 0 {
        // Without the right to use ports there is still the line on the console.
        return;
    }
    // SAFETY: the port was just allowed; a write to it changes no memory of this process. Where the
    // monitor has no boot timer, port 0x3f0 is a floppy controller's read-only status register.
    unsafe {
        std::arch::asm!(
            "out dx, al",
            in("dx") BOOT_TIMER_PORT,
            in("al") value,
            options(nomem, nostack, preserves_flags)
        );
    }
}
