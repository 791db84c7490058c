//! Restoring a snapshot: how long until the guest's first instruction, how many a second, and what a clone costs.
//!
//! The guest (`guest::waiting_elf`) was saved while it looked at its VM's generation id. A clone's id is another, which the guest sees with its first instructions
//! and says so with a byte on the serial port, and then halts: a hundred of them keep no processor busy.

use std::{
    fs,
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use mallee_vmm::api::{
    BootSource, MachineConfig, NetworkInterface, SnapshotCreate, SnapshotLoad, SnapshotType, VmConfig, VmState,
    VmStateUpdate, client::Client,
};
use nix::sched::{CloneFlags, unshare};

use super::{
    error::BenchError,
    guest,
    memory::{self, Resident},
    monitors::{MEMORY_MIB, OURS},
    serial,
};

/// A monitor whose socket is not there after this long will not have one.
const SOCKET_BOUND: Duration = Duration::from_secs(10);

/// A guest on disk, and how it is brought back.
pub struct Saved {
    program: PathBuf,
    /// The file for `--restore-file`.
    request: PathBuf,
    has_network: bool,
}

impl Saved {
    /// Starts the guest, saves it and ends it. `folder` takes the files.
    #[allow(clippy::needless_update, reason = "what a VMM offers grows; this states what it wants of it")]
    pub fn new(program: &Path, folder: &Path, has_network: bool) -> Result<Saved, BenchError> {
        let at = |name: &str| folder.join(format!("{}-{name}", if has_network { "network" } else { "bare" }));
        let failed = |source: mallee_vmm::api::client::ClientError| BenchError::Silent {
            monitor: OURS.to_owned(),
            said: source.to_string(),
        };
        write(&at("kernel"), &guest::waiting_elf())?;
        let mut config = VmConfig {
            machine_config: MachineConfig { mem_size_mib: MEMORY_MIB, ..MachineConfig::default() },
            boot_source: Some(BootSource { kernel_image_path: at("kernel"), ..BootSource::default() }),
            ..VmConfig::default()
        };
        if has_network {
            config.network_interfaces.push(NetworkInterface {
                iface_id: "eth0".into(),
                host_dev_name: "tap0".into(),
                guest_mac: Some("06:00:00:00:00:01".into()),
                ..NetworkInterface::default()
            });
        }
        write_json(&at("vm.json"), &config)?;
        let mut saved = Saved { program: program.to_owned(), request: at("load.json"), has_network };
        let mut command = saved.bare_command();
        command.arg("--config-file").arg(at("vm.json")).arg("--api-sock").arg(at("api"));
        let _running = serial::start(OURS, &mut command)?;
        let client = Client::new(at("api"));
        // The guest may speak before the socket is there.
        let begun = Instant::now();
        while client.instance().is_err() && begun.elapsed() < SOCKET_BOUND {
            std::thread::sleep(Duration::from_millis(1));
        }
        let request = SnapshotCreate {
            snapshot_type: SnapshotType::Full,
            snapshot_path: at("state"),
            mem_file_path: at("memory"),
        };
        client
            .patch("/vm", &VmStateUpdate { state: VmState::Paused })
            .and_then(|()| client.put("/snapshot/create", &request))
            .map_err(failed)?;
        let load = SnapshotLoad {
            snapshot_path: request.snapshot_path,
            mem_file_path: Some(request.mem_file_path),
            resume_vm: true,
            ..SnapshotLoad::default()
        };
        write_json(&saved.request, &load)?;
        saved.has_network = has_network;
        Ok(saved)
    }

    /// The command that restores the guest; its serial port is its standard output.
    pub fn command(&self) -> Command {
        let mut command = self.bare_command();
        command.arg("--restore-file").arg(&self.request);
        command
    }

    fn bare_command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if self.has_network {
            // Where it may make its tap.
            // SAFETY: one system call, between fork and exec.
            unsafe { command.pre_exec(|| unshare(CloneFlags::CLONE_NEWNET).map_err(Into::into)) };
        }
        command
    }

    /// What a clone has of its own, when there is another one.
    pub fn resident(&self) -> Result<Resident, BenchError> {
        let _other = serial::start(OURS, &mut self.command())?;
        let clone = serial::start(OURS, &mut self.command())?;
        // Threads that come up beside the guest have come up by then.
        std::thread::sleep(Duration::from_millis(50));
        memory::resident(clone.child.id(), MEMORY_MIB)
            .map_err(|reason| BenchError::Memory { monitor: OURS.to_owned(), reason })
    }

    /// Starts `count` clones at once; how many a second have said that they run.
    pub fn rate(&self, count: usize) -> Result<f64, BenchError> {
        let begun = Instant::now();
        let mut clones: Vec<Clone> = (0..count).map(|_| Clone::start(&mut self.command())).collect::<Result<_, _>>()?;
        for output in clones.iter_mut().filter_map(|clone| clone.0.stdout.as_mut()) {
            output
                .read_exact(&mut [0])
                .map_err(|error| BenchError::Silent { monitor: OURS.to_owned(), said: error.to_string() })?;
        }
        Ok(count as f64 / begun.elapsed().as_secs_f64())
    }
}

/// A clone that is ended when this is dropped.
struct Clone(Child);

impl Clone {
    fn start(command: &mut Command) -> Result<Clone, BenchError> {
        // Nobody reads what so many say.
        command.stderr(Stdio::null());
        command.spawn().map(Clone).map_err(|source| BenchError::Start { monitor: OURS.to_owned(), source })
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), BenchError> {
    let text = serde_json::to_vec(value).unwrap_or_default();
    write(path, &text)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BenchError> {
    fs::write(path, bytes).map_err(|source| BenchError::File { action: "writing", path: path.to_owned(), source })
}
