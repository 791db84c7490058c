//! A hostile driver for each virtio device: registers, rings and requests from the fuzzer's bytes.
//!
//! A driver that follows no rule at all gets no further than the first register. So each script begins with a device that is
//! negotiated and has its queues in place, features and sizes from the input; what comes then is up to the bytes: requests
//! that are nearly right, rings overwritten, registers written at the wrong time, resets in between.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;

use arbitrary::{Arbitrary, Unstructured};
use serde_json::json;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::folder;
use super::input::memory_file;
use crate::api;
use crate::backends::disk::Disk;
use crate::backends::tap::Tap;
use crate::backends::terminal::Terminal;
use crate::backends::vsock::VsockSockets;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::console::Console;
use crate::devices::virtio::mmio::{MmioTransport, Wiring};
use crate::devices::virtio::net::{Link, MoverParts, Net};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::devices::virtio::window::Window;
use crate::error::Result;
use crate::memory::{self, GuestMemory};

const MEMORY: u64 = 1 << 20;
/// Where the rings of queue N are: a page each for descriptors, available and used, from here on.
const RINGS: u64 = 0x1000;
const RINGS_OF_ONE: u64 = 0x3000;
/// Where buffers are, if the script does not say otherwise.
const BUFFERS: u64 = 0x4_0000;
/// Entries of a queue at most, so that few bytes fill one.
const MAX_SIZE: u16 = 16;
/// No script is longer: what matters happens in few steps.
const MAX_STEPS: usize = 64;

#[derive(Debug, Arbitrary)]
enum Step {
    /// A chain of buffers, made available; the head is published or not.
    Request {
        queue: u8,
        buffers: Vec<Buffer>,
        tells: bool,
    },
    /// Bytes anywhere in the first 64 KiB, where the rings are.
    Scribble {
        at: u16,
        bytes: [u8; 8],
    },
    /// Bytes in the first buffers, for headers of requests.
    Header {
        at: u8,
        bytes: [u8; 24],
    },
    WriteRegister {
        register: u8,
        value: u32,
    },
    ReadRegister {
        register: u8,
    },
    WriteConfig {
        at: u8,
        bytes: [u8; 4],
    },
    Kick {
        queue: u8,
    },
    /// The worker does what there is to do; the device is stopped and goes on from there.
    Work,
    /// The host's side of the device: something comes in, or the peer goes away.
    Host {
        bytes: [u8; 16],
        length: u8,
    },
    Start {
        features: u64,
        sizes: u8,
    },
}

#[derive(Debug, Arbitrary)]
struct Buffer {
    address: u64,
    length: u16,
    flags: u8,
    next: u8,
    /// Address and length as they are, and not brought near to what is right.
    is_wild: bool,
}

/// What is on the other side of a device.
trait Host {
    fn event(&mut self, bytes: &[u8]);
}

impl Host for () {
    fn event(&mut self, _: &[u8]) {}
}

/// The other ends of a tap's queues.
struct Wire(Vec<UnixDatagram>);

impl Host for Wire {
    /// A frame, to the queue that its first byte chooses.
    fn event(&mut self, bytes: &[u8]) {
        let queue = usize::from(bytes.first().copied().unwrap_or(0)) % self.0.len();
        let _ = self.0[queue].send(bytes);
        let mut sent = [0; 2048];
        self.0.iter().for_each(|end| while end.recv(&mut sent).is_ok() {});
    }
}

struct NoWiring;

impl Wiring for NoWiring {
    fn connect(&self, _: &[EventFd], _: &EventFd) -> Result<()> {
        Ok(())
    }
}

struct Driver {
    memory: GuestMemory,
    device: MmioTransport,
    /// For each queue: the next free descriptor, and what the available ring's index says.
    next: Vec<(u16, u16)>,
}

fn run(bytes: &[u8], device: Box<dyn VirtioDevice>, host: &mut dyn Host) {
    let mut input = Unstructured::new(bytes);
    let memory = memory::map(&[(GuestAddress(0), MEMORY as usize)], None, false).unwrap();
    let queues = device.queue_sizes().len();
    let device = MmioTransport::new(device, memory.clone(), Window::alone(), Box::new(NoWiring)).unwrap();
    let mut driver = Driver { memory, device, next: vec![(0, 0); queues] };
    let (features, sizes) = (input.arbitrary().unwrap_or(0), input.arbitrary().unwrap_or(0));
    driver.start(features, sizes);
    for _ in 0..MAX_STEPS {
        let Ok(step) = Step::arbitrary(&mut input) else { break };
        driver.take(step, host);
        if input.is_empty() {
            break;
        }
    }
    driver.work();
    driver.device.stop();
}

