//! What apt's index says of a package.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::run;
use crate::digest::Inputs;
use crate::error::{Error, at};

/// A package in the version that apt would install.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    pub name: String,
    pub version: String,
    /// Of the package's file.
    pub sha256: String,
    /// Of the package's file, in bytes.
    pub size: u64,
    /// Names, the first of each set of alternatives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub depends: Vec<String>,
}

/// apt's index of packages.
pub struct Index {
    /// apt's own digest of the index is kept here, since not every system keeps one, and making it takes
    /// longer than all that is asked of it.
    folder: PathBuf,
}

impl Index {
    pub fn open(folder: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(folder).map_err(at(folder))?;
        Ok(Index { folder: folder.to_owned() })
    }

    /// Changes whenever apt's answers may change: with the lists it has fetched and with its configuration.
    pub fn state() -> String {
        let mut inputs = Inputs::default();
        for folder in ["/var/lib/apt/lists", "/etc/apt", "/etc/apt/sources.list.d", "/etc/apt/preferences.d"] {
            let mut files: Vec<String> = std::fs::read_dir(folder)
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|entry| {
                    let facts = entry.metadata().ok().filter(Metadata::is_file)?;
                    let (name, size) = (entry.file_name(), facts.len());
                    Some(format!("{} {size} {}.{}", name.display(), facts.mtime(), facts.mtime_nsec()))
                })
                .collect();
            files.sort();
            inputs.add(folder).add(files.join("\n"));
        }
        inputs.digest()
    }

    /// The named packages alone.
    pub fn single(&self, names: &[&str]) -> Result<Vec<Package>, Error> {
        let mut found = self.lookup(names)?;
        names
            .iter()
            .map(|name| found.remove(*name).ok_or_else(|| Error::UnknownPackage { name: (*name).to_owned() }))
            .collect()
    }

    /// The named packages and all on which they depend, by name.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<Package>, Error> {
        let mut known = BTreeMap::new();
        let mut missing: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
        while !missing.is_empty() {
            let asked: Vec<&str> = missing.iter().map(String::as_str).collect();
            let found = self.single(&asked)?;
            missing = found.iter().flat_map(|package| package.depends.iter().cloned()).collect();
            known.extend(found.into_iter().map(|package| (package.name.clone(), package)));
            missing.retain(|name| !known.contains_key(name));
        }
        Ok(known.into_values().collect())
    }

    fn lookup(&self, names: &[&str]) -> Result<BTreeMap<String, Package>, Error> {
        let mut command = Command::new("apt-cache");
        for kind in ["pkgcache", "srcpkgcache"] {
            let file = self.folder.join(format!("{kind}.bin"));
            command.arg("-o").arg(format!("Dir::Cache::{kind}={}", file.display()));
        }
        // A name that apt does not know makes its status 100 and leaves the others in the output.
        let output = run(command.args(["show", "--no-all-versions"]).args(names), "apt")?;
        Ok(parse(&String::from_utf8_lossy(&output.stdout)))
    }
}

/// Stanzas of `Field: value` lines, parted by empty lines. Continuation lines (of fields that are not
/// looked at) begin with a space.
fn parse(text: &str) -> BTreeMap<String, Package> {
    let mut packages = BTreeMap::new();
    for stanza in text.split("\n\n") {
        let fields: BTreeMap<&str, &str> =
            stanza.lines().filter(|line| !line.starts_with(' ')).filter_map(|line| line.split_once(": ")).collect();
        let field = |name: &str| fields.get(name).map(|value| value.trim());
        let package = (|| {
            Some(Package {
                name: field("Package")?.to_owned(),
                version: field("Version")?.to_owned(),
                sha256: field("SHA256")?.to_owned(),
                size: field("Size")?.parse().ok()?,
                depends: [field("Pre-Depends"), field("Depends")]
                    .into_iter()
                    .flatten()
                    .flat_map(dependency_names)
                    .collect(),
            })
        })();
        if let Some(package) = package {
            // The first stanza is the candidate.
            packages.entry(package.name.clone()).or_insert(package);
        }
    }
    packages
}

/// `a (>= 1) | b, c:any` gives `a` and `c`.
fn dependency_names(field: &str) -> impl Iterator<Item = String> + '_ {
    field.split(',').filter_map(|alternatives| {
        let first = alternatives.split('|').next()?.trim();
        let name = first.split([' ', '(', ':']).next()?;
        (!name.is_empty()).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Package: dropbear-bin\nVersion: 2022.83-1\nSize: 155520\n\
        Depends: libc6 (>= 2.34), libcrypt1 (>= 1:4.1.0) | other, zlib1g:any\n\
        Description: small\n more: text\nSHA256: aa\n\n\
        Package: dropbear-bin\nVersion: 2020.1\nSize: 1\nSHA256: bb\n\n\
        Package: broken\nVersion: 1\n";

    #[test]
    fn a_stanza_is_read_and_the_first_counts() {
        let packages = parse(TEXT);
        assert_eq!(packages.len(), 1);
        let package = &packages["dropbear-bin"];
        assert_eq!(package.version, "2022.83-1");
        assert_eq!((package.sha256.as_str(), package.size), ("aa", 155_520));
        assert_eq!(package.depends, ["libc6", "libcrypt1", "zlib1g"]);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC{0,200}") {
            let _ = parse(&text);
            let _ = dependency_names(&text).count();
        }
    }
}
