//! Findings that need no privilege: programs, KVM, memory, disk, ports, networks in use.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};

use ipnet::Ipv4Net;
use mallee_netd::api::Check;
use mallee_vmm::api::{KvmCheck, KvmClass};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::sys::statvfs::statvfs;

use super::Finding;
use crate::cli::{program, record, routes};

const GIB: u64 = 1 << 30;

pub fn user() -> Finding {
    if nix::unistd::geteuid().is_root() {
        Finding::good("user", "root")
    } else {
        Finding::bad("user", "not root", "run `mallee up` as root: it makes interfaces, namespaces and cgroups")
    }
}

pub fn programs() -> Finding {
    let names = ["mallee-controller", "mallee-netd", "mallee-agent", "mallee-vmm"];
    let missing: Vec<&str> = names.into_iter().filter(|name| program(name).is_err()).collect();
    if missing.is_empty() {
        Finding::good("programs", names.join(", "))
    } else {
        Finding::bad("programs", format!("not beside mallee: {}", missing.join(", ")), "build all of them: make")
    }
}

pub fn kvm() -> Finding {
    let check = || -> Result<KvmCheck, String> {
        let path = program("mallee-vmm").map_err(|error| error.to_string())?;
        let done = Command::new(path).arg("--check-kvm").stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
        serde_json::from_slice(&done.stdout)
            .map_err(|_| format!("mallee-vmm --check-kvm: {}", String::from_utf8_lossy(&done.stderr).trim()))
    };
    match check() {
        Ok(KvmCheck { class: KvmClass::Hardware, detail }) => {
            Finding::good("KVM", format!("hardware: unmodified Linux runs directly here ({detail})"))
        }
        Ok(KvmCheck { class: KvmClass::Software, detail }) => Finding::less(
            "KVM",
            format!("software: only images made for it run directly here, the probe for one ({detail})"),
            "for Linux, add a node of the virtual lab (mallee lab up), or use a machine with VT-x or AMD-V",
        ),
        Ok(KvmCheck { class: KvmClass::None, detail }) => Finding::less(
            "KVM",
            format!("none: no instance runs directly here ({detail})"),
            "load kvm_intel or kvm_amd and enable virtualisation in the firmware, or add a node of the virtual lab (mallee lab up)",
        ),
        Err(words) => Finding::bad("KVM", words, "see that mallee-vmm lies beside mallee and can be executed"),
    }
}

/// Rules of others that stop instances' packets, whatever netd allows.
pub fn firewall() -> Finding {
    let check = || -> Result<Check, String> {
        let path = program("mallee-netd").map_err(|error| error.to_string())?;
        let done = Command::new(path).arg("check").stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
        serde_json::from_slice(&done.stdout)
            .map_err(|_| format!("mallee-netd check: {}", String::from_utf8_lossy(&done.stderr).trim()))
    };
    match check() {
        Ok(found) => firewall_finding(&found),
        Err(words) => Finding::less("firewall", words, "see that mallee-netd lies beside mallee and runs as root"),
    }
}

fn firewall_finding(found: &Check) -> Finding {
    let mut dropping: Vec<String> = found.drop_policies.iter().map(ToString::to_string).collect();
    if !found.legacy_tables.is_empty() {
        dropping.push(format!("perhaps the old iptables (tables {})", found.legacy_tables.join(", ")));
    }
    if dropping.is_empty() {
        return Finding::good("firewall", "no rules of others drop by policy");
    }
    Finding::less(
        "firewall",
        format!("others' rules drop what they do not accept: {}", dropping.join("; ")),
        "let instances' networks and the public network pass there (nft list ruleset; iptables-legacy -S); netd changes only its own tables",
    )
}

pub fn cgroup() -> Finding {
    let unified = statfs("/sys/fs/cgroup").is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if unified {
        Finding::good("cgroup", "version 2 at /sys/fs/cgroup: instances are held to their share of CPU and memory")
    } else {
        Finding::less(
            "cgroup",
            "version 2 is not at /sys/fs/cgroup: instances are not held to their share of CPU and memory",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup",
        )
    }
}

