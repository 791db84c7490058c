//! The host kernel's half of a network device: vhost-net (drivers/vhost/net.c), one descriptor for each pair of queues.
//!
//! A thread of the kernel moves frames between the guest's rings and the tap: woken by the driver's kicks, it interrupts the guest by the eventfd that KVM
//! listens to. This process says where rings, memory and tap are, and sees nothing of the frames. The kernel is as wary of rings as we are: what breaks one is told on
//! an eventfd, and the queue stands still.
//!
//! What the kernel writes to the guest's memory passes by KVM's log of changes as well as by ours. Where changes are tracked it keeps a log of its
//! own ([`DirtyLog`]), which becomes a part of ours whenever the device stops.
//!
//! While a queue has its tap, its rings are the kernel's: where it stands is known only after [`Vhost::stop`].

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_F_LOG_ALL, VHOST_NET_SET_BACKEND, VHOST_VRING_F_LOG, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::backends::tap::Tap;
use crate::devices::virtio::{ActiveQueue, QueuePosition, TRANSPORT_FEATURES};
use crate::error::{Error, Result};
use crate::memory::{self, GuestMemory, PAGE};

const DEVICE: &str = "/dev/vhost-net";
/// Features that the kernel must know if the guest is to use them. All others of a network device are the tap's.
pub const FEATURES: u64 = TRANSPORT_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The kernel's side of one pair of queues.
pub struct Vhost {
    file: File,
    /// Those of [`FEATURES`] that this kernel knows.
    features: u64,
    /// The kernel works in this process's memory, and has a thread for it.
    is_owned: bool,
}

/// What the kernel is told of a pair of queues.
pub struct Pair<'a> {
    /// For receiving and for transmitting. They stay as they are until the pair is stopped.
    pub queues: &'a [ActiveQueue; 2],
    pub tap: &'a Tap,
    /// What the driver has accepted.
    pub features: u64,
    /// Written when the driver wants to know of used buffers.
    pub interrupt: &'a EventFd,
    /// Written when a ring is broken.
    pub errors: &'a EventFd,
    /// What the rings and their buffers are in. The mappings and the log live as long as the pair works.
    pub memory: &'a GuestMemory,
    pub log: Option<&'a DirtyLog>,
}

impl Vhost {
    /// Opens the kernel's device. Nothing is set up yet.
    pub fn open() -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(DEVICE);
        let file = file.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::BadConfiguration(format!(
                "vhost_net: there is no {DEVICE}. Load the module (modprobe vhost_net), or leave vhost_net out; in a jail, only \
                 what the configuration file says has it"
            )),
            io::ErrorKind::PermissionDenied => Error::BadConfiguration(format!(
                "vhost_net: {DEVICE} may not be opened by this user; give it the device, or leave vhost_net out"
            )),
            _ => Error::Host { what: "open /dev/vhost-net", source: error },
        })?;
        let mut vhost = Vhost { file, features: 0, is_owned: false };
        let nowhere = GuestMemory::new();
        let known = vhost.handle(&nowhere).get_features();
        vhost.features = known.map_err(failed).map_err(Error::host("VHOST_GET_FEATURES"))? & FEATURES;
        if vhost.features & TRANSPORT_FEATURES != TRANSPORT_FEATURES {
            let why = "vhost_net: this host's kernel does not know virtio 1.0; leave vhost_net out".into();
            return Err(Error::BadConfiguration(why));
        }
        Ok(vhost)
    }

    /// Those of [`FEATURES`] that this kernel knows.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Has the kernel work on the pair from where its queues stand. After an error it does not.
    pub fn start(&mut self, pair: &Pair) -> io::Result<()> {
        self.describe(pair).map_err(failed)?;
        for queue in 0..2 {
            self.set_tap(queue, Some(pair.tap))?;
        }
        for queue in pair.queues {
            // What came before the tap was there was looked at by nobody.
            queue.kick.write(1)?;
        }
        Ok(())
    }

    fn describe(&mut self, pair: &Pair) -> vhost::Result<()> {
        if !self.is_owned {
            self.handle(pair.memory).set_owner()?;
            self.is_owned = true;
        }
        let handle = self.handle(pair.memory);
        handle.set_mem_table(&regions(pair.memory))?;
        let mut features = pair.features & self.features;
        if let Some(log) = pair.log {
            handle.set_log_base(log.address(), None)?;
            features |= 1 << VHOST_F_LOG_ALL;
        }
        handle.set_features(features)?;
        for (index, ActiveQueue { queue, kick }) in pair.queues.iter().enumerate() {
            let rings = queue.rings();
            handle.set_vring_num(index, rings.size)?;
            handle.set_vring_base(index, queue.position().next_available)?;
            let config = VringConfigData {
                queue_max_size: rings.size,
                queue_size: rings.size,
                flags: if pair.log.is_some() { 1 << VHOST_VRING_F_LOG } else { 0 },
                desc_table_addr: rings.descriptors,
                used_ring_addr: rings.used,
                avail_ring_addr: rings.available,
                log_addr: Some(rings.used),
            };
            handle.set_vring_addr(index, &config)?;
            handle.set_vring_call(index, pair.interrupt)?;
            handle.set_vring_err(index, pair.errors)?;
            handle.set_vring_kick(index, kick)?;
        }
        Ok(())
    }

    /// Ends the kernel's work on the pair: when this returns it has let go of the tap, and has finished or put back what it had begun.
    /// Says where the queues stand.
    pub fn stop(&self, queues: &[ActiveQueue; 2], memory: &GuestMemory) -> io::Result<[QueuePosition; 2]> {
        if !self.is_owned {
            return Ok(queues.each_ref().map(|queue| queue.queue.position()));
        }
        for queue in 0..2 {
            self.set_tap(queue, None)?;
        }
        let mut positions = [QueuePosition::default(); 2];
        for (index, (position, queue)) in positions.iter_mut().zip(queues).enumerate() {
            let next_available = self.handle(memory).get_vring_base(index).map_err(failed)?;
            *position = QueuePosition {
                next_available: next_available as u16,
                // Nobody else knows it; it is also where the kernel begins to count.
                next_used: queue.queue.used_index().map_err(io::Error::other)?,
            };
        }
        Ok(positions)
    }

    fn set_tap(&self, queue: u32, tap: Option<&Tap>) -> io::Result<()> {
        let backend = vhost_vring_file { index: queue, fd: tap.map_or(-1, Tap::fd) };
        // SAFETY: the kernel reads one `vhost_vring_file` at the given address.
        match unsafe { ioctl_with_ref(&self.file, VHOST_NET_SET_BACKEND(), &backend) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn handle<'a>(&'a self, memory: &'a GuestMemory) -> Handle<'a> {
        Handle { file: &self.file, memory }
    }
}

fn failed(error: vhost::Error) -> io::Error {
    io::Error::other(format!("vhost-net: {error}"))
}

fn regions(memory: &GuestMemory) -> Vec<VhostUserMemoryRegionInfo> {
    let region = |region: &vm_memory::GuestRegionMmap<_>| VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        ..VhostUserMemoryRegionInfo::default()
    };
    memory.iter().map(region).collect()
}

