//! `mallee-guest`: checks of the monitor's devices in a Linux guest. See [`mallee_tests::guest`]. As process 1 it is the guest's side.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mallee_tests::guest::{Machine, checks, host, init, initrd};
use mallee_tests::lab::packages;

#[derive(Parser)]
#[command(name = "mallee-guest", version, about = "Checks of the monitor's devices in a Linux guest")]
struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Write the guest's kernels and its initial RAM file system into a folder: vmlinux, vmlinuz, initrd.
    Build { folder: PathBuf },
    /// Boot the guest once and run checks.
    Run(Run),
    /// The names of all checks.
    List,
}

#[derive(clap::Args)]
struct Run {
    /// The folder that `build` wrote.
    #[arg(long)]
    files: PathBuf,
    #[arg(long, default_value = "vmlinux")]
    kernel: String,
    #[arg(long, default_value = "/usr/bin/mallee-vmm")]
    monitor: PathBuf,
    #[arg(long, default_value_t = 2)]
    cpus: u8,
    #[arg(long, default_value = "linux")]
    protocol: String,
    #[arg(long, default_value_t = 256)]
    memory_mib: u64,
    #[arg(long, default_value = "quiet tsc=reliable no_timer_check")]
    boot_args: String,
    /// Have the monitor go into a jail.
    #[arg(long)]
    jail: bool,
    /// Checks by name; all by default.
    names: Vec<String>,
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let done = match Command::parse().verb {
        Verb::Build { folder } => build(&folder),
        Verb::Run(run) => run.execute(),
        Verb::List => {
            checks::ALL.iter().for_each(|check| println!("{}", check.name));
            Ok(true)
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mallee-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build(folder: &std::path::Path) -> Result<bool, String> {
    std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let written = packages::fetch(&|text| eprintln!("  {text}")).and_then(|set| {
        initrd::write(&set, &folder.join("initrd"))?;
        initrd::write_kernel(&set, &folder.join("vmlinux"), false)?;
        initrd::write_kernel(&set, &folder.join("vmlinuz"), true)
    });
    written.map(|()| true).map_err(|error| error.to_string())
}

impl Run {
    /// One line a check; whether all have passed.
    fn execute(self) -> Result<bool, String> {
        let checks = match self.names.is_empty() {
            true => checks::ALL.iter().map(|check| check.name.to_owned()).collect(),
            false => self.names,
        };
        let outcomes = host::run(&host::Boot {
            monitor: self.monitor,
            kernel: self.files.join(self.kernel),
            initrd: self.files.join("initrd"),
            machine: Machine { cpus: self.cpus, protocol: self.protocol, checks },
            memory_mib: self.memory_mib,
            boot_args: self.boot_args,
            is_jailed: self.jail,
        })?;
        for (name, outcome) in &outcomes {
            match outcome {
                Ok(seen) => println!("PASS {name}: {seen}"),
                Err(why) => println!("FAIL {name}: {why}"),
            }
        }
        Ok(outcomes.iter().all(|(_, outcome)| outcome.is_ok()))
    }
}
