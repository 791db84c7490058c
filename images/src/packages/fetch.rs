//! Fetching packages' files, each once.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Package, run};
use crate::digest;
use crate::error::{Error, at};
use crate::progress::Step;

/// The files of `packages`, in their order, kept in `folder` under their digests.
pub fn fetch(packages: &[Package], folder: &Path) -> Result<Vec<PathBuf>, Error> {
    std::fs::create_dir_all(folder).map_err(at(folder))?;
    let missing: Vec<&Package> = packages.iter().filter(|package| !kept(package, folder).exists()).collect();
    if !missing.is_empty() {
        download(&missing, folder)?;
    }
    Ok(packages.iter().map(|package| kept(package, folder)).collect())
}

fn kept(package: &Package, folder: &Path) -> PathBuf {
    folder.join(format!("{}.deb", package.sha256))
}

fn download(packages: &[&Package], folder: &Path) -> Result<(), Error> {
    let bytes: u64 = packages.iter().map(|package| package.size).sum();
    let _step = Step::begin(format!("fetching {} Debian package(s), {:.1} MB", packages.len(), bytes as f64 / 1e6));
    // In the same file system as where they are to be kept, so that renaming suffices.
    let private = tempfile::tempdir_in(folder).map_err(at(folder))?;
    let mut command = Command::new("apt-get");
    command.args(["download", "-q"]).current_dir(private.path());
    if nix::unistd::geteuid().is_root() {
        // apt's own user cannot write into a private folder.
        command.args(["-o", "APT::Sandbox::User=root"]);
    }
    command.args(packages.iter().map(|package| format!("{}={}", package.name, package.version)));
    let output = run(&mut command, "apt")?;
    let names = || packages.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ");
    if !output.status.success() {
        return Err(Error::Fetch {
            names: names(),
            detail: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            cache: folder.to_owned(),
        });
    }
    for package in packages {
        keep(package, private.path(), folder)?;
    }
    Ok(())
}

/// Moves the file that apt fetched for `package` to its place, if it is the one of apt's index.
fn keep(package: &Package, fetched: &Path, folder: &Path) -> Result<(), Error> {
    let prefix = format!("{}_", package.name);
    let file = std::fs::read_dir(fetched)
        .map_err(at(fetched))?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .ok_or_else(|| Error::Fetch {
            names: package.name.clone(),
            detail: "apt-get download left no file".into(),
            cache: folder.to_owned(),
        })?
        .path();
    let found = digest::of_file(&file)?;
    if found != package.sha256 {
        return Err(Error::PackageDigest { name: package.name.clone(), expected: package.sha256.clone(), found });
    }
    let place = kept(package, folder);
    std::fs::rename(&file, &place).map_err(at(&place))
}
