//! virtio-blk (virtio 1.2, 5.2) on a disk of `backends::disk`.
//!
//! `request` is what a driver asks for, `pending` what the kernel works on; this file is the device and its thread.
//!
//! With the engine `Sync` requests are served one after the other, in the order of the ring. With `Async` reads, writes and flushes go to the
//! kernel as many as there are, and come back in the order in which they are done, which the protocol allows: a driver that wants one
//! after the other waits in between. Discards and writes of zeros are rare, and are served in place either way.
//!
//! FLUSH makes all that was acknowledged last through a crash of the host (`fdatasync`). Without the FLUSH feature every write
//! is made safe before it is acknowledged.

mod pending;
mod request;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::iovec::GuestByte;
use super::queue::{Broken, Chain, Used};
use super::worker::{Shell, Worker, watch};
use super::{Activation, ActiveQueue, Interrupt, QueuePosition, VirtioDevice};
use crate::api;
use crate::backends::disk::ring::Ring;
use crate::backends::disk::{Disk, SECTOR};
use crate::confine::ThreadKind;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::metrics::DeviceMetrics;
use crate::rate_limiter::RateLimiter;
use pending::{Done, Pending};
use request::{Bounds, HEADER, MAX_DISCARD, MAX_WRITE_ZEROES, Operation, Refusal};

pub const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];
const ID_LENGTH: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Requests taken before the worker looks at its stop event again.
const BATCH: usize = 64;
const KICK: u64 = 0;
const TOKENS: u64 = 1;
const DONE: u64 = 2;

/// The configuration space up to `write_zeroes_may_unmap` (virtio 1.2, 5.2.4).
type Config = [u8; 60];

pub struct Block {
    worker: Shell<BlockWorker>,
    id: [u8; ID_LENGTH],
    name: String,
    features: u64,
    config: Config,
}

/// What the worker is lent.
struct Parts {
    disk: Disk,
    ring: Option<Ring>,
    limiter: Option<RateLimiter>,
}

impl Block {
    /// `id` is what the guest sees as the disk's serial (cut to 20 bytes). With a `ring` of [`QUEUE_SIZE`] entries on the disk's file the
    /// engine is `Async`.
    pub fn new(disk: Disk, ring: Option<Ring>, id: &str, limiter: Option<RateLimiter>) -> Self {
        let mut features = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX;
        features |= match disk.is_read_only() {
            true => 1 << VIRTIO_BLK_F_RO,
            false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
        };
        let mut padded = [0; ID_LENGTH];
        padded.iter_mut().zip(id.bytes()).for_each(|(to, from)| *to = from);
        let config = config(&disk);
        let worker = Shell::new(Parts { disk, ring, limiter });
        Block { worker, id: padded, name: id.to_owned(), features, config }
    }

    /// Puts what `drive` says behind the device. To be called while it does not work. Whether the configuration space is another
    /// now; an error leaves everything as it was.
    pub fn reopen(&mut self, drive: &api::Drive) -> Result<bool> {
        let parts = parts(&mut self.worker)?;
        if let Some(disk) = parts.disk.reopen(drive)? {
            if let Some(ring) = &parts.ring {
                ring.set_file(&disk.for_ring(drive)?).map_err(Error::host("io_uring"))?;
            }
            parts.disk = disk;
        }
        let config = config(&parts.disk);
        Ok(std::mem::replace(&mut self.config, config) != config)
    }

    /// Makes `drive`, which is this one, `size` bytes long. To be called while the device does not work. Whether the configuration space is
    /// another now; an error leaves everything as it was.
    pub fn grow(&mut self, drive: &api::Drive, size: u64) -> Result<bool> {
        let parts = parts(&mut self.worker)?;
        parts.disk.grow(drive, size)?;
        let config = config(&parts.disk);
        Ok(std::mem::replace(&mut self.config, config) != config)
    }

    /// Changes the rate limiter's buckets that are given. To be called while the device does not work.
    pub fn limit(&mut self, limits: &api::RateLimiter) -> Result<()> {
        let parts = parts(&mut self.worker)?;
        RateLimiter::change(&mut parts.limiter, limits).map_err(Error::host("rate limiter's timer"))
    }
}

