//! What can go wrong while an image is built or checked, in words that say what to do.

use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },

    #[error("cannot run {program}: {source}; install Debian's package {package}")]
    NoProgram { program: String, package: &'static str, source: io::Error },

    #[error("{program} failed ({status}): {output}")]
    Failed { program: String, status: std::process::ExitStatus, output: String },

    #[error(
        "apt does not know the package {name}: run `apt-get update` as root, \
         and see that /etc/apt names Debian 12 (bookworm) or later with its security updates"
    )]
    UnknownPackage { name: String },

    #[error(
        "cannot fetch {names}: {detail}\nIs the network there? If the version is gone from the mirror, \
         `apt-get update` makes apt learn of the new one. Once fetched, packages are kept in {} \
         and the network is not needed again", cache.display()
    )]
    Fetch { names: String, detail: String, cache: PathBuf },

    #[error("package {name}: the file that apt fetched has the digest {found}, its index says {expected}")]
    PackageDigest { name: String, expected: String, found: String },

    #[error("{file} is in none of the packages {packages}; the recipe must name another package")]
    NotInPackages { file: String, packages: String },

    #[error("kernel image: {0}")]
    Kernel(#[from] crate::kernel::payload::PayloadError),

    #[error("{}: not a usable ELF file: {detail}", path.display())]
    Elf { path: PathBuf, detail: String },

    #[error("there is no image {name:?}; there are: {known}")]
    UnknownImage { name: String, known: String },

    #[error("{}: {detail}", path.display())]
    BadImage { path: PathBuf, detail: String },

    #[error(
        "the guest's programs are built from the source tree, which is not at {}: give it with --source",
        path.display()
    )]
    NoSource { path: PathBuf },

    #[error("neither XDG_CACHE_HOME nor HOME is set: say with --cache where to keep what was built")]
    NoCacheFolder,
}

/// For `map_err`: an input or output error with the file it is about.
pub fn at(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
    let path = path.as_ref().to_owned();
    move |source| Error::Io { path, source }
}
