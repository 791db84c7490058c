//! Images for the tests of disks and of the device on them.

use std::path::Path;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};

use crate::api::{Drive, DriveFormat};

/// Makes a qcow2 image of `size` bytes that says it stands on `backing`.
pub fn make_qcow2(path: &Path, size: u64, backing: Option<&str>) {
    let storage = File::create_open(StorageCreateOptions::new().filename(path)).unwrap();
    let mut builder = Qcow2::<File>::create_builder(storage).size(size);
    if let Some(backing) = backing {
        builder = builder.backing(backing.into(), "raw".into());
    }
    builder.create().unwrap();
}

pub fn drive(path: &Path, format: DriveFormat) -> Drive {
    Drive { drive_id: "d".into(), path_on_host: path.to_owned(), format, ..Drive::default() }
}
