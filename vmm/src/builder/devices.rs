//! From a configuration to virtio devices, and from devices to windows of the machine.

use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::{self, Drive, IoEngine, NetworkInterface, VmConfig, guest};
use crate::backends::disk::Disk;
use crate::backends::disk::ring::Ring;
use crate::backends::tap::Tap;
use crate::backends::tap_counters::TapCounters;
use crate::backends::terminal::Terminal;
use crate::backends::vhost::Vhost;
use crate::backends::vsock::VsockSockets;
use crate::devices::MAX_VIRTIO_DEVICES;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{self, Block};
use crate::devices::virtio::console::Console;
use crate::devices::virtio::mmio::{MmioTransport, Wiring};
use crate::devices::virtio::net::{Link, MAX_PAIRS, MacAddress, MoverParts, NO_LIMITS, Net};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::devices::virtio::window::Windows;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;
use crate::trace;
use crate::vm::Activations;

/// The virtio devices, in the order of their windows: drives with the root device first, so that it is
/// `/dev/vda`, then network interfaces, entropy, vsock, balloon, console.
pub fn open(config: &VmConfig) -> Result<Vec<Box<dyn VirtioDevice>>> {
    refuse_ambiguous(config)?;
    let (roots, others): (Vec<_>, Vec<_>) = config.drives.iter().partition(|drive| drive.is_root_device);
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for drive in roots.into_iter().chain(others) {
        devices.push(Box::new(block_device(drive)?));
    }
    for interface in &config.network_interfaces {
        let mac = interface.guest_mac.as_deref().map(MacAddress::parse).transpose()?;
        let pairs = queue_pairs(interface)?;
        let taps = Tap::open(&interface.host_dev_name, pairs)?;
        let mover = match interface.vhost_net {
            true => MoverParts::Kernel {
                vhosts: (0..pairs).map(|_| Vhost::open()).collect::<Result<_>>()?,
                counters: TapCounters::open(&interface.host_dev_name)?,
            },
            false => MoverParts::Threads {
                receive_limiter: rate_limiter(interface.rx_rate_limiter.as_ref())?,
                transmit_limiter: rate_limiter(interface.tx_rate_limiter.as_ref())?,
            },
        };
        devices.push(Box::new(Net::new(Link { taps, mover }, &interface.iface_id, mac)?));
    }
    if let Some(entropy) = &config.entropy {
        devices.push(Box::new(Rng::new(rate_limiter(entropy.rate_limiter.as_ref())?)));
    }
    if let Some(vsock) = &config.vsock {
        devices.push(Box::new(Vsock::new(vsock.guest_cid, VsockSockets::bind(&vsock.uds_path)?)?));
    }
    if let Some(balloon) = &config.balloon {
        refuse_large_balloon(balloon.amount_mib, config)?;
        devices.push(Box::new(Balloon::new(balloon)?));
    }
    if let Some(console) = &config.console {
        devices.push(Box::new(Console::new(Terminal::open(console)?, console)));
    }
    if devices.len() > MAX_VIRTIO_DEVICES {
        return Err(Error::BadConfiguration(format!(
            "{} virtio devices; at most {MAX_VIRTIO_DEVICES} fit",
            devices.len()
        )));
    }
    Ok(devices)
}

fn block_device(drive: &Drive) -> Result<Block> {
    let disk = Disk::open(drive)?;
    let ring = match drive.io_engine {
        IoEngine::Sync => None,
        IoEngine::Async => {
            let ring = Ring::new(&disk.for_ring(drive)?, block::QUEUE_SIZE.into());
            Some(ring.map_err(Error::host("io_uring, which a drive's io_engine Async needs"))?)
        }
    };
    Ok(Block::new(disk, ring, &drive.drive_id, rate_limiter(drive.rate_limiter.as_ref())?))
}

/// How many pairs of queues an interface is to have, if it can be as it is described.
pub fn queue_pairs(interface: &NetworkInterface) -> Result<u16> {
    if interface.vhost_net && (interface.rx_rate_limiter.is_some() || interface.tx_rate_limiter.is_some()) {
        return Err(Error::BadConfiguration(format!("interface {:?}: {NO_LIMITS}", interface.iface_id)));
    }
    match interface.queue_pairs.unwrap_or(1) {
        pairs @ 1..=MAX_PAIRS => Ok(pairs),
        pairs => Err(Error::BadConfiguration(format!(
            "queue_pairs of interface {:?} is {pairs}; it must be between 1 and {MAX_PAIRS}",
            interface.iface_id
        ))),
    }
}

