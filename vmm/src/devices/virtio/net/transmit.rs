//! From the guest to the tap.

use std::io;

use vmm_sys_util::eventfd::EventFd;

use super::super::queue::{Broken, Chain, Used};
use super::super::{ActiveQueue, Interrupt, QueuePosition};
use super::pair::BATCH;
use crate::backends::tap::{HEADER, Tap};
use crate::rate_limiter::RateLimiter;

/// Header, Ethernet with a VLAN tag, and the largest IP packet. Longer ones are dropped.
const MAX_FRAME: usize = HEADER + 18 + 65_535;

pub struct Transmitter {
    queue: ActiveQueue,
    chain: Chain,
    limiter: Option<RateLimiter>,
    waits_for: WaitsFor,
}

/// What transmitting goes on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WaitsFor {
    /// A kick: the driver has a frame.
    Frame,
    /// Room in the tap. The next frame in the ring was put back for want of it, and has paid its tokens.
    Tap,
    /// The limiter's timer.
    Tokens,
}

impl Transmitter {
    pub fn new(queue: ActiveQueue, limiter: Option<RateLimiter>) -> Self {
        Transmitter { queue, chain: Chain::default(), limiter, waits_for: WaitsFor::Frame }
    }

    pub fn limiter(&self) -> Option<&RateLimiter> {
        self.limiter.as_ref()
    }

    /// The limiter's timer has fired.
    pub fn wake(&mut self) {
        self.limiter.iter_mut().for_each(RateLimiter::wake);
    }

    pub fn kick(&self) -> &EventFd {
        &self.queue.kick
    }

    pub fn take_kick(&self) {
        self.queue.take_kick();
    }

    /// Whether the tap is full, and there is a frame for it.
    pub fn waits_for_tap(&self) -> bool {
        self.waits_for == WaitsFor::Tap
    }

    /// Says where the queue stands; a frame that waits for the tap is still in it.
    pub fn stop(self) -> (QueuePosition, Option<RateLimiter>) {
        (self.queue.queue.position(), self.limiter)
    }

    /// Transmits until the ring is empty, the tap is full or the limiter has no more tokens, or a batch is done.
    pub fn run(&mut self, tap: &Tap, interrupt: &Interrupt) -> Result<(), Broken> {
        self.queue.queue.disable_kicks()?;
        self.waits_for = self.send_batch(tap)?;
        // A driver may well add to the ring before it is told; this is after the last look at it.
        if self.waits_for == WaitsFor::Frame && self.queue.queue.enable_kicks()? {
            let _ = self.queue.kick.write(1);
        }
        if self.queue.queue.needs_interrupt()? {
            interrupt.queue();
        }
        Ok(())
    }

