//! virtio-rng (virtio 1.2, 5.4): the host kernel's random numbers for the guest, as many and as often as the rate
//! limiter allows: a guest that asks for ever would keep a processor of the host's busy.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::queue::{Broken, Chain, Used};
use super::worker::{Shell, Worker, watch};
use super::{Activation, ActiveQueue, Interrupt, QueuePosition, VirtioDevice};
use crate::confine::ThreadKind;
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;

const QUEUE_SIZES: &[u16] = &[64];
/// No request gets more than this many bytes; a driver takes what it gets and asks again.
const MAX_BYTES: usize = 4096;
/// Requests served before the worker looks at its stop event again.
const BATCH: usize = 64;
const KICK: u64 = 0;
const TOKENS: u64 = 1;

pub struct Rng(Shell<RngWorker>);

impl Rng {
    pub fn new(limiter: Option<RateLimiter>) -> Self {
        Rng(Shell::new(limiter))
    }
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

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let [queue] = activation.take_queues()?;
        let Activation { interrupt, memory, .. } = activation;
        self.0.start(|limiter| RngWorker { queue, limiter, interrupt, chain: Chain::default(), _memory: memory })
    }

    fn deactivate(&mut self) -> Vec<QueuePosition> {
        self.0.stop()
    }
}

struct RngWorker {
    queue: ActiveQueue,
    limiter: Option<RateLimiter>,
    interrupt: Arc<Interrupt>,
    chain: Chain,
    /// What the chain's pointers point into.
    _memory: GuestMemory,
}

impl Worker for RngWorker {
    const NAME: &'static str = "virtio-rng";
    const KIND: ThreadKind = ThreadKind::Rng;
    type Parts = Option<RateLimiter>;

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
        for _ in 0..BATCH {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let bytes = self.chain.writable.len().min(MAX_BYTES) as u64;
            if let Some(limiter) = &mut self.limiter
                && !limiter.admit(bytes)
            {
                queue.undo_pop();
                queue.metrics().stalls.increment();
                // No kick is waited for: the limiter's timer comes first.
                return Ok(());
            }
            let length = fill(&mut self.chain) as u32;
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
        (self.limiter, vec![self.queue.queue.position()])
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
    use crate::api;
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
            limiter: None,
            interrupt: Arc::new(Interrupt::alone()),
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

    #[test]
    fn a_limited_guest_waits_for_its_tokens_and_then_gets_its_bytes() {
        let memory = memory();
        let queue = queue_with(&memory, &[&[(0x8000, 64, true)], &[(0x9000, 64, true)]]);
        let bucket = api::TokenBucket { size: 64, one_time_burst: None, refill_time: 50 };
        let limiter = RateLimiter::new(&api::RateLimiter { bandwidth: Some(bucket), ops: None }).unwrap();
        let mut worker = RngWorker {
            queue: ActiveQueue { queue, kick: EventFd::new(EFD_NONBLOCK).unwrap() },
            limiter,
            interrupt: Arc::new(Interrupt::alone()),
            chain: Chain::default(),
            _memory: memory.clone(),
        };
        let epoll = Epoll::new().unwrap();
        worker.register(&epoll).unwrap();
        worker.handle(KICK, EventSet::IN, &epoll).unwrap();
        assert_eq!(used(&memory, &worker.queue.queue).len(), 1);
        let mut ready = [vmm_sys_util::epoll::EpollEvent::default(); 1];
        // Twenty seconds stand for "for ever"; the timer is set to 50 ms.
        assert_eq!((epoll.wait(20_000, &mut ready).unwrap(), ready[0].data()), (1, TOKENS));
        worker.handle(TOKENS, EventSet::IN, &epoll).unwrap();
        assert_eq!(used(&memory, &worker.queue.queue).len(), 2);
    }
}
