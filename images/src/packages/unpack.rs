//! The content of packages, in a folder that goes away with the build. No script of a package is run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Package, run_well};
use crate::elf;
use crate::error::{Error, at};
use crate::tree::Tree;

/// Where Debian keeps shared libraries, in the order in which they are looked for.
const LIBRARY_FOLDERS: [&str; 6] =
    ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64", "lib", "usr/lib"];

pub struct Unpacked {
    folder: tempfile::TempDir,
    names: Vec<String>,
}

impl Unpacked {
    /// Unpacks `files`, which are those of `packages`, over each other.
    pub fn new(packages: &[Package], files: &[PathBuf]) -> Result<Self, Error> {
        let folder = tempfile::tempdir().map_err(at("a temporary folder"))?;
        for file in files {
            run_well(Command::new("dpkg-deb").arg("--extract").arg(file).arg(folder.path()), "dpkg")?;
        }
        Ok(Unpacked { folder, names: packages.iter().map(|p| p.name.clone()).collect() })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The file `path` (absolute, as in the package). Links are followed inside the packages only.
    pub fn file(&self, path: &str) -> Result<PathBuf, Error> {
        self.resolve(path, 8)
            .ok_or_else(|| Error::NotInPackages { file: path.to_owned(), packages: self.names.join(", ") })
    }

    fn resolve(&self, path: &str, links: u32) -> Option<PathBuf> {
        let place = self.path().join(path.trim_start_matches('/'));
        let kind = place.symlink_metadata().ok()?.file_type();
        if kind.is_file() {
            return Some(place);
        }
        let target = std::fs::read_link(&place).ok()?;
        let target = target.to_str()?;
        // Packages link to names beside them or to absolute paths.
        let next = match target.strip_prefix('/') {
            Some(absolute) => absolute.to_owned(),
            None => format!("{}/{target}", Path::new(path).parent()?.to_str()?),
        };
        (links > 0 && !next.contains("..")).then(|| self.resolve(&next, links - 1))?
    }

    /// Puts the program `path` into `tree` as `place`, with its loader and all libraries that it needs.
    pub fn install(&self, tree: &mut Tree, path: &str, place: &str) -> Result<(), Error> {
        let file = self.file(path)?;
        tree.copy(place, 0o755, &file)?;
        let mut seen = BTreeSet::new();
        let mut left = vec![file];
        while let Some(file) = left.pop() {
            let bytes = std::fs::read(&file).map_err(at(&file))?;
            let needs = elf::needs(&file, &bytes)?;
            if let Some(loader) = needs.interpreter
                && seen.insert(loader.clone())
            {
                tree.copy(&loader, 0o755, &self.file(&loader)?)?;
            }
            for library in needs.libraries {
                if seen.insert(library.clone()) {
                    let found = self.library(&library)?;
                    tree.copy(&format!("/usr/lib/x86_64-linux-gnu/{library}"), 0o644, &found)?;
                    left.push(found);
                }
            }
        }
        Ok(())
    }

    fn library(&self, name: &str) -> Result<PathBuf, Error> {
        LIBRARY_FOLDERS
            .iter()
            .find_map(|folder| self.resolve(&format!("/{folder}/{name}"), 8))
            .ok_or_else(|| Error::NotInPackages { file: name.to_owned(), packages: self.names.join(", ") })
    }

    /// The licences of what is in an image travel with it.
    pub fn install_copyrights(&self, tree: &mut Tree) -> Result<(), Error> {
        for name in &self.names {
            let path = format!("/usr/share/doc/{name}/copyright");
            if let Some(file) = self.resolve(&path, 8) {
                tree.copy(&path, 0o644, &file)?;
            }
        }
        Ok(())
    }
}