    fn send_batch(&mut self, tap: &Tap) -> Result<WaitsFor, Broken> {
        let mut is_paid = self.waits_for == WaitsFor::Tap;
        for _ in 0..BATCH {
            if !self.queue.queue.pop(&mut self.chain)? {
                break;
            }
            if !is_paid && !self.pay() {
                return Ok(self.put_back(WaitsFor::Tokens));
            }
            if let Err(error) = self.send(tap) {
                match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(self.put_back(WaitsFor::Tap)),
                    // A header that makes no sense, a tap that is down: the frame is lost, as on a wire.
                    _ => tracing::debug!(%error, "frame dropped"),
                }
            }
            is_paid = false;
            self.queue.queue.publish(&[Used { head: self.chain.head, length: 0 }])?;
        }
        Ok(WaitsFor::Frame)
    }

    /// Takes the tokens of the frame; false if it must wait for them.
    fn pay(&mut self) -> bool {
        let bytes = self.chain.readable.len().saturating_sub(HEADER) as u64;
        self.limiter.as_mut().is_none_or(|limiter| limiter.admit(bytes))
    }

    fn put_back(&mut self, waits_for: WaitsFor) -> WaitsFor {
        self.queue.queue.undo_pop();
        self.queue.queue.metrics().stalls.increment();
        waits_for
    }

    fn send(&self, tap: &Tap) -> io::Result<()> {
        let frame = &self.chain.readable;
        if !(HEADER..=MAX_FRAME).contains(&frame.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        loop {
            match frame.write_to(tap.fd()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::queue::VirtQueue;
    use super::super::super::queue::testing::{memory, queue_with, used};
    use super::*;
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn transmitter(queue: VirtQueue) -> Transmitter {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        Transmitter::new(ActiveQueue { queue, kick }, None)
    }

    fn tap() -> (Tap, UnixDatagram) {
        let (host, device) = UnixDatagram::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        (Tap::from_file(File::from(OwnedFd::from(device))), host)
    }

    #[test]
    fn a_frame_in_pieces_leaves_in_one_and_a_senseless_one_is_given_back() {
        let memory = memory();
        memory.write_slice(b"hello, wire", GuestAddress(0x9000)).unwrap();
        let chains: [&[_]; 2] =
            [&[(0x8000, 12, false), (0x9000, 5, false), (0x9005, 6, false)], &[(0x8000, 11, false)]];
        let (tap, host) = tap();
        let mut transmitter = transmitter(queue_with(&memory, &chains));
        transmitter.run(&tap, &Interrupt::alone()).unwrap();
        let mut frame = [0; 64];
        let length = host.recv(&mut frame).unwrap();
        assert_eq!(&frame[HEADER..length], b"hello, wire");
        assert_eq!(used(&memory, &transmitter.queue.queue).len(), 2);
    }

    #[test]
    fn with_the_tap_full_the_frame_stays_and_leaves_later() {
        let memory = memory();
        let (tap, host) = tap();
        let mut transmitter = transmitter(queue_with(&memory, &[&[(0x8000, 1000, false)]]));
        let device: &dyn std::os::fd::AsFd = &device_of(&tap);
        let filler = UnixDatagram::from(device.as_fd().try_clone_to_owned().unwrap());
        while filler.send(&[0; 1000]).is_ok() {}
        transmitter.run(&tap, &Interrupt::alone()).unwrap();
        assert!(transmitter.waits_for_tap());
        assert!(used(&memory, &transmitter.queue.queue).is_empty());
        let mut frame = [0; 2000];
        host.set_nonblocking(true).unwrap();
        while host.recv(&mut frame).is_ok() {}
        transmitter.run(&tap, &Interrupt::alone()).unwrap();
        assert!(!transmitter.waits_for_tap());
        assert_eq!(used(&memory, &transmitter.queue.queue).len(), 1);
        assert_eq!(host.recv(&mut frame).unwrap(), 1000);
    }

    #[test]
    fn a_limited_guest_waits_for_its_tokens_and_pays_each_frame_once() {
        let memory = memory();
        let (tap, host) = tap();
        host.set_nonblocking(true).unwrap();
        let chains: [&[_]; 2] = [&[(0x8000, 112, false)], &[(0x8000, 112, false)]];
        let mut transmitter = transmitter(queue_with(&memory, &chains));
        transmitter.limiter = limiter(100);
        let interrupt = Interrupt::alone();
        let device: &dyn std::os::fd::AsFd = &device_of(&tap);
        let filler = UnixDatagram::from(device.as_fd().try_clone_to_owned().unwrap());
        while filler.send(&[0; 1000]).is_ok() {}
        transmitter.run(&tap, &interrupt).unwrap();
        assert_eq!(transmitter.waits_for, WaitsFor::Tap);
        let mut frame = [0; 2000];
        while host.recv(&mut frame).is_ok() {}
        // The first has paid already; an hour would pass before the second could.
        transmitter.run(&tap, &interrupt).unwrap();
        assert_eq!(transmitter.waits_for, WaitsFor::Tokens);
        assert_eq!(used(&memory, &transmitter.queue.queue).len(), 1);
        assert_eq!(host.recv(&mut frame).unwrap(), 112);
        assert!(host.recv(&mut frame).is_err());
        transmitter.limiter = None;
        transmitter.run(&tap, &interrupt).unwrap();
        assert_eq!(host.recv(&mut frame).unwrap(), 112);
    }

    /// So many bytes an hour.
    fn limiter(size: u64) -> Option<RateLimiter> {
        let bucket = crate::api::TokenBucket { size, one_time_burst: None, refill_time: 3_600_000 };
        RateLimiter::new(&crate::api::RateLimiter { bandwidth: Some(bucket), ops: None }).unwrap()
    }

    fn device_of(tap: &Tap) -> OwnedFd {
        // SAFETY: the descriptor is open as long as the tap, which the caller holds.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(tap.fd()) }.try_clone_to_owned().unwrap()
    }
}
