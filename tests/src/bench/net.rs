//! What a virtio network interface moves, as a Linux guest counts it (`guest::net_bench`): one pair of queues, a tap, and on its other side the host itself.
//!
//! The far end of every stream and packet is in this program ([`Far`]), the same for all monitors. User space and vhost-net are measured apart: the one is the
//! monitor's own work, the other the kernel's, whoever asks for it.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
};

use mallee_vmm::api::NetworkInterface;
use serde_json::json;

use super::{
    error::BenchError,
    monitors::{CLOUD_HYPERVISOR, FIRECRACKER, OURS, on_path},
    run::{Guest, Monitor},
};
use crate::guest::net_bench::{COUNTED_PORT, ECHO_PORT, HOST, MAC, SINK_PORT, SOURCE_PORT};
use crate::lab::machine::QEMU;

/// The tap that all monitors use, one after the other.
const TAP: &str = "malleebench0";
const VHOST_DEVICE: &str = "/dev/vhost-net";

/// The monitors whose devices are at virtio-mmio: ours by its own threads, and Firecracker.
pub fn mmio(ours: &Path, guest: &Guest) -> Result<Vec<Monitor>, BenchError> {
    let mut monitors = vec![with_interface(ours, guest, false, OURS)?];
    if let Some(program) = on_path(FIRECRACKER) {
        monitors.push(firecracker(&program, guest)?);
    }
    Ok(monitors)
}

/// Every monitor that is here; ours and QEMU's microvm also by vhost-net, where the host has it.
pub fn present(ours: &Path, guest: &Guest) -> Result<Vec<Monitor>, BenchError> {
    let mut monitors = ways()
        .map(|(vhost_net, suffix)| with_interface(ours, guest, vhost_net, &format!("{OURS}{suffix}")))
        .collect::<Result<Vec<_>, _>>()?;
    if let Some(program) = on_path(FIRECRACKER) {
        monitors.push(firecracker(&program, guest)?);
    }
    if let Some(program) = on_path(CLOUD_HYPERVISOR) {
        let interface = format!("tap={TAP},mac={MAC}");
        monitors.push(guest.cloud_hypervisor(&program, CLOUD_HYPERVISOR, &["--net", &interface]));
    }
    if let Some(program) = on_path(QEMU) {
        monitors.extend(ways().map(|(vhost_net, suffix)| {
            let vhost = if vhost_net { "on" } else { "off" };
            let link = format!("tap,id=link,ifname={TAP},script=no,downscript=no,vhost={vhost}");
            let device = format!("virtio-net-device,netdev=link,mac={MAC}");
            guest.qemu(&program, &format!("qemu-microvm{suffix}"), &["-netdev", &link, "-device", &device])
        }));
    }
    Ok(monitors)
}

fn firecracker(program: &Path, guest: &Guest) -> Result<Monitor, BenchError> {
    let interface = json!({ "iface_id": "eth0", "host_dev_name": TAP, "guest_mac": MAC });
    guest.firecracker(program, FIRECRACKER, json!({ "network-interfaces": [interface] }))
}

#[allow(clippy::needless_update, reason = "what a VMM offers grows; this states what it wants of it")]
fn with_interface(program: &Path, guest: &Guest, vhost_net: bool, name: &str) -> Result<Monitor, BenchError> {
    guest.ours(program, name, |config| {
        config.network_interfaces.push(NetworkInterface {
            iface_id: "eth0".into(),
            host_dev_name: TAP.into(),
            guest_mac: Some(MAC.into()),
            vhost_net,
            ..NetworkInterface::default()
        });
    })
}

/// Whether by vhost-net, and how that is called.
fn ways() -> impl Iterator<Item = (bool, &'static str)> {
    [(false, ""), (true, " vhost-net")].into_iter().filter(|(vhost, _)| !vhost || Path::new(VHOST_DEVICE).exists())
}

/// The host's side of the tap. It goes with this.
pub struct Far;

impl Far {
    /// Makes the tap with its address.
    pub fn new() -> Result<Self, BenchError> {
        // What a run that was killed has left.
        let _ = ip(&["link", "delete", "dev", TAP]);
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap"])?;
        let far = Far;
        ip(&["address", "add", &format!("{HOST}/24"), "dev", TAP])?;
        ip(&["link", "set", "dev", TAP, "up"])?;
        Ok(far)
    }

    /// The same, and answers at its ports as long as the program runs.
    pub fn start() -> Result<Self, BenchError> {
        let far = Self::new()?;
        let packets = Arc::new(AtomicU64::new(0));
        let counted = packets.clone();
        serve(SINK_PORT, |mut stream| {
            let mut buffer = vec![0; 256 << 10];
            while stream.read(&mut buffer).is_ok_and(|length| length > 0) {}
        })?;
        serve(SOURCE_PORT, |mut stream| {
            let buffer = vec![0; 256 << 10];
            while stream.write_all(&buffer).is_ok() {}
        })?;
        serve(COUNTED_PORT, move |mut stream| drop(stream.write_all(counted.load(Relaxed).to_string().as_bytes())))?;
        receive(SINK_PORT, move |_, _| {
            packets.fetch_add(1, Relaxed);
        })?;
        receive(ECHO_PORT, |socket, (bytes, from)| drop(socket.send_to(bytes, from)))?;
        Ok(far)
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", "dev", TAP]);
    }
}

/// Has a thread serve each stream that comes to the port.
fn serve(port: u16, with: impl Fn(TcpStream) + Clone + Send + 'static) -> Result<(), BenchError> {
    let listener = TcpListener::bind((HOST, port)).map_err(failed)?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let with = with.clone();
            thread::spawn(move || with(stream));
        }
    });
    Ok(())
}

/// Gives each packet that comes to the port to `with`, in a thread.
fn receive(
    port: u16,
    with: impl Fn(&UdpSocket, (&[u8], std::net::SocketAddr)) + Send + 'static,
) -> Result<(), BenchError> {
    let socket = UdpSocket::bind((HOST, port)).map_err(failed)?;
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            with(&socket, (&buffer[..length], from));
        }
    });
    Ok(())
}

fn ip(words: &[&str]) -> Result<(), BenchError> {
    let done = Command::new("ip").args(words).output().map_err(failed)?;
    let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    if done.status.success() { Ok(()) } else { Err(failed(std::io::Error::other(said))) }
}

fn failed(source: std::io::Error) -> BenchError {
    BenchError::File { action: "setting up the tap", path: TAP.into(), source }
}