/// What the worker is lent; an error while it works.
fn parts(worker: &mut Shell<BlockWorker>) -> Result<&mut Parts> {
    worker.parts().ok_or_else(|| Error::host("drive")(io::ErrorKind::ResourceBusy.into()))
}

fn config(disk: &Disk) -> Config {
    let alignment = u32::try_from(disk.granularity() / SECTOR).unwrap_or(1);
    let mut config = [0; 60];
    let mut set = |offset: usize, bytes: &[u8]| config[offset..][..bytes.len()].copy_from_slice(bytes);
    set(0, &disk.sectors().to_le_bytes());
    // seg_max: a full ring less header and status.
    set(12, &(u32::from(QUEUE_SIZE) - 2).to_le_bytes());
    set(36, &MAX_DISCARD.to_le_bytes());
    set(40, &1u32.to_le_bytes());
    set(44, &alignment.to_le_bytes());
    set(48, &MAX_WRITE_ZEROES.to_le_bytes());
    set(52, &1u32.to_le_bytes());
    set(56, &[1]);
    config
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
        self.worker.start(|Parts { disk, ring, limiter }| BlockWorker {
            disk,
            pending: ring.map(|ring| Pending::new(ring, QUEUE_SIZE, activation.memory.clone())),
            limiter,
            id,
            write_through,
            queue,
            interrupt: activation.interrupt,
            metrics: activation.metrics,
            chain: Chain::default(),
            _memory: activation.memory,
        })
    }

    fn deactivate(&mut self) -> Vec<QueuePosition> {
        self.worker.stop()
    }
}

struct BlockWorker {
    disk: Disk,
    pending: Option<Pending>,
    limiter: Option<RateLimiter>,
    id: [u8; ID_LENGTH],
    write_through: bool,
    queue: ActiveQueue,
    interrupt: Arc<Interrupt>,
    metrics: Arc<DeviceMetrics>,
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
        if let Some(ring) = self.pending.as_ref().and_then(Pending::ring) {
            watch(epoll, ring.fd(), EventSet::IN, DONE)?;
        }
        watch(epoll, self.queue.kick.as_raw_fd(), EventSet::IN, KICK)
    }

    fn handle(&mut self, number: u64, _: EventSet, _: &Epoll) -> std::result::Result<(), Broken> {
        match (number, &mut self.limiter) {
            (KICK, _) => self.queue.take_kick(),
            (TOKENS, Some(limiter)) => limiter.wake(),
            _ => {}
        }
        self.complete()?;
        let taken = self.take_requests();
        // Whatever stopped the taking: what was begun is done.
        self.submit()?;
        taken?;
        self.complete()
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn finish(&mut self) {
        if let Some(mut pending) = self.pending.take() {
            pending.drain(|done| {
                let _ = self.answer(done);
            });
            self.pending = Some(pending);
            let _ = self.tell();
        }
        if let Err(error) = self.disk.settle() {
            tracing::error!(%error, "virtio-blk: the image's tables cannot be written");
        }
    }

    fn take_apart(self) -> (Self::Parts, Vec<QueuePosition>) {
        let ring = self.pending.and_then(Pending::into_ring);
        let parts = Parts { disk: self.disk, ring, limiter: self.limiter };
        (parts, vec![self.queue.queue.position()])
    }
}

impl BlockWorker {
    fn take_requests(&mut self) -> std::result::Result<(), Broken> {
        self.queue.queue.disable_kicks()?;
        for _ in 0..BATCH {
            let queue = &mut self.queue.queue;
            if self.pending.as_ref().is_some_and(Pending::is_full) {
                queue.metrics().stalls.increment();
                // No kick is waited for: a request that is done comes first.
                return Ok(());
            }
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
            self.serve()?;
        }
        if self.queue.queue.enable_kicks()? {
            let _ = self.queue.kick.write(1);
        }
        Ok(())
    }