pub fn memory() -> Finding {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available_kib(&text) {
        Some(kib) if kib >= 1 << 20 => Finding::good("memory", format!("{} MiB available", kib >> 10)),
        Some(kib) => Finding::less(
            "memory",
            format!("{} MiB available", kib >> 10),
            "an instance of the smallest type takes 512 MiB; free some memory",
        ),
        None => Finding::less("memory", "/proc/meminfo does not tell", "mount /proc"),
    }
}

fn available_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

pub fn disk(state: &Path) -> Finding {
    let existing = state.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let Ok(fs) = statvfs(existing) else {
        return Finding::less(
            "disk",
            format!("{} does not tell", existing.display()),
            "choose another folder with --state",
        );
    };
    let free = fs.blocks_available() * fs.fragment_size();
    let what = format!("{} MiB free for {}", free >> 20, state.display());
    if free >= 8 * GIB {
        Finding::good("disk", what)
    } else if free >= GIB {
        Finding::less(
            "disk",
            what,
            "images, objects and root disks lie there; give it more room or choose another --state",
        )
    } else {
        Finding::bad("disk", what, "free at least 1 GiB or choose another folder with --state")
    }
}

pub fn ports(state: &Path) -> Vec<Finding> {
    if let Some(pid) = record::holder(state) {
        return vec![Finding::good("ports", format!("a cloud runs here already (process {pid})"))];
    }
    let in_use = |address: (Ipv4Addr, u16)| TcpListener::bind(address).is_err();
    [(Ipv4Addr::LOCALHOST, 8750, "--listen"), (Ipv4Addr::UNSPECIFIED, 8751, "--node-listen")]
        .into_iter()
        .map(|(address, port, option)| {
            if in_use((address, port)) {
                Finding::bad(
                    "ports",
                    format!("{address}:{port} is in use"),
                    format!("end what uses it, or choose another with {option}"),
                )
            } else {
                Finding::good("ports", format!("{address}:{port} is free"))
            }
        })
        .collect()
}

/// Networks of ours that this machine already reaches in another way, and packet filters in the way.
pub fn conflicts(public_network: Ipv4Net) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some((interface, route)) = routes::overlapping(public_network, "mallee0") {
        findings.push(Finding::bad(
            "networks",
            format!(
                "the public network {public_network} overlaps {route}, which this machine reaches through {interface}"
            ),
            "choose another one with --public-network, or give that interface with --uplink",
        ));
    }
    let filtered = |file: &str| std::fs::read_to_string(file).is_ok_and(|text| text.trim() == "1");
    if filtered("/proc/sys/net/bridge/bridge-nf-call-iptables") {
        findings.push(Finding::less(
            "filters",
            "frames on bridges go through this machine's packet filter (bridge-nf-call-iptables is 1)",
            "if nodes do not reach one another: sysctl net.bridge.bridge-nf-call-iptables=0, or accept bridged frames in FORWARD",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::good("networks", format!("{public_network} is not in use, bridges are not filtered")));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use mallee_netd::api::DropPolicy;

    #[test]
    fn a_firewall_in_the_way_is_named() {
        assert_eq!(firewall_finding(&Check::default()).level, super::super::Level::Good);
        let of = |text: &str| text.to_owned();
        let policy = DropPolicy { family: of("ip"), table: of("filter"), chain: of("FORWARD"), hook: of("forward") };
        let found = Check { drop_policies: vec![policy], legacy_tables: vec![of("nat")] };
        let finding = firewall_finding(&found);
        assert_eq!(finding.level, super::super::Level::Less);
        assert!(finding.what.contains("table ip filter, chain FORWARD") && finding.what.contains("nat"));
    }

    #[test]
    fn available_memory_is_read() {
        assert_eq!(available_kib("MemTotal: 5 kB\nMemAvailable:   24000000 kB\n"), Some(24_000_000));
        assert_eq!(available_kib(""), None);
    }
}
