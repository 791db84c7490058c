//! What was fetched and built, kept in the user's cache folder (XDG Base Directory Specification).
//!
//! `apt/` holds apt's own digest of its index, `debs/` packages under their digests, `images/NAME/DIGEST/` built images under the digest of their inputs,
//! and `images/NAME/inputs.json` what the last build found in apt's index, for a machine on which the index is gone.
//! All of it can be deleted at any time.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, at};
use crate::manifest::{self, Manifest};
use crate::sparse;

#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// `folder`, or else `mallee` in the user's cache folder.
    pub fn open(folder: Option<PathBuf>) -> Result<Self, Error> {
        let folder = match folder {
            Some(folder) => folder,
            None => user_cache().ok_or(Error::NoCacheFolder)?.join("mallee"),
        };
        std::fs::create_dir_all(&folder).map_err(at(&folder))?;
        let folder = folder.canonicalize().map_err(at(&folder))?;
        Ok(Cache { folder })
    }

    pub fn packages(&self) -> PathBuf {
        self.folder.join("debs")
    }

    /// For apt's digest of its index.
    pub fn apt(&self) -> PathBuf {
        self.folder.join("apt")
    }

    /// The image `name` built from the inputs with this digest: from the cache, or by `build`, which
    /// fills the folder it is given with the parts and returns the manifest. Half an image is never kept.
    pub fn image(
        &self,
        name: &str,
        inputs: &str,
        build: impl FnOnce(&Path) -> Result<Manifest, Error>,
    ) -> Result<PathBuf, Error> {
        let images = self.folder.join("images").join(name);
        let place = images.join(inputs);
        if Manifest::read(&place).and_then(|manifest| manifest.verify(&place)).is_ok() {
            return Ok(place);
        }
        std::fs::create_dir_all(&images).map_err(at(&images))?;
        let half_made = tempfile::tempdir_in(&images).map_err(at(&images))?;
        build(half_made.path())?.write(half_made.path())?;
        // Only a damaged one can be there.
        let _ = std::fs::remove_dir_all(&place);
        let built = half_made.keep();
        match std::fs::rename(&built, &place) {
            Ok(()) => Ok(place),
            // Another build of the same inputs was faster: its result is the same.
            Err(_) if Manifest::read(&place).is_ok() => {
                let _ = std::fs::remove_dir_all(&built);
                Ok(place)
            }
            Err(error) => Err(at(&place)(error)),
        }
    }

    /// `find`'s answer, remembered for as long as `state` (of that which is asked) stays the same; and longer if
    /// `find` fails because apt's index is empty.
    pub fn remembered<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        state: &str,
        find: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let folder = self.folder.join("images").join(name);
        let path = folder.join("inputs.json");
        let known: Option<Answer<T>> = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let known = match known {
            Some(known) if known.state == state => return Ok(known.found),
            known => known,
        };
        match find() {
            Ok(found) => {
                std::fs::create_dir_all(&folder).map_err(at(&folder))?;
                let answer = Answer { state: state.to_owned(), found };
                let text = serde_json::to_vec_pretty(&answer).unwrap_or_default();
                std::fs::write(&path, text).map_err(at(&path))?;
                Ok(answer.found)
            }
            Err(error @ (Error::UnknownPackage { .. } | Error::NoProgram { .. })) => {
                let known = known.ok_or(error)?;
                tracing::warn!("apt does not know the packages; using the versions of the last build");
                Ok(known.found)
            }
            Err(error) => Err(error),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Answer<T> {
    state: String,
    found: T,
}

/// Copies the image in `from` to `to`, the manifest last, so that a folder with a manifest is whole.
/// Files that are there already and right are left alone.
pub fn export(from: &Path, to: &Path) -> Result<(), Error> {
    let manifest = Manifest::read(from)?;
    if Manifest::read(to).is_ok_and(|there| there == manifest) && manifest.verify(to).is_ok() {
        return Ok(());
    }
    std::fs::create_dir_all(to).map_err(at(to))?;
    let listed = to.join(manifest::FILE);
    if listed.exists() {
        std::fs::remove_file(&listed).map_err(at(&listed))?;
    }
    for entry in std::fs::read_dir(from).map_err(at(from))? {
        let entry = entry.map_err(at(from))?;
        let name = entry.file_name();
        if name != manifest::FILE {
            // Not over the file itself: somebody may have it open.
            let place = to.join(&name);
            let _ = std::fs::remove_file(&place);
            sparse::copy(&entry.path(), &place)?;
        }
    }
    manifest.write(to)
}

fn user_cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Part;

    fn build(folder: &Path) -> Result<Manifest, Error> {
        std::fs::write(folder.join("kernel"), b"kernel").unwrap();
        Ok(Manifest {
            format: manifest::FORMAT.into(),
            name: "test".into(),
            description: String::new(),
            architecture: "x86_64".into(),
            kernel: Part::of(folder, "kernel")?,
            initrd: None,
            root: None,
            cmdline: String::new(),
            runs_on_software_kvm: true,
        })
    }

    #[test]
    fn the_second_build_is_the_first_ones_result() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(home.path().into())).unwrap();
        let first = cache.image("test", "abc", build).unwrap();
        let second = cache.image("test", "abc", |_| panic!("it is there")).unwrap();
        assert_eq!(first, second);
    }

    #[test]
    fn a_damaged_result_is_built_again() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(home.path().into())).unwrap();
        let place = cache.image("test", "abc", build).unwrap();
        std::fs::write(place.join("kernel"), b"kerneL").unwrap();
        cache.image("test", "abc", build).unwrap();
        assert_eq!(std::fs::read(place.join("kernel")).unwrap(), b"kernel");
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(home.path().into())).unwrap();
        let failed = cache.image("test", "abc", |folder| {
            std::fs::write(folder.join("kernel"), b"half").unwrap();
            Err(Error::NoCacheFolder)
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read_dir(home.path().join("images/test")).unwrap().count(), 0);
    }

    #[test]
    fn without_an_index_the_last_answer_counts() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(home.path().into())).unwrap();
        let unknown = || Err::<Vec<u8>, _>(Error::UnknownPackage { name: "x".into() });
        assert!(cache.remembered("test", "a", unknown).is_err());
        assert_eq!(cache.remembered("test", "a", || Ok(vec![1u8])).unwrap(), [1]);
        assert_eq!(cache.remembered("test", "b", unknown).unwrap(), [1]);
    }

    #[test]
    fn an_answer_holds_as_long_as_what_was_asked() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(home.path().into())).unwrap();
        let ask = |state, answer: u8| cache.remembered("test", state, || Ok(answer)).unwrap();
        assert_eq!(ask("a", 1), 1);
        assert_eq!(ask("a", 2), 1);
        assert_eq!(ask("b", 3), 3);
    }

    #[test]
    fn an_export_is_whole_and_repeatable() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(home.path().join("cache"))).unwrap();
        let place = cache.image("test", "abc", build).unwrap();
        let out = home.path().join("out");
        for _ in 0..2 {
            export(&place, &out).unwrap();
            Manifest::read(&out).unwrap().verify(&out).unwrap();
        }
        std::fs::write(out.join("kernel"), b"changed").unwrap();
        export(&place, &out).unwrap();
        Manifest::read(&out).unwrap().verify(&out).unwrap();
    }
}
