//! The files that hold object bytes.
//!
//! A file is written under `s3/tmp`, made durable, and only then given its name under `s3/data`; it
//! never changes afterwards, so a reader that has it open, and a hard link to it, keep what they
//! have. A name is a random UUID: an overwritten object gets a new file, the old one is unlinked
//! after the row that named it is gone. A crash at any instruction leaves at most a file that no
//! row names; [`Files::sweep`] removes those at the next start.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Files that are written at one time. Each has a thread, and the runtime's 512 serve all others too
/// who must open, read or remove a file.
const WRITERS: usize = 128;

/// The name of a data file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DataId(pub String);

impl DataId {
    fn new() -> DataId {
        DataId(uuid::Uuid::new_v4().simple().to_string())
    }
}

/// The folders of the object store.
#[derive(Debug, Clone)]
pub struct Files {
    temporary: PathBuf,
    data: PathBuf,
    blobs: PathBuf,
    writers: Arc<Semaphore>,
}

/// A file that is being written. Dropped before [`Unfinished::finish`], it is gone.
#[derive(Debug)]
pub struct Unfinished {
    pub file: File,
    path: PathBuf,
    id: DataId,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Fails with "not found" after `finish`; a file that cannot be removed is swept later.
        let _ = fs::remove_file(&self.path);
    }
}

impl Files {
    /// Makes the folders below `state` where they are missing.
    pub fn open(state: &Path) -> io::Result<Files> {
        let root = state.join("s3");
        let files = Files {
            temporary: root.join("tmp"),
            data: root.join("data"),
            blobs: state.join("blobs"),
            writers: Arc::new(Semaphore::new(WRITERS)),
        };
        for folder in [&files.temporary, &files.data, &files.blobs] {
            fs::create_dir_all(folder)?;
        }
        // All of them at the start: a PUT then makes one folder entry durable, not two.
        for prefix in 0..=255_u8 {
            fs::create_dir_all(files.data.join(format!("{prefix:02x}")))?;
        }
        fs::set_permissions(&root, Permissions::from_mode(0o700))?;
        fs::set_permissions(&files.blobs, Permissions::from_mode(0o700))?;
        sync_folder(&files.data)?;
        sync_folder(&root)?;
        Ok(files)
    }

    /// Waits for the right to write one file more, which is given back when it is dropped. `None`:
    /// there were too many for as long as that.
    pub async fn turn(&self, patience: Duration) -> Option<OwnedSemaphorePermit> {
        tokio::time::timeout(patience, Arc::clone(&self.writers).acquire_owned()).await.ok()?.ok()
    }

