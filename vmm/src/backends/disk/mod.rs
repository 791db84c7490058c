//! The file behind a virtio-blk device, locked against a second VM.
//!
//! What is asked of a disk is the same whatever its format: to read and write whole sectors, to forget or to zero some, to make
//! all of it last. `raw` does that with one system call on guest memory each; `qcow2` through the `imago` crate. `ring` is another way
//! to a raw file, for many requests at once.
//!
//! Everything is opened here, by the paths and formats that the configuration states: an image's content never says what else is opened.
//!
//! Offsets and lengths are in bytes and were checked against [`Disk::sectors`] by the caller.

mod qcow2;
mod raw;
pub mod ring;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::api::{Drive, DriveFormat, IoEngine};
use crate::devices::virtio::iovec::IoVec;
use crate::error::{Error, Result};
use qcow2::Qcow2;

/// A sector, the unit of virtio-blk (bytes).
pub const SECTOR: u64 = 512;
/// Images that one may stand on. Each is a look-up more for what none above it holds.
const MAX_BACKING: usize = 8;

pub struct Disk {
    image: Image,
    sectors: u64,
    is_read_only: bool,
    /// Bytes.
    granularity: u64,
}

enum Image {
    Raw(File),
    Qcow2(Box<Qcow2>),
}

impl Disk {
    /// Opens a drive's files. The format is what the configuration says, whatever the content looks like.
    pub fn open(drive: &Drive) -> Result<Self> {
        let path = drive.path_on_host.as_path();
        let refused = |why: String| Error::BadConfiguration(format!("drive {}: {why}", drive.drive_id));
        refuse_senseless(drive).map_err(refused)?;
        let file = open(path, !drive.is_read_only)?;
        let (image, size, granularity) = match drive.format {
            DriveFormat::Raw => {
                let (size, granularity) = raw::measure(&file).map_err(Error::file("drive", path))?;
                (Image::Raw(file), size, granularity)
            }
            DriveFormat::Qcow2 => {
                let image = Qcow2::open(file, drive).map_err(refused)?;
                let (size, granularity) = (image.size(), image.cluster_size());
                (Image::Qcow2(Box::new(image)), size, granularity)
            }
        };
        if size < SECTOR {
            return Err(refused(format!("{} has {size} bytes, less than a sector", path.display())));
        }
        if !size.is_multiple_of(SECTOR) {
            tracing::warn!(path = %path.display(), size, "the bytes after the last whole sector are not seen");
        }
        Ok(Disk { image, sectors: size / SECTOR, is_read_only: drive.is_read_only, granularity })
    }

    /// Opens what `drive` says now. Nothing if that is the raw file that is open already: then only its size is looked at again.
    pub fn reopen(&mut self, drive: &Drive) -> Result<Option<Self>> {
        let path = drive.path_on_host.as_path();
        if let Image::Raw(file) = &self.image
            && File::open(path).and_then(|named| is_same(file, &named)).map_err(Error::file("drive", path))?
        {
            let (size, _) = raw::measure(file).map_err(Error::file("drive", path))?;
            if size < SECTOR {
                let why = format!("drive {}: {} has {size} bytes", drive.drive_id, path.display());
                return Err(Error::BadConfiguration(why));
            }
            self.sectors = size / SECTOR;
            return Ok(None);
        }
        Disk::open(drive).map(Some)
    }

