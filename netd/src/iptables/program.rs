//! The programs that read and write x_tables.
//!
//! `iptables` is two programs by one name: Debian's default one writes nf_tables, which is what this backend is to do without. So the one that is
//! named for x_tables is taken, or else one that says so of itself. They are given rules on their standard input and never a word by a shell.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::error::{Error, Result};

/// Seconds to wait for others that change tables (`/run/xtables.lock`).
const WAIT: &str = "30";
/// Matches and targets that rules are made of (`/proc/net/ip_tables_matches`, `…_targets`), but those that no table is without.
const MATCHES: [&str; 6] = ["conntrack", "connmark", "mac", "u32", "comment", "hashlimit"];
const TARGETS: [&str; 6] = ["CT", "MARK", "CONNMARK", "DNAT", "SNAT", "MASQUERADE"];
/// Rules that name each of them, in chains that nothing leads to.
const PROBE: &str = "\
*raw
:mallee-probe - [0:0]
-A mallee-probe -p udp -m udp -m mac --mac-source 02:00:00:00:00:01 -m u32 --u32 0=0 -m comment --comment probe -j CT --zone-orig mark
COMMIT
*mangle
:mallee-probe - [0:0]
-A mallee-probe -m conntrack --ctstate NEW -m connmark --mark 0 -j MARK --set-xmark 0
-A mallee-probe -m hashlimit --hashlimit-above 1/sec --hashlimit-mode srcip --hashlimit-name mallee-probe -j CONNMARK --set-xmark 0
COMMIT
*nat
:mallee-probe - [0:0]
-A mallee-probe -j DNAT --to-destination 192.0.2.1
-A mallee-probe -j SNAT --to-source 192.0.2.1
-A mallee-probe -j MASQUERADE
COMMIT
";
const PROBE_END: &str = "\
*raw\n-F mallee-probe\n-X mallee-probe\nCOMMIT\n*mangle\n-F mallee-probe\n-X mallee-probe\nCOMMIT
*nat\n-F mallee-probe\n-X mallee-probe\nCOMMIT\n";

#[derive(Debug)]
pub struct Programs {
    save: String,
    restore: String,
}

impl Programs {
    /// The two programs, where this machine has them.
    pub fn find() -> Result<Self> {
        Ok(Self { save: find("save")?, restore: find("restore")? })
    }

    /// Makes a rule of each kind that netd's are, and removes them again. An error names what the kernel does not have.
    pub fn probe(&self) -> Result<()> {
        let outcome = self.restore(PROBE);
        if outcome.is_ok() {
            return self.restore(PROBE_END);
        }
        // Whatever of it was made.
        let _ = self.restore(PROBE_END);
        let lacking = |file: &str, wanted: &[&'static str]| -> Vec<&'static str> {
            let known = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
            wanted.iter().copied().filter(|name| !known.lines().any(|line| line == *name)).collect()
        };
        let missing = [lacking("ip_tables_matches", &MATCHES), lacking("ip_tables_targets", &TARGETS)].concat();
        match missing.as_slice() {
            [] => outcome,
            missing => Err(Error::Backend(format!(
                "this kernel's x_tables lack {}; load the modules `xt_…` of these names (CONFIG_NETFILTER_XT_…)",
                missing.join(", ")
            ))),
        }
    }

    /// Every table that there is, with its counters.
    pub fn save(&self) -> Result<String> {
        let output = Command::new(&self.save).arg("--counters").stdin(Stdio::null()).output();
        let output = output.map_err(Error::io(format!("starting {}", self.save)))?;
        succeeded(&self.save, &output)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Changes tables as the script says, and nothing that it does not name.
    pub fn restore(&self, script: &str) -> Result<()> {
        let doing = || Error::io(format!("starting {}", self.restore));
        let mut child = Command::new(&self.restore)
            .args(["--noflush", "--counters", "--wait", WAIT])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(doing())?;
        // A program that ends before it has read all says why on the other side.
        let written = child.stdin.take().map(|mut stdin| stdin.write_all(script.as_bytes()));
        let output = child.wait_with_output().map_err(doing())?;
        succeeded(&self.restore, &output)?;
        written.transpose().map_err(Error::io(format!("writing to {}", self.restore)))?;
        Ok(())
    }
}

fn succeeded(program: &str, output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Backend(format!("{program}: {}", said.lines().collect::<Vec<_>>().join(" "))))
}

fn find(what: &str) -> Result<String> {
    let names = [format!("iptables-legacy-{what}"), format!("iptables-{what}")];
    // A daemon's path may lack the folder that these are in.
    let places = names.iter().flat_map(|name| [name.clone(), format!("/usr/sbin/{name}"), format!("/sbin/{name}")]);
    places.into_iter().find(|place| is_of_x_tables(place)).ok_or_else(|| {
        Error::Backend(format!(
            "neither `{}` is here nor a `{}` that is of x_tables; install the package `iptables`",
            names[0], names[1]
        ))
    })
}

fn is_of_x_tables(program: &str) -> bool {
    let Ok(output) = Command::new(program).arg("--version").stdin(Stdio::null()).output() else { return false };
    output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("nf_tables")
}
