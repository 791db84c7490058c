//! Our programs, found on the host and gathered with the shared libraries that they need.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::error::{LabError, OnPath, output_of};

/// Programs of ours that a node runs.
pub const NODE_PROGRAMS: &[&str] = &["mallee-vmm", "mallee-netd", "mallee-agent", "mallee-guest"];
/// The node's first process.
pub const INIT: &str = "mallee-lab-node";
/// Tools of the host's that help a person (and the tests) to look around in a node; each is taken
/// along when it is there.
const HOST_TOOLS: &[&str] = &["nft", "conntrack", "tcpdump", "ip", "bridge", "tc", "pgrep", "pkill"];

/// Where programs are looked for, in this order.
#[derive(Debug, Clone)]
pub struct Places(Vec<PathBuf>);

impl Places {
    /// `named` (a folder given by the user) first, then the folder of the running program.
    pub fn new(named: Option<&Path>) -> Places {
        let mut places: Vec<PathBuf> = named.map(Path::to_owned).into_iter().collect();
        if let Ok(own) = std::env::current_exe() {
            places.extend(own.parent().map(Path::to_owned));
        }
        Places(places)
    }

    pub fn find(&self, program: &str) -> Result<PathBuf, LabError> {
        self.0
            .iter()
            .map(|place| place.join(program))
            .find(|path| path.is_file())
            .ok_or_else(|| LabError::ProgramMissing { program: program.to_owned(), places: self.to_string() })
    }
}

impl std::fmt::Display for Places {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.0.iter().map(|place| place.display().to_string()).collect();
        f.write_str(&names.join(", "))
    }
}

/// The host's tools that are there.
pub fn host_tools() -> Vec<PathBuf> {
    HOST_TOOLS
        .iter()
        .flat_map(|tool| ["/usr/sbin", "/usr/bin"].map(|folder| Path::new(folder).join(tool)))
        .filter(|path| path.is_file())
        .collect()
}

/// Shared libraries that `programs` need, the dynamic loader among them, as absolute paths.
pub fn libraries<'a>(programs: impl IntoIterator<Item = &'a PathBuf>) -> Result<BTreeSet<PathBuf>, LabError> {
    let mut found = BTreeSet::new();
    for program in programs {
        // A static program is no error, only not dynamic.
        let Ok(listing) = output_of(Command::new("ldd").arg(program)) else {
            continue;
        };
        found.extend(listing.lines().filter_map(library_path));
    }
    Ok(found)
}

/// The path in a line of ldd's: `libm.so.6 => /lib/…/libm.so.6 (0x…)` or `/lib64/ld-… (0x…)`.
fn library_path(line: &str) -> Option<PathBuf> {
    line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from)
}

/// A copy of `program` without what only a debugger needs, which is most of its size.
pub fn stripped(program: &Path, into: &Path) -> Result<(), LabError> {
    fs::copy(program, into).on("copying to", into)?;
    output_of(Command::new("strip").arg("--strip-debug").arg(into))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_lines_are_read() {
        let path = library_path("\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)");
        assert_eq!(path, Some(PathBuf::from("/lib/x86_64-linux-gnu/libc.so.6")));
        let loader = library_path("\t/lib64/ld-linux-x86-64.so.2 (0x00007f)");
        assert_eq!(loader, Some(PathBuf::from("/lib64/ld-linux-x86-64.so.2")));
        assert_eq!(library_path("\tlinux-vdso.so.1 (0x00007f)"), None);
    }
}
