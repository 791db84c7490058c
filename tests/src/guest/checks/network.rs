//! Network interfaces with a pair of queues for each processor: as many as Linux's driver sets up, and all of them at work; one whose frames the monitor's
//! threads move, and one whose frames the host's kernel moves (vhost-net).
//!
//! Each processor of the guest opens streams of its own: the driver sends by the queue of the processor that it runs on, and what the host sends back
//! comes by the pair that the stream was last sent by. (That is the opener's at first, and may be any later, as acknowledgements leave where data comes
//! in.) The monitor's counters tell what went by which queue; of what the kernel moves only the tap tells, of all queues together. Half of the streams come after the VM was
//! paused, so that the queues have gone on from where they stood.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use mallee_vmm::api::{Action, Metrics, NetworkInterface, VmConfig, VmState, VmStateUpdate};
use serde_json::Value;

use super::cpus::work_on;
use crate::guest::host::Host;
use crate::guest::interface;
use crate::guest::link::Link;
use crate::guest::{Check, Machine, Outcome, expect, while_doing};

pub const CHECK: Check = Check {
    name: "network",
    configure: |config, folder| THREADS.configure(config, folder),
    guest: |machine, link| THREADS.guest(machine, link),
    host: |host, link| THREADS.host(host, link),
};

pub const VHOST_CHECK: Check = Check {
    name: "vhost",
    configure: |config, folder| VHOST.configure(config, folder),
    guest: |machine, link| VHOST.guest(machine, link),
    host: |host, link| VHOST.host(host, link),
};

/// One interface.
struct Subject {
    id: &'static str,
    /// The tap, which the monitor makes and which goes with it.
    tap: &'static str,
    mac: &'static str,
    host: Ipv4Addr,
    guest: Ipv4Addr,
    vhost: bool,
}

const THREADS: Subject = Subject {
    id: "threads",
    tap: "malleeguest0",
    mac: "06:00:c6:12:fa:02",
    host: Ipv4Addr::new(198, 18, 250, 1),
    guest: Ipv4Addr::new(198, 18, 250, 2),
    vhost: false,
};

const VHOST: Subject = Subject {
    id: "kernel",
    tap: "malleeguest1",
    mac: "06:00:c6:12:fb:02",
    host: Ipv4Addr::new(198, 18, 251, 1),
    guest: Ipv4Addr::new(198, 18, 251, 2),
    vhost: true,
};

const PORT: u16 = 7;
/// More pairs say no more.
const MAX_PAIRS: u8 = 4;
/// Streams of each processor before the pause and as many after it, and what goes there and back in each (bytes).
const STREAMS: usize = 4;
const LENGTH: usize = 64 << 10;

fn pairs(cpus: u8) -> u8 {
    cpus.min(MAX_PAIRS)
}

impl Subject {
    fn configure(&self, config: &mut VmConfig, folder: &Path) {
        config.metrics = Some(Metrics { metrics_path: folder.join("metrics") });
        config.network_interfaces.push(NetworkInterface {
            iface_id: self.id.into(),
            host_dev_name: self.tap.into(),
            guest_mac: Some(self.mac.into()),
            queue_pairs: Some(pairs(config.machine_config.vcpu_count).into()),
            vhost_net: self.vhost,
            ..NetworkInterface::default()
        });
    }

    fn guest(&self, machine: &Machine, link: &mut Link) -> Outcome {
        let name = interface::find(self.mac)?;
        let wanted = usize::from(pairs(machine.cpus));
        for direction in ["rx-", "tx-"] {
            let queues = fs::read_dir(format!("{}/{name}/queues", interface::FOLDER));
            let queues = queues.map_err(while_doing("the queues"))?.flatten();
            let count = queues.filter(|it| it.file_name().to_string_lossy().starts_with(direction)).count();
            expect(&format!("the number of queues {direction}*"), count, wanted)?;
        }
        interface::configure(&name, self.guest).map_err(while_doing("the interface's address"))?;
        for said in ["listening", "paused and resumed"] {
            link.say("ready")?;
            link.wait_for(said)?;
            for cpu in 0..usize::from(machine.cpus) {
                work_on(cpu)?;
                (0..STREAMS).try_for_each(|_| there_and_back(self.host))?;
            }
        }
        work_on(0)?;
        link.say("done")?;
        link.wait_for("counted")?;
        Ok(String::new())
    }