impl Driver {
    fn take(&mut self, step: Step, host: &mut dyn Host) {
        match step {
            Step::Request { queue, buffers, tells } => self.request(queue, &buffers, tells),
            Step::Scribble { at, bytes } => drop(self.memory.write_slice(&bytes, GuestAddress(at.into()))),
            Step::Header { at, bytes } => {
                drop(self.memory.write_slice(&bytes, GuestAddress(BUFFERS + 8 * u64::from(at))));
            }
            Step::WriteRegister { register, value } => self.write(u32::from(register & !3), value),
            Step::ReadRegister { register } => {
                // Registers, and the beginning of the configuration space behind them.
                self.device.read(u64::from(register) * 2, &mut [0; 4][..1 << (register % 3)]);
            }
            Step::WriteConfig { at, bytes } => {
                self.device.write(u64::from(VIRTIO_MMIO_CONFIG) + u64::from(at), &bytes);
            }
            Step::Kick { queue } => self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue.into()),
            Step::Work => self.work(),
            Step::Host { bytes, length } => host.event(&bytes[..usize::from(length % 17)]),
            Step::Start { features, sizes } => {
                self.write(VIRTIO_MMIO_STATUS, 0);
                self.start(features, sizes);
            }
        }
    }

    /// As a driver starts a device, with these features of those it offers.
    fn start(&mut self, features: u64, sizes: u8) {
        let mut status = VIRTIO_CONFIG_S_ACKNOWLEDGE;
        self.write(VIRTIO_MMIO_STATUS, status);
        status |= VIRTIO_CONFIG_S_DRIVER;
        self.write(VIRTIO_MMIO_STATUS, status);
        let offered = self.offered(0) | self.offered(1) << 32;
        let accepted = features & offered | 1 << VIRTIO_F_VERSION_1;
        for half in 0..2u32 {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, (accepted >> (32 * half)) as u32);
        }
        status |= VIRTIO_CONFIG_S_FEATURES_OK;
        self.write(VIRTIO_MMIO_STATUS, status);
        let size = 1 << (sizes % 5);
        for queue in 0..self.next.len() {
            self.place(queue, size);
        }
        status |= VIRTIO_CONFIG_S_DRIVER_OK;
        self.write(VIRTIO_MMIO_STATUS, status);
    }

    fn offered(&mut self, half: u32) -> u64 {
        self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
        let mut bytes = [0; 4];
        self.device.read(VIRTIO_MMIO_DEVICE_FEATURES.into(), &mut bytes);
        u32::from_le_bytes(bytes).into()
    }

    fn place(&mut self, queue: usize, size: u16) {
        let [descriptors, available, used] = rings(queue);
        for ring in [descriptors, available, used] {
            let _ = self.memory.write_slice(&[0; 0x1000], GuestAddress(ring));
        }
        self.next[queue] = (0, 0);
        for (register, value) in [
            (VIRTIO_MMIO_QUEUE_SEL, queue as u64),
            (VIRTIO_MMIO_QUEUE_NUM, size.into()),
            (VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, used),
            (VIRTIO_MMIO_QUEUE_READY, 1),
        ] {
            self.write(register, value as u32);
        }
    }

    /// Puts a chain into the rings, as long as they were where [`Self::place`] has put them.
    fn request(&mut self, queue: u8, buffers: &[Buffer], tells: bool) {
        let queue = usize::from(queue) % self.next.len();
        let [descriptors, available, _] = rings(queue);
        let (next, index) = &mut self.next[queue];
        let head = *next % MAX_SIZE;
        for (position, buffer) in buffers.iter().take(8).enumerate() {
            let slot = *next % MAX_SIZE;
            let is_last = position + 1 == buffers.len().min(8);
            let bytes = buffer.descriptor((slot + 1) % MAX_SIZE, is_last);
            let _ = self.memory.write_slice(&bytes, GuestAddress(descriptors + 16 * u64::from(slot)));
            *next = next.wrapping_add(1);
        }
        let entry = available + 4 + 2 * u64::from(*index % MAX_SIZE);
        let _ = self.memory.write_obj(head, GuestAddress(entry));
        *index = index.wrapping_add(1);
        let _ = self.memory.write_obj(*index, GuestAddress(available + 2));
        if tells {
            self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
        }
    }

    fn work(&mut self) {
        self.device.pause();
        self.device.resume();
    }

    fn write(&mut self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }
}

fn rings(queue: usize) -> [u64; 3] {
    let first = RINGS + RINGS_OF_ONE * queue as u64;
    [first, first + 0x1000, first + 0x2000]
}

