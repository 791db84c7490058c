//! Copying disk images without writing their holes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::error::{Error, at};

const CHUNK: usize = 64 << 10;

/// Copies `from` to a new file `to`; chunks of zeros become holes.
pub fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let mut source = File::open(from).map_err(at(from))?;
    let mut target = File::create(to).map_err(at(to))?;
    let mut chunk = vec![0; CHUNK];
    let mut length = 0;
    loop {
        let read = source.read(&mut chunk).map_err(at(from))?;
        if read == 0 {
            break;
        }
        length += read as u64;
        let content = &chunk[..read];
        if content.iter().all(|byte| *byte == 0) {
            target.seek(SeekFrom::Start(length)).map_err(at(to))?;
        } else {
            target.write_all(content).map_err(at(to))?;
        }
    }
    target.set_len(length).map_err(at(to))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_copy_is_equal_and_keeps_the_holes() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let mut bytes = vec![0u8; 1 << 20];
        bytes[300_000] = 7;
        bytes.extend([1, 2, 3]);
        bytes.extend([0; 5]);
        std::fs::write(&from, &bytes).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), bytes);
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 19);
    }
}