    /// Makes the disk, which is `drive`'s, `size` bytes long, for good before it returns. What is new reads as zeros. A disk does not shrink: what would be cut off may be
    /// in use.
    pub fn grow(&mut self, drive: &Drive, size: u64) -> Result<()> {
        let refused = |why: String| Error::BadConfiguration(format!("drive {}: {why}", drive.drive_id));
        let present = self.sectors * SECTOR;
        match size {
            _ if self.is_read_only => return Err(refused("a read-only drive does not grow".into())),
            _ if size == present => return Ok(()),
            _ if size < present => return Err(refused(format!("it has {present} bytes, and {size} are less"))),
            _ if !size.is_multiple_of(SECTOR) => {
                return Err(refused(format!("{size} bytes are not a multiple of {SECTOR}")));
            }
            _ => {}
        }
        let grown = match &mut self.image {
            Image::Raw(file) => raw::grow(file, size),
            Image::Qcow2(image) => image.grow(size),
        };
        grown.map_err(Error::file("growing the drive", &drive.path_on_host))?;
        self.sectors = size / SECTOR;
        Ok(())
    }

    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// What is forgotten should begin and end at multiples of so many bytes, a power of two and at least a sector.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// The file that `drive` names and that is open here, opened once more, for a ring. The kernel lets go of a ring's file some time after
    /// the ring is gone, and after the end of the process; the lock goes with the other one, at once.
    pub fn for_ring(&self, drive: &Drive) -> Result<File> {
        let failed = Error::file("drive", &drive.path_on_host);
        let Image::Raw(locked) = &self.image else {
            return Err(failed(io::ErrorKind::Unsupported.into()));
        };
        let file =
            OpenOptions::new().read(true).write(!self.is_read_only).open(&drive.path_on_host).map_err(&failed)?;
        match is_same(locked, &file).map_err(&failed)? {
            true => Ok(file),
            false => Err(failed(io::ErrorKind::StaleNetworkFileHandle.into())),
        }
    }

    /// Fills the segments. Consumes the list.
    pub fn read(&mut self, into: &mut IoVec, offset: u64) -> io::Result<()> {
        match &mut self.image {
            Image::Raw(file) => raw::read(file, into, offset),
            Image::Qcow2(image) => image.read(into, offset),
        }
    }

    /// Writes the segments. Consumes the list.
    pub fn write(&mut self, from: &mut IoVec, offset: u64) -> io::Result<()> {
        match &mut self.image {
            Image::Raw(file) => raw::write(file, from, offset),
            Image::Qcow2(image) => image.write(from, offset),
        }
    }

    /// Makes what was written last.
    pub fn sync(&self) -> io::Result<()> {
        match &self.image {
            Image::Raw(file) => file.sync_data(),
            Image::Qcow2(image) => image.sync(),
        }
    }

    /// Brings what is only in this process into the file.
    pub fn settle(&self) -> io::Result<()> {
        match &self.image {
            Image::Raw(_) => Ok(()),
            Image::Qcow2(image) => image.settle(),
        }
    }

    /// Forgets a range, whose content does not matter from now on. An error of the kind `Unsupported` if this file cannot.
    pub fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        match &mut self.image {
            Image::Raw(file) => raw::discard(file, offset, length),
            Image::Qcow2(image) => image.discard(offset, length),
        }
    }

    /// Makes a range read as zeros, without giving its space back unless `may_unmap`.
    pub fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        match &mut self.image {
            Image::Raw(file) => raw::write_zeroes(file, offset, length, may_unmap),
            Image::Qcow2(image) => image.write_zeroes(offset, length, may_unmap),
        }
    }
}

fn refuse_senseless(drive: &Drive) -> std::result::Result<(), String> {
    if drive.format == DriveFormat::Raw && !drive.backing.is_empty() {
        return Err("a raw image has no backing image".into());
    }
    if drive.format == DriveFormat::Qcow2 && drive.io_engine == IoEngine::Async {
        return Err("io_engine Async serves raw drives only".into());
    }
    if drive.backing.len() > MAX_BACKING {
        return Err(format!("{} backing images; at most {MAX_BACKING}", drive.backing.len()));
    }
    match drive.backing.iter().position(|image| image.format == DriveFormat::Raw) {
        Some(index) if index + 1 < drive.backing.len() => Err("a raw backing image has no backing image".into()),
        _ => Ok(()),
    }
}

/// Opens a file and locks it: writers exclude all others; readers share. The lock goes with the file.
fn open(path: &Path, is_writable: bool) -> Result<File> {
    let failed = Error::file("drive", path);
    let file = OpenOptions::new().read(true).write(is_writable).open(path).map_err(&failed)?;
    let locked = if is_writable { file.try_lock() } else { file.try_lock_shared() };
    match locked {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(Error::BadConfiguration(format!("drive file {} is in use by another VM or drive", path.display())))
        }
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

fn is_same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
