//! A node's initial RAM file system: three archives one after the other, as the kernel allows
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! What changes least comes first: the *base* (modules, busybox; kept in the cache beside the
//! packages), the *programs* (kept in the lab until one of them changes), and the *setup* (the
//! node's own description and credentials, written at each start). Nothing is compressed: the
//! unpacking would cost the node more than the reading.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use cpio::newc;
use sha2::{Digest, Sha256};

use super::{
    error::{LabError, OnPath, output_of},
    modules,
    packages::PackageSet,
    programs::{self, NODE_PROGRAMS, Places},
};

/// Where in a node the modules lie, in loading order by name.
pub const MODULES: &str = "lib/modules/mallee";
/// Where in a node its setup lies.
pub const SETUP: &str = "etc/mallee-lab/setup.json";
/// Where in a node its credentials for the controller lie.
pub const CREDENTIALS: &str = "etc/mallee/credentials";

const FOLDERS: &[&str] = &[
    "bin", "sbin", "dev", "proc", "sys", "run", "tmp", "etc", "root", "lib", "lib64", "usr", "usr/bin", "usr/sbin",
    "usr/lib", "var", "var/lib", "var/log", "state",
];

/// Writes an archive; folders above a file are made when first needed.
pub(crate) struct Archive<W: Write> {
    out: W,
    made: std::collections::BTreeSet<PathBuf>,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Archive { out, made: Default::default(), inode: 0 }
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "a file in a cpio archive is below 4 GiB"))?;
        let mut writer =
            newc::Builder::new(&path.to_string_lossy()).ino(self.inode).nlink(1).mode(mode).write(&mut self.out, size);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }

    pub(crate) fn folder(&mut self, path: &Path) -> io::Result<()> {
        if path.as_os_str().is_empty() || !self.made.insert(path.to_owned()) {
            return Ok(());
        }
        if let Some(above) = path.parent() {
            self.folder(above)?;
        }
        self.entry(path, 0o040755, &[])
    }

    pub(crate) fn file(&mut self, path: impl AsRef<Path>, mode: u32, content: &[u8]) -> io::Result<()> {
        let path = path.as_ref();
        if let Some(above) = path.parent() {
            self.folder(above)?;
        }
        self.entry(path, 0o100000 | mode, content)
    }

    fn link(&mut self, path: impl AsRef<Path>, target: &str) -> io::Result<()> {
        self.entry(path.as_ref(), 0o120777, target.as_bytes())
    }

    pub(crate) fn finish(self) -> io::Result<W> {
        newc::trailer(self.out)
    }
}

/// The base archive of `packages`, from the cache or made.
pub fn base(packages: &PackageSet) -> Result<PathBuf, LabError> {
    let order = modules::in_loading_order(&packages.modules())?;
    let mut hasher = Sha256::new();
    hasher.update(&packages.hash);
    for path in &order {
        hasher.update(path.as_os_str().as_encoded_bytes());
    }
    let name = format!("base-{}.cpio", hex::encode(&hasher.finalize()[..8]));
    let path = super::packages::cache_folder().join(name);
    if !path.is_file() {
        written(&path, |out| write_base(out, packages, &order))?;
    }
    Ok(path)
}

fn write_base(out: &mut dyn Write, packages: &PackageSet, order: &[PathBuf]) -> io::Result<()> {
    let mut archive = Archive::new(out);
    for folder in FOLDERS {
        archive.folder(Path::new(folder))?;
    }
    archive.file("bin/busybox", 0o755, &fs::read(packages.busybox())?)?;
    let applets = output_of(Command::new(packages.busybox()).arg("--list")).map_err(io::Error::other)?;
    for applet in applets.lines().filter(|name| *name != "busybox") {
        archive.link(format!("bin/{applet}"), "busybox")?;
    }
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    archive.file("etc/group", 0o644, b"root:x:0:\n")?;
    for (place, module) in order.iter().enumerate() {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.file(format!("{MODULES}/{place:03}-{name}"), 0o644, &fs::read(module)?)?;
    }
    archive.finish().map(drop)
}

