//! What a number was measured on.

use std::{fs, process::Command};

use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::lab::programs::Places;

#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// When, in UTC.
    pub date: String,
    pub processor: String,
    pub processors: usize,
    pub memory_mib: u64,
    pub kernel: String,
    /// What `mallee-vmm --check-kvm` found out: class and detail.
    pub kvm: serde_json::Value,
}

impl Facts {
    pub fn of_this_machine(places: &Places) -> Facts {
        Facts {
            date: OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            processor: field("/proc/cpuinfo", "model name"),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: field("/proc/meminfo", "MemTotal")
                .split(' ')
                .next()
                .and_then(|word| word.parse::<u64>().ok())
                .unwrap_or_default()
                / 1024,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            kvm: check_kvm(places).unwrap_or_default(),
        }
    }
}

fn check_kvm(places: &Places) -> Option<serde_json::Value> {
    let program = places.find(super::monitors::OURS).ok()?;
    serde_json::from_slice(&Command::new(program).arg("--check-kvm").output().ok()?.stdout).ok()
}

/// The value of the first `name : value` line of a file in /proc.
fn field(path: &str, name: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
        .unwrap_or_default()
}
