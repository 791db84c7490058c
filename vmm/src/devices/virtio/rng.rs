//! virtio-rng (virtio 1.2, 5.4): the host kernel's random numbers for the guest.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::queue::{Broken, Chain, Used};
use super::worker::{Running, Worker, watch};
use super::{Activation, ActiveQueue, Interrupt, QueuePosition, VirtioDevice};
use crate::confine::ThreadKind;
use crate::memory::GuestMemory;

const QUEUE_SIZES: &[u16] = &[64];
/// No request gets more than this many bytes; a driver takes what it gets and asks again.
const MAX_BYTES: usize = 4096;
const KICK: u64 = 0;

#[derive(Default)]
pub struct Rng {
    running: Option<Running<RngWorker>>,
}

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { mut queues, interrupt, memory, .. } = activation;
        let queue = queues.pop().ok_or(io::ErrorKind::InvalidInput)?;
        let worker = RngWorker { queue, interrupt, chain: Chain::default(), _memory: memory };
        self.running = Some(Running::start(worker).map_err(|(_, error)| error)?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<QueuePosition> {
        let worker = self.running.take().and_then(Running::stop);
        worker.map_or(Vec::new(), |worker| vec![worker.queue.queue.position()])
    }
}

struct RngWorker {
    queue: ActiveQueue,
    interrupt: Arc<Interrupt>,
    chain: Chain,
    /// What the chain's pointers point into.
    _memory: GuestMemory,
}

impl Worker for RngWorker {
    const NAME: &'static str = "virtio-rng";
    const KIND: ThreadKind = ThreadKind::Rng;

    fn register(&self, epoll: &Epoll) -> io::Result<()> {
        watch(epoll, self.queue.kick.as_raw_fd(), EventSet::IN, KICK)
    }

    fn handle(&mut self, _: u64, _: EventSet, _: &Epoll) -> Result<(), Broken> {
        self.queue.take_kick();
        let queue = &mut self.queue.queue;
        while queue.pop(&mut self.chain)? {
            let length = fill(&mut self.chain) as u32;
            queue.publish(&[Used { head: self.chain.head, length }])?;
            if queue.needs_interrupt()? {
                self.interrupt.queue();
            }
        }
        // One who asks again at once kicks again at once.
        if queue.enable_kicks()? {
            let _ = self.queue.kick.write(1);
        }
        Ok(())
    }

    fn broken(&mut self, why: Broken) {
        tracing::warn!(%why, "virtio-rng: the driver must reset the device");
        self.interrupt.need_reset();
    }
}

/// Fills the request up to [`MAX_BYTES`]; how many bytes were written.
fn fill(chain: &mut Chain) -> usize {
    let mut bytes = [0u8; MAX_BYTES];
    let bytes = &mut bytes[..chain.writable.len().min(MAX_BYTES)];
    // SAFETY: the kernel writes at most the length of `bytes` to it. Up to 256 bytes are never cut short;
    // of more, as many as it says.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    let count = usize::try_from(count).unwrap_or(0);
    if chain.writable.write_at(0, &bytes[..count]) { count } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::queue::testing::{memory, queue_with, used};
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[test]
    fn requests_are_filled_and_bounded() {
        let memory = memory();
        let queue = queue_with(&memory, &[&[(0x8000, 64, true)], &[(0x9000, 100_000, true)]]);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut worker = RngWorker {
            queue: ActiveQueue { queue, kick },
            interrupt: Arc::new(Interrupt::new().unwrap()),
            chain: Chain::default(),
            _memory: memory.clone(),
        };
        worker.handle(KICK, EventSet::IN, &Epoll::new().unwrap()).unwrap();
        let lengths: Vec<u32> = used(&memory, &worker.queue.queue).iter().map(|u| u.length).collect();
        assert_eq!(lengths, [64, MAX_BYTES as u32]);
        let mut bytes = [0u8; 64];
        memory.read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
        assert_ne!(bytes, [0; 64]);
    }
}
