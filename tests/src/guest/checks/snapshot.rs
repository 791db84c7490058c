//! A running Linux is saved, goes on, and goes on a second time from the snapshot: with its processes, the right time, a new generation id, and its vsock
//! connections reset.
//!
//! The guest's half runs on in both: the saved guest hears from the host on its line, the clone finds the line gone and opens another.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mallee_vmm::api::client::Client;
use mallee_vmm::api::{
    Drive, DriveOverride, NetworkInterface, NetworkOverride, SnapshotCreate, SnapshotLoad, SnapshotType, VmConfig,
    VmState, VmStateUpdate, VsockOverride,
};

use crate::guest::host::Host;
use crate::guest::link::{self, Link};
use crate::guest::{Check, Outcome, expect, while_doing};

pub const CHECK: Check = Check { name: "snapshot", configure: |_, _| {}, guest: |_, link| guest(link), host };

/// Where the clone's host half listens.
const CLONE_PORT: u32 = 61;
/// How long the snapshot lies: what a clock that stood still would be behind.
const LIES: Duration = Duration::from_secs(3);
/// How much further behind the clone's clock may be than the saved guest's was.
const CLOCK_TOLERANCE_MS: u128 = 250;
/// The generation id's device. Debian's cloud kernel has no driver for it; that of the generic event device, through which it tells that it is new, it has.
const GENERATION_DEVICE: &str = "/sys/bus/acpi/devices/VMGENCTR:00";

fn guest(link: &mut Link) -> Outcome {
    expect("the generation's device", Path::new(GENERATION_DEVICE).exists(), true)?;
    let notified = notifications()?;
    let beside = std::thread::spawn(|| {
        // Something that runs while it is saved.
        (0u64..).find(|number| number.count_ones() == 40 || STOP.load(std::sync::atomic::Ordering::Relaxed))
    });
    link.say(&format!("ready {}", now_ms()))?;
    let heard = link.hear();
    STOP.store(true, std::sync::atomic::Ordering::Relaxed);
    beside.join().map_err(|_| "the process beside panicked")?;
    match heard.as_deref() {
        Ok("saved") => {
            expect("notifications of a new generation in the saved guest", notifications()?, notified)?;
            Ok("went on after it was saved".into())
        }
        Ok(other) => Err(format!("the other half says {other:?}")),
        Err(_) => clone(notified),
    }
}

static STOP: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// In the clone, whose line to the host is not there any more.
fn clone(notified: u64) -> ! {
    let told = || -> Result<(), String> {
        let stream = link::stream(CLONE_PORT).map_err(while_doing("a new line to the host"))?;
        let reader = stream.try_clone().map_err(while_doing("a new line to the host"))?;
        let mut link = Link::new(reader, stream);
        link.say(&format!("{} {}", now_ms(), notifications()? - notified))?;
        link.wait_for("bye")
    };
    if let Err(why) = told() {
        println!("{} FAIL clone {why}", crate::guest::init::MARK);
    }
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    loop {
        std::thread::park();
    }
}

/// Interrupts of the generic event device so far: the generation's, as nobody presses the power button.
fn notifications() -> Result<u64, String> {
    let text = fs::read_to_string("/proc/interrupts").map_err(while_doing("/proc/interrupts"))?;
    let lines = text.lines().filter(|line| line.contains("ACPI:Ged"));
    Ok(lines.flat_map(|line| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok())).sum())
}

fn now_ms() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

