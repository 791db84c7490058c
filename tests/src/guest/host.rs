//! The host's side: a monitor for one boot, the host's halves of the checks, and what both sides said.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mallee_vmm::api::client::Client;
use mallee_vmm::api::{BootProtocol, BootSource, Event, EventKind, ExitReason, MachineConfig, Serial, VmConfig, Vsock};

use super::init::MARK;
use super::link::{FIRST_PORT, Link};
use super::{Check, Machine, Outcome, checks, while_doing};

/// Not an expectation: how long something may take on a slow and busy machine before it is said that it will not happen.
const BOUND: Duration = Duration::from_secs(120);

/// What one boot needs.
pub struct Boot {
    pub monitor: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub machine: Machine,
    pub memory_mib: u64,
    /// More words for the kernel.
    pub boot_args: String,
    /// Whether the monitor goes into a jail; its user is root without any right, whose files all are.
    pub is_jailed: bool,
}

/// The running monitor, as a check's host half sees it.
pub struct Host {
    pub client: Client,
    /// The monitor's program.
    pub monitor: PathBuf,
    /// Of the monitor, in the jail if there is one.
    pub pid: u32,
    /// Where the monitor's sockets and files are.
    pub folder: PathBuf,
}

impl Host {
    /// Waits until `seen` gives something; fails with `what` when it will not happen any more.
    pub fn wait<T>(&self, what: &str, mut seen: impl FnMut() -> Result<Option<T>, String>) -> Result<T, String> {
        let end = Instant::now() + BOUND;
        loop {
            if let Some(value) = seen()? {
                return Ok(value);
            }
            if Instant::now() > end {
                return Err(format!("waited in vain for {what}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The device's counters, from the monitor's Prometheus text: `vsock_conns_added` and the like.
    pub fn vsock_path(&self) -> PathBuf {
        self.folder.join("vsock")
    }

    /// Resident memory of the monitor, the guest's included, in bytes.
    pub fn resident(&self) -> Result<u64, String> {
        let path = format!("/proc/{}/statm", self.pid);
        let text = fs::read_to_string(&path).map_err(while_doing(&path))?;
        let pages: u64 = text.split(' ').nth(1).and_then(|word| word.parse().ok()).ok_or("statm cannot be read")?;
        Ok(pages * 4096)
    }
}

/// Runs one boot; what each check came to, in order.
pub fn run(boot: &Boot) -> Result<Vec<(String, Outcome)>, String> {
    let folder = tempfile::tempdir().map_err(while_doing("a temporary folder"))?;
    let chosen: Vec<&'static Check> = boot
        .machine
        .checks
        .iter()
        .map(|name| checks::find(name).ok_or_else(|| format!("there is no check {name}")))
        .collect::<Result<_, _>>()?;
    let config = configuration(boot, &chosen, folder.path())?;
    let listeners = (0..chosen.len())
        .map(|place| UnixListener::bind(folder.path().join(format!("vsock_{}", FIRST_PORT + place as u32))))
        .collect::<Result<Vec<_>, _>>()
        .map_err(while_doing("the checks' lines"))?;
    let mut monitor = Monitor::start(boot, folder.path(), &config)?;
    let host = monitor.host(boot, folder.path())?;
    let (halves, output) = std::thread::scope(|scope| {
        let halves: Vec<_> = chosen
            .iter()
            .zip(&listeners)
            .map(|(check, listener)| scope.spawn(|| host_half(check, listener, &host)))
            .collect();
        let output = monitor.wait_for_end(folder.path());
        // Halves whose guest never came are let go.
        for place in 0..chosen.len() {
            let _ = UnixStream::connect(folder.path().join(format!("vsock_{}", FIRST_PORT + place as u32)));
        }
        let halves: Vec<Outcome> = halves
            .into_iter()
            .map(|half| half.join().unwrap_or_else(|_| Err("the host's half panicked".into())))
            .collect();
        (halves, output)
    });
    let guest = guest_outcomes(&output?);
    let missing = || Err("the guest did not come as far as this".to_owned());
    Ok(chosen
        .iter()
        .zip(halves)
        .map(|(check, host)| {
            let guest = guest.get(check.name).cloned().unwrap_or_else(missing);
            (check.name.to_owned(), join(guest, host))
        })
        .collect())
}

fn join(guest: Outcome, host: Outcome) -> Outcome {
    match (guest, host) {
        (Ok(guest), Ok(host)) => Ok([guest, host].join("; ").trim_matches([';', ' ']).to_owned()),
        (Err(why), Ok(_)) => Err(format!("guest: {why}")),
        (Ok(_), Err(why)) => Err(format!("host: {why}")),
        (Err(guest), Err(host)) => Err(format!("guest: {guest}; host: {host}")),
    }
}

fn host_half(check: &Check, listener: &UnixListener, host: &Host) -> Outcome {
    let (stream, _) = listener.accept().map_err(while_doing("the line to the guest"))?;
    let reader = stream.try_clone().map_err(while_doing("the line to the guest"))?;
    (check.host)(host, &mut Link::new(reader, stream))
}

/// The machine without any check's device, then each check's.
fn configuration(boot: &Boot, chosen: &[&Check], folder: &Path) -> Result<VmConfig, String> {
    let protocol = match boot.machine.protocol.as_str() {
        "linux" => BootProtocol::Linux,
        "pvh" => BootProtocol::Pvh,
        other => return Err(format!("protocol {other} is neither linux nor pvh")),
    };
    let line = format!("console=ttyS0 panic=-1 {} {}", boot.boot_args, boot.machine.to_words());
    let mut config = VmConfig {
        machine_config: MachineConfig {
            vcpu_count: boot.machine.cpus,
            mem_size_mib: boot.memory_mib,
            ..MachineConfig::default()
        },
        boot_source: Some(BootSource {
            kernel_image_path: boot.kernel.clone(),
            initrd_path: Some(boot.initrd.clone()),
            boot_args: Some(line),
            protocol: Some(protocol),
        }),
        serial: Some(Serial { serial_out_path: folder.join("serial"), size_limit: None }),
        vsock: Some(Vsock { guest_cid: 3, uds_path: folder.join("vsock"), vsock_id: None }),
        ..VmConfig::default()
    };
    for check in chosen {
        (check.configure)(&mut config, folder);
    }
    Ok(config)
}

/// Lines of the guest's, by check.
fn guest_outcomes(serial: &str) -> BTreeMap<String, Outcome> {
    serial
        .lines()
        .filter_map(|line| line.split_once(MARK)?.1.trim().split_once(' '))
        .filter_map(|(verdict, rest)| {
            let (name, detail) = rest.split_once(' ').unwrap_or((rest, ""));
            match verdict {
                "PASS" => Some((name.to_owned(), Ok(detail.to_owned()))),
                "FAIL" => Some((name.to_owned(), Err(detail.to_owned()))),
                _ => None,
            }
        })
        .collect()
}

/// A monitor that does not outlive its boot.
struct Monitor(Child);

impl Monitor {
    fn start(boot: &Boot, folder: &Path, config: &VmConfig) -> Result<Self, String> {
        let path = folder.join("config.json");
        let text = serde_json::to_vec_pretty(config).map_err(while_doing("the configuration"))?;
        fs::write(&path, text).map_err(while_doing("the configuration"))?;
        let mut command = Command::new(&boot.monitor);
        command.arg("--config-file").arg(&path).arg("--api-sock").arg(folder.join("api"));
        command.arg("--events-path").arg(folder.join("events")).stdin(Stdio::null());
        if boot.is_jailed {
            let root = folder.join("jail");
            fs::create_dir(&root).map_err(while_doing("the jail's folder"))?;
            command.arg("--jail").arg(root).args(["--jail-uid", "0", "--jail-gid", "0"]);
        }
        command.spawn().map(Monitor).map_err(while_doing("starting the monitor"))
    }

    fn host(&self, boot: &Boot, folder: &Path) -> Result<Host, String> {
        let mut host = Host {
            client: Client::new(folder.join("api")),
            monitor: boot.monitor.clone(),
            pid: self.0.id(),
            folder: folder.to_owned(),
        };
        if boot.is_jailed {
            host.pid = host.wait("the process in the jail", || Ok(inner(self.0.id())))?;
        }
        Ok(host)
    }

    /// Waits for the guest's power off; what it wrote to its serial port.
    fn wait_for_end(&mut self, folder: &Path) -> Result<String, String> {
        let read = || fs::read_to_string(folder.join("serial")).unwrap_or_default();
        let end = Instant::now() + 4 * BOUND;
        loop {
            match self.0.try_wait().map_err(while_doing("the monitor"))? {
                // A guest that is reset (by a triple fault, say) did not come to its end.
                Some(status) if status.success() => {
                    return match exit(folder)? {
                        EventKind::Exit { reason: ExitReason::PowerOff, .. } => Ok(read()),
                        other => Err(format!("the monitor's last event: {other:?}; the console:\n{}", tail(&read()))),
                    };
                }
                Some(status) => {
                    return Err(format!("the monitor ended with {status}; the console:\n{}", tail(&read())));
                }
                None if Instant::now() > end => {
                    return Err(format!("the guest does not end; its console:\n{}", tail(&read())));
                }
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The process in a jail: the only child of the one that was started.
pub fn inner(outer: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// The last that the monitor has written of what happened.
fn exit(folder: &Path) -> Result<EventKind, String> {
    let events = fs::read_to_string(folder.join("events")).map_err(while_doing("the monitor's events"))?;
    let last = events.lines().last().ok_or("the monitor has written no event")?;
    serde_json::from_str(last).map(|event: Event| event.kind).map_err(|error| format!("{last}: {error}"))
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_found_among_what_else_is_on_the_console() {
        let serial =
            "[    1.0] x\nguest-check: init\n[  1.1] yguest-check: PASS a seen 4\r\nguest-check: FAIL b why not\n";
        let outcomes = guest_outcomes(serial);
        assert_eq!(outcomes.len(), 2);
        assert_eq!(outcomes["a"], Ok("seen 4".to_owned()));
        assert_eq!(outcomes["b"], Err("why not".to_owned()));
    }
}
