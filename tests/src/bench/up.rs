//! How long a small Linux guest takes to be up: from starting the monitor to the first line of the guest's first process. No devices but the serial port.

use std::path::Path;

use serde_json::json;

use super::{
    error::BenchError,
    monitors::{CLOUD_HYPERVISOR, FIRECRACKER, OURS, on_path},
    run::{Guest, Monitor},
};
use crate::lab::machine::QEMU;

/// Every monitor that is here.
pub fn present(ours: &Path, guest: &Guest) -> Result<Vec<Monitor>, BenchError> {
    let mut monitors = vec![guest.ours(ours, OURS, |_| {})?];
    if let Some(program) = on_path(FIRECRACKER) {
        monitors.push(guest.firecracker(&program, FIRECRACKER, json!({}))?);
    }
    monitors.extend(on_path(CLOUD_HYPERVISOR).map(|program| guest.cloud_hypervisor(&program, CLOUD_HYPERVISOR, &[])));
    monitors.extend(on_path(QEMU).map(|program| guest.qemu(&program, "qemu-microvm", &[])));
    Ok(monitors)
}
