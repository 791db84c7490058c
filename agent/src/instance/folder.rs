//! One instance's folder.
//!
//! ```text
//! instances/i-…/record.json   what must survive the agent: see `record`
//!               vmm.json      configuration of the VMM's next start
//!               lock          locked by the VMM as long as it lives; holds its process id
//!               log           what the VMM wrote on its standard output and error
//!               root/         empty: the VMM's own root is mounted here, in its own namespace
//!               vm/           belongs to the VMM's user id
//!                  disk       root disk
//!                  console    serial output (and console.1)
//!                  events-N   measurements of the N-th start
//!                  api.sock
//! ```
//!
//! The VMM can write into `vm/` and nowhere else. Should a guest break out of its VMM, it finds
//! itself as that user: what lies in `vm/` is then the enemy's, and is opened here only with
//! [`open_foreign`].

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use crate::ids::InstanceId;

/// Paths of one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder(PathBuf);

impl Folder {
    pub fn of(instances: &Path, id: &InstanceId) -> Self {
        Self(instances.join(id.as_str()))
    }

    /// Makes what is missing of the folder and gives `vm/` to `uid`.
    pub fn make(&self, uid: u32) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o711).create(&self.0)?;
        DirBuilder::new().recursive(true).mode(0o711).create(self.jail_root())?;
        DirBuilder::new().recursive(true).mode(0o700).create(self.vm())?;
        chown(self.vm(), Some(uid), Some(uid))
    }

    /// Removes everything; the record goes last, so that a crash in between is noticed and gone on
    /// with. Nothing may run in it.
    pub fn remove(&self) -> io::Result<()> {
        for part in [self.vm(), self.jail_root()] {
            ignore_missing(fs::remove_dir_all(part))?;
        }
        for part in [self.config(), self.log(), self.lock(), self.record()] {
            ignore_missing(fs::remove_file(part))?;
        }
        ignore_missing(fs::remove_dir_all(&self.0))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
    pub fn record(&self) -> PathBuf {
        self.0.join("record.json")
    }
    pub fn config(&self) -> PathBuf {
        self.0.join("vmm.json")
    }
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }
    pub fn jail_root(&self) -> PathBuf {
        self.0.join("root")
    }
    pub fn vm(&self) -> PathBuf {
        self.0.join("vm")
    }
    pub fn disk(&self) -> PathBuf {
        self.vm().join("disk")
    }
    pub fn console(&self) -> PathBuf {
        self.vm().join("console")
    }
    pub fn api_socket(&self) -> PathBuf {
        self.vm().join("api.sock")
    }
    pub fn events(&self, start: u64) -> PathBuf {
        self.vm().join(events_name(start))
    }
}

/// Name of the events file of an instance's `start`-th start. A start has its own file, so that
/// what an earlier VMM wrote is never taken for news of a later one.
pub fn events_name(start: u64) -> String {
    format!("events-{start}")
}

pub fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Opens a file that belongs to a VMM's user: a regular file or nothing, no link is followed, and a
/// pipe that was put there does not make the agent wait.
pub fn open_foreign(path: &Path) -> io::Result<File> {
    open_regular(OpenOptions::new().read(true), path)
}

/// The same, for writing as well.
pub fn open_foreign_for_writing(path: &Path) -> io::Result<File> {
    open_regular(OpenOptions::new().read(true).write(true), path)
}

fn open_regular(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other(format!("{} is not a regular file", path.display())));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_and_removed_twice_without_complaint() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(root.path(), &"i-00000001".parse().unwrap());
        let uid = nix::unistd::getuid().as_raw();
        folder.make(uid).unwrap();
        folder.make(uid).unwrap();
        fs::write(folder.disk(), b"x").unwrap();
        folder.remove().unwrap();
        folder.remove().unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn links_pipes_and_folders_are_not_opened() {
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        let pipe = root.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [link.as_path(), &pipe, root.path()] {
            assert!(open_foreign(path).is_err(), "{}", path.display());
        }
    }
}
