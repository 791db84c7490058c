//! virtio-blk (virtio 1.2, 5.2) on a raw file.
//!
//! Data goes between file and guest memory with `preadv` and `pwritev`; requests are served one after the other, in
//! the order of the ring. FLUSH is `fdatasync`: a driver that was told its data is safe finds it there after a
//! crash of the host. Without the FLUSH feature every write is made safe before it is acknowledged.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::queue::{Broken, Chain, Used};
use super::worker::{Shell, Worker, watch};
use super::{Activation, ActiveQueue, Interrupt, QueuePosition, VirtioDevice};
use crate::backends::disk::{Disk, SECTOR};
use crate::confine::ThreadKind;
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];
/// Type, reserved, sector (virtio 1.2, 5.2.6).
const HEADER: usize = 16;
const ID_LENGTH: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Requests served before the worker looks at its stop event again.
const BATCH: usize = 64;
const KICK: u64 = 0;
const TOKENS: u64 = 1;

pub struct Block {
    worker: Shell<BlockWorker>,
    id: [u8; ID_LENGTH],
    name: String,
    features: u64,
    config: [u8; 16],
}

impl Block {
    /// `id` is what the guest sees as the disk's serial (cut to 20 bytes).
    pub fn new(disk: Disk, id: &str, limiter: Option<RateLimiter>) -> Self {
        let mut features = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX;
        if disk.is_read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        // Capacity (sectors), size_max (not offered), seg_max: a full ring less header and status.
        let mut config = [0; 16];
        config[..8].copy_from_slice(&disk.sectors().to_le_bytes());
        config[12..].copy_from_slice(&(u32::from(QUEUE_SIZE) - 2).to_le_bytes());
        let mut padded = [0; ID_LENGTH];
        padded.iter_mut().zip(id.bytes()).for_each(|(to, from)| *to = from);
        Block { worker: Shell::new(Parts { disk, limiter }), id: padded, name: id.to_owned(), features, config }
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let write_through = !activation.has(VIRTIO_BLK_F_FLUSH);
        let [queue] = activation.take_queues()?;
        let id = self.id;
        self.worker.start(|Parts { disk, limiter }| BlockWorker {
            requests: Requests { disk, id, write_through },
            limiter,
            queue,
            interrupt: activation.interrupt,
            chain: Chain::default(),
            _memory: activation.memory,
        })
    }

    fn deactivate(&mut self) -> Vec<QueuePosition> {
        self.worker.stop()
    }
}

/// What the worker is lent.
struct Parts {
    disk: Disk,
    limiter: Option<RateLimiter>,
}

struct BlockWorker {
    requests: Requests,
    limiter: Option<RateLimiter>,
    queue: ActiveQueue,
    interrupt: Arc<Interrupt>,
    chain: Chain,
    /// What the chain's pointers point into.
    _memory: GuestMemory,
}

impl Worker for BlockWorker {
    const NAME: &'static str = "virtio-blk";
    const KIND: ThreadKind = ThreadKind::Block;
    type Parts = Parts;

    fn register(&self, epoll: &Epoll) -> io::Result<()> {
        if let Some(limiter) = &self.limiter {
            watch(epoll, limiter.timer(), EventSet::IN, TOKENS)?;
        }
        watch(epoll, self.queue.kick.as_raw_fd(), EventSet::IN, KICK)
    }

    fn handle(&mut self, number: u64, _: EventSet, _: &Epoll) -> Result<(), Broken> {
        match (number, &mut self.limiter) {
            (TOKENS, Some(limiter)) => limiter.wake(),
            _ => self.queue.take_kick(),
        }
        let queue = &mut self.queue.queue;
        queue.disable_kicks()?;
        for _ in 0..BATCH {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            if let Some(limiter) = &mut self.limiter
                && !limiter.admit(cost(&self.chain))
            {
                queue.undo_pop();
                queue.metrics().stalls.increment();
                // No kick is waited for: the limiter's timer comes first.
                return Ok(());
            }
            let length = self.requests.serve(&mut self.chain)?;
            queue.publish(&[Used { head: self.chain.head, length }])?;
            if queue.needs_interrupt()? {
                self.interrupt.queue();
            }
        }
        if queue.enable_kicks()? {
            let _ = self.queue.kick.write(1);
        }
        Ok(())
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn take_apart(self) -> (Self::Parts, Vec<QueuePosition>) {
        let parts = Parts { disk: self.requests.disk, limiter: self.limiter };
        (parts, vec![self.queue.queue.position()])
    }
}

/// Bytes that a request moves, which is what its chain has beyond header and status.
fn cost(chain: &Chain) -> u64 {
    (chain.readable.len() + chain.writable.len()).saturating_sub(HEADER + 1) as u64
}

/// Serves requests on a disk.
struct Requests {
    disk: Disk,
    id: [u8; ID_LENGTH],
    write_through: bool,
}

impl Requests {
    /// Serves one request and writes its status; how many bytes the driver finds written.
    fn serve(&self, chain: &mut Chain) -> Result<u32, Broken> {
        let mut header = [0; HEADER];
        if !chain.readable.read_at(0, &mut header) {
            return Err(Broken("block request without a header"));
        }
        chain.readable.consume(HEADER);
        let Some(status_byte) = chain.writable.pop_byte() else {
            return Err(Broken("block request without a place for its status"));
        };

        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = header[8..].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let (status, written) = match self.run(kind, sector, chain) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refusal::Failed(error)) => {
                tracing::warn!(%error, kind, sector, "block request");
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        status_byte.write(status as u8);
        Ok(written + 1)
    }

