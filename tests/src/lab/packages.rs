//! Debian's kernel and busybox, fetched once for each version and unpacked in the user's cache.
//!
//! A set of packages is known by the hash of what apt says it would fetch (names, versions and
//! digests), so a new kernel makes a new set beside the old one and nothing is ever changed in place.
//! Asking apt takes a second or two, so its answer is kept for as long as its package lists do not change.
//! When apt cannot say (no package lists, no network), the newest set in the cache is used.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::{LabError, OnPath, output_of};

/// The package that always depends on the newest cloud kernel.
const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";
/// A shell and the small tools, in one file without libraries.
const BUSYBOX: &str = "busybox-static";
/// Grows when what is made of the packages changes, so that older sets are not taken for it.
const LAYOUT: &str = "lab-packages/1";

/// An unpacked set of packages.
#[derive(Debug, Clone)]
pub struct PackageSet {
    /// Root of the unpacked packages.
    pub root: PathBuf,
    /// The kernel's release, for example `6.1.0-31-cloud-amd64`.
    pub release: String,
    /// Hash of the packages' names and digests.
    pub hash: String,
}

impl PackageSet {
    pub fn kernel(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.release))
    }

    pub fn modules(&self) -> PathBuf {
        self.root.join(format!("lib/modules/{}", self.release))
    }

    pub fn busybox(&self) -> PathBuf {
        self.root.join("bin/busybox")
    }
}

/// The user's cache folder for Mallee's lab (XDG Base Directory Specification).
pub fn cache_folder() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"));
    base.join("mallee/lab")
}

/// The newest set of packages: from the cache, or fetched into it.
pub fn fetch(progress: &dyn Fn(&str)) -> Result<PackageSet, LabError> {
    let cache = cache_folder();
    fs::create_dir_all(&cache).on("making", &cache)?;
    if let Some(set) = Answer::of_same_lists(&cache).and_then(|hash| open(&cache.join(hash)).ok()) {
        return Ok(set);
    }
    let wanted = match wanted() {
        Ok(wanted) => wanted,
        Err(problem) => return newest_cached(&cache).ok_or(problem),
    };
    let folder = cache.join(&wanted.hash);
    if !folder.is_dir() {
        progress(&format!("fetching {} from Debian", wanted.names.join(", ")));
        unpack(&wanted, &cache, &folder)?;
    }
    Answer::keep(&cache, &wanted.hash)?;
    open(&folder)
}

/// Which set apt's package lists led to, and the lists' age at that time.
#[derive(Serialize, Deserialize)]
struct Answer {
    layout: String,
    lists: SystemTime,
    hash: String,
}

impl Answer {
    const FILE: &str = "answer.json";
    const LISTS: &str = "/var/lib/apt/lists";

    fn of_same_lists(cache: &Path) -> Option<String> {
        let answer: Answer = serde_json::from_slice(&fs::read(cache.join(Self::FILE)).ok()?).ok()?;
        let same = answer.layout == LAYOUT && answer.lists == Self::lists_changed()?;
        same.then_some(answer.hash)
    }

    fn keep(cache: &Path, hash: &str) -> Result<(), LabError> {
        let Some(lists) = Self::lists_changed() else {
            return Ok(());
        };
        let answer = Answer { layout: LAYOUT.to_owned(), lists, hash: hash.to_owned() };
        let path = cache.join(Self::FILE);
        let text = serde_json::to_vec(&answer).map_err(std::io::Error::other).on("writing", &path)?;
        fs::write(&path, text).on("writing", &path)
    }

    fn lists_changed() -> Option<SystemTime> {
        fs::metadata(Self::LISTS).and_then(|data| data.modified()).ok()
    }
}

struct Wanted {
    names: Vec<String>,
    hash: String,
}

fn wanted() -> Result<Wanted, LabError> {
    let depends = output_of(Command::new("apt-cache").args(["depends", KERNEL_METAPACKAGE]))?;
    let kernel = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| LabError::Packages(format!("{KERNEL_METAPACKAGE} names no kernel; run apt-get update")))?
        .to_owned();
    let names = vec![kernel, BUSYBOX.to_owned()];
    let uris = output_of(Command::new("apt-get").args(["download", "--print-uris"]).args(&names))?;
    let mut hasher = Sha256::new();
    hasher.update(LAYOUT);
    // Each line is 'URI' FILE SIZE DIGEST; where it comes from does not matter.
    for line in uris.lines() {
        for word in line.split_whitespace().skip(1) {
            hasher.update(word);
            hasher.update(b"\n");
        }
    }
    Ok(Wanted { names, hash: hex::encode(&hasher.finalize()[..12]) })
}

fn unpack(wanted: &Wanted, cache: &Path, folder: &Path) -> Result<(), LabError> {
    let work = tempfile::Builder::new().prefix("unpacking-").tempdir_in(cache).on("making a folder in", cache)?;
    // apt fetches as the user _apt where that one may write, and says so at length where it may not.
    output_of(
        Command::new("apt-get")
            .args(["download", "-q", "-o", "APT::Sandbox::User=root"])
            .args(&wanted.names)
            .current_dir(work.path()),
    )?;
    let root = work.path().join("root");
    for entry in fs::read_dir(work.path()).on("reading", work.path())?.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            output_of(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&root))?;
            fs::remove_file(&path).on("removing", &path)?;
        }
    }
    match fs::rename(&root, folder) {
        // Another lab on this machine was quicker with the same set.
        Err(_) if folder.is_dir() => Ok(()),
        other => other.on("placing", folder),
    }
}

fn open(folder: &Path) -> Result<PackageSet, LabError> {
    let modules = folder.join("lib/modules");
    let release = fs::read_dir(&modules)
        .on("reading", &modules)?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .next()
        .ok_or_else(|| LabError::Packages(format!("no kernel in {}", folder.display())))?;
    let hash = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(PackageSet { root: folder.to_owned(), release, hash })
}

fn newest_cached(cache: &Path) -> Option<PackageSet> {
    let mut sets: Vec<_> = fs::read_dir(cache)
        .ok()?
        .flatten()
        .filter(|entry| entry.path().join("boot").is_dir())
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    sets.sort();
    open(&sets.pop()?.1).ok()
}
