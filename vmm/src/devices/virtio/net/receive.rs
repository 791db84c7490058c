//! From the tap to the guest.
//!
//! The driver's buffers are gathered until the largest frame fits, then read into with one `readv`. With mergeable buffers a
//! frame takes as many of them as it needs; the rest stay gathered for the next one. All buffers of a frame are
//! published at the same instant.

use std::collections::VecDeque;
use std::io;

use vmm_sys_util::eventfd::EventFd;

use super::super::iovec::{IoVec, MAX_SEGMENTS};
use super::super::queue::{Broken, Chain, Used, VirtQueue};
use super::super::{ActiveQueue, Interrupt, QueuePosition};
use super::pair::BATCH;
use crate::backends::tap::{HEADER, Tap};
use crate::rate_limiter::RateLimiter;

/// The largest frame that a tap hands over: 64 KiB of payload with its headers (virtio 1.2, 5.1.6.3.1).
const MAX_FRAME: usize = 65_550 + HEADER;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

pub struct Receiver {
    queue: ActiveQueue,
    mergeable: bool,
    chain: Chain,
    /// The gathered buffers' memory, and for each its head and length.
    space: IoVec,
    gathered: VecDeque<(u16, usize)>,
    used: Vec<Used>,
    limiter: Option<RateLimiter>,
    waits_for: WaitsFor,
}

/// What receiving goes on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WaitsFor {
    /// A frame.
    Tap,
    /// A kick: the driver gives buffers.
    Buffers,
    /// The limiter's timer.
    Tokens,
}

impl Receiver {
    pub fn new(queue: ActiveQueue, mergeable: bool, limiter: Option<RateLimiter>) -> Self {
        Receiver {
            queue,
            mergeable,
            chain: Chain::default(),
            space: IoVec::default(),
            gathered: VecDeque::new(),
            used: Vec::new(),
            limiter,
            // Until the driver has kicked for the first time there is nothing to receive into.
            waits_for: WaitsFor::Buffers,
        }
    }

    pub fn kick(&self) -> &EventFd {
        &self.queue.kick
    }

    pub fn take_kick(&self) {
        self.queue.take_kick();
    }

    /// Whether a frame is what receiving waits for.
    pub fn waits_for_tap(&self) -> bool {
        self.waits_for == WaitsFor::Tap
    }

    pub fn limiter(&self) -> Option<&RateLimiter> {
        self.limiter.as_ref()
    }

    /// The limiter's timer has fired.
    pub fn wake(&mut self) {
        self.limiter.iter_mut().for_each(RateLimiter::wake);
    }

    /// Puts the buffers back that no frame has come for, and says where the queue stands.
    pub fn stop(mut self) -> (QueuePosition, Option<RateLimiter>) {
        for _ in &self.gathered {
            self.queue.queue.undo_pop();
        }
        (self.queue.queue.position(), self.limiter)
    }

    /// Receives until the tap, the ring or the limiter has no more, or a batch is full.
    pub fn run(&mut self, tap: &Tap, interrupt: &Interrupt) -> Result<(), Broken> {
        self.waits_for = WaitsFor::Tap;
        for _ in 0..BATCH {
            if let Some(limiter) = &mut self.limiter
                && !limiter.is_open()
            {
                self.stall(WaitsFor::Tokens);
                break;
            }
            if !self.gather()? {
                self.stall(WaitsFor::Buffers);
                break;
            }
            match self.space.read_from(tap.fd()) {
                Ok(length) => self.deliver(length)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The tap is down: it becomes readable when it is up.
                Err(error) => {
                    tracing::debug!(%error, "tap read");
                    break;
                }
            }
        }
        if self.queue.queue.needs_interrupt()? {
            interrupt.queue();
        }
        Ok(())
    }

    fn stall(&mut self, waits_for: WaitsFor) {
        self.waits_for = waits_for;
        self.queue.queue.metrics().stalls.increment();
    }

    /// Makes sure that there is space for a frame; false if the driver has none and will kick.
    fn gather(&mut self) -> Result<bool, Broken> {
        loop {
            while self.wants_more() {
                if !self.gather_one(|queue, chain| queue.pop(chain))? {
                    break;
                }
            }
            // Less than the largest frame is better than waiting for buffers the driver may not have.
            if !self.gathered.is_empty() {
                return Ok(true);
            }
            if !self.queue.queue.enable_kicks()? {
                return Ok(false);
            }
        }
    }

    fn wants_more(&self) -> bool {
        match self.mergeable {
            true => self.space.len() < MAX_FRAME,
            false => self.gathered.is_empty(),
        }
    }

    fn gather_one(
        &mut self,
        pop: impl FnOnce(&mut VirtQueue, &mut Chain) -> Result<bool, Broken>,
    ) -> Result<bool, Broken> {
        if !pop(&mut self.queue.queue, &mut self.chain)? {
            return Ok(false);
        }
        let buffer = &self.chain.writable;
        if !self.chain.readable.is_empty() || buffer.len() < HEADER {
            return Err(Broken("receive buffer that cannot hold a header"));
        }
        if self.space.segments().len() + buffer.segments().len() > MAX_SEGMENTS {
            self.queue.queue.undo_pop();
            return Ok(false);
        }
        self.space.extend(buffer);
        self.gathered.push_back((self.chain.head, buffer.len()));
        Ok(true)
    }

