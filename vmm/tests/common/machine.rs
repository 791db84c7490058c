//! A VM with the counting guest, its files, and the process that runs it.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mallee_vmm::api::client::{Client, ClientError};
use serde_json::{Value, json};

use super::counter;

pub const MEMORY_MIB: u64 = 16;

/// A folder with a counting guest.
pub struct Machine {
    folder: tempfile::TempDir,
    sockets: Cell<u32>,
}

impl Machine {
    pub fn new(mode: u8) -> Self {
        let machine = Machine { folder: tempfile::tempdir().unwrap(), sockets: Cell::new(0) };
        counter::write(&machine.path("kernel"), mode);
        machine
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn config(&self, vcpus: u8) -> Value {
        json!({
            "boot-source": { "kernel_image_path": self.path("kernel") },
            "machine-config": { "vcpu_count": vcpus, "mem_size_mib": MEMORY_MIB },
            "serial": { "serial_out_path": self.path("console") },
        })
    }

    /// A process with its socket, and nothing else yet.
    pub fn idle(&self) -> Process {
        self.spawn(|_| {})
    }

    /// A process that has begun with `config`.
    pub fn start(&self, config: Value) -> Process {
        std::fs::write(self.path("config"), config.to_string()).unwrap();
        self.spawn(|command| {
            command.arg("--config-file").arg(self.path("config"));
        })
    }

    pub fn spawn(&self, change: impl FnOnce(&mut Command)) -> Process {
        let number = self.sockets.replace(self.sockets.get() + 1);
        let socket = self.path(&format!("api{number}"));
        let mut command = Command::new(super::program());
        command.arg("--api-sock").arg(&socket).stdin(Stdio::null());
        command.arg("--events-path").arg(self.path(&format!("events{number}")));
        change(&mut command);
        Process::start(command, &socket)
    }

    pub fn console(&self) -> String {
        console(&self.path("console"))
    }

    /// What the guest has counted so far: `(own, other)` of each whole line.
    pub fn counts(&self) -> Vec<(u64, u64)> {
        counts(&self.console())
    }
}

pub fn console(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The counts of whole lines; a line that is not one fails the test.
pub fn counts(text: &str) -> Vec<(u64, u64)> {
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().map(|line| counter::parse(line).unwrap_or_else(|| panic!("{line:?} in\n{text}"))).collect()
}

/// A process of the program, which does not outlive its test.
pub struct Process {
    child: Child,
    pub client: Client,
}

impl Process {
    /// Starts `command`, and waits until it serves `socket`.
    pub fn start(mut command: Command, socket: &Path) -> Self {
        let process = Process { child: command.spawn().unwrap(), client: Client::new(socket) };
        wait_until("the socket", || process.client.instance().is_ok());
        process
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Runs a command in the process's own network namespace.
    pub fn inside(&self, line: &str) {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.id().to_string()]).args(line.split(' '));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
    }

    pub fn state(&self) -> String {
        self.client.instance().unwrap().state
    }

    pub fn set_state(&self, state: &str) -> Result<(), ClientError> {
        self.client.patch("/vm", &json!({ "state": state }))
    }

    pub fn pause(&self) {
        self.set_state("Paused").unwrap();
    }

    pub fn resume(&self) {
        self.set_state("Resumed").unwrap();
    }

    /// Ends it by SIGTERM; its exit status.
    pub fn terminate(mut self) -> Option<i32> {
        Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        self.child.wait().unwrap().code()
    }

    /// Waits for its end; its exit status.
    pub fn wait(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for what takes milliseconds; the bound is for a machine that has stood still meanwhile.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A child that does not outlive its test; its own child ends with it.
pub struct Guarded(pub Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
