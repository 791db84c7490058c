//! `manifest.json`: what an image is made of.

use serde::Deserialize;

/// The one format that is understood.
const FORMAT: &str = "mallee-image/1";
/// A manifest is a few hundred bytes.
pub(super) const SIZE_MOST: u64 = 64 * 1024;
/// Linux's own bound for a command line on x86 (`COMMAND_LINE_SIZE`).
const CMDLINE_MOST: usize = 2048;

/// A manifest as it lies in the object store. Parts are objects beside it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Manifest {
    pub format: String,
    #[serde(default)]
    pub description: Option<String>,
    pub architecture: String,
    pub kernel: Part,
    #[serde(default)]
    pub initrd: Option<Part>,
    #[serde(default)]
    pub root: Option<Part>,
    #[serde(default)]
    pub cmdline: String,
    #[serde(default)]
    pub runs_on_software_kvm: bool,
}

/// A file of the image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Part {
    /// Relative to the manifest's own folder.
    pub key: String,
    pub sha256: String,
    /// Bytes.
    pub size: u64,
    #[serde(default)]
    pub format: Option<String>,
}

impl Manifest {
    /// Reads and checks one; what is wrong with it is said in words.
    pub fn parse(text: &[u8]) -> Result<Manifest, String> {
        let manifest: Manifest = serde_json::from_slice(text).map_err(|error| format!("it cannot be read: {error}"))?;
        if manifest.format != FORMAT {
            return Err(format!("its format is '{}': '{FORMAT}' is understood", manifest.format));
        }
        if manifest.architecture != "x86_64" {
            return Err(format!("its architecture is '{}': x86_64 can be run", manifest.architecture));
        }
        if manifest.cmdline.len() >= CMDLINE_MOST || manifest.cmdline.chars().any(char::is_control) {
            return Err(format!("its cmdline must be shorter than {CMDLINE_MOST} bytes and of one line"));
        }
        manifest.parts().try_for_each(|(name, part)| part.check(name))?;
        Ok(manifest)
    }

    /// With their names, kernel first.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &Part)> {
        [("kernel", Some(&self.kernel)), ("initrd", self.initrd.as_ref()), ("root", self.root.as_ref())]
            .into_iter()
            .filter_map(|(name, part)| Some((name, part?)))
    }
}

impl Part {
    fn check(&self, name: &str) -> Result<(), String> {
        if self.sha256.len() != 64 || !self.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(format!("the sha256 of its {name} must be 64 lower-case hexadecimal digits"));
        }
        if self.key.is_empty() || self.key.starts_with('/') {
            return Err(format!("the key of its {name} must be relative to the manifest"));
        }
        if self.size == 0 || i64::try_from(self.size).is_err() {
            return Err(format!("the size of its {name} is {}", self.size));
        }
        match self.format.as_deref() {
            None | Some("raw") => Ok(()),
            Some(format) => Err(format!("the format of its {name} is '{format}': raw is understood")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut serde_json::Value)) -> Result<Manifest, String> {
        let mut manifest = serde_json::json!({
            "format": "mallee-image/1", "name": "tiny", "architecture": "x86_64",
            "kernel": {"key": "vmlinux", "sha256": "a".repeat(64), "size": 5},
            "root": {"key": "root.img", "sha256": "b".repeat(64), "size": 7, "format": "raw"},
            "cmdline": "console=ttyS0", "runs_on_software_kvm": false
        });
        change(&mut manifest);
        Manifest::parse(manifest.to_string().as_bytes())
    }

    #[test]
    fn a_good_one_and_many_bad_ones() {
        assert_eq!(with(|_| {}).unwrap().parts().count(), 2);
        assert!(with(|m| m["format"] = "other/2".into()).unwrap_err().contains("mallee-image/1"));
        assert!(with(|m| m["architecture"] = "arm64".into()).unwrap_err().contains("x86_64"));
        assert!(with(|m| m["kernel"]["sha256"] = "zz".into()).unwrap_err().contains("kernel"));
        assert!(with(|m| m["root"]["format"] = "qcow2".into()).unwrap_err().contains("raw"));
        assert!(with(|m| m["root"]["size"] = 0.into()).unwrap_err().contains("root"));
        assert!(with(|m| m["cmdline"] = "a\nb".into()).unwrap_err().contains("cmdline"));
        assert!(with(|m| m["kernel"] = serde_json::Value::Null).is_err());
        assert!(Manifest::parse(b"{ not json").unwrap_err().contains("cannot be read"));
    }
}