impl Buffer {
    /// The bytes of a descriptor (virtio 1.2, 2.7.5).
    fn descriptor(&self, next: u16, is_last: bool) -> [u8; 16] {
        const NEXT: u16 = 1;
        let (address, length) = match self.is_wild {
            true => (self.address, u32::from(self.length) << (self.next % 17)),
            false => (BUFFERS + self.address % (MEMORY - BUFFERS), u32::from(self.length % 4096)),
        };
        let (mut flags, next) = match self.is_wild {
            true => (u16::from(self.flags), u16::from(self.next)),
            // Write or read: the only choice that a proper driver has.
            false => (u16::from(self.flags) & 2, next),
        };
        if !is_last {
            flags |= NEXT;
        }
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }
}

pub fn rng(bytes: &[u8]) {
    run(bytes, Box::new(Rng::new(None)), &mut ());
}

pub fn balloon(bytes: &[u8]) {
    let flags = bytes.first().copied().unwrap_or(0);
    let config = config(json!({
        "amount_mib": 0,
        "deflate_on_oom": flags & 1 != 0,
        "stats_polling_interval_s": flags & 2,
        "free_page_reporting": flags & 4 != 0,
    }));
    run(bytes, Box::new(Balloon::new(&config).unwrap()), &mut ());
}

pub fn block(bytes: &[u8]) {
    let file = memory_file();
    file.set_len(1 << 20).unwrap();
    let drive: api::Drive = config(json!({
        "drive_id": "fuzz",
        "path_on_host": format!("/proc/self/fd/{}", file.as_raw_fd()),
        "is_root_device": false,
        "is_read_only": bytes.first().is_some_and(|first| first & 1 == 1),
    }));
    run(bytes, Box::new(Block::new(Disk::open(&drive).unwrap(), None, "fuzz", None)), &mut ());
}

/// With one pair of queues, or, as a bit of the first byte says, with three and a control queue.
pub fn net(bytes: &[u8]) {
    let pairs = if bytes.first().is_some_and(|first| first & 0x40 != 0) { 3 } else { 1 };
    let mut wire = Wire(Vec::new());
    let tap = |_| {
        let (end, other) = UnixDatagram::pair().unwrap();
        end.set_nonblocking(true).unwrap();
        other.set_nonblocking(true).unwrap();
        wire.0.push(other);
        Tap::from_file(OwnedFd::from(end).into())
    };
    let taps = (0..pairs).map(tap).collect();
    let mover = MoverParts::Threads { receive_limiter: None, transmit_limiter: None };
    run(bytes, Box::new(Net::new(Link { taps, mover }, "fuzz", None).unwrap()), &mut wire);
}

/// A part of a VM's configuration, as a client would write it.
fn config<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// Programs of the host that speak to the guest's ports, and one that listens.
struct Streams {
    path: PathBuf,
    _listener: UnixListener,
    streams: Vec<UnixStream>,
}

impl Host for Streams {
    /// The first byte says whether a stream is opened, written to and read, or closed.
    fn event(&mut self, bytes: &[u8]) {
        let Some((first, rest)) = bytes.split_first() else { return };
        match (first % 4, self.streams.last_mut()) {
            (0, _) | (_, None) => {
                if let Ok(mut stream) = UnixStream::connect(&self.path) {
                    let _ = stream.set_nonblocking(true);
                    let _ = stream.write_all(b"CONNECT 1\n");
                    self.streams.push(stream);
                }
            }
            (1, Some(stream)) => drop(stream.write(rest)),
            (2, Some(stream)) => drop(stream.read(&mut [0; 64])),
            _ => drop(self.streams.pop()),
        }
    }
}

pub fn vsock(bytes: &[u8]) {
    let path = folder().join("v");
    let _ = std::fs::remove_file(&path);
    let sockets = VsockSockets::bind(&path).unwrap();
    let listening = folder().join("v_1");
    let _ = std::fs::remove_file(&listening);
    let mut host = Streams { path, _listener: UnixListener::bind(&listening).unwrap(), streams: Vec::new() };
    run(bytes, Box::new(Vsock::new(3, sockets).unwrap()), &mut host);
}

pub fn console(bytes: &[u8]) {
    let path = folder().join("c");
    let config: api::Console = config(json!({ "kind": "socket", "path": path }));
    let _ = std::fs::remove_file(&path);
    let terminal = Terminal::open(&config).unwrap();
    let listener = folder().join("unused");
    let _ = std::fs::remove_file(&listener);
    let mut host = Streams { path, _listener: UnixListener::bind(&listener).unwrap(), streams: Vec::new() };
    run(bytes, Box::new(Console::new(terminal, &config)), &mut host);
}
