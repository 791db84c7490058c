//! The newest bytes of an instance's serial console.
//!
//! The VMM writes `console` and, when that is full, renames it to `console.1` and begins anew: the
//! newest bytes may lie in both. The files belong to the VMM's user, so they are opened without
//! following a link that a taken-over VMM could have put there.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::clock::to_unix_ns;
use crate::instance::folder::open_foreign;

/// The end of a console.
#[derive(Debug, PartialEq, Eq)]
pub struct Tail {
    pub output: Vec<u8>,
    /// When the newest byte was written, nanoseconds since 1970.
    pub written_unix_ns: u64,
}

/// At most the newest `max_bytes` of the console at `path` and its predecessor `….1`.
pub fn tail(path: &Path, max_bytes: usize) -> io::Result<Tail> {
    let mut newest = open_foreign(path)?;
    let written_unix_ns = to_unix_ns(newest.metadata()?.modified()?);
    let mut output = end_of(&mut newest, max_bytes)?;
    let missing = max_bytes - output.len();
    let mut rotated = path.as_os_str().to_owned();
    rotated.push(".1");
    if missing > 0
        && let Ok(mut older) = open_foreign(Path::new(&rotated))
    {
        let mut whole = end_of(&mut older, missing)?;
        whole.append(&mut output);
        output = whole;
    }
    Ok(Tail { output, written_unix_ns })
}

fn end_of(file: &mut File, max_bytes: usize) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(max_bytes as u64)))?;
    let mut bytes = Vec::new();
    // `take`: the file may grow while it is read.
    file.take(max_bytes as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_the_end_of_both_files_together(older in proptest::option::of(".{0,40}"), newer in ".{0,40}", max in 0usize..100) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("console");
            std::fs::write(&path, &newer).unwrap();
            if let Some(older) = &older {
                std::fs::write(folder.path().join("console.1"), older).unwrap();
            }
            let all = [older.unwrap_or_default().as_bytes(), newer.as_bytes()].concat();
            let expected = &all[all.len().saturating_sub(max)..];
            prop_assert_eq!(tail(&path, max).unwrap().output, expected);
        }
    }

    #[test]
    fn a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(tail(&path, 10).is_err());
    }
}
