//! Trials of the monitor: a driver for every virtio device that there is, by the rules (`exercise`) or as an enemy would write it
//! (`hostile`).
//!
//! The drivers of `virtio` are careful and know their devices; these know of a device only what queues it has, so that
//! one that is added to the monitor is tried without a line here. What is shared lies in `device` (a window, set up
//! step by step, each step one that can be done wrongly) and `scratch` (the memory that queues and buffers are in).
//!
//! A trial ends with a line on the console and the machine turned off. If the monitor did what it may not do (a device that does
//! not answer, one that goes on with a broken ring), the line says so and the machine is reset instead.

mod device;
mod exercise;
mod hostile;
mod net_control;
mod scratch;

use mallee_probe::options::Trial;

use crate::machine::{self, serial};
use device::Device;

/// Runs a trial to its end.
pub fn run(trial: Trial) -> ! {
    let outcome = match trial {
        Trial::Exercise => exercise::all(),
        Trial::Hostile { seed } => hostile::all(seed),
    };
    match outcome {
        Ok(()) => {
            serial::line(format_args!("probe: trial passed"));
            machine::power_off()
        }
        Err(Failure { device, what }) => {
            serial::line(format_args!("probe: trial FAILED: device {device}: {what}"));
            machine::reset()
        }
    }
}

/// What the monitor did that it may not do.
struct Failure {
    /// Number of the window.
    device: u32,
    what: &'static str,
}

type Outcome = Result<(), Failure>;

/// Every device, in the order of the windows.
fn devices() -> impl Iterator<Item = Device> {
    (0..crate::virtio::mmio::WINDOWS_MAX).map_while(Device::open)
}
