//! The manifest: a JSON object beside an image's parts, by which the image is registered.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest;
use crate::error::{Error, at};

/// The only format there is.
pub const FORMAT: &str = "mallee-image/1";
/// The manifest's own file name.
pub const FILE: &str = "manifest.json";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: String,
    pub name: String,
    pub description: String,
    /// EC2's word: `x86_64`.
    pub architecture: String,
    pub kernel: Part,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<Part>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<RootPart>,
    pub cmdline: String,
    /// Whether it can run where `/dev/kvm` is a software KVM, which runs no ordinary kernel.
    pub runs_on_software_kvm: bool,
}

/// A file of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Relative to the manifest's folder.
    pub key: String,
    pub sha256: String,
    /// In bytes.
    pub size: u64,
}

/// The root disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootPart {
    pub key: String,
    pub sha256: String,
    pub size: u64,
    pub format: DiskFormat,
}

/// Stated, never guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

impl Part {
    /// Describes the file `key` of `folder`.
    pub fn of(folder: &Path, key: &str) -> Result<Self, Error> {
        let path = folder.join(key);
        let size = path.metadata().map_err(at(&path))?.len();
        Ok(Part { key: key.into(), sha256: digest::of_file(&path)?, size })
    }

    pub fn raw_disk(self) -> RootPart {
        RootPart { key: self.key, sha256: self.sha256, size: self.size, format: DiskFormat::Raw }
    }
}

impl Manifest {
    /// Reads the manifest of the image in `folder`.
    pub fn read(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(FILE);
        let bytes = std::fs::read(&path).map_err(at(&path))?;
        let bad = |detail: String| Error::BadImage { path: path.clone(), detail };
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        if manifest.format != FORMAT {
            return Err(bad(format!("format {:?}; this program knows {FORMAT:?}", manifest.format)));
        }
        Ok(manifest)
    }

    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(FILE);
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::BadImage { path: path.clone(), detail: error.to_string() })?;
        text.push('\n');
        std::fs::write(&path, text).map_err(at(&path))
    }

    /// Key, digest and size of every file.
    pub fn parts(&self) -> Vec<Part> {
        let root =
            self.root.iter().map(|root| Part { key: root.key.clone(), sha256: root.sha256.clone(), size: root.size });
        [self.kernel.clone()].into_iter().chain(self.initrd.clone()).chain(root).collect()
    }

    /// Compares every file in `folder` with what the manifest says of it.
    pub fn verify(&self, folder: &Path) -> Result<(), Error> {
        for part in self.parts() {
            let path = folder.join(&part.key);
            let bad = |detail: String| Error::BadImage { path: path.clone(), detail };
            if !is_plain_key(&part.key) {
                return Err(bad("a key must be a relative path inside the image's folder".into()));
            }
            let found = Part::of(folder, &part.key)?;
            if found.size != part.size {
                return Err(bad(format!("{} bytes; the manifest says {}", found.size, part.size)));
            }
            if found.sha256 != part.sha256 {
                return Err(bad(format!(
                    "digest {}; the manifest says {}: the file was changed or damaged, build it again",
                    found.sha256, part.sha256
                )));
            }
        }
        Ok(())
    }
}

fn is_plain_key(key: &str) -> bool {
    let path = Path::new(key);
    !key.is_empty() && path.components().all(|part| matches!(part, std::path::Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(folder: &Path) -> Manifest {
        std::fs::write(folder.join("vmlinux"), b"kernel").unwrap();
        std::fs::write(folder.join("root.img"), b"root").unwrap();
        Manifest {
            format: FORMAT.into(),
            name: "test".into(),
            description: String::new(),
            architecture: "x86_64".into(),
            kernel: Part::of(folder, "vmlinux").unwrap(),
            initrd: None,
            root: Some(Part::of(folder, "root.img").unwrap().raw_disk()),
            cmdline: "console=ttyS0".into(),
            runs_on_software_kvm: false,
        }
    }

    #[test]
    fn what_was_written_is_read_and_verified() {
        let folder = tempfile::tempdir().unwrap();
        let manifest = image(folder.path());
        manifest.write(folder.path()).unwrap();
        let read = Manifest::read(folder.path()).unwrap();
        assert_eq!(read, manifest);
        read.verify(folder.path()).unwrap();
    }

    #[test]
    fn a_changed_file_is_found_by_its_digest_and_a_cut_one_by_its_size() {
        let folder = tempfile::tempdir().unwrap();
        let manifest = image(folder.path());
        std::fs::write(folder.path().join("root.img"), b"rooT").unwrap();
        assert!(manifest.verify(folder.path()).unwrap_err().to_string().contains("digest"));
        std::fs::write(folder.path().join("root.img"), b"roo").unwrap();
        assert!(manifest.verify(folder.path()).unwrap_err().to_string().contains("3 bytes"));
    }

    #[test]
    fn a_key_cannot_leave_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        for key in ["../x", "/etc/passwd", ""] {
            let mut manifest = image(folder.path());
            manifest.kernel.key = key.into();
            let error = manifest.verify(folder.path()).unwrap_err().to_string();
            assert!(error.contains("relative path"), "{key}: {error}");
        }
    }

    #[test]
    fn another_format_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut manifest = image(folder.path());
        manifest.format = "mallee-image/2".into();
        manifest.write(folder.path()).unwrap();
        assert!(Manifest::read(folder.path()).unwrap_err().to_string().contains("mallee-image/2"));
    }
}
