//! A root disk: ext4 without a partition table, made by `mke2fs` from a folder, with neither a mount nor a
//! loop device.
//!
//! The same tree gives the same bytes: identifiers are fixed, the features are named here and not taken from the
//! machine's `/etc/mke2fs.conf`, and `debugfs` sets what `mke2fs` copies from the folder and nobody can choose there
//! (owners for a builder who is not root, and the change times).

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Error, at};
use crate::packages::run_well;
use crate::tree::{Node, TIME, Tree};

const BLOCK: u64 = 4096;
/// 1024 blocks, the smallest journal there is.
const JOURNAL_MIB: &str = "4";
/// What Debian 12 gives a file system, less what a small root has no use for (quota, project ids).
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,\
                        sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
/// The disk may grow online to this many blocks: 256 GiB.
const LARGEST_BLOCKS: u64 = (256 << 30) / BLOCK;

pub struct Disk<'a> {
    pub tree: &'a Tree,
    /// At most 16 bytes.
    pub label: &'a str,
    /// Of the file system and of its directories' hashes. Not secret, and the same in each copy.
    pub uuid: &'a str,
    /// Of the whole disk, in bytes, a multiple of 4096.
    pub size: u64,
}

impl Disk<'_> {
    /// Writes the disk to the new file `path`.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let staging = tempfile::tempdir().map_err(at("a temporary folder"))?;
        let root = staging.path().join("root");
        stage(self.tree, &root)?;
        self.make_file_system(&root, path)?;
        set_attributes(self.tree, path)
    }

    fn make_file_system(&self, root: &Path, path: &Path) -> Result<(), Error> {
        let file = File::create(path).map_err(at(path))?;
        file.set_len(self.size).map_err(at(path))?;
        let extended =
            format!("root_owner=0:0,hash_seed={},resize={LARGEST_BLOCKS},lazy_itable_init=0,nodiscard", self.uuid);
        run_well(
            tool("mke2fs")
                .args(["-q", "-F", "-t", "ext4", "-m", "0", "-I", "256"])
                .args(["-b", &BLOCK.to_string(), "-J", &format!("size={JOURNAL_MIB}")])
                .args(["-O", FEATURES, "-E", &extended, "-L", self.label, "-U", self.uuid, "-d"])
                .arg(root)
                .arg(path)
                .arg((self.size / BLOCK).to_string()),
            "e2fsprogs",
        )
        .map(|_| ())
    }
}

/// A program of e2fsprogs, whose clock stands still.
fn tool(name: &str) -> Command {
    // They are not in every user's path.
    let system = Path::new("/usr/sbin").join(name);
    let mut command = if system.exists() { Command::new(system) } else { Command::new(name) };
    command.env("E2FSPROGS_FAKE_TIME", TIME.to_string()).env("MKE2FS_CONFIG", "/dev/null");
    command.env("MKE2FS_DEVICE_PHYS_SECTSIZE", "512").stdin(Stdio::null());
    command
}

fn stage(tree: &Tree, root: &Path) -> Result<(), Error> {
    std::fs::create_dir(root).map_err(at(root))?;
    for (path, node) in tree.iter() {
        let place = root.join(path.trim_start_matches('/'));
        match node {
            Node::Folder { .. } => std::fs::create_dir(&place),
            Node::File { content, mode } => std::fs::write(&place, content)
                .and_then(|()| std::fs::set_permissions(&place, std::fs::Permissions::from_mode(*mode))),
            Node::Link { target } => symlink(target, &place),
            // Made by debugfs, which needs no privilege for it.
            Node::Device { .. } => Ok(()),
        }
        .map_err(at(&place))?;
    }
    Ok(())
}

