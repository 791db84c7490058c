//! Disks with Linux's driver: a raw file through io_uring, and a qcow2 image on another one. What the guest writes, discards and zeroes
//! is looked for in the host's files, as the next VM would find it; and the disks grow while they are used.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, FormatCreateBuilder, Storage as _, StorageCreateOptions, StorageOpenOptions};
use mallee_vmm::api::{BackingImage, Drive, DriveFormat, DriveUpdate, IoEngine};

use crate::guest::host::Host;
use crate::guest::link::Link;
use crate::guest::{Check, Outcome, expect, while_doing};

pub const CHECK: Check = Check { name: "drive", configure, guest: |_, link| guest(link), host };

const RAW: &str = "raw-disk";
const OVERLAY: &str = "overlay-disk";
const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const GROWN: u64 = 24 * MIB;
/// What the overlay's base is full of, and what the guest writes.
const BASE: u8 = 0x11;
const WRITTEN: u8 = 0x77;
/// In MiB: what is written, and what of that is discarded and zeroed then.
const WRITE: std::ops::Range<u64> = 2..10;
const DISCARD: std::ops::Range<u64> = 2..6;
const ZERO: std::ops::Range<u64> = 8..9;
/// include/uapi/linux/fs.h
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;
/// Not an expectation: after that it will not happen.
const PATIENCE: Duration = Duration::from_secs(60);

fn configure(config: &mut mallee_vmm::api::VmConfig, folder: &Path) {
    // A failure shows when the monitor does not find its files.
    let _ = make_files(folder);
    config.drives.push(Drive {
        drive_id: RAW.into(),
        path_on_host: folder.join(RAW),
        io_engine: IoEngine::Async,
        ..Drive::default()
    });
    config.drives.push(Drive {
        drive_id: OVERLAY.into(),
        path_on_host: folder.join(OVERLAY),
        format: DriveFormat::Qcow2,
        backing: vec![BackingImage { path_on_host: base(folder), format: DriveFormat::Raw }],
        ..Drive::default()
    });
}

fn base(folder: &Path) -> PathBuf {
    folder.join("base")
}

fn make_files(folder: &Path) -> std::io::Result<()> {
    File::create(folder.join(RAW))?.set_len(SIZE)?;
    fs::write(base(folder), vec![BASE; SIZE as usize])?;
    let file = Storage::create_open(StorageCreateOptions::new().filename(folder.join(OVERLAY)))?;
    Qcow2::<Storage>::create_builder(file).size(SIZE).backing("base".into(), "raw".into()).create()
}

fn guest(link: &mut Link) -> Outcome {
    for name in [RAW, OVERLAY] {
        let (block, disk) = open(name)?;
        let before = if name == OVERLAY { BASE } else { 0 };
        expect("a byte of the new disk", byte_at(&disk, WRITE.start)?, before)?;
        for mib in WRITE {
            disk.write_all_at(&vec![WRITTEN; MIB as usize], mib * MIB).map_err(while_doing("writing"))?;
        }
        disk.sync_all().map_err(while_doing("a flush"))?;
        link.say(&format!("written {name}"))?;
        link.wait_for("seen")?;
        forget(&disk, BLKDISCARD, DISCARD).map_err(while_doing("BLKDISCARD"))?;
        forget(&disk, BLKZEROOUT, ZERO).map_err(while_doing("BLKZEROOUT"))?;
        disk.sync_all().map_err(while_doing("a flush"))?;
        expect("a byte that was zeroed", byte_at(&disk, ZERO.start)?, 0)?;
        expect("a byte behind it", byte_at(&disk, ZERO.end)?, WRITTEN)?;
        link.say(&format!("forgotten {name}"))?;
        link.wait_for("seen")?;
        link.say("grow it")?;
        link.wait_for("grown")?;
        wait_for_size(&block, GROWN)?;
        let last = GROWN / MIB - 1;
        expect("a byte of what is new", byte_at(&disk, last)?, 0)?;
        disk.write_all_at(&[WRITTEN], last * MIB).map_err(while_doing("writing to what is new"))?;
        disk.sync_all().map_err(while_doing("a flush"))?;
        link.say("written to what is new")?;
    }
    Ok("written, flushed, discarded, zeroed, grown".into())
}

/// The disk whose serial number is `name`: its folder in /sys, and itself.
fn open(name: &str) -> Result<(PathBuf, File), String> {
    let folder = "/sys/block";
    for entry in fs::read_dir(folder).map_err(while_doing(folder))?.flatten() {
        if fs::read_to_string(entry.path().join("serial")).is_ok_and(|serial| serial.trim() == name) {
            let path = Path::new("/dev").join(entry.file_name());
            let disk = OpenOptions::new().read(true).write(true).open(&path);
            return Ok((entry.path(), disk.map_err(while_doing(&path.display().to_string()))?));
        }
    }
    Err(format!("no disk has the serial number {name}"))
}

