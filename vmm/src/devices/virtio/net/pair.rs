//! The thread of one pair of queues, and of the control queue if it is the first pair's.
//!
//! # No lost wake-up
//!
//! Each direction can be stopped by either side: receiving by an empty ring, transmitting by a full tap. What
//! is waited for is always derived from that state in one place (`PairWorker::update_interest`): the tap is readable-watched
//! unless receiving waits for buffers, and then kicks are on and were checked once more after
//! they were turned on; it is writable-watched exactly while transmitting waits for it. With ring and
//! tap both full, either side's progress wakes the worker. A direction that waits for its rate limiter's tokens is woken by the
//! limiter's timer, which is set whenever tokens are refused.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::control::Control;
use super::receive::Receiver;
use super::taps::Taps;
use super::transmit::Transmitter;
use crate::api;
use crate::bus::lock;
use crate::confine::ThreadKind;
use crate::devices::virtio::queue::Broken;
use crate::devices::virtio::worker::{Worker, rewatch, watch};
use crate::devices::virtio::{Activation, ActiveQueue, Interrupt, QueuePosition};
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;

/// Frames handled in one go before the other direction and the stop event get their turn.
pub const BATCH: usize = 256;

/// Numbers in the worker's epoll set.
const TAP: u64 = 0;
const RECEIVE_KICK: u64 = 1;
const TRANSMIT_KICK: u64 = 2;
const RECEIVE_TOKENS: u64 = 3;
const TRANSMIT_TOKENS: u64 = 4;
const CONTROL_KICK: u64 = 5;

/// One pair's limiters; all pairs' share their buckets.
pub struct Limits {
    pub receive: Option<RateLimiter>,
    pub transmit: Option<RateLimiter>,
}

impl Limits {
    /// These for the first of `count` pairs, and others over the same buckets.
    pub fn for_each_of(self, count: usize) -> io::Result<Vec<Self>> {
        let mut all = (1..count).map(|_| self.share()).collect::<io::Result<Vec<_>>>()?;
        all.insert(0, self);
        Ok(all)
    }

    pub fn share(&self) -> io::Result<Self> {
        let share = |limiter: &Option<RateLimiter>| limiter.as_ref().map(RateLimiter::share).transpose();
        Ok(Limits { receive: share(&self.receive)?, transmit: share(&self.transmit)? })
    }

    pub fn change(&mut self, receive: &api::RateLimiter, transmit: &api::RateLimiter) -> io::Result<()> {
        RateLimiter::change(&mut self.receive, receive)?;
        RateLimiter::change(&mut self.transmit, transmit)
    }
}

pub struct PairWorker {
    receiver: Receiver,
    transmitter: Transmitter,
    control: Option<Control>,
    taps: Arc<Taps>,
    /// The pair's number.
    index: usize,
    /// The pair's queue of the tap, to be waited for. Open as long as `taps` is.
    tap: RawFd,
    interrupt: Arc<Interrupt>,
    /// What of the tap is waited for now.
    watched: EventSet,
    /// What the buffers' pointers point into.
    _memory: GuestMemory,
}

impl PairWorker {
    pub fn new(
        [receive, transmit]: [ActiveQueue; 2],
        limits: Limits,
        control: Option<Control>,
        taps: Arc<Taps>,
        index: usize,
        activation: &Activation,
    ) -> Self {
        let tap = lock(taps.queue(index)).fd();
        PairWorker {
            receiver: Receiver::new(receive, activation.has(VIRTIO_NET_F_MRG_RXBUF), limits.receive),
            transmitter: Transmitter::new(transmit, limits.transmit),
            control,
            taps,
            index,
            tap,
            interrupt: activation.interrupt.clone(),
            watched: EventSet::empty(),
            _memory: activation.memory.clone(),
        }
    }

    fn receive(&mut self) -> Result<(), Broken> {
        self.receiver.run(&lock(self.taps.queue(self.index)), &self.interrupt)
    }

    fn transmit(&mut self) -> Result<(), Broken> {
        self.transmitter.run(&lock(self.taps.queue(self.index)), &self.interrupt)
    }

    fn update_interest(&mut self, epoll: &Epoll) -> Result<(), Broken> {
        let mut wanted = EventSet::empty();
        if self.receiver.waits_for_tap() {
            wanted |= EventSet::IN;
        }
        if self.transmitter.waits_for_tap() {
            wanted |= EventSet::OUT;
        }
        if wanted != self.watched {
            rewatch(epoll, self.tap, wanted, TAP).map_err(|_| Broken("epoll"))?;
            self.watched = wanted;
        }
        Ok(())
    }

    /// The interface was taken away on the host. There is nothing to be received any more, and what is
    /// transmitted is lost, as on a cable that is cut.
    fn lose_tap(&mut self, epoll: &Epoll) -> Result<(), Broken> {
        tracing::warn!("virtio-net: the tap is gone");
        epoll.ctl(ControlOperation::Delete, self.tap, EpollEvent::default()).map_err(|_| Broken("epoll"))?;
        Err(Broken("the tap is gone"))
    }
}

impl Worker for PairWorker {
    const NAME: &'static str = "virtio-net";
    const KIND: ThreadKind = ThreadKind::Net;
    type Parts = Limits;

    fn register(&self, epoll: &Epoll) -> io::Result<()> {
        watch(epoll, self.tap, self.watched, TAP)?;
        watch(epoll, self.receiver.kick().as_raw_fd(), EventSet::IN, RECEIVE_KICK)?;
        watch(epoll, self.transmitter.kick().as_raw_fd(), EventSet::IN, TRANSMIT_KICK)?;
        for (limiter, number) in
            [(self.receiver.limiter(), RECEIVE_TOKENS), (self.transmitter.limiter(), TRANSMIT_TOKENS)]
        {
            limiter.map_or(Ok(()), |limiter| watch(epoll, limiter.timer(), EventSet::IN, number))?;
        }
        let control = self.control.as_ref();
        control.map_or(Ok(()), |control| watch(epoll, control.kick().as_raw_fd(), EventSet::IN, CONTROL_KICK))
    }

    fn handle(&mut self, number: u64, events: EventSet, epoll: &Epoll) -> Result<(), Broken> {
        match number {
            TAP => {
                if events.intersects(EventSet::ERROR | EventSet::HANG_UP) {
                    return self.lose_tap(epoll);
                }
                if events.contains(EventSet::OUT) {
                    self.transmit()?;
                }
                if events.contains(EventSet::IN) {
                    self.receive()?;
                }
            }
            RECEIVE_KICK => {
                self.receiver.take_kick();
                self.receive()?;
            }
            TRANSMIT_KICK => {
                self.transmitter.take_kick();
                self.transmit()?;
            }
            RECEIVE_TOKENS => {
                self.receiver.wake();
                self.receive()?;
            }
            TRANSMIT_TOKENS => {
                self.transmitter.wake();
                self.transmit()?;
            }
            CONTROL_KICK => {
                if let Some(control) = &mut self.control {
                    control.run(&self.taps, &self.interrupt)?;
                }
            }
            _ => {}
        }
        self.update_interest(epoll)
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn take_apart(self) -> (Self::Parts, Vec<QueuePosition>) {
        let (receiving, receive) = self.receiver.stop();
        let (transmitting, transmit) = self.transmitter.stop();
        let mut positions = vec![receiving, transmitting];
        positions.extend(self.control.map(|control| control.position()));
        (Limits { receive, transmit }, positions)
    }
}