    /// Publishes the buffers that a frame of `length` bytes (with header) has filled.
    fn deliver(&mut self, length: usize) -> Result<(), Broken> {
        if length < HEADER || length > self.space.len() {
            return Ok(());
        }
        if let Some(limiter) = &mut self.limiter {
            limiter.charge((length - HEADER) as u64);
        }
        self.used.clear();
        let mut left = length;
        let mut taken = 0;
        while left > 0 {
            let Some((head, size)) = self.gathered.pop_front() else { break };
            let part = left.min(size);
            self.used.push(Used { head, length: part as u32 });
            left -= part;
            taken += size;
        }
        let count = (self.used.len() as u16).to_le_bytes();
        self.space.write_at(NUM_BUFFERS, &count);
        self.space.consume(taken);
        self.queue.queue.publish(&self.used)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::queue::testing::{memory, queue_with, used};
    use super::*;
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    /// A tap, and the other end of its cable.
    fn tap() -> (Tap, UnixDatagram) {
        let (host, device) = UnixDatagram::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        (Tap::from_file(File::from(OwnedFd::from(device))), host)
    }

    fn receiver(queue: VirtQueue, mergeable: bool) -> Receiver {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        Receiver::new(ActiveQueue { queue, kick }, mergeable, None)
    }

    fn frame(length: usize) -> Vec<u8> {
        let mut frame = vec![0; HEADER];
        frame.extend((0..length).map(|i| i as u8));
        frame
    }

    #[test]
    fn a_frame_takes_as_many_mergeable_buffers_as_it_needs() {
        let memory = memory();
        let buffers: Vec<[(u64, u32, bool); 1]> = (0..4).map(|i| [(0x8000 + i * 0x1000, 512, true)]).collect();
        let chains: Vec<&[_]> = buffers.iter().map(|buffer| &buffer[..]).collect();
        let (tap, host) = tap();
        let interrupt = Interrupt::alone();
        let mut receiver = receiver(queue_with(&memory, &chains), true);
        host.send(&frame(1000)).unwrap();
        host.send(&frame(100)).unwrap();
        receiver.run(&tap, &interrupt).unwrap();
        let lengths: Vec<u32> = used(&memory, &receiver.queue.queue).iter().map(|u| u.length).collect();
        assert_eq!(lengths, [512, 500, 112]);
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x8000 + 10)).unwrap(), 2);
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0xa000 + 10)).unwrap(), 1);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x9000)).unwrap(), (512 - HEADER) as u8);
        assert!(receiver.waits_for_tap());
    }

    #[test]
    fn with_the_ring_empty_it_waits_for_a_kick_and_loses_nothing() {
        let memory = memory();
        let (tap, host) = tap();
        let interrupt = Interrupt::alone();
        let mut receiver = receiver(queue_with(&memory, &[&[(0x8000, 2048, true)]]), false);
        host.send(&frame(10)).unwrap();
        host.send(&frame(20)).unwrap();
        receiver.run(&tap, &interrupt).unwrap();
        assert_eq!(receiver.waits_for, WaitsFor::Buffers);
        assert_eq!(used(&memory, &receiver.queue.queue).len(), 1);
        // The driver gives the buffer back and kicks.
        receiver.queue.queue.undo_pop();
        receiver.run(&tap, &interrupt).unwrap();
        let lengths: Vec<u32> = used(&memory, &receiver.queue.queue).iter().map(|u| u.length).collect();
        assert_eq!(lengths, [22, 32]);
    }

    #[test]
    fn a_stop_puts_gathered_buffers_back() {
        let memory = memory();
        let buffers: Vec<[(u64, u32, bool); 1]> = (0..4).map(|i| [(0x8000 + i * 0x1000, 512, true)]).collect();
        let chains: Vec<&[_]> = buffers.iter().map(|buffer| &buffer[..]).collect();
        let (tap, host) = tap();
        let mut receiver = receiver(queue_with(&memory, &chains), true);
        host.send(&frame(600)).unwrap();
        receiver.run(&tap, &Interrupt::alone()).unwrap();
        assert_eq!(receiver.stop().0, QueuePosition { next_available: 2, next_used: 2 });
    }

    #[test]
    fn a_limited_guest_gets_what_its_tokens_pay_and_the_rest_waits_in_the_tap() {
        let memory = memory();
        let (tap, host) = tap();
        let mut receiver = receiver(queue_with(&memory, &[&[(0x8000, 2000, true)], &[(0x9000, 2000, true)]]), false);
        let bucket = crate::api::TokenBucket { size: 100, one_time_burst: None, refill_time: 3_600_000 };
        let config = crate::api::RateLimiter { bandwidth: Some(bucket), ops: None };
        receiver.limiter = RateLimiter::new(&config).unwrap();
        host.send(&frame(100)).unwrap();
        host.send(&frame(100)).unwrap();
        let interrupt = Interrupt::alone();
        receiver.run(&tap, &interrupt).unwrap();
        assert_eq!(used(&memory, &receiver.queue.queue).len(), 1);
        assert_eq!(receiver.waits_for, WaitsFor::Tokens);
        receiver.limiter = None;
        receiver.run(&tap, &interrupt).unwrap();
        assert_eq!(used(&memory, &receiver.queue.queue).len(), 2);
    }

    #[test]
    fn buffers_without_room_for_a_header_break_the_queue() {
        let memory = memory();
        let (tap, _host) = tap();
        let mut receiver = receiver(queue_with(&memory, &[&[(0x8000, 11, true)]]), true);
        assert!(receiver.run(&tap, &Interrupt::alone()).is_err());
    }
}
