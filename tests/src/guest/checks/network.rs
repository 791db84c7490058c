//! A network interface with a pair of queues for each processor: as many as Linux's driver sets up, and all of them at work.
//!
//! Each processor of the guest opens streams of its own: the driver sends by the queue of the processor that it runs on, and what the host sends back
//! comes by the pair that the stream was last sent by. (That is the opener's at first, and may be any later, as acknowledgements leave where data comes
//! in.) The monitor's counters tell what went by which queue.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use mallee_vmm::api::{Action, Metrics, NetworkInterface, VmConfig};
use serde_json::Value;

use super::cpus::work_on;
use crate::guest::host::Host;
use crate::guest::interface;
use crate::guest::link::Link;
use crate::guest::{Check, Machine, Outcome, expect, while_doing};

pub const CHECK: Check = Check { name: "network", configure, guest, host };

/// The tap, which the monitor makes and which goes with it.
const TAP: &str = "malleeguest0";
const ID: &str = "several";
const MAC: &str = "06:00:c6:12:fa:02";
const HOST: Ipv4Addr = Ipv4Addr::new(198, 18, 250, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(198, 18, 250, 2);
const PORT: u16 = 7;
/// More pairs say no more.
const MAX_PAIRS: u8 = 4;
/// Streams of each processor, and what goes there and back in each (bytes).
const STREAMS: usize = 8;
const LENGTH: usize = 64 << 10;

fn pairs(cpus: u8) -> u8 {
    cpus.min(MAX_PAIRS)
}

fn configure(config: &mut VmConfig, folder: &Path) {
    config.metrics = Some(Metrics { metrics_path: folder.join("metrics") });
    config.network_interfaces.push(NetworkInterface {
        iface_id: ID.into(),
        host_dev_name: TAP.into(),
        guest_mac: Some(MAC.into()),
        queue_pairs: Some(pairs(config.machine_config.vcpu_count).into()),
        ..NetworkInterface::default()
    });
}

fn guest(machine: &Machine, link: &mut Link) -> Outcome {
    let name = interface::find(MAC)?;
    let wanted = usize::from(pairs(machine.cpus));
    for direction in ["rx-", "tx-"] {
        let queues = fs::read_dir(format!("{}/{name}/queues", interface::FOLDER)).map_err(while_doing("the queues"))?;
        let count = queues.flatten().filter(|it| it.file_name().to_string_lossy().starts_with(direction)).count();
        expect(&format!("the number of queues {direction}*"), count, wanted)?;
    }
    interface::configure(&name, GUEST).map_err(while_doing("the interface's address"))?;
    link.say("up")?;
    link.wait_for("listening")?;
    for cpu in 0..usize::from(machine.cpus) {
        work_on(cpu)?;
        (0..STREAMS).try_for_each(|_| there_and_back())?;
    }
    work_on(0)?;
    link.say("done")?;
    link.wait_for("counted")?;
    Ok(String::new())
}

fn there_and_back() -> Result<(), String> {
    let failed = while_doing("a stream to the host");
    let sent: Vec<u8> = (0..LENGTH).map(|at| (at / 251) as u8).collect();
    let mut stream = TcpStream::connect((HOST, PORT)).map_err(while_doing("connecting to the host"))?;
    let mut received = Vec::new();
    stream
        .write_all(&sent)
        .and_then(|()| stream.shutdown(std::net::Shutdown::Write))
        .and_then(|()| stream.read_to_end(&mut received))
        .map_err(failed)?;
    expect("what came back", received == sent, true)
}

fn host(host: &Host, link: &mut Link) -> Outcome {
    link.wait_for("up")?;
    ip(&["address", "add", &format!("{HOST}/24"), "dev", TAP])?;
    ip(&["link", "set", "dev", TAP, "up"])?;
    let listener = TcpListener::bind((HOST, PORT)).map_err(while_doing("listening"))?;
    std::thread::spawn(move || listener.incoming().flatten().try_for_each(echo));
    link.say("listening")?;
    link.wait_for("done")?;
    let config: VmConfig = host.client.get("/vm/config").map_err(while_doing("the configuration"))?;
    let pairs = config.network_interfaces.iter().find(|it| it.iface_id == ID).and_then(|it| it.queue_pairs);
    let pairs = usize::from(pairs.ok_or("the interface has lost its queues")?);
    let counted = metrics(host)?;
    for pair in 0..pairs {
        let [receives, transmits] = [2 * pair, 2 * pair + 1].map(|queue| &counted[format!("queue_{queue}")]);
        for (what, count) in [("written to", &receives["bytes_written"]), ("read from", &transmits["bytes_read"])] {
            if count.as_u64().is_none_or(|bytes| bytes == 0) {
                return Err(format!("bytes {what} the guest by pair {pair}: {count}; all: {counted}"));
            }
        }
    }
    link.say("counted")?;
    Ok(format!("TCP both ways by each of {pairs} pairs of queues"))
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

/// The interface's counters since the start: a line of metrics has what was counted since the line before.
fn metrics(host: &Host) -> Result<Value, String> {
    host.client.act(Action::FlushMetrics).map_err(while_doing("FlushMetrics"))?;
    let text = fs::read_to_string(host.folder.join("metrics")).map_err(while_doing("the metrics"))?;
    let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    match (lines.next(), lines.next()) {
        (Some(mut line), None) => Ok(line[format!("net_{ID}")].take()),
        _ => Err(format!("not one line of metrics: {text}")),
    }
}
