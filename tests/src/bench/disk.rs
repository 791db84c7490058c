//! Requests a second on a virtio disk, as a Linux guest counts them (`guest::disk_bench`).
//!
//! Each monitor gets the same kernel, initrd and memory, and a raw file through the host's page cache, with flushes passed on. It has to be
//! run where KVM runs Linux: on hardware, or in a node of the virtual lab.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use mallee_vmm::api::{BootSource, Drive, IoEngine, MachineConfig, VmConfig};

use super::{
    error::BenchError,
    monitors::{MEMORY_MIB, OURS, version},
};
use crate::guest::disk_bench::{Rates, WORD};

const DISK_MIB: u64 = 64;

/// A monitor with the command that boots the guest on the disk; the serial port is its standard output.
pub struct Monitor {
    pub name: String,
    pub version: String,
    program: PathBuf,
    arguments: Vec<String>,
}

/// The guest's files, as `mallee-guest build` wrote them, and a folder for configurations and the disk.
pub struct Files<'a> {
    pub guest: &'a Path,
    pub work: &'a Path,
}

impl Files<'_> {
    fn kernel(&self) -> PathBuf {
        self.guest.join("vmlinux")
    }

    fn initrd(&self) -> PathBuf {
        self.guest.join("initrd")
    }

    fn disk(&self) -> PathBuf {
        self.work.join("disk")
    }

    /// The disk, with all of its blocks written: a hole would be read without a look at the file.
    pub fn make_disk(&self) -> Result<(), BenchError> {
        let path = self.disk();
        fs::write(&path, vec![0xa5; (DISK_MIB << 20) as usize])
            .and_then(|()| File::open(&path)?.sync_all())
            .map_err(|source| BenchError::File { action: "writing", path, source })
    }
}

fn command_line() -> String {
    format!("console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check {WORD}")
}

/// Ours with each engine.
#[allow(clippy::needless_update, reason = "what a VMM offers grows; this states what it wants of it")]
pub fn ours(program: &Path, files: &Files) -> Result<Vec<Monitor>, BenchError> {
    [(IoEngine::Sync, OURS.to_owned()), (IoEngine::Async, format!("{OURS} io_uring"))]
        .into_iter()
        .map(|(io_engine, name)| {
            let config = VmConfig {
                machine_config: MachineConfig { mem_size_mib: MEMORY_MIB, ..MachineConfig::default() },
                boot_source: Some(BootSource {
                    kernel_image_path: files.kernel(),
                    initrd_path: Some(files.initrd()),
                    boot_args: Some(command_line()),
                    ..BootSource::default()
                }),
                drives: vec![Drive {
                    drive_id: "disk".into(),
                    path_on_host: files.disk(),
                    io_engine,
                    ..Drive::default()
                }],
                ..VmConfig::default()
            };
            let path = files.work.join(format!("{io_engine:?}.json"));
            serde_json::to_vec(&config)
                .map_err(std::io::Error::other)
                .and_then(|text| fs::write(&path, text))
                .map_err(|source| BenchError::File { action: "writing", path: path.clone(), source })?;
            let arguments = vec!["--config-file".into(), path.display().to_string()];
            Ok(Monitor { name, version: version(program), program: program.to_owned(), arguments })
        })
        .collect()
}

/// QEMU's microvm with each of the two ways that it has for buffered files.
pub fn qemu(program: &Path, files: &Files) -> Vec<Monitor> {
    ["threads", "io_uring"]
        .map(|engine| {
            let drive =
                format!("id=disk,if=none,format=raw,cache=writeback,aio={engine},file={}", files.disk().display());
            let words = [
                ("-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off".to_owned()),
                ("-accel", "kvm".into()),
                ("-cpu", "host,arch-capabilities=off".into()),
                ("-smp", "1".into()),
                ("-m", MEMORY_MIB.to_string()),
                ("-display", "none".into()),
                ("-serial", "stdio".into()),
                ("-kernel", files.kernel().display().to_string()),
                ("-initrd", files.initrd().display().to_string()),
                ("-append", command_line()),
                ("-drive", drive),
                ("-device", "virtio-blk-device,drive=disk".into()),
            ];
            let mut arguments: Vec<String> = ["-nodefaults", "-no-user-config", "-no-reboot"].map(Into::into).to_vec();
            arguments.extend(words.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
            let name = format!("qemu-microvm {engine}");
            Monitor { name, version: version(program), program: program.to_owned(), arguments }
        })
        .into()
}

impl Monitor {
    /// One boot; what its guest counted.
    pub fn run(&self) -> Result<Rates, BenchError> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let child = command.spawn().map_err(|source| BenchError::Start { monitor: self.name.clone(), source })?;
        let mut child = Ending(child);
        let mut said = String::new();
        for line in child.0.stdout.take().into_iter().flat_map(|output| BufReader::new(output).lines()) {
            let Ok(line) = line else { continue };
            if let Some(rates) = Rates::from_line(&line) {
                return Ok(rates);
            }
            said.push_str(&line);
            said.push('\n');
        }
        Err(BenchError::Silent { monitor: self.name.clone(), said: said.trim().to_owned() })
    }
}

/// A child that does not outlive its measurement.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