/// Owner, mode and times of every node, and the devices.
fn set_attributes(tree: &Tree, disk: &Path) -> Result<(), Error> {
    let mut script = String::new();
    // The two folders that every file system has.
    set_inode(&mut script, "/", 0o040_755);
    set_inode(&mut script, "/lost+found", 0o040_700);
    for (path, node) in tree.iter() {
        let mode = match node {
            Node::Folder { mode } => 0o040_000 | mode,
            Node::File { mode, .. } => 0o100_000 | mode,
            Node::Link { .. } => 0o120_777,
            Node::Device { mode, major, minor } => {
                let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
                let folder = if folder.is_empty() { "/" } else { folder };
                // mknod takes a name in the working directory.
                let _ = writeln!(script, "cd \"{folder}\"\nmknod {name} c {major} {minor}\ncd /");
                0o020_000 | mode
            }
        };
        set_inode(&mut script, path, mode);
    }
    let mut commands = tempfile::NamedTempFile::new().map_err(at("a temporary file"))?;
    commands.write_all(script.as_bytes()).map_err(at(commands.path()))?;
    let output = run_well(tool("debugfs").arg("-w").arg("-f").arg(commands.path()).arg(disk), "e2fsprogs")?;
    check_debugfs(disk, &String::from_utf8_lossy(&output.stderr))
}

fn set_inode(script: &mut String, path: &str, mode: u32) {
    let mut set = |field: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(script, "set_inode_field \"{path}\" {field} {value}");
    };
    set("mode", &format!("0{mode:o}"));
    for field in ["uid", "gid"] {
        set(field, "0");
    }
    for field in ["atime", "ctime", "mtime", "crtime"] {
        set(field, &format!("@{TIME}"));
        set(&format!("{field}_extra"), "0");
    }
}

/// `debugfs` ends with status 0 whatever happened; what it complains of stands on its standard error,
/// below its first line, the version.
fn check_debugfs(disk: &Path, complaints: &str) -> Result<(), Error> {
    match complaints.lines().find(|line| !line.starts_with("debugfs ") && !line.trim().is_empty()) {
        None => Ok(()),
        Some(line) => Err(Error::BadImage { path: disk.into(), detail: format!("debugfs: {line}") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest;

    const UUID: &str = "b1ed0000-6d61-4c6c-a565-74696e790001";

    fn tree() -> Tree {
        let mut tree = Tree::default();
        tree.file("/etc/hostname", 0o644, "tiny\n")
            .file("/sbin/init", 0o755, vec![7; 100_000])
            .link("/bin", "usr/bin")
            .folder("/root", 0o700)
            .device("/dev/console", 0o600, 5, 1);
        for number in 0..200 {
            tree.file(&format!("/usr/bin/applet{number}"), 0o755, format!("{number}"));
        }
        tree
    }

    fn write(folder: &Path, name: &str, tree: &Tree) -> std::path::PathBuf {
        let path = folder.join(name);
        Disk { tree, label: "test", uuid: UUID, size: 16 << 20 }.write(&path).unwrap();
        path
    }

    fn debugfs(disk: &Path, request: &str) -> String {
        let output = tool("debugfs").args(["-R", request]).arg(disk).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let one = write(folder.path(), "one", &tree());
        // Change times, which cannot be chosen, are others in the second run.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        let two = write(folder.path(), "two", &tree());
        assert_eq!(digest::of_file(&one).unwrap(), digest::of_file(&two).unwrap());
        let mut other = tree();
        other.file("/etc/hostname", 0o644, "Tiny\n");
        let three = write(folder.path(), "three", &other);
        assert_ne!(digest::of_file(&one).unwrap(), digest::of_file(&three).unwrap());
    }

    #[test]
    fn content_owners_and_modes_are_right_and_the_file_system_is_clean() {
        let folder = tempfile::tempdir().unwrap();
        let disk = write(folder.path(), "disk", &tree());
        assert_eq!(debugfs(&disk, "cat /etc/hostname"), "tiny\n");
        let root = debugfs(&disk, "stat /root");
        assert!(root.contains("Mode:  0700") && root.contains("User:     0"), "{root}");
        let console = debugfs(&disk, "stat /dev/console");
        assert!(console.contains("character special") && console.contains("05:01"), "{console}");
        let checked = tool("e2fsck").args(["-f", "-n"]).arg(&disk).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    }

    #[test]
    fn a_disk_that_is_too_small_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut tree = tree();
        tree.file("/large", 0o644, vec![1; 20 << 20]);
        let disk = Disk { tree: &tree, label: "test", uuid: UUID, size: 16 << 20 };
        assert!(matches!(disk.write(&folder.path().join("disk")), Err(Error::Failed { .. })));
    }
}
