//! Where the serial port's output goes: standard output, or a file whose size is bounded.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Size of the file when the configuration does not say (bytes).
pub const DEFAULT_LIMIT: u64 = 1 << 20;

pub enum Console {
    StandardOutput,
    File(RotatingFile),
}

/// A file that is renamed to `….1` and begun anew when it reaches its limit, so that a guest can take
/// at most twice the limit of the host's disk.
pub struct RotatingFile {
    file: File,
    path: PathBuf,
    size: u64,
    limit: u64,
    failed: bool,
}

impl Console {
    /// Appends to the file at `path`.
    pub fn file(path: &Path, limit: u64) -> io::Result<Self> {
        let file = open(path)?;
        let size = file.metadata()?.len();
        Ok(Console::File(RotatingFile { file, path: path.to_owned(), size, limit, failed: false }))
    }

    /// Output that cannot be written is lost: a full disk must not stop the guest.
    pub fn write(&mut self, bytes: &[u8]) {
        match self {
            Console::StandardOutput => {
                let mut stdout = io::stdout().lock();
                let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
            }
            Console::File(file) => file.write(bytes),
        }
    }
}

impl RotatingFile {
    fn write(&mut self, bytes: &[u8]) {
        let result = self.rotate_if_full(bytes.len() as u64).and_then(|()| self.file.write_all(bytes));
        match result {
            Ok(()) => self.size += bytes.len() as u64,
            Err(error) if !self.failed => {
                self.failed = true;
                tracing::warn!(%error, path = %self.path.display(), "console output is being lost");
            }
            Err(_) => {}
        }
    }

    fn rotate_if_full(&mut self, coming: u64) -> io::Result<()> {
        if self.size == 0 || self.size + coming <= self.limit {
            return Ok(());
        }
        let mut older = self.path.clone().into_os_string();
        older.push(".1");
        std::fs::rename(&self.path, older)?;
        self.file = open(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_never_stops_writing_takes_at_most_twice_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let mut console = Console::file(&path, 100).unwrap();
        for line in 0..100 {
            console.write(format!("{line:09}\n").as_bytes());
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 100);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("000000099\n"));
    }
}