    /// Serves the request in `chain`, or begins to.
    fn serve(&mut self) -> std::result::Result<(), Broken> {
        let begun = Instant::now();
        let bounds = Bounds { sectors: self.disk.sectors(), is_read_only: self.disk.is_read_only() };
        let (operation, status) = request::parse(&mut self.chain, bounds)?;
        if let Ok(operation) = &operation {
            self.metrics.count(counter(operation), 1);
        }
        if let (Ok(operation), Some(pending)) = (&operation, &mut self.pending)
            && pending
                .begin(operation, &mut self.chain, &status, self.write_through)
                .map_err(|error| broken_ring(&error))?
        {
            return Ok(());
        }
        let outcome = operation.and_then(|operation| Ok(self.execute(&operation)?));
        self.give_back(self.chain.head, &status, outcome, begun)?;
        self.tell()
    }

    /// Does all of it; how many bytes of the driver's buffers were written.
    fn execute(&mut self, operation: &Operation) -> io::Result<u32> {
        let (disk, chain) = (&mut self.disk, &mut self.chain);
        match operation {
            Operation::Read { offset } => {
                let length = chain.writable.len() as u32;
                disk.read(&mut chain.writable, *offset)?;
                return Ok(length);
            }
            Operation::Write { offset } => {
                disk.write(&mut chain.readable, *offset)?;
                if self.write_through {
                    disk.sync()?;
                }
            }
            Operation::Flush => disk.sync()?,
            Operation::Identify => {
                let length = chain.writable.len().min(ID_LENGTH);
                chain.writable.write_at(0, &self.id[..length]);
                return Ok(length as u32);
            }
            Operation::Discard(range) => disk.discard(range.start, range.end - range.start)?,
            Operation::WriteZeroes { range, may_unmap } => {
                disk.write_zeroes(range.start, range.end - range.start, *may_unmap)?;
                if self.write_through {
                    disk.sync()?;
                }
            }
        }
        Ok(0)
    }

    fn submit(&mut self) -> std::result::Result<(), Broken> {
        self.pending.as_mut().map_or(Ok(()), Pending::submit).map_err(|error| broken_ring(&error))
    }

    /// Gives back what the kernel has done.
    fn complete(&mut self) -> std::result::Result<(), Broken> {
        while let Some(done) = self.pending.as_mut().and_then(Pending::next) {
            self.answer(done)?;
        }
        // The rest of what was done in part.
        self.submit()?;
        self.tell()
    }

    fn answer(&mut self, done: Done) -> std::result::Result<(), Broken> {
        self.give_back(done.head, &done.status, done.outcome.map_err(Refusal::from), done.begun)
    }

    fn give_back(
        &mut self,
        head: u16,
        status: &GuestByte,
        outcome: std::result::Result<u32, Refusal>,
        begun: Instant,
    ) -> std::result::Result<(), Broken> {
        let (code, written) = match outcome {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refusal::Invalid) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Refusal::Failed(error)) => {
                // Told once: a disk that is full fails as often as its guest likes to try.
                if self.metrics.backend_errors.get() == 0 {
                    tracing::warn!(%error, drive = self.metrics.id, "virtio-blk: a request has failed");
                }
                self.metrics.backend_errors.increment();
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        status.write(code as u8);
        self.metrics.latency.record(begun.elapsed().as_micros() as u64);
        self.queue.queue.publish(&[Used { head, length: written + 1 }])
    }

    fn tell(&mut self) -> std::result::Result<(), Broken> {
        if self.queue.queue.needs_interrupt()? {
            self.interrupt.queue();
        }
        Ok(())
    }
}

fn broken_ring(error: &io::Error) -> Broken {
    tracing::error!(%error, "io_uring");
    Broken("io_uring takes no requests")
}

/// Bytes that a request moves, which is what its chain has beyond header and status.
fn cost(chain: &Chain) -> u64 {
    (chain.readable.len() + chain.writable.len()).saturating_sub(HEADER + 1) as u64
}

/// Firecracker's names where it has one.
fn counter(operation: &Operation) -> &'static str {
    match operation {
        Operation::Read { .. } => "read_count",
        Operation::Write { .. } => "write_count",
        Operation::Flush => "flush_count",
        Operation::Identify => "identify_count",
        Operation::Discard(_) => "discard_count",
        Operation::WriteZeroes { .. } => "write_zeroes_count",
    }
}

#[cfg(test)]
mod tests;