fn byte_at(disk: &File, mib: u64) -> Result<u8, String> {
    let mut byte = [0];
    disk.read_exact_at(&mut byte, mib * MIB).map_err(while_doing("reading"))?;
    Ok(byte[0])
}

/// A request on a range of MiB.
fn forget(disk: &File, request: libc::c_ulong, mib: std::ops::Range<u64>) -> std::io::Result<()> {
    let range = [mib.start * MIB, (mib.end - mib.start) * MIB];
    // SAFETY: both requests read two 64-bit numbers.
    match unsafe { libc::ioctl(disk.as_raw_fd(), request as _, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The driver takes a new size in a work item of its own, some time after its interrupt.
fn wait_for_size(block: &Path, wanted: u64) -> Result<(), String> {
    let size = || -> Result<u64, String> {
        let text = fs::read_to_string(block.join("size")).map_err(while_doing("the disk's size"))?;
        text.trim().parse::<u64>().map(|sectors| sectors * 512).map_err(while_doing("the disk's size"))
    };
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end && size()? != wanted {
        std::thread::sleep(Duration::from_millis(20));
    }
    expect("the disk's size", size()?, wanted)
}

fn host(host: &Host, link: &mut Link) -> Outcome {
    let mut given_back = Vec::new();
    for name in [RAW, OVERLAY] {
        let path = host.folder.join(name);
        let used = || fs::metadata(&path).map(|file| file.blocks() * 512).map_err(while_doing(name));
        link.wait_for(&format!("written {name}"))?;
        for mib in WRITE {
            expect(&format!("{name}, a byte of MiB {mib}"), content(host, name, mib)?, WRITTEN)?;
        }
        let full = used()?;
        link.say("seen")?;
        link.wait_for(&format!("forgotten {name}"))?;
        expect("a byte that was zeroed", content(host, name, ZERO.start)?, 0)?;
        expect("a byte that was not", content(host, name, ZERO.end)?, WRITTEN)?;
        let back = full.saturating_sub(used()?);
        if back < (DISCARD.end - DISCARD.start) * MIB {
            return Err(format!("{name}: {back} bytes were given back of {full}"));
        }
        given_back.push(format!("{} MiB of {name}", back / MIB));
        link.say("seen")?;
        link.wait_for("grow it")?;
        grow(host, name)?;
        link.say("grown")?;
        link.wait_for("written to what is new")?;
        expect(&format!("{name}, a byte of what is new"), content(host, name, GROWN / MIB - 1)?, WRITTEN)?;
    }
    expect("the overlay's base", fs::read(base(&host.folder)).is_ok_and(|it| it.iter().all(|it| *it == BASE)), true)?;
    Ok(format!("given back: {}", given_back.join(", ")))
}

/// A raw file by somebody else, who may, an image by the monitor that has it open.
fn grow(host: &Host, name: &str) -> Result<(), String> {
    let mut update = DriveUpdate { drive_id: name.into(), ..DriveUpdate::default() };
    if name == RAW {
        let path = host.folder.join(name);
        let file = OpenOptions::new().write(true).open(&path).map_err(while_doing("growing the file"))?;
        file.set_len(GROWN).map_err(while_doing("growing the file"))?;
        update.path_on_host = Some(path);
    } else {
        update.size = Some(GROWN);
    }
    host.client.patch(&format!("/drives/{name}"), &update).map_err(while_doing("PATCH /drives"))
}

/// The first byte of a MiB, as who opens the file now sees it.
fn content(host: &Host, name: &str, mib: u64) -> Result<u8, String> {
    let failed = while_doing(name);
    let open = |path: PathBuf| Storage::open(StorageOpenOptions::new().filename(path));
    let file = open(host.folder.join(name)).map_err(&failed)?;
    let mut byte = [0];
    if name == RAW {
        let raw = FormatAccess::new(Raw::open_image(file, false).map_err(&failed)?);
        raw.read(&mut byte[..], mib * MIB).map_err(&failed)?;
    } else {
        let mut image: Qcow2<Storage> = Qcow2::open_image(file, false).map_err(&failed)?;
        let base = Raw::open_image(open(base(&host.folder)).map_err(&failed)?, false).map_err(&failed)?;
        image.set_backing(Some(FormatAccess::new(base)));
        FormatAccess::new(image).read(&mut byte[..], mib * MIB).map_err(&failed)?;
    }
    Ok(byte[0])
}