    fn host(&self, host: &Host, link: &mut Link) -> Outcome {
        link.wait_for("ready")?;
        ip(&["address", "add", &format!("{}/24", self.host), "dev", self.tap])?;
        ip(&["link", "set", "dev", self.tap, "up"])?;
        let listener = TcpListener::bind((self.host, PORT)).map_err(while_doing("listening"))?;
        std::thread::spawn(move || listener.incoming().flatten().try_for_each(echo));
        link.say("listening")?;
        link.wait_for("ready")?;
        for state in [VmState::Paused, VmState::Resumed] {
            host.client.patch("/vm", &VmStateUpdate { state }).map_err(while_doing("pausing and resuming"))?;
        }
        link.say("paused and resumed")?;
        link.wait_for("done")?;
        let config: VmConfig = host.client.get("/vm/config").map_err(while_doing("the configuration"))?;
        let pairs = config.network_interfaces.iter().find(|it| it.iface_id == self.id).and_then(|it| it.queue_pairs);
        let pairs = usize::from(pairs.ok_or("the interface has lost its queues")?);
        let counted = metrics(host)?.remove(self.id).unwrap_or_default();
        for pair in 0..pairs {
            let [receives, transmits] = [2 * pair, 2 * pair + 1].map(|queue| &counted[format!("queue_{queue}")]);
            for (what, count) in [("written to", &receives["bytes_written"]), ("read from", &transmits["bytes_read"])] {
                if count.as_u64().is_none_or(|bytes| (bytes == 0) != self.vhost) {
                    return Err(format!("bytes {what} the guest by pair {pair}: {count}; all: {counted}"));
                }
            }
        }
        // As much as the streams' content went either way, whoever moved it.
        let streams = 2 * STREAMS * usize::from(config.machine_config.vcpu_count);
        for direction in ["rx", "tx"] {
            let bytes = counted[format!("{direction}_bytes_count")].as_u64().unwrap_or(0);
            if bytes < (streams * LENGTH) as u64
                || counted[format!("{direction}_count")].as_u64() < Some(streams as u64)
            {
                return Err(format!("{direction} of {streams} streams of {LENGTH} bytes; all: {counted}"));
            }
        }
        if self.vhost {
            expect("the number of the kernel's threads", kernel_threads(host.pid), pairs)?;
        }
        link.say("counted")?;
        Ok(format!("TCP both ways by each of {pairs} pairs of queues"))
    }
}

/// Threads of vhost that work for the process: they are named after it.
fn kernel_threads(pid: u32) -> usize {
    let is_meant = |name: &str| name.trim() == format!("vhost-{pid}");
    let comm = |folder: fs::DirEntry| fs::read_to_string(folder.path().join("comm")).unwrap_or_default();
    // Threads of the kernel up to Linux 6.3, of the process from then on.
    ["/proc".to_owned(), format!("/proc/{pid}/task")]
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten().map(comm))
        .filter(|name| is_meant(name))
        .count()
}

fn there_and_back(host: Ipv4Addr) -> Result<(), String> {
    let failed = while_doing("a stream to the host");
    let sent: Vec<u8> = (0..LENGTH).map(|at| (at / 251) as u8).collect();
    let mut stream = TcpStream::connect((host, PORT)).map_err(while_doing("connecting to the host"))?;
    let mut received = Vec::new();
    stream
        .write_all(&sent)
        .and_then(|()| stream.shutdown(std::net::Shutdown::Write))
        .and_then(|()| stream.read_to_end(&mut received))
        .map_err(failed)?;
    expect("what came back", received == sent, true)
}

/// Sends back what comes until it ends.
fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    stream.write_all(&all)
}

fn ip(words: &[&str]) -> Result<(), String> {
    let done = Command::new("ip").args(words).output().map_err(while_doing("ip"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.success() { Ok(()) } else { Err(format!("ip {}: {said}", words.join(" "))) }
}

/// The interfaces' counters since the start. A line of metrics has what was counted since the line before.
fn metrics(host: &Host) -> Result<BTreeMap<String, Value>, String> {
    host.client.act(Action::FlushMetrics).map_err(while_doing("FlushMetrics"))?;
    let text = fs::read_to_string(host.folder.join("metrics")).map_err(while_doing("the metrics"))?;
    let lines = text.lines().map(serde_json::from_str::<BTreeMap<String, Value>>);
    let lines = lines.collect::<Result<Vec<_>, _>>().map_err(while_doing("a line of metrics"))?;
    let mut all = BTreeMap::new();
    for (name, counters) in lines.into_iter().flatten() {
        if let Some(id) = name.strip_prefix("net_") {
            add(all.entry(id.to_owned()).or_insert(Value::Null), &counters);
        }
    }
    Ok(all)
}

/// Number by number.
fn add(sum: &mut Value, one: &Value) {
    match one {
        Value::Object(members) => members.iter().for_each(|(name, value)| add(&mut sum[name], value)),
        number => *sum = (sum.as_u64().unwrap_or(0) + number.as_u64().unwrap_or(0)).into(),
    }
}