    fn run(&self, kind: u32, sector: u64, chain: &mut Chain) -> Result<u32, Refusal> {
        match kind {
            VIRTIO_BLK_T_IN => {
                let length = chain.writable.len();
                let offset = self.check_range(sector, length)?;
                chain.writable.read_exact_at(self.disk.fd(), offset)?;
                Ok(length as u32)
            }
            VIRTIO_BLK_T_OUT => {
                if self.disk.is_read_only() {
                    return Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem).into());
                }
                let offset = self.check_range(sector, chain.readable.len())?;
                chain.readable.write_all_at(self.disk.fd(), offset)?;
                if self.write_through {
                    self.disk.sync()?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.disk.sync()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let length = chain.writable.len().min(ID_LENGTH);
                chain.writable.write_at(0, &self.id[..length]);
                Ok(length as u32)
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Offset in bytes of a transfer that lies wholly within the disk.
    fn check_range(&self, sector: u64, length: usize) -> Result<u64, Refusal> {
        let length = length as u64;
        let sectors = length / SECTOR;
        let inside =
            length.is_multiple_of(SECTOR) && sector.checked_add(sectors).is_some_and(|end| end <= self.disk.sectors());
        if !inside {
            return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
        }
        Ok(sector * SECTOR)
    }
}

enum Refusal {
    Unsupported,
    Failed(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Refusal::Failed(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Drive, DriveFormat};
    use crate::devices::virtio::queue::testing::{Buffer, memory, queue_with, used_index};
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    const AT_HEADER: u64 = 0x8000;
    const AT_DATA: u64 = 0x9000;
    const AT_STATUS: u64 = 0xf000;

    fn requests(file: &tempfile::NamedTempFile, is_read_only: bool) -> Requests {
        file.as_file().set_len(8 * SECTOR).unwrap();
        let drive = Drive {
            drive_id: "d".into(),
            path_on_host: file.path().to_owned(),
            is_read_only,
            format: DriveFormat::Raw,
            ..Drive::default()
        };
        let disk = Disk::open(&drive).unwrap();
        Requests { disk, id: *b"vol-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", write_through: false }
    }

    /// Runs one request; its status byte, or that the queue is broken.
    fn run(requests: &Requests, kind: u32, sector: u64, memory: &GuestMemory, data: &[Buffer]) -> Result<u8, Broken> {
        memory.write_obj([kind, 0], GuestAddress(AT_HEADER)).unwrap();
        memory.write_obj(sector, GuestAddress(AT_HEADER + 8)).unwrap();
        memory.write_obj(0xffu8, GuestAddress(AT_STATUS)).unwrap();
        let chain = [&[(AT_HEADER, 16, false)], data, &[(AT_STATUS, 1, true)]].concat();
        let mut queue = queue_with(memory, &[&chain]);
        let mut chain = Chain::default();
        queue.pop(&mut chain)?;
        requests.serve(&mut chain)?;
        Ok(memory.read_obj(GuestAddress(AT_STATUS)).unwrap())
    }

    #[test]
    fn what_is_written_in_pieces_is_read_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (requests, memory) = (requests(&file, false), memory());
        let content: Vec<u8> = (0..1024u32).map(|i| i as u8 ^ (i >> 8) as u8).collect();
        memory.write_slice(&content, GuestAddress(AT_DATA)).unwrap();
        let pieces = [(AT_DATA, 100, false), (AT_DATA + 100, 924, false)];
        assert_eq!(run(&requests, VIRTIO_BLK_T_OUT, 3, &memory, &pieces), Ok(0));
        assert_eq!(std::fs::read(file.path()).unwrap()[1536..2560], content);
        let there = [(0x2_0000, 1000, true), (0x3_0000, 24, true)];
        assert_eq!(run(&requests, VIRTIO_BLK_T_IN, 3, &memory, &there), Ok(0));
        let mut read = vec![0; 1000];
        memory.read_slice(&mut read, GuestAddress(0x2_0000)).unwrap();
        assert_eq!(read, content[..1000]);
        assert_eq!(run(&requests, VIRTIO_BLK_T_FLUSH, 0, &memory, &[]), Ok(0));
        assert_eq!(run(&requests, VIRTIO_BLK_T_GET_ID, 0, &memory, &[(AT_DATA, 20, true)]), Ok(0));
        assert_eq!(memory.read_obj::<[u8; 5]>(GuestAddress(AT_DATA)).unwrap(), *b"vol-1");
    }

    #[test]
    fn transfers_past_the_end_or_of_part_sectors_fail_and_change_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (requests, memory) = (requests(&file, false), memory());
        memory.write_slice(&[7; 4096], GuestAddress(AT_DATA)).unwrap();
        for (sector, length) in [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511)] {
            let data = [(AT_DATA, length, false)];
            assert_eq!(run(&requests, VIRTIO_BLK_T_OUT, sector, &memory, &data), Ok(1), "{sector}");
        }
        assert!(std::fs::read(file.path()).unwrap().iter().all(|byte| *byte == 0));
        assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 8 * SECTOR);
    }

