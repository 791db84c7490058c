//! The monitors that are measured, and how each is told to run the same guest.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use mallee_vmm::api::{BootSource, MachineConfig, VmConfig};

use super::error::BenchError;
use crate::lab::{machine::QEMU, programs::Places};

/// Size of the measured guests' memory.
pub const MEMORY_MIB: u64 = 128;

/// Name of our own monitor in the series; the others are set in relation to it.
pub const OURS: &str = "mallee-vmm";

/// The peers' programs, and their names in the series.
pub const FIRECRACKER: &str = "firecracker";
pub const CLOUD_HYPERVISOR: &str = "cloud-hypervisor";

/// Name of the floor in the series.
pub const FLOOR: &str = "floor";

/// One monitor with the command that runs the guest; its serial port is its standard output.
pub struct Monitor {
    pub name: &'static str,
    pub version: String,
    program: PathBuf,
    arguments: Vec<String>,
}

impl Monitor {
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// Every monitor that is here, ours first. `folder` takes their configuration files.
pub fn present(places: &Places, kernel: &Path, folder: &Path) -> Result<Vec<Monitor>, BenchError> {
    let mut monitors = vec![ours(places, kernel, folder)?];
    monitors.extend(on_path(FIRECRACKER).map(|program| firecracker(program, folder)));
    monitors.extend(on_path(CLOUD_HYPERVISOR).map(|program| cloud_hypervisor(program, kernel)));
    monitors.extend(on_path(QEMU).map(|program| qemu_microvm(program, kernel)));
    Ok(monitors)
}

#[allow(clippy::needless_update, reason = "what a VMM offers grows; this states what it wants of it")]
fn ours(places: &Places, kernel: &Path, folder: &Path) -> Result<Monitor, BenchError> {
    let program = places.find(OURS)?;
    // Firecracker reads the same file.
    let config = VmConfig {
        machine_config: MachineConfig { mem_size_mib: MEMORY_MIB, ..MachineConfig::default() },
        boot_source: Some(BootSource {
            kernel_image_path: kernel.to_owned(),
            initrd_path: None,
            boot_args: Some("console=ttyS0".into()),
            ..BootSource::default()
        }),
        ..VmConfig::default()
    };
    let path = config_file(folder);
    serde_json::to_vec(&config)
        .map_err(std::io::Error::other)
        .and_then(|text| fs::write(&path, text))
        .map_err(|source| BenchError::File { action: "writing", path: path.clone(), source })?;
    Ok(Monitor {
        name: OURS,
        version: version(&program),
        program,
        arguments: words(&["--config-file", &path.display().to_string()]),
    })
}

fn firecracker(program: PathBuf, folder: &Path) -> Monitor {
    Monitor {
        name: FIRECRACKER,
        version: version(&program),
        program,
        arguments: words(&["--no-api", "--config-file", &config_file(folder).display().to_string()]),
    }
}

fn cloud_hypervisor(program: PathBuf, kernel: &Path) -> Monitor {
    let memory = format!("size={MEMORY_MIB}M");
    Monitor {
        name: CLOUD_HYPERVISOR,
        version: version(&program),
        program,
        arguments: words(&[
            "--kernel",
            &kernel.display().to_string(),
            "--cpus",
            "boot=1",
            "--memory",
            &memory,
            "--serial",
            "tty",
            "--console",
            "off",
        ]),
    }
}

fn qemu_microvm(program: PathBuf, kernel: &Path) -> Monitor {
    Monitor { name: "qemu-microvm", version: version(&program), program, arguments: microvm(kernel) }
}

/// QEMU's words for a microvm like everybody's: one processor, [`MEMORY_MIB`], the serial port on standard output.
///
/// `arch-capabilities=off`: QEMU would write an MSR that a software KVM refuses, and end.
pub fn microvm(kernel: &Path) -> Vec<String> {
    let memory = MEMORY_MIB.to_string();
    words(&[
        "-M",
        "microvm,x-option-roms=off,pit=off,pic=off,rtc=off",
        "-accel",
        "kvm",
        "-cpu",
        "host,arch-capabilities=off",
        "-smp",
        "1",
        "-m",
        &memory,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-no-reboot",
        "-kernel",
        &kernel.display().to_string(),
    ])
}

fn config_file(folder: &Path) -> PathBuf {
    folder.join("vm.json")
}

/// Words of a command line.
pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// The first line of what the program says of its version.
pub fn version(program: &Path) -> String {
    let said = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let said = said.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&said).lines().next().unwrap_or_default().to_owned()
}

pub fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|candidate| candidate.is_file())
}
