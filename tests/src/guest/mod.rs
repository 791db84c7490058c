//! Checks of the monitor's devices with Linux's own drivers: Debian's unmodified kernel in a guest of
//! `mallee-vmm`.
//!
//! One boot runs a list of checks. Each is a file under [`checks`] with two halves: one runs in the guest, as a function of the
//! guest's first process ([`init`]), the other on the host, in a thread of the program that started the monitor ([`host`]). The
//! halves of one check have a line to each other ([`link`], a vsock stream of its own), so that neither guesses what the other has done:
//! nothing sleeps and hopes. The guest prints one line a check on its serial port, PASS or FAIL and why; a check has
//! passed when both halves say so.
//!
//! A new device's check is a file with a [`Check`] in it and a line in [`checks::ALL`].
//!
//! The guest is Debian's kernel and one file: this program and its libraries in an initial RAM file system ([`initrd`]). It runs
//! wherever `/dev/kvm` runs Linux; elsewhere in a node of the virtual lab (`tests/e2e/test_vmm.py`).

pub mod checks;
pub mod disk_bench;
pub mod host;
pub mod init;
pub mod initrd;
pub mod interface;
pub mod link;
pub mod net_bench;

use std::path::Path;

use mallee_vmm::api::VmConfig;
use serde::{Deserialize, Serialize};

use host::Host;
use link::Link;

/// What was seen, or what was not as it should be.
pub type Outcome = Result<String, String>;

/// One subject, from both sides.
pub struct Check {
    pub name: &'static str,
    /// Adds what the check needs to the machine; sockets and files go into the folder.
    pub configure: fn(&mut VmConfig, &Path),
    /// Runs in the guest.
    pub guest: fn(&Machine, &mut Link) -> Outcome,
    /// Runs on the host.
    pub host: fn(&Host, &mut Link) -> Outcome,
}

/// What the guest is told of the machine that it should find itself in, on its command line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    pub cpus: u8,
    /// `linux` or `pvh`.
    pub protocol: String,
    /// Names of the checks to run, in order.
    pub checks: Vec<String>,
}

impl Machine {
    /// `cpus=2 protocol=linux checks=a,b`, each word with a prefix that no kernel knows.
    pub fn to_words(&self) -> String {
        format!("guest.cpus={} guest.protocol={} guest.checks={}", self.cpus, self.protocol, self.checks.join(","))
    }

    pub fn from_words(line: &str) -> Option<Self> {
        let word = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name));
        Some(Machine {
            cpus: word("guest.cpus=")?.parse().ok()?,
            protocol: word("guest.protocol=")?.to_owned(),
            checks: word("guest.checks=")?.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        })
    }
}

/// For `map_err`: what was being done when an error came.
pub fn while_doing<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> String {
    move |error| format!("{what}: {error}")
}

/// Fails with what it was instead of what it should be.
pub fn expect<T: PartialEq + std::fmt::Debug>(what: &str, seen: T, wanted: T) -> Result<(), String> {
    if seen == wanted { Ok(()) } else { Err(format!("{what} is {seen:?} and not {wanted:?}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_reads_what_the_host_wrote() {
        let machine = Machine { cpus: 4, protocol: "pvh".into(), checks: vec!["a".into(), "b".into()] };
        let read = Machine::from_words(&format!("console=ttyS0 {} quiet", machine.to_words())).unwrap();
        assert_eq!((read.cpus, read.protocol, read.checks), (4, "pvh".into(), vec!["a".to_owned(), "b".to_owned()]));
        assert!(Machine::from_words("console=ttyS0").is_none());
    }

    #[test]
    fn no_two_checks_have_the_same_name() {
        let mut names: Vec<_> = checks::ALL.iter().map(|check| check.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), checks::ALL.len());
    }
}
