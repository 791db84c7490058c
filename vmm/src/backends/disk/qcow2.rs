//! A qcow2 image and what it stands on, through the `imago` crate.
//!
//! The crate moves bytes to and from slices. Guest memory may be written by the guest meanwhile, so it never becomes a slice: there is a buffer
//! in between, of a bounded size.
//!
//! The crate keeps look-up tables in memory and writes changed ones when there are too many or it is told to
//! ([`Qcow2::settle`]). An image whose process was killed has all that its guest was told is safe, and what was in between may be
//! lost, as on a disk with a write cache.

use std::fs::File;
use std::io;

use imago::file::File as Storage;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2 as Format;
use imago::raw::Raw;
use imago::{FormatAccess, ShallowMapping, StorageExt, StorageOpenOptions};

use super::{Drive, DriveFormat, SECTOR};
use crate::api::BackingImage;
use crate::devices::virtio::iovec::IoVec;

type Access = FormatAccess<Storage>;

/// Bytes that are moved at once.
const BUFFER: usize = 256 << 10;

pub struct Qcow2 {
    image: Access,
    cluster_size: u64,
    /// Of what it stands on (bytes); 0 if that is nothing.
    backing_size: u64,
    /// As long as the longest request so far, up to [`BUFFER`].
    buffer: Vec<u8>,
}

impl Qcow2 {
    /// `file` is the drive's own; what it stands on is opened here, for reading.
    pub fn open(file: File, drive: &Drive) -> Result<Self, String> {
        let name = |error: io::Error| format!("{}: {error}", drive.path_on_host.display());
        let mut backing = None;
        for image in drive.backing.iter().rev() {
            backing = Some(layer(image, backing)?);
        }
        let backing_size = backing.as_ref().map_or(0, Access::size);
        let image = open(file, !drive.is_read_only, backing).map_err(name)?;
        let image = FormatAccess::new(image);
        // Version 2 has none; then there is nothing that could be forgotten either.
        let cluster_size = image.inner().zero_granularity().unwrap_or(SECTOR);
        Ok(Qcow2 { image, cluster_size, backing_size, buffer: Vec::new() })
    }

    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Makes it longer. What it stands on may be longer than it was, and must not come to light: that much is marked as zeros first.
    pub fn grow(&mut self, size: u64) -> io::Result<()> {
        let hidden = self.backing_size.min(size);
        if hidden > self.size() {
            self.image.resize_grow(hidden, PreallocateMode::Zero)?;
        }
        self.image.resize_grow(size, PreallocateMode::None)?;
        self.sync()
    }

    pub fn cluster_size(&self) -> u64 {
        self.cluster_size
    }

    pub fn read(&mut self, into: &IoVec, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let piece = piece(&mut self.buffer, into.len() - done);
            self.image.read(&mut *piece, offset + done as u64)?;
            into.write_at(done, piece);
            done += piece.len();
        }
        Ok(())
    }

    pub fn write(&mut self, from: &IoVec, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            let piece = piece(&mut self.buffer, from.len() - done);
            from.read_at(done, piece);
            self.image.write(&*piece, offset + done as u64)?;
            done += piece.len();
        }
        Ok(())
    }

    /// Writes the tables that were changed.
    pub fn settle(&self) -> io::Result<()> {
        self.image.flush()
    }

    pub fn sync(&self) -> io::Result<()> {
        self.image.flush()?;
        self.image.sync()
    }

    pub fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.give_back(offset, length)?;
        self.image.discard_to_any(offset, length)
    }

    pub fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        let end = offset + length;
        // The crate marks whole clusters. It would also look after the rest, but not of an image that is smaller than a cluster.
        let first = offset.next_multiple_of(self.cluster_size).min(end);
        let last = (end - end % self.cluster_size).max(first);
        self.write_zero_bytes(offset, first)?;
        self.zero_clusters(first, last, may_unmap)?;
        self.write_zero_bytes(last, end)
    }

    fn zero_clusters(&mut self, begin: u64, end: u64, may_unmap: bool) -> io::Result<()> {
        if begin == end {
            return Ok(());
        }
        let zeroed = match may_unmap {
            true => {
                self.give_back(begin, end - begin)?;
                self.image.discard_to_zero(begin, end - begin)
            }
            false => self.image.write_zeroes(begin, end - begin),
        };
        match zeroed {
            // Version 2.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_zero_bytes(begin, end),
            done => done,
        }
    }

    fn write_zero_bytes(&mut self, begin: u64, end: u64) -> io::Result<()> {
        let mut at = begin;
        while at < end {
            let piece = piece(&mut self.buffer, usize::try_from(end - at).unwrap_or(usize::MAX));
            piece.fill(0);
            self.image.write(&*piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Gives the space of a range, whose content does not matter any more, back to the host. The crate keeps a file's space for what is
    /// written next. It comes before the tables are changed: afterwards the crate may put something else there.
    fn give_back(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let (mapping, mapped) = self.image.get_shallow_mapping(at, end - at)?;
            if let ShallowMapping::Raw { storage, offset, writable: true, .. } = mapping {
                storage.discard(offset, mapped)?;
            }
            if mapped == 0 {
                break;
            }
            at += mapped;
        }
        Ok(())
    }
}

/// The first `length` bytes of the buffer, or all that it may have.
fn piece(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    let length = length.min(BUFFER);
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    &mut buffer[..length]
}

/// A backing image on those behind it.
fn layer(image: &BackingImage, backing: Option<Access>) -> Result<Access, String> {
    let path = image.path_on_host.as_path();
    let name = |error: io::Error| format!("backing image {}: {error}", path.display());
    let file = super::open(path, false).map_err(|error| error.to_string())?;
    match image.format {
        DriveFormat::Raw => {
            let image = Raw::open_image(storage(file, false).map_err(name)?, false).map_err(name)?;
            Ok(FormatAccess::new(image))
        }
        DriveFormat::Qcow2 => Ok(FormatAccess::new(open(file, false, backing).map_err(name)?)),
    }
}

/// Opens one image, and nothing that it names: whether it names something must be what the configuration says.
fn open(file: File, is_writable: bool, backing: Option<Access>) -> io::Result<Format<Storage>> {
    let mut image = Format::<Storage>::open_image(storage(file, is_writable)?, is_writable)?;
    if image.requires_external_data_file() {
        return Err(io::Error::other("an external data file is not served"));
    }
    image.set_data_file(None);
    match (image.implicit_backing_file(), &backing) {
        (Some(named), None) => {
            return Err(io::Error::other(format!("it stands on {named:?}, and no backing image is given for that")));
        }
        (None, Some(_)) => return Err(io::Error::other("it stands on no other, and a backing image is given")),
        _ => image.set_backing(backing),
    }
    Ok(image)
}

fn storage(file: File, is_writable: bool) -> io::Result<Storage> {
    Storage::from_open_file(file, StorageOpenOptions::new().write(is_writable))
}
