//! A guest with a command line and devices under each monitor: a Linux guest that counts something and prints it (`guest::disk_bench`, `guest::net_bench`) or
//! only that it is up, or the probe, which is measured from outside.
//!
//! Each monitor gets the same kernel, initrd, command line and memory, and one processor. Linux has to be run where KVM runs it: on hardware, or in a node
//! of the virtual lab.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Seek},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use mallee_vmm::api::{BootSource, MachineConfig, VmConfig};
use serde_json::{Value, json};

use super::{
    error::BenchError,
    monitors::{self, MEMORY_MIB, version, words},
};

/// A guest that has not said what it was booted for by then will not: in a node of the lab one boots in some seconds and counts for ten.
const BOUND: Duration = Duration::from_secs(180);

/// A monitor with the command that boots the guest; the serial port is its standard output.
pub struct Monitor {
    pub name: String,
    pub version: String,
    program: PathBuf,
    arguments: Vec<String>,
}

/// What is booted, and a folder for what belongs to the measurement.
pub struct Guest<'a> {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub command_line: String,
    pub work: &'a Path,
}

impl<'a> Guest<'a> {
    /// Linux with the guest's files as `mallee-guest build` wrote them. The word of its command line says what is to be counted.
    pub fn linux(files: &Path, word: &str, work: &'a Path) -> Self {
        Guest {
            kernel: files.join("vmlinux"),
            initrd: Some(files.join("initrd")),
            command_line: format!("console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check {word}"),
            work,
        }
    }

    /// Ours, with the devices that `add` adds.
    #[allow(clippy::needless_update, reason = "what a VMM offers grows; this states what it wants of it")]
    pub fn ours(&self, program: &Path, name: &str, add: impl FnOnce(&mut VmConfig)) -> Result<Monitor, BenchError> {
        let mut config = VmConfig {
            machine_config: MachineConfig { mem_size_mib: MEMORY_MIB, ..MachineConfig::default() },
            boot_source: Some(BootSource {
                kernel_image_path: self.kernel.clone(),
                initrd_path: self.initrd.clone(),
                boot_args: Some(self.command_line.clone()),
                ..BootSource::default()
            }),
            ..VmConfig::default()
        };
        add(&mut config);
        let path = self.write(name, &config)?;
        Ok(monitor(program, name, words(&["--config-file", &path])))
    }

    /// Firecracker, with the members of its configuration that `devices` has: `drives`, `network-interfaces`.
    pub fn firecracker(&self, program: &Path, name: &str, devices: Value) -> Result<Monitor, BenchError> {
        let mut config = json!({
            "boot-source": {
                "kernel_image_path": self.kernel,
                "initrd_path": self.initrd,
                "boot_args": self.command_line,
            },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
            "drives": [],
        });
        if let (Value::Object(config), Value::Object(devices)) = (&mut config, devices) {
            config.extend(devices);
        }
        let path = self.write(name, &config)?;
        Ok(monitor(program, name, words(&["--no-api", "--config-file", &path])))
    }

    /// Cloud Hypervisor, with the devices that `more` words describe.
    pub fn cloud_hypervisor(&self, program: &Path, name: &str, more: &[&str]) -> Monitor {
        let kernel = self.kernel.display().to_string();
        let initrd = self.initrd.as_ref().map(|path| path.display().to_string());
        let memory = format!("size={MEMORY_MIB}M");
        let initrd = initrd.as_ref().map(|path| ["--initramfs", path]);
        let machine = [
            ["--kernel", &kernel],
            ["--cmdline", &self.command_line],
            ["--cpus", "boot=1"],
            ["--memory", &memory],
            ["--serial", "tty"],
            ["--console", "off"],
        ];
        monitor(program, name, words(&[machine.as_flattened(), initrd.as_slice().as_flattened(), more].concat()))
    }

    /// QEMU's microvm, with the devices that `more` words describe.
    pub fn qemu(&self, program: &Path, name: &str, more: &[&str]) -> Monitor {
        let mut arguments = monitors::microvm(&self.kernel);
        arguments.extend(words(&["-append", &self.command_line]));
        if let Some(initrd) = &self.initrd {
            arguments.extend(words(&["-initrd", &initrd.display().to_string()]));
        }
        arguments.extend(words(more));
        monitor(program, name, arguments)
    }

    /// Writes a monitor's configuration; its path.
    fn write(&self, name: &str, config: &impl serde::Serialize) -> Result<String, BenchError> {
        let path = self.work.join(format!("{}.json", name.replace(' ', "-")));
        serde_json::to_vec(config)
            .map_err(std::io::Error::other)
            .and_then(|text| fs::write(&path, text))
            .map_err(|source| BenchError::File { action: "writing", path: path.clone(), source })?;
        Ok(path.display().to_string())
    }
}

fn monitor(program: &Path, name: &str, arguments: Vec<String>) -> Monitor {
    Monitor { name: name.to_owned(), version: version(program), program: program.to_owned(), arguments }
}

impl Monitor {
    /// One boot; what is measured while it runs.
    pub fn during<T>(&self, measure: impl FnOnce() -> std::io::Result<T>) -> Result<T, BenchError> {
        let failed = |source| BenchError::Start { monitor: self.name.clone(), source };
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let _child = Ending(command.spawn().map_err(failed)?);
        measure().map_err(|source| BenchError::Silent { monitor: self.name.clone(), said: source.to_string() })
    }

    /// One boot; what `counted` finds in a line of the guest's, and how long after the monitor's start that line came.
    pub fn run<T>(&self, counted: impl Fn(&str) -> Option<T>) -> Result<(T, Duration), BenchError> {
        let failed = |source| BenchError::Start { monitor: self.name.clone(), source };
        let mut errors = tempfile::tempfile().map_err(failed)?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(errors.try_clone().map_err(failed)?);
        let begun = Instant::now();
        let mut child = Ending(command.spawn().map_err(failed)?);
        let lines = child.0.stdout.take().map(lines_of);
        let mut said = String::new();
        while let Some((arrived, line)) = lines.as_ref().and_then(|lines| next(lines, begun)) {
            if let Some(found) = counted(&line) {
                return Ok((found, arrived - begun));
            }
            said.push_str(&line);
            said.push('\n');
        }
        drop(child);
        let _ = errors.rewind().and_then(|()| errors.read_to_string(&mut said));
        Err(BenchError::Silent { monitor: self.name.clone(), said: said.trim().to_owned() })
    }
}

/// The lines and when each came, read by a thread so that a monitor that says nothing can be given up.
fn lines_of(output: ChildStdout) -> mpsc::Receiver<(Instant, String)> {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            if tell.send((Instant::now(), String::from_utf8_lossy(&line).trim_end().to_owned())).is_err() {
                return;
            }
            line.clear();
        }
    });
    told
}

/// The next line, if one comes within the bound.
fn next(lines: &mpsc::Receiver<(Instant, String)>, begun: Instant) -> Option<(Instant, String)> {
    lines.recv_timeout(BOUND.saturating_sub(begun.elapsed())).ok()
}

/// A child that does not outlive its measurement.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