    /// Begins a new file.
    pub fn create(&self) -> io::Result<Unfinished> {
        let id = DataId::new();
        let path = self.temporary.join(&id.0);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o400).open(&path)?;
        Ok(Unfinished { file, path, id })
    }

    /// Makes the bytes durable, then the name: after this returns, a crash loses neither.
    pub fn finish(&self, unfinished: Unfinished) -> io::Result<DataId> {
        unfinished.file.sync_all()?;
        let path = self.path(&unfinished.id);
        fs::rename(&unfinished.path, &path)?;
        sync_folder(path.parent().unwrap_or(&self.data))?;
        Ok(unfinished.id.clone())
    }

    /// Where a data file lies.
    pub fn path(&self, id: &DataId) -> PathBuf {
        let folder = id.0.get(..2).unwrap_or("00");
        self.data.join(folder).join(&id.0)
    }

    /// Removes data files that no row names any more, on a thread where that holds nobody up: there
    /// may be thousands, and a large one takes its time. One that is gone already is no error; one
    /// that cannot be removed is left to the next sweep.
    pub async fn remove(&self, ids: impl IntoIterator<Item = DataId>) {
        let (files, ids) = (self.clone(), Vec::from_iter(ids));
        if !ids.is_empty() {
            // The thread of a runtime that ends may not come to it; that too is left to the sweep.
            let _ = tokio::task::spawn_blocking(move || ids.iter().for_each(|id| files.remove_one(id))).await;
        }
    }

    fn remove_one(&self, id: &DataId) {
        if let Err(error) = fs::remove_file(self.path(id))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, data = %id.0, "a data file is left to the next sweep");
        }
    }

    /// Keeps a data file's bytes under their digest, by a hard link, whatever becomes of the object.
    pub fn pin(&self, id: &DataId, sha256: &str) -> io::Result<PathBuf> {
        let blob = self.blobs.join(sha256);
        match fs::hard_link(self.path(id), &blob) {
            Ok(()) => sync_folder(&self.blobs)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        Ok(blob)
    }

    pub fn unpin(&self, sha256: &str) -> io::Result<()> {
        match fs::remove_file(self.blobs.join(sha256)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The pinned bytes with this digest.
    pub fn blob(&self, sha256: &str) -> Option<PathBuf> {
        let well_formed = sha256.len() == 64 && sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        Some(self.blobs.join(sha256)).filter(|path| well_formed && path.is_file())
    }

    /// The state folder that these lie in, for tests that open it again.
    #[cfg(test)]
    pub fn state(&self) -> &Path {
        self.blobs.parent().unwrap()
    }

    /// Data files that are there.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        fs::read_dir(&self.data).unwrap().map(|folder| fs::read_dir(folder.unwrap().path()).unwrap().count()).sum()
    }

    /// Removes every temporary file and every data file that is not in `named`. Only at the start,
    /// before the first request: a file that is being written is in neither set.
    pub fn sweep(&self, named: &HashSet<DataId>) -> io::Result<usize> {
        let mut removed = 0;
        for entry in fs::read_dir(&self.temporary)? {
            fs::remove_file(entry?.path())?;
            removed += 1;
        }
        for folder in fs::read_dir(&self.data)? {
            for entry in fs::read_dir(folder?.path())? {
                let entry = entry?;
                if !named.contains(&DataId(entry.file_name().to_string_lossy().into_owned())) {
                    fs::remove_file(entry.path())?;
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn an_unfinished_file_leaves_nothing_and_a_finished_one_stays() {
        let state = tempfile::tempdir().unwrap();
        let files = Files::open(state.path()).unwrap();
        drop(files.create().unwrap());
        assert_eq!(fs::read_dir(&files.temporary).unwrap().count(), 0);
        let mut unfinished = files.create().unwrap();
        unfinished.file.write_all(b"bytes").unwrap();
        let id = files.finish(unfinished).unwrap();
        assert_eq!(fs::read(files.path(&id)).unwrap(), b"bytes");
        assert_eq!(fs::read_dir(&files.temporary).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn only_so_many_files_are_written_at_one_time() {
        let state = tempfile::tempdir().unwrap();
        let files = Files::open(state.path()).unwrap();
        let mut turns = Vec::new();
        for _ in 0..WRITERS {
            turns.push(files.turn(Duration::ZERO).await.unwrap());
        }
        assert!(files.clone().turn(Duration::ZERO).await.is_none());
        turns.pop();
        assert!(files.turn(Duration::ZERO).await.is_some());
    }

    #[test]
    fn the_sweep_takes_orphans_and_leaves_what_is_named_or_pinned() {
        let state = tempfile::tempdir().unwrap();
        let files = Files::open(state.path()).unwrap();
        let finished = || files.finish(files.create().unwrap()).unwrap();
        let (named, orphan, pinned) = (finished(), finished(), finished());
        let digest = "0".repeat(64);
        files.pin(&pinned, &digest).unwrap();
        std::mem::forget(files.create().unwrap());
        assert_eq!(files.sweep(&HashSet::from([named.clone()])).unwrap(), 3);
        assert!(files.path(&named).exists() && !files.path(&orphan).exists());
        assert!(files.blob(&digest).is_some());
        files.unpin(&digest).unwrap();
        assert!(files.blob(&digest).is_none() && files.blob("../x").is_none());
    }
}