fn host(host: &Host, link: &mut Link) -> Outcome {
    let said = link.hear()?;
    let clock_ms: u128 =
        said.strip_prefix("ready ").and_then(|clock| clock.parse().ok()).ok_or("the guest is not ready")?;
    // A guest's clock does not run as its host's does to the second; what counts is that it is no further behind in the clone.
    let behind_ms = now_ms().saturating_sub(clock_ms);
    let folder = host.folder.join("clone");
    fs::create_dir(&folder).map_err(while_doing("the clone's folder"))?;
    let (state, memory) = (folder.join("state"), folder.join("memory"));
    let set = |client: &Client, state| client.patch("/vm", &VmStateUpdate { state });
    set(&host.client, VmState::Paused).map_err(while_doing("pausing"))?;
    let request = SnapshotCreate {
        snapshot_type: SnapshotType::Full,
        snapshot_path: state.clone(),
        mem_file_path: memory.clone(),
    };
    // Several hundred MiB to a disk that others use, too.
    let patient = Client::new(host.client.socket()).with_timeout(Duration::from_secs(120));
    patient.put("/snapshot/create", &request).map_err(while_doing("saving"))?;
    let config: VmConfig = host.client.get("/vm/config").map_err(while_doing("the configuration"))?;
    let drive_overrides = copy_drives(&config, &folder)?;
    let network_overrides = other_taps(&config);
    set(&host.client, VmState::Resumed).map_err(while_doing("resuming"))?;
    link.say("saved")?;
    std::thread::sleep(LIES);

    let listener = UnixListener::bind(folder.join(format!("vsock_{CLONE_PORT}"))).map_err(while_doing("listening"))?;
    let clone = Clone::start(&host.monitor, &folder)?;
    let client = Client::new(folder.join("api")).with_timeout(Duration::from_secs(60));
    host.wait("the clone's monitor", || Ok(client.instance().ok()))?;
    let load = SnapshotLoad {
        snapshot_path: state,
        mem_file_path: Some(memory),
        resume_vm: true,
        vsock_override: Some(VsockOverride { uds_path: folder.join("vsock") }),
        console_path: config.console.map(|_| folder.join("console")),
        serial_out_path: Some(folder.join("serial")),
        drive_overrides,
        network_overrides,
        ..SnapshotLoad::default()
    };
    let begun_ms = now_ms();
    client.put("/snapshot/load", &load).map_err(while_doing("loading"))?;
    let said = match converse(host, &listener) {
        Ok(said) => said,
        Err(why) => return Err(format!("{why}; the clone's console:\n{}", clone.console(&folder))),
    };
    let (clock_ms, notified) = said.split_once(' ').ok_or("the clone says nothing of use")?;
    let clock_ms: u128 = clock_ms.parse().map_err(while_doing("the clone's clock"))?;
    if clock_ms + behind_ms + CLOCK_TOLERANCE_MS < begun_ms {
        return Err(format!(
            "the clone's clock is {} ms behind, the saved guest's was {behind_ms}",
            begun_ms - clock_ms
        ));
    }
    expect("notifications of a new generation", notified, "1")?;
    Ok("a clone found its line reset, its clock right and its generation new".into())
}

/// Copies of the drives of a paused VM: no two write to one file.
fn copy_drives(config: &VmConfig, folder: &Path) -> Result<Vec<DriveOverride>, String> {
    let copy = |drive: &Drive| {
        let path_on_host = folder.join(&drive.drive_id);
        fs::copy(&drive.path_on_host, &path_on_host).map_err(while_doing("copying a drive"))?;
        Ok(DriveOverride { drive_id: drive.drive_id.clone(), path_on_host })
    };
    config.drives.iter().map(copy).collect()
}

/// A tap of its own for each interface, which the clone's monitor makes.
fn other_taps(config: &VmConfig) -> Vec<NetworkOverride> {
    let other = |(number, interface): (usize, &NetworkInterface)| NetworkOverride {
        iface_id: interface.iface_id.clone(),
        host_dev_name: format!("malleeclone{number}"),
        guest_mac: None,
    };
    config.network_interfaces.iter().enumerate().map(other).collect()
}

/// What the clone says on its new line.
fn converse(host: &Host, listener: &UnixListener) -> Outcome {
    listener.set_nonblocking(true).map_err(while_doing("the clone's line"))?;
    let stream = host.wait("the clone's line", || Ok(listener.accept().ok().map(|(stream, _)| stream)))?;
    stream.set_nonblocking(false).map_err(while_doing("the clone's line"))?;
    let reader = stream.try_clone().map_err(while_doing("the clone's line"))?;
    let mut link = Link::new(reader, stream);
    let said = link.hear()?;
    link.say("bye")?;
    Ok(said)
}

/// A second monitor, which does not outlive its check.
struct Clone(Child);

impl Clone {
    fn start(program: &Path, folder: &Path) -> Result<Self, String> {
        let mut command = Command::new(program);
        command.arg("--api-sock").arg(folder.join("api")).stdin(Stdio::null());
        command.spawn().map(Clone).map_err(while_doing("starting the clone's monitor"))
    }

    fn console(&self, folder: &Path) -> String {
        fs::read_to_string(folder.join("serial")).unwrap_or_default()
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
