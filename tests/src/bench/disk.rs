//! Requests a second on a virtio disk, as a Linux guest counts them (`guest::disk_bench`): a raw file through the host's page cache, with flushes
//! passed on.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use mallee_vmm::api::{Drive, IoEngine};

use super::{
    error::BenchError,
    linux::{Guest, Monitor},
    monitors::OURS,
};

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

/// Ours with each engine.
#[allow(clippy::needless_update, reason = "what a VMM offers grows; this states what it wants of it")]
pub fn ours(program: &Path, guest: &Guest) -> Result<Vec<Monitor>, BenchError> {
    let with = |(io_engine, name): (IoEngine, String)| {
        guest.ours(program, &name, |config| {
            let drive = Drive { drive_id: "disk".into(), path_on_host: disk(guest), io_engine, ..Drive::default() };
            config.drives.push(drive);
        })
    };
    [(IoEngine::Sync, OURS.to_owned()), (IoEngine::Async, format!("{OURS} io_uring"))].into_iter().map(with).collect()
}

/// QEMU's microvm with each of the two ways that it has for buffered files.
pub fn qemu(program: &Path, guest: &Guest) -> Vec<Monitor> {
    ["threads", "io_uring"]
        .map(|engine| {
            let file = disk(guest);
            let drive = format!("id=disk,if=none,format=raw,cache=writeback,aio={engine},file={}", file.display());
            let words = [("-drive", drive), ("-device", "virtio-blk-device,drive=disk".into())];
            guest.qemu(program, &format!("qemu-microvm {engine}"), &words)
        })
        .into()
}
