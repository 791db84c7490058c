//! A Linux guest that counts something and prints it (`guest::disk_bench`, `guest::net_bench`): how each monitor boots it, and what it prints.
//!
//! Each monitor gets the same kernel, initrd, command line and memory, and one processor. It has to be run where KVM runs Linux: on hardware, or in a node
//! of the virtual lab.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use mallee_vmm::api::{BootSource, MachineConfig, VmConfig};

use super::{
    error::BenchError,
    monitors::{MEMORY_MIB, version},
};

/// A monitor with the command that boots the guest; the serial port is its standard output.
pub struct Monitor {
    pub name: String,
    pub version: String,
    program: PathBuf,
    arguments: Vec<String>,
}

/// What is booted, and a folder for what belongs to the measurement.
pub struct Guest<'a> {
    /// The guest's files, as `mallee-guest build` wrote them.
    pub files: &'a Path,
    pub work: &'a Path,
    /// The word of the command line that says what is to be counted.
    pub word: &'static str,
}

impl Guest<'_> {
    fn kernel(&self) -> PathBuf {
        self.files.join("vmlinux")
    }

    fn initrd(&self) -> PathBuf {
        self.files.join("initrd")
    }

    fn command_line(&self) -> String {
        format!("console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check {}", self.word)
    }

    /// Ours, with the devices that `add` adds.
    #[allow(clippy::needless_update, reason = "what a VMM offers grows; this states what it wants of it")]
    pub fn ours(&self, program: &Path, name: &str, add: impl FnOnce(&mut VmConfig)) -> Result<Monitor, BenchError> {
        let mut config = VmConfig {
            machine_config: MachineConfig { mem_size_mib: MEMORY_MIB, ..MachineConfig::default() },
            boot_source: Some(BootSource {
                kernel_image_path: self.kernel(),
                initrd_path: Some(self.initrd()),
                boot_args: Some(self.command_line()),
                ..BootSource::default()
            }),
            ..VmConfig::default()
        };
        add(&mut config);
        let path = self.work.join(format!("{}.json", name.replace(' ', "-")));
        serde_json::to_vec(&config)
            .map_err(std::io::Error::other)
            .and_then(|text| fs::write(&path, text))
            .map_err(|source| BenchError::File { action: "writing", path: path.clone(), source })?;
        let arguments = vec!["--config-file".into(), path.display().to_string()];
        Ok(Monitor { name: name.to_owned(), version: version(program), program: program.to_owned(), arguments })
    }

    /// QEMU's microvm, with the devices that `words` describe.
    pub fn qemu(&self, program: &Path, name: &str, words: &[(&str, String)]) -> Monitor {
        let machine = [
            ("-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off".to_owned()),
            ("-accel", "kvm".into()),
            ("-cpu", "host,arch-capabilities=off".into()),
            ("-smp", "1".into()),
            ("-m", MEMORY_MIB.to_string()),
            ("-display", "none".into()),
            ("-serial", "stdio".into()),
            ("-kernel", self.kernel().display().to_string()),
            ("-initrd", self.initrd().display().to_string()),
            ("-append", self.command_line()),
        ];
        let mut arguments: Vec<String> = ["-nodefaults", "-no-user-config", "-no-reboot"].map(Into::into).to_vec();
        arguments.extend(machine.iter().chain(words).flat_map(|(name, value)| [(*name).to_owned(), value.clone()]));
        Monitor { name: name.to_owned(), version: version(program), program: program.to_owned(), arguments }
    }
}

impl Monitor {
    /// One boot; what `counted` finds in a line of the guest's.
    pub fn run<T>(&self, counted: impl Fn(&str) -> Option<T>) -> Result<T, BenchError> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let child = command.spawn().map_err(|source| BenchError::Start { monitor: self.name.clone(), source })?;
        let mut child = Ending(child);
        let mut said = String::new();
        for line in child.0.stdout.take().into_iter().flat_map(|output| BufReader::new(output).lines()) {
            let Ok(line) = line else { continue };
            if let Some(found) = counted(&line) {
                return Ok(found);
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