/// For the crate's calls, which want to check the rings against the memory.
struct Handle<'a> {
    file: &'a File,
    memory: &'a GuestMemory,
}

impl AsRawFd for Handle<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl<'a> VhostKernBackend for Handle<'a> {
    type AS = &'a GuestMemory;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

/// Which pages the kernel has written to: a bit a page, by guest-physical address (`log_write` in drivers/vhost/vhost.c).
pub struct DirtyLog(Vec<AtomicU64>);

impl DirtyLog {
    /// `None` if changes of `memory` are not tracked.
    pub fn new(memory: &GuestMemory) -> Option<Self> {
        memory::bitmap(memory.iter().next()?)?;
        let pages = memory.last_addr().0 / PAGE as u64 + 1;
        Some(DirtyLog((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()))
    }

    fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Notes in `memory` what was written since this was last called. To be called when the kernel does not work.
    pub fn move_to(&self, memory: &GuestMemory) {
        for (index, word) in (0..).zip(&self.0) {
            let mut bits = word.swap(0, Ordering::Relaxed);
            while bits != 0 {
                let page = 64 * index + u64::from(bits.trailing_zeros());
                let address = GuestAddress(page * PAGE as u64);
                if let Some((region, offset)) = memory.to_region_addr(address)
                    && let Some(bitmap) = memory::bitmap(region)
                {
                    bitmap.set_bit(offset.0 as usize / PAGE);
                }
                bits &= bits - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::bitmap::AtomicBitmap;

    #[test]
    fn what_the_kernel_logs_is_marked_in_the_region_where_it_is() {
        let ranges = [(GuestAddress(0), 128 * PAGE), (GuestAddress(1 << 20), 64 * PAGE)];
        let memory = memory::map(&ranges, None, true).unwrap();
        let log = DirtyLog::new(&memory).unwrap();
        // As the kernel does it: bits in bytes (`set_bit_to_user`).
        // SAFETY: the log is so long, and nobody else has it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(log.address() as *mut u8, log.0.len() * 8) };
        let in_second = (1 << 20) / PAGE + 3;
        for page in [0, 9, 127, in_second] {
            bytes[page / 8] |= 1 << (page % 8);
        }
        // Between the regions: nowhere.
        bytes[200 / 8] |= 1;
        log.move_to(&memory);
        let marked = |region: usize| {
            let bitmap: &AtomicBitmap = memory::bitmap(memory.iter().nth(region).unwrap()).unwrap();
            (0..bitmap.len()).filter(|page| bitmap.is_bit_set(*page)).collect::<Vec<_>>()
        };
        assert_eq!((marked(0), marked(1)), (vec![0, 9, 127], vec![3]));
        assert!(log.0.iter().all(|word| word.load(Ordering::Relaxed) == 0));
        assert!(DirtyLog::new(&memory::map(&ranges, None, false).unwrap()).is_none());
    }

    #[test]
    fn a_host_without_it_says_what_to_do() {
        if std::path::Path::new(DEVICE).exists() {
            assert_eq!(Vhost::open().unwrap().features() & TRANSPORT_FEATURES, TRANSPORT_FEATURES);
        } else {
            let error = Vhost::open().err().unwrap().to_string();
            assert!(error.contains("modprobe vhost_net"), "{error}");
        }
    }
}