/// The archive with our programs, the tools and their libraries, from `folder` or made there.
pub fn programs(places: &Places, folder: &Path) -> Result<PathBuf, LabError> {
    let init = places.find(programs::INIT)?;
    let mut ours = Vec::new();
    for program in NODE_PROGRAMS {
        // A node without one of them boots all the same: useful while a part is being worked on.
        ours.extend(places.find(program).ok());
    }
    let tools = programs::host_tools();
    let libraries = programs::libraries([&init].into_iter().chain(&ours).chain(&tools))?;

    let mut hasher = Sha256::new();
    for path in [&init].into_iter().chain(&ours).chain(&tools).chain(&libraries) {
        let data = fs::metadata(path).on("looking at", path)?;
        hasher.update(path.as_os_str().as_encoded_bytes());
        hasher.update(format!(" {} {} {}\n", data.len(), data.mtime(), data.mtime_nsec()));
    }
    let path = folder.join(format!("programs-{}.cpio", hex::encode(&hasher.finalize()[..8])));
    if !path.is_file() {
        let work = tempfile::Builder::new().prefix(".work-").tempdir_in(folder).on("making a folder in", folder)?;
        let strip = |program: &Path| -> Result<Vec<u8>, LabError> {
            let copy = work.path().join("stripped");
            programs::stripped(program, &copy)?;
            fs::read(&copy).on("reading", &copy)
        };
        let init = strip(&init)?;
        let ours = ours.iter().map(|path| Ok((file_name(path), strip(path)?))).collect::<Result<Vec<_>, LabError>>()?;
        written(&path, |out| {
            let mut archive = Archive::new(out);
            archive.file("init", 0o755, &init)?;
            for (name, content) in &ours {
                archive.file(format!("usr/bin/{name}"), 0o755, content)?;
            }
            for path in tools.iter().chain(&libraries) {
                archive.file(path.strip_prefix("/").unwrap_or(path), 0o755, &fs::read(path)?)?;
            }
            archive.finish().map(drop)
        })?;
        remove_other_archives(folder, &path);
    }
    Ok(path)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Archives of programs as they were before the last change; nodes that run do not read theirs any more.
fn remove_other_archives(folder: &Path, keep: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("programs-") && name.ends_with(".cpio") && entry.path() != keep {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Joins the archives and the node's own setup (and credentials, when it has some) into `path`.
pub fn assemble(path: &Path, archives: &[PathBuf], setup: &[u8], credentials: Option<&Path>) -> Result<(), LabError> {
    let mut out = File::create(path).on("making", path)?;
    // It holds the node's key.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).on("protecting", path)?;
    for archive in archives {
        let mut file = File::open(archive).on("opening", archive)?;
        io::copy(&mut file, &mut out).on("copying", archive)?;
        pad(&mut out).on("writing", path)?;
    }
    let mut archive = Archive::new(BufWriter::new(out));
    archive.file(SETUP, 0o600, setup).on("writing", path)?;
    if let Some(credentials) = credentials {
        for entry in fs::read_dir(credentials).on("reading", credentials)?.flatten() {
            let content = fs::read(entry.path()).on("reading", entry.path())?;
            archive.file(format!("{CREDENTIALS}/{}", file_name(&entry.path())), 0o600, &content).on("writing", path)?;
        }
    }
    archive.finish().and_then(|mut out| out.flush()).on("writing", path)
}

/// Each archive begins on a multiple of four bytes; the kernel skips the zeroes between.
fn pad(out: &mut File) -> io::Result<()> {
    let length = out.metadata()?.len();
    let missing = (4 - length % 4) % 4;
    out.write_all(&[0; 4][..missing as usize])
}

/// Writes a file whole or not at all.
fn written(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), LabError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).on("making", folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder).on("making a file in", folder)?;
    {
        let mut out = BufWriter::new(file.as_file_mut());
        write(&mut out).and_then(|()| out.flush()).on("writing", path)?;
    }
    file.persist(path).map_err(|e| e.error).on("placing", path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_reads_back() {
        let mut archive = Archive::new(Vec::new());
        archive.file("etc/deep/file", 0o644, b"content").unwrap();
        archive.link("bin/sh", "busybox").unwrap();
        let bytes = archive.finish().unwrap();
        let mut names = Vec::new();
        let mut rest = &bytes[..];
        loop {
            let reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push((reader.entry().name().to_owned(), reader.entry().mode()));
            rest = reader.finish().unwrap();
        }
        assert_eq!(
            names,
            [
                ("etc".to_owned(), 0o040755),
                ("etc/deep".to_owned(), 0o040755),
                ("etc/deep/file".to_owned(), 0o100644),
                ("bin/sh".to_owned(), 0o120777)
            ]
        );
    }
}
