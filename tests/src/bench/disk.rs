//! Requests a second on a virtio disk, as a Linux guest counts them (`guest::disk_bench`): a raw file through the host's page cache, with flushes
//! passed on (Cloud Hypervisor and QEMU do so unless they are told not to, Firecracker when it is told to).

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use mallee_vmm::api::{Drive, IoEngine};
use serde_json::json;

use super::{
    error::BenchError,
    monitors::{CLOUD_HYPERVISOR, FIRECRACKER, OURS, on_path},
    run::{Guest, Monitor},
};
use crate::lab::machine::QEMU;

const DISK_MIB: u64 = 64;

fn disk(guest: &Guest) -> PathBuf {
    guest.work.join("disk")
}

/// Makes the disk, with all of its blocks written: a hole would be read without a look at the file.
pub fn make_disk(guest: &Guest) -> Result<(), BenchError> {
    let path = disk(guest);
    fs::write(&path, vec![0xa5; (DISK_MIB << 20) as usize])
        .and_then(|()| File::open(&path)?.sync_all())
        .map_err(|source| BenchError::File { action: "writing", path, source })
}

/// Every monitor that is here, by each of its ways to the file.
pub fn present(ours: &Path, guest: &Guest) -> Result<Vec<Monitor>, BenchError> {
    let mut monitors = [(IoEngine::Sync, OURS.to_owned()), (IoEngine::Async, format!("{OURS} io_uring"))]
        .into_iter()
        .map(|(engine, name)| with_engine(ours, guest, engine, &name))
        .collect::<Result<Vec<_>, _>>()?;
    let file = disk(guest);
    if let Some(program) = on_path(FIRECRACKER) {
        for engine in ["Sync", "Async"] {
            let drive = json!({ "drive_id": "disk", "path_on_host": file, "is_root_device": false, "io_engine": engine,
                "cache_type": "Writeback" });
            let name = if engine == "Sync" { FIRECRACKER.to_owned() } else { format!("{FIRECRACKER} io_uring") };
            monitors.push(guest.firecracker(&program, &name, json!({ "drives": [drive] }))?);
        }
    }
    if let Some(program) = on_path(CLOUD_HYPERVISOR) {
        let drive = format!("path={},image_type=raw", file.display());
        monitors.push(guest.cloud_hypervisor(&program, CLOUD_HYPERVISOR, &["--disk", &drive]));
    }
    if let Some(program) = on_path(QEMU) {
        for engine in ["threads", "io_uring"] {
            let drive = format!("id=disk,if=none,format=raw,cache=writeback,aio={engine},file={}", file.display());
            let words = ["-drive", &drive, "-device", "virtio-blk-device,drive=disk"];
            monitors.push(guest.qemu(&program, &format!("qemu-microvm {engine}"), &words));
        }
    }
    Ok(monitors)
}

#[allow(clippy::needless_update, reason = "what a VMM offers grows; this states what it wants of it")]
fn with_engine(program: &Path, guest: &Guest, io_engine: IoEngine, name: &str) -> Result<Monitor, BenchError> {
    guest.ours(program, name, |config| {
        let drive = Drive { drive_id: "disk".into(), path_on_host: disk(guest), io_engine, ..Drive::default() };
        config.drives.push(drive);
    })
}
