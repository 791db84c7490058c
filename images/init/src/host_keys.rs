//! The ssh server's host keys: made on the instance's own first boot, never in the image.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::report;
use crate::supervisor::{Children, Ended};

const FOLDER: &str = "/etc/dropbear";
/// One key of one kind: every ssh client of the last ten years knows Ed25519, and making one takes
/// milliseconds where RSA takes seconds.
pub const KEY: &str = "/etc/dropbear/dropbear_ed25519_host_key";
const KEYGEN: &str = "/usr/bin/dropbearkey";

/// Makes the key if there is none. Returns whether it was made now.
pub fn ensure(children: &Children) -> io::Result<bool> {
    if Path::new(KEY).exists() {
        return Ok(false);
    }
    make(children).map(|()| true)
}

/// Makes a new key; an old one is replaced as a whole or not at all.
pub fn make(children: &Children) -> io::Result<()> {
    fs::create_dir_all(FOLDER)?;
    let temporary = format!("{KEY}.new");
    let _ = fs::remove_file(&temporary);
    let mut command = Command::new(KEYGEN);
    command.args(["-t", "ed25519", "-f", &temporary]).stdout(Stdio::null()).stderr(Stdio::null());
    match children.run(command)? {
        Ended::Exited(0) => fs::rename(&temporary, KEY),
        ended => Err(io::Error::other(format!("{KEYGEN} {ended}"))),
    }
}

/// Puts the public key and its fingerprint on the console, between the marks by which people and
/// programs find them in EC2's console output.
pub fn print(children: &Children) {
    let listing = "/run/host-key.txt";
    let shown = fs::File::create(listing).and_then(|file| {
        let mut command = Command::new(KEYGEN);
        command.args(["-y", "-f", KEY]).stdout(file).stderr(Stdio::null());
        children.run(command)?;
        fs::read_to_string(listing)
    });
    match shown.map(|text| HostKey::parse(&text)) {
        Ok(Some(key)) => println!("{}", key.console_text()),
        Ok(None) => report::line("the host key's fingerprint is not known"),
        Err(error) => report::line(format_args!("host key: {error}")),
    }
}

#[derive(Debug, PartialEq, Eq)]
struct HostKey {
    /// `ssh-ed25519 AAAA… comment`.
    public: String,
    /// `SHA256:…`.
    fingerprint: String,
}

impl HostKey {
    /// Reads what `dropbearkey -y` prints.
    fn parse(text: &str) -> Option<Self> {
        let public = text.lines().find(|line| line.starts_with("ssh-"))?.trim();
        let fingerprint = text.lines().find_map(|line| line.strip_prefix("Fingerprint:"))?;
        let fingerprint = fingerprint.split_whitespace().find(|word| word.contains(':'))?;
        Some(HostKey { public: public.into(), fingerprint: fingerprint.into() })
    }

    fn console_text(&self) -> String {
        let comment = self.public.split(' ').nth(2).unwrap_or("no comment");
        format!(
            "-----BEGIN SSH HOST KEY FINGERPRINTS-----\n\
             256 {} {comment} (ED25519)\n\
             -----END SSH HOST KEY FINGERPRINTS-----\n\
             -----BEGIN SSH HOST KEY KEYS-----\n\
             {}\n\
             -----END SSH HOST KEY KEYS-----",
            self.fingerprint, self.public
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropbearkeys_listing_is_understood() {
        let text = "Public key portion is:\nssh-ed25519 AAAAC3 root@tiny\n\
                    Fingerprint: SHA256:abc+def/0\n";
        let key = HostKey::parse(text).unwrap();
        assert_eq!(key.public, "ssh-ed25519 AAAAC3 root@tiny");
        let console = key.console_text();
        assert!(console.contains("\n256 SHA256:abc+def/0 root@tiny (ED25519)\n"), "{console}");
    }

    #[test]
    fn something_else_is_not() {
        assert_eq!(HostKey::parse("Failed reading"), None);
        assert_eq!(HostKey::parse(""), None);
    }
}
