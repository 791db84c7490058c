//! Where the serial port's output goes: standard output, or a file whose size is bounded.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Size of the file when the configuration does not say (bytes).
pub const DEFAULT_LIMIT: u64 = 1 << 20;

/// Bytes that a file may grow beyond its limit until it is rotated.
const SLACK: u64 = 64 << 10;

pub enum Console {
    StandardOutput,
    File(RotatingFile),
}

/// A file that is renamed to `….1` and begun anew when it reaches its limit, so that a guest cannot fill the host's
/// disk: it can take twice the limit and [`SLACK`].
///
/// Whoever writes is a vCPU's thread, which may not open files. It goes on writing and says that a rotation is due; the main thread
/// does it ([`Console::rotate`]). What comes before it does, beyond the slack, is lost.
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

    /// Whether [`Self::rotate`] is to be called.
    pub fn is_rotation_due(&self) -> bool {
        matches!(self, Console::File(file) if file.is_full())
    }

    /// Begins a new file if this one is full.
    pub fn rotate(&mut self) {
        if let Console::File(file) = self
            && file.is_full()
            && let Err(error) = file.rotate()
        {
            file.fail(&error);
        }
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
        let size = self.size + bytes.len() as u64;
        if size > self.limit.saturating_add(SLACK) {
            return;
        }
        match self.file.write_all(bytes) {
            Ok(()) => self.size = size,
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &io::Error) {
        if !self.failed {
            self.failed = true;
            tracing::warn!(%error, path = %self.path.display(), "console output is being lost");
        }
    }

    fn is_full(&self) -> bool {
        self.size >= self.limit
    }

    fn rotate(&mut self) -> io::Result<()> {
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
    fn a_file_that_is_full_is_begun_anew_and_one_old_one_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let mut console = Console::file(&path, 100).unwrap();
        for line in 0..100 {
            console.write(format!("{line:09}\n").as_bytes());
            assert_eq!(console.is_rotation_due(), line % 10 == 9);
            if line < 99 {
                console.rotate();
            }
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 100);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("000000099\n"));
    }

    #[test]
    fn a_guest_that_writes_faster_than_files_are_rotated_loses_output() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let mut console = Console::file(&path, 100).unwrap();
        for _ in 0..200 {
            console.write(&[b'x'; 1000]);
        }
        assert!(std::fs::metadata(&path).unwrap().len() <= 100 + SLACK);
        console.rotate();
        console.write(b"again\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "again\n");
    }
}