    #[test]
    fn a_read_only_disk_is_not_written_and_unknown_requests_are_unsupported() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (requests, memory) = (requests(&file, true), memory());
        let data = [(AT_DATA, 512, false)];
        assert_eq!(run(&requests, VIRTIO_BLK_T_OUT, 0, &memory, &data), Ok(1));
        assert_eq!(run(&requests, 77, 0, &memory, &[]), Ok(2));
    }

    #[test]
    fn requests_without_header_or_status_break_the_queue() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (requests, memory) = (requests(&file, false), memory());
        for chain in [&[(AT_HEADER, 8, false), (AT_STATUS, 1, true)][..], &[(AT_HEADER, 16, false)]] {
            let mut queue = queue_with(&memory, &[chain]);
            let mut chain = Chain::default();
            queue.pop(&mut chain).unwrap();
            assert!(requests.serve(&mut chain).is_err());
        }
    }

    #[test]
    fn a_limited_drive_serves_everything_in_time_and_keeps_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (disk, memory) = (requests(&file, false).disk, memory());
        let bucket = crate::api::TokenBucket { size: 1, one_time_burst: None, refill_time: 2 };
        let limiter = crate::api::RateLimiter { ops: Some(bucket), bandwidth: None };
        let mut device = Block::new(disk, "d", RateLimiter::new(&limiter).unwrap());
        memory.write_obj([VIRTIO_BLK_T_FLUSH, 0], GuestAddress(AT_HEADER)).unwrap();
        let chain: &[Buffer] = &[(AT_HEADER, 16, false), (AT_STATUS, 1, true)];
        let metrics = Arc::new(crate::metrics::QueueMetrics::default());
        let queue = queue_with(&memory, &[chain; 5]).counted_in(metrics.clone());
        let used_index = used_index(&queue);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        kick.write(1).unwrap();
        let interrupt = Arc::new(Interrupt::new().unwrap());
        let queues = vec![ActiveQueue { queue, kick }];
        let activation = Activation {
            features: 0,
            is_resumed: false,
            queues,
            interrupt,
            memory: memory.clone(),
            metrics: crate::metrics::device(VIRTIO_ID_BLOCK, "d", 1),
        };
        device.activate(activation).unwrap();
        while memory.read_obj::<u16>(used_index).unwrap() < 5 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        device.deactivate();
        assert!(metrics.stalls.get() > 0);
        assert!(device.worker.parts().unwrap().limiter.is_some());
    }

    proptest! {
        #[test]
        fn no_request_panics_or_grows_the_disk(
            kind in 0u32..14, sector: u64, near in 0u64..10, wild: bool,
            data in proptest::collection::vec((0x9000u64..0xe000, 0u32..2000), 0..8), split in 0usize..8,
        ) {
            let file = tempfile::NamedTempFile::new().unwrap();
            let (requests, memory) = (requests(&file, false), memory());
            let data: Vec<Buffer> = data.into_iter().enumerate().map(|(i, (a, l))| (a, l, i >= split)).collect();
            let _ = run(&requests, kind, if wild { sector } else { near }, &memory, &data);
            prop_assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 8 * SECTOR);
        }
    }
}
