//! What the tests with the probe guest share: the guest itself, a VM with every device that there is, and its end.
//!
//! The VM runs in a network namespace of its own, where it may make its tap.

#![allow(dead_code)] // each test program uses another part

pub mod counter;
pub mod debugger;
pub mod gdb;
pub mod machine;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use mallee_vmm::api::{Event, EventKind};

/// The program that is tested: the one that the environment names, which is how the monitor that is used gets here (`tests/check`), or the one that
/// was built with the tests.
pub fn program() -> PathBuf {
    std::env::var_os("MALLEE_VMM").map_or_else(|| env!("CARGO_BIN_EXE_mallee-vmm").into(), PathBuf::from)
}

/// The whole answer to `GET /metrics`, which is no JSON.
pub fn metrics(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The probe guest (`images/probe`), built by the cargo that runs the tests.
pub fn probe() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/probe");
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("probe");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo.current_dir(source).args(["build", "--quiet", "--release", "--locked", "--bin", "mallee-probe"]);
        cargo.arg("--target-dir").arg(&target);
        for name in ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_BUILD_RUSTFLAGS"] {
            cargo.env_remove(name);
        }
        assert!(cargo.status().unwrap().success(), "the probe guest does not build");
        target.join("release/mallee-probe")
    })
}

/// A folder with the files of a VM that has every device.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        for disk in ["root", "data", "many", "base", "other"] {
            std::fs::File::create(place.path(disk)).unwrap().set_len(1 << 20).unwrap();
        }
        for overlay in ["overlay", "another-overlay"] {
            make_overlay(&place.path(overlay), 1 << 20);
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The configuration. Every kind of device belongs here, so that what is tested with all of them is tested with the next
    /// one.
    pub fn config(&self, boot_args: &str) -> serde_json::Value {
        serde_json::json!({
            "boot-source": { "kernel_image_path": probe(), "boot_args": boot_args },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "track_dirty_pages": true },
            "drives": [
                {
                    "drive_id": "root", "path_on_host": self.path("root"), "is_root_device": true,
                    // Little enough that the trial has to wait for it.
                    "rate_limiter": { "ops": { "size": 2, "refill_time": 60 } },
                },
                { "drive_id": "data", "path_on_host": self.path("data"), "is_root_device": false },
                {
                    "drive_id": "many", "path_on_host": self.path("many"), "is_root_device": false,
                    "io_engine": "Async",
                },
                {
                    "drive_id": "overlay", "path_on_host": self.path("overlay"), "is_root_device": false,
                    "format": "qcow2", "backing": [{ "path_on_host": self.path("base"), "format": "raw" }],
                },
            ],
            "network-interfaces": [{
                "iface_id": "eth0", "host_dev_name": "tap0", "queue_pairs": 2,
                "tx_rate_limiter": { "ops": { "size": 2, "refill_time": 4 } },
                "rx_rate_limiter": { "bandwidth": { "size": 100000, "refill_time": 30 } },
            }],
            "entropy": {},
            "vsock": { "guest_cid": 3, "uds_path": self.path("vsock") },
            "balloon": { "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_reporting": true },
            // Small enough that the trial's line fills it.
            "console": { "kind": "file", "path": self.path("hvc0"), "size_limit": 16 },
            // Small enough that the trial's few lines fill it.
            "serial": { "serial_out_path": self.path("console"), "size_limit": 64 },
        })
    }

    /// The configuration of a guest with nothing to do, whose lines all stay in the console's file, so that whoever looks late sees
    /// them too.
    pub fn idle_config(&self) -> serde_json::Value {
        let mut config = self.config("probe.ip=10.0.0.2/24 probe.metadata=off");
        config["serial"]["size_limit"] = serde_json::json!(1 << 20);
        config
    }

    /// Whether the guest of [`Self::idle_config`] has come up.
    pub fn is_idle(&self) -> bool {
        self.console().contains("probe: address 10.0.0.2/24")
    }

    /// The program with a configuration file.
    pub fn command(&self, boot_args: &str) -> Command {
        self.command_of(&self.config(boot_args))
    }

    /// The same, with a configuration of the caller's.
    pub fn command_of(&self, config: &serde_json::Value) -> Command {
        std::fs::write(self.path("config"), config.to_string()).unwrap();
        let mut command = self.bare_command();
        command.arg("--config-file").arg(self.path("config"));
        command
    }

    /// The program in a network namespace of its own.
    pub fn bare_command(&self) -> Command {
        let mut command = Command::new(program());
        command.arg("--events-path").arg(self.path("events")).stdin(Stdio::null()).stderr(Stdio::null());
        // SAFETY: one system call, between fork and exec.
        unsafe { command.pre_exec(|| check(libc::unshare(libc::CLONE_NEWNET))) };
        command
    }

    pub fn last_event(&self) -> Option<EventKind> {
        let text = std::fs::read_to_string(self.path("events")).ok()?;
        Some(serde_json::from_str::<Event>(text.lines().last()?).unwrap().kind)
    }

    /// What the guest wrote, as far as the console's two files hold it.
    pub fn console(&self) -> String {
        let read = |name| std::fs::read_to_string(self.path(name)).unwrap_or_default();
        read("console.1") + &read("console")
    }
}

/// An empty qcow2 image on another one.
fn make_overlay(path: &Path, size: u64) {
    let file = File::create_open(StorageCreateOptions::new().filename(path)).unwrap();
    let image = Qcow2::<File>::create_builder(file).size(size).backing("base".into(), "raw".into());
    image.create().unwrap();
}

pub const MEMORY_MIB: u64 = 32;

/// -1 is the last error.
pub fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
