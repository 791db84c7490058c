//! `mallee doctor`: what this machine can do, and what is in the way.
//!
//! Nothing is guessed from version numbers or CPU flags: KVM is tried by running instructions in a
//! throw-away VM (`mallee-vmm --check-kvm`), the network by making a bridge, a tap and a question to
//! nftables in a network namespace that goes with the thread that made it. Every finding that is not
//! well says what to do. The exit status is 0 when `mallee up` will work.

mod kernel;
mod machine;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use ipnet::Ipv4Net;
use serde::Serialize;

use super::{Result, State, print_json};

#[derive(Debug, Args)]
pub struct Doctor {
    #[command(flatten)]
    state: State,
    /// Public network that `mallee up` will be given
    #[arg(long, default_value = "198.51.100.0/24", value_name = "CIDR")]
    public_network: Ipv4Net,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How a finding bears on `mallee up`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Good,
    /// Works, with less than it could have.
    Less,
    /// `mallee up` will not work.
    Bad,
}

#[derive(Debug, Clone, Serialize)]
struct Finding {
    subject: &'static str,
    level: Level,
    what: String,
    /// What to do; empty when there is nothing to do.
    advice: String,
}

impl Finding {
    fn good(subject: &'static str, what: impl Into<String>) -> Finding {
        Finding { subject, level: Level::Good, what: what.into(), advice: String::new() }
    }

    fn less(subject: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { subject, level: Level::Less, what: what.into(), advice: advice.into() }
    }

    fn bad(subject: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { subject, level: Level::Bad, what: what.into(), advice: advice.into() }
    }
}

impl Doctor {
    pub async fn run(self) -> Result<ExitCode> {
        let findings = self.findings();
        let works = findings.iter().all(|finding| finding.level != Level::Bad);
        if self.json {
            print_json(&findings)?;
        } else {
            print(&findings, works);
        }
        Ok(if works { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn findings(&self) -> Vec<Finding> {
        let state: PathBuf = self.state.dir.clone();
        let mut findings = vec![machine::user(), machine::programs(), machine::kvm()];
        findings.extend(kernel::network());
        findings.push(machine::firewall());
        findings.extend([machine::cgroup(), machine::memory(), machine::disk(&state)]);
        findings.extend(machine::ports(&state));
        findings.extend(machine::conflicts(self.public_network));
        findings
    }
}

fn print(findings: &[Finding], works: bool) {
    for finding in findings {
        let mark = match finding.level {
            Level::Good => "✓",
            Level::Less => "!",
            Level::Bad => "✗",
        };
        println!("{mark} {:<12} {}", finding.subject, finding.what);
        if !finding.advice.is_empty() {
            println!("  {:<12} → {}", "", finding.advice);
        }
    }
    println!();
    println!(
        "{}",
        if works { "`mallee up` will work here." } else { "`mallee up` will not work here: see what is marked ✗." }
    );
}
