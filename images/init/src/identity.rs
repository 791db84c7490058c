//! What the metadata service says this machine is, applied to the running system: host name and root's
//! authorized keys.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::metadata::Metadata;
use crate::report;

/// Where this program remembers across reboots.
pub const STATE: &str = "/var/lib/mallee";

/// The instance whose first boot this root file system has been through, if any. A disk that was copied
/// from another instance carries that one's id, and so is recognised as new.
pub fn remembered_instance() -> Option<String> {
    let id = fs::read_to_string(Path::new(STATE).join("instance-id")).ok()?;
    Some(id.trim().to_owned())
}

/// Sets host name and keys. Keys are added at an instance's first boot only: later the file is the
/// owner's to edit.
pub fn apply(metadata: &Metadata, first_boot: bool) {
    if let Some(name) = &metadata.hostname {
        set_hostname(name);
    }
    if !first_boot {
        return;
    }
    let folder = Path::new("/root/.ssh");
    match authorize(folder, &metadata.public_keys) {
        Ok(added) => report::line(format_args!("{added} public key(s) may log in as root")),
        Err(error) => report::line(format_args!("{}: {error}", folder.display())),
    }
}

/// Notes that this instance's first boot is done with what happens once.
pub fn remember_instance(id: &str) -> io::Result<()> {
    fs::create_dir_all(STATE)?;
    replace_file(&Path::new(STATE).join("instance-id"), format!("{id}\n").as_bytes(), 0o644)
}

/// Whole or not at all, also if the machine stops in between.
pub fn replace_file(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

fn set_hostname(name: &str) {
    let short = name.split('.').next().unwrap_or(name);
    if let Err(error) = nix::unistd::sethostname(short) {
        report::line(format_args!("host name {short:?}: {error}"));
        return;
    }
    let names = if short == name { short.to_owned() } else { format!("{name} {short}") };
    let hosts = format!("127.0.0.1 localhost\n127.0.1.1 {names}\n::1 localhost ip6-localhost\n");
    for (path, content) in [("/etc/hostname", format!("{short}\n")), ("/etc/hosts", hosts)] {
        if let Err(error) = replace_file(Path::new(path), content.as_bytes(), 0o644) {
            report::line(format_args!("{path}: {error}"));
        }
    }
}

/// Adds those keys that are not there yet, and returns how many were added.
fn authorize(folder: &Path, keys: &[String]) -> io::Result<usize> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let path = folder.join("authorized_keys");
    let present = match fs::read_to_string(&path) {
        Ok(present) => present,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let missing: Vec<&str> =
        keys.iter().map(String::as_str).filter(|key| !present.lines().any(|line| line.trim() == *key)).collect();
    if missing.is_empty() {
        return Ok(0);
    }
    let mut content = present;
    if !content.is_empty() && !content.ends_with('\n') {
        content.push('\n');
    }
    for key in &missing {
        content.push_str(key);
        content.push('\n');
    }
    replace_file(&path, content.as_bytes(), 0o600)?;
    Ok(missing.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_added_once_and_others_kept() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join(".ssh");
        let keys = ["ssh-ed25519 AAAA a".to_owned()];
        assert_eq!(authorize(&folder, &keys).unwrap(), 1);
        assert_eq!(authorize(&folder, &keys).unwrap(), 0);
        fs::write(folder.join("authorized_keys"), "ssh-rsa BBBB own").unwrap();
        assert_eq!(authorize(&folder, &keys).unwrap(), 1);
        let content = fs::read_to_string(folder.join("authorized_keys")).unwrap();
        assert_eq!(content, "ssh-rsa BBBB own\nssh-ed25519 AAAA a\n");
    }
}
