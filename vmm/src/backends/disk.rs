//! The file behind a virtio-blk device: raw, locked against a second VM.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use crate::api::{Drive, DriveFormat};
use crate::error::{Error, Result};

/// A sector, the unit of virtio-blk (bytes).
pub const SECTOR: u64 = 512;

pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Disk {
    /// Opens a drive's file. The format is what the configuration says, whatever the content looks like.
    pub fn open(drive: &Drive) -> Result<Self> {
        let path = drive.path_on_host.as_path();
        if drive.format == DriveFormat::Qcow2 {
            return Err(Error::BadConfiguration(format!(
                "drive {}: format qcow2 is not served; convert {} to raw",
                drive.drive_id,
                path.display()
            )));
        }
        let mut file =
            OpenOptions::new().read(true).write(!drive.is_read_only).open(path).map_err(Error::file("drive", path))?;
        lock(&file, drive.is_read_only, path)?;
        // Also tells the size of a block device.
        let size = file.seek(SeekFrom::End(0)).map_err(Error::file("drive", path))?;
        if size < SECTOR {
            return Err(Error::BadConfiguration(format!(
                "drive {}: {} has {size} bytes, less than a sector",
                drive.drive_id,
                path.display()
            )));
        }
        if !size.is_multiple_of(SECTOR) {
            tracing::warn!(path = %path.display(), size, "the bytes after the last whole sector are not seen");
        }
        Ok(Disk { file, sectors: size / SECTOR, read_only: drive.is_read_only })
    }

    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Makes what was written last.
    pub fn sync(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }
}

/// Writers exclude all others; readers share. The lock goes with the process.
fn lock(file: &File, shared: bool, path: &Path) -> Result<()> {
    let locked = if shared { file.try_lock_shared() } else { file.try_lock() };
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            Err(Error::BadConfiguration(format!("drive file {} is in use by another VM", path.display())))
        }
        Err(TryLockError::Error(error)) => Err(Error::file("drive", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(path: &Path, is_read_only: bool, format: DriveFormat) -> Drive {
        Drive { drive_id: "d".into(), path_on_host: path.to_owned(), is_read_only, format, ..Drive::default() }
    }

    #[test]
    fn two_vms_cannot_write_to_one_file_but_many_can_read_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let writer = Disk::open(&drive(file.path(), false, DriveFormat::Raw)).unwrap();
        assert_eq!(writer.sectors(), 8);
        let error = Disk::open(&drive(file.path(), false, DriveFormat::Raw)).err().unwrap();
        assert!(error.to_string().contains("in use"), "{error}");
        drop(writer);
        let readers: Vec<_> =
            (0..3).map(|_| Disk::open(&drive(file.path(), true, DriveFormat::Raw)).unwrap()).collect();
        assert!(readers.iter().all(Disk::is_read_only));
    }

    #[test]
    fn what_cannot_be_a_disk_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(Disk::open(&drive(file.path(), false, DriveFormat::Raw)).is_err());
        file.as_file().set_len(4096).unwrap();
        assert!(Disk::open(&drive(file.path(), false, DriveFormat::Qcow2)).is_err());
        assert!(Disk::open(&drive(Path::new("/nonexistent"), true, DriveFormat::Raw)).is_err());
    }
}