/// A balloon with all of a guest's memory is a mistake, and never gets there.
pub fn refuse_large_balloon(mib: u32, config: &VmConfig) -> Result<()> {
    let memory = config.machine_config.mem_size_mib;
    match u64::from(mib) < memory {
        true => Ok(()),
        false => {
            Err(Error::BadConfiguration(format!("amount_mib is {mib}; it must be less than the memory, {memory} MiB")))
        }
    }
}

fn rate_limiter(config: Option<&api::RateLimiter>) -> Result<Option<RateLimiter>> {
    config.map(RateLimiter::new).transpose().map(Option::flatten).map_err(Error::host("rate limiter's timer"))
}

/// A configuration file can say what the REST interface would have refused.
fn refuse_ambiguous(config: &VmConfig) -> Result<()> {
    let drives = config.drives.iter().map(|drive| &drive.drive_id);
    let interfaces = config.network_interfaces.iter().map(|interface| &interface.iface_id);
    for ids in [drives.collect::<Vec<_>>(), interfaces.collect()] {
        if let Some(twice) = ids.iter().enumerate().find(|(i, id)| ids[..*i].contains(id)) {
            return Err(Error::BadConfiguration(format!("the id {:?} is there twice", twice.1)));
        }
    }
    if config.drives.iter().filter(|drive| drive.is_root_device).count() > 1 {
        return Err(Error::BadConfiguration("more than one drive is_root_device".into()));
    }
    Ok(())
}

/// Gives each device its window and interrupt. `slot` is the first memory slot that is free.
pub fn attach(
    devices: Vec<Box<dyn VirtioDevice>>,
    vm: &Arc<VmFd>,
    memory: &GuestMemory,
    slot: u32,
    activations: &Arc<Activations>,
) -> Result<Vec<Mutex<MmioTransport>>> {
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    let windows = Windows::new(devices.len()).map_err(Error::host("registers' memory"))?;
    let acknowledged = Arc::new(event()?);
    let transports = devices
        .into_iter()
        .enumerate()
        .map(|(index, device)| {
            let wiring = KvmWiring {
                vm: vm.clone(),
                base: guest::VIRTIO_MMIO_BASE + index as u64 * guest::VIRTIO_MMIO_STRIDE,
                gsi: guest::VIRTIO_MMIO_FIRST_GSI + index as u32,
                acknowledged: acknowledged.clone(),
                activations: activations.clone(),
            };
            MmioTransport::new(device, memory.clone(), windows.window(index), Box::new(wiring)).map(Mutex::new)
        })
        .collect::<Result<_>>()?;
    // Who traces exits wants to see what a driver reads.
    if trace::get().is_none()
        && let Err(error) = windows.show(vm, slot)
    {
        tracing::warn!(%error, "KVM shows a guest no registers: each read is an exit");
    }
    Ok(transports)
}

fn event() -> Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::host("eventfd"))
}

/// Notifications and acknowledgements as ioeventfds, the interrupt as an irqfd: no direction passes through a vCPU's thread.
struct KvmWiring {
    vm: Arc<VmFd>,
    base: u64,
    gsi: u32,
    /// Nobody reads it, nor could tell who wrote: that KVM takes an acknowledgement of used buffers is enough, since these are always
    /// a reason (`Interrupt`). One with another reason too comes to the window.
    acknowledged: Arc<EventFd>,
    activations: Arc<Activations>,
}

impl Wiring for KvmWiring {
    fn connect(&self, kicks: &[EventFd], interrupt: &EventFd) -> Result<()> {
        let register = |register: u32| IoEventAddress::Mmio(self.base + u64::from(register));
        let listen = |event, register: &IoEventAddress, value: u32| {
            self.vm.register_ioevent(event, register, value).map_err(Error::kvm("KVM_IOEVENTFD"))
        };
        for (queue, kick) in kicks.iter().enumerate() {
            listen(kick, &register(VIRTIO_MMIO_QUEUE_NOTIFY), queue as u32)?;
        }
        listen(&self.acknowledged, &register(VIRTIO_MMIO_INTERRUPT_ACK), VIRTIO_MMIO_INT_VRING)?;
        self.vm.register_irqfd(interrupt, self.gsi).map_err(Error::kvm("KVM_IRQFD"))
    }

    fn defers_activation(&self) -> bool {
        self.activations.ask();
        true
    }
}
