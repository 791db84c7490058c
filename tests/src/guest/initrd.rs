//! The guest's files: Debian's kernel as an ELF image or as it is, and an initial RAM file system with modules, this
//! program, and its libraries.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use mallee_images::kernel::payload;

use super::init::MODULES;
use crate::lab::error::{LabError, OnPath};
use crate::lab::initrd::Archive;
use crate::lab::{modules, packages::PackageSet, programs};

/// What the checks' devices need, and a benchmark's (one of the monitors beside ours has its devices on PCI); what these depend on is found.
const WANTED: &[&str] = &[
    "virtio_mmio",
    "virtio_pci",
    "virtio_rng",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio_console",
    "vmw_vsock_virtio_transport",
];
const FOLDERS: &[&str] = &["proc", "sys", "dev", "tmp"];

/// Writes the initial RAM file system to `path`.
pub fn write(packages: &PackageSet, path: &Path) -> Result<(), LabError> {
    let program = std::env::current_exe().on("finding", "this program")?;
    let libraries = programs::libraries([&program])?;
    let out = fs::File::create(path).on("making", path)?;
    let mut archive = Archive::new(BufWriter::new(out));
    let work = tempfile::tempdir().on("making", "a temporary folder")?;
    let stripped = work.path().join("init");
    programs::stripped(&program, &stripped)?;
    let order = modules::loading_order(&packages.modules(), WANTED)?;
    (|| {
        for folder in FOLDERS {
            archive.folder(Path::new(folder))?;
        }
        archive.file("init", 0o755, &fs::read(&stripped)?)?;
        for path in &libraries {
            archive.file(path.strip_prefix("/").unwrap_or(path), 0o755, &fs::read(path)?)?;
        }
        for (place, module) in order.iter().enumerate() {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            archive.file(format!("{}/{place:03}-{name}", &MODULES[1..]), 0o644, &fs::read(module)?)?;
        }
        archive.finish().and_then(|mut out| out.flush())
    })()
    .on("writing", path)
}

/// Writes the kernel to `path`: as Debian ships it, or the ELF image inside.
pub fn write_kernel(packages: &PackageSet, path: &Path, as_bzimage: bool) -> Result<(), LabError> {
    let bytes = fs::read(packages.kernel()).on("reading", packages.kernel())?;
    let content = match as_bzimage {
        true => bytes,
        false => payload::extract_vmlinux(&bytes)
            .map_err(|error| LabError::Packages(format!("{}: {error}", packages.kernel().display())))?,
    };
    fs::write(path, content).on("writing", path)
}
