//! Which modules, in which order: each says itself on which others it depends, in its `.modinfo` section.
//!
//! Debian's package has no index of dependencies (that is made where it is installed), and none is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use object::read::elf::ElfFile64;
use object::{Object, ObjectSection};

use crate::error::{Error, at};

/// The modules of an unpacked kernel package, by name.
#[derive(Debug, Default)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
}

impl Modules {
    /// Finds every `*.ko` under `folder`.
    pub fn under(folder: &Path) -> Result<Self, Error> {
        let mut modules = Modules::default();
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).map_err(at(&folder))? {
                let entry = entry.map_err(at(&folder))?;
                let path = entry.path();
                if entry.file_type().map_err(at(&path))?.is_dir() {
                    folders.push(path);
                } else if let Some(name) = module_name(&path) {
                    modules.files.insert(name, path);
                }
            }
        }
        Ok(modules)
    }

    /// `wanted` and all that they depend on, in the order in which they can be loaded. Those in `loaded`
    /// are taken for loaded already, and are added to by those returned.
    pub fn closure(&self, wanted: &[&str], loaded: &mut BTreeSet<String>) -> Result<Vec<PathBuf>, Error> {
        let mut order = Vec::new();
        for name in wanted {
            self.add(&normalised(name), loaded, &mut order)?;
        }
        Ok(order)
    }

    fn add(&self, name: &str, loaded: &mut BTreeSet<String>, order: &mut Vec<PathBuf>) -> Result<(), Error> {
        // Before the dependencies, so that a circle (which the kernel's build refuses) ends here too.
        if !loaded.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name).ok_or_else(|| Error::NotInPackages {
            file: format!("{name}.ko"),
            packages: "of the kernel (is it built in, or gone?)".into(),
        })?;
        let bytes = std::fs::read(path).map_err(at(path))?;
        let dependencies = dependencies(&bytes).map_err(|detail| Error::Elf { path: path.clone(), detail })?;
        for dependency in dependencies {
            self.add(&dependency, loaded, order)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

/// In names of modules a hyphen is an underscore.
fn normalised(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(path: &Path) -> Option<String> {
    Some(normalised(path.file_name()?.to_str()?.strip_suffix(".ko")?))
}

fn dependencies(module: &[u8]) -> Result<Vec<String>, String> {
    let file = ElfFile64::<object::Endianness>::parse(module).map_err(|error| error.to_string())?;
    let section = file.section_by_name(".modinfo").ok_or("it has no .modinfo section")?;
    let data = section.data().map_err(|error| error.to_string())?;
    Ok(depends(data))
}

/// `.modinfo` is a sequence of `key=value`, each ended by a zero byte.
fn depends(modinfo: &[u8]) -> Vec<String> {
    modinfo
        .split(|byte| *byte == 0)
        .filter_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix("depends="))
        .flat_map(|names| names.split(','))
        .filter(|name| !name.is_empty())
        .map(normalised)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modules_own_words() {
        let modinfo = b"license=GPL\0depends=virtio_ring,net-failover\0retpoline=Y\0";
        assert_eq!(depends(modinfo), ["virtio_ring", "net_failover"]);
        assert_eq!(depends(b"depends=\0"), Vec::<String>::new());
        assert_eq!(depends(b""), Vec::<String>::new());
    }

    #[test]
    fn a_missing_module_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let modules = Modules::under(folder.path()).unwrap();
        let error = modules.closure(&["virtio-blk"], &mut BTreeSet::new()).unwrap_err();
        assert!(error.to_string().contains("virtio_blk.ko"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(0u8.., 0..300)) {
            let _ = depends(&bytes);
            let _ = dependencies(&bytes);
        }
    }
}
