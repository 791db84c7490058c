//! virtio-vsock (virtio 1.2, 5.10): stream sockets between guest and host, without a network.
//!
//! `packet` is the header, `connection` one stream with its credit, `multiplexer` all of them; this file is the device and the
//! thread that moves packets between its rings and the multiplexer. What a connection is on the host's side
//! is `backends::vsock`.
//!
//! Both rings can be full at once: the guest then waits for its packets to be taken, and ours for buffers. The multiplexer
//! holds a bounded number of answers for that case. Only when those are used up is the guest's ring left alone, and each buffer that
//! the guest gives makes room again ([`VsockWorker::run`] goes on where it stopped).

mod connection;
mod multiplexer;
mod packet;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::{Epoll, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::queue::{Broken, Chain, Used};
use super::worker::{Shell, Worker, watch};
use super::{Activation, ActiveQueue, Interrupt, QueuePosition, VirtioDevice};
use crate::backends::vsock::VsockSockets;
use crate::confine::ThreadKind;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use multiplexer::Multiplexer;
use packet::{HEADER, Header};

/// Receiving (host to guest), transmitting, events.
const QUEUE_SIZES: &[u16] = &[256, 256, 16];
/// Packets handled in one go before the other direction and the stop event get their turn.
const BATCH: usize = 256;
/// Context ids below are the hypervisor's and the host's, the last one means "any" (virtio 1.2, 5.10.4).
const CIDS: std::ops::Range<u32> = 3..u32::MAX;
const TICK: Duration = Duration::from_secs(1);
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.2, 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Numbers in the worker's epoll set; the multiplexer's own are above.
const RECEIVE_KICK: u64 = 0;
const TRANSMIT_KICK: u64 = 1;
const EVENT_KICK: u64 = 2;
const TIMER: u64 = 3;

pub struct Vsock {
    config: [u8; 8],
    worker: Shell<VsockWorker>,
}

/// What the worker is lent.
struct Parts {
    multiplexer: Multiplexer,
    /// Made once: a thread under its filter makes none.
    timer: TimerFd,
    timer_is_set: bool,
    /// The guest is to be told that its connections are gone (it was restored from a snapshot).
    tells_reset: bool,
}

impl Vsock {
    pub fn new(guest_cid: u32, sockets: VsockSockets) -> Result<Self> {
        if !CIDS.contains(&guest_cid) {
            return Err(Error::BadConfiguration(format!(
                "guest_cid is {guest_cid}; it must be between {} and {}",
                CIDS.start,
                CIDS.end - 1
            )));
        }
        let parts = Parts {
            multiplexer: Multiplexer::new(guest_cid, sockets),
            timer: TimerFd::new().map_err(|error| Error::host("vsock's timer")(error.into()))?,
            timer_is_set: false,
            tells_reset: false,
        };
        Ok(Vsock { config: u64::from(guest_cid).to_le_bytes(), worker: Shell::new(parts) })
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    /// What the guest was connected to is not here. It is told with the next activation.
    fn adopt(&mut self, _: &[u8]) {
        if let Some(parts) = self.worker.parts() {
            parts.tells_reset = true;
        }
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let [receive, transmit, events] = activation.take_queues()?;
        self.worker.start(|mut parts| {
            if !activation.is_resumed {
                parts.multiplexer.clear();
            }
            parts.multiplexer.count_in(activation.metrics);
            VsockWorker {
                receive,
                transmit,
                events,
                parts,
                interrupt: activation.interrupt,
                chain: Chain::default(),
                _memory: activation.memory,
            }
        })
    }

    fn deactivate(&mut self) -> Vec<QueuePosition> {
        self.worker.stop()
    }
}

struct VsockWorker {
    receive: ActiveQueue,
    transmit: ActiveQueue,
    events: ActiveQueue,
    parts: Parts,
    interrupt: Arc<Interrupt>,
    chain: Chain,
    /// What the chain's pointers point into.
    _memory: GuestMemory,
}

impl Worker for VsockWorker {
    const NAME: &'static str = "virtio-vsock";
    const KIND: ThreadKind = ThreadKind::Vsock;
    type Parts = Parts;

    fn register(&self, epoll: &Epoll) -> io::Result<()> {
        watch(epoll, self.receive.kick.as_raw_fd(), EventSet::IN, RECEIVE_KICK)?;
        watch(epoll, self.transmit.kick.as_raw_fd(), EventSet::IN, TRANSMIT_KICK)?;
        watch(epoll, self.events.kick.as_raw_fd(), EventSet::IN, EVENT_KICK)?;
        watch(epoll, self.parts.timer.as_raw_fd(), EventSet::IN, TIMER)?;
        self.parts.multiplexer.register(epoll)
    }

    fn handle(&mut self, number: u64, events: EventSet, epoll: &Epoll) -> std::result::Result<(), Broken> {
        match number {
            RECEIVE_KICK => self.receive.take_kick(),
            TRANSMIT_KICK => self.transmit.take_kick(),
            EVENT_KICK => {
                self.events.take_kick();
                self.tell_reset()?;
            }
            TIMER => self.tick(epoll),
            number => self.parts.multiplexer.on_event(number, events, epoll),
        }
        self.run(epoll)?;
        self.set_timer();
        Ok(())
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn take_apart(self) -> (Self::Parts, Vec<QueuePosition>) {
        let queues = [&self.receive, &self.transmit, &self.events];
        let positions = queues.map(|it| it.queue.position()).to_vec();
        (self.parts, positions)
    }
}

impl VsockWorker {
    /// Both directions, as far as they go.
    fn run(&mut self, epoll: &Epoll) -> std::result::Result<(), Broken> {
        self.take_packets(epoll)?;
        let was_full = !self.parts.multiplexer.has_room();
        self.give_packets()?;
        if was_full && self.parts.multiplexer.has_room() {
            // The guest's packets that were left in the ring.
            let _ = self.transmit.kick.write(1);
        }
        Ok(())
    }

    /// From the guest, as long as there is room for the answers.
    fn take_packets(&mut self, epoll: &Epoll) -> std::result::Result<(), Broken> {
        let queue = &mut self.transmit.queue;
        queue.disable_kicks()?;
        for _ in 0..BATCH {
            if !self.parts.multiplexer.has_room() {
                // No kick is waited for: `run` comes back when there is room.
                queue.metrics().stalls.increment();
                break;
            }
            if !queue.pop(&mut self.chain)? {
                if queue.enable_kicks()? {
                    continue;
                }
                break;
            }
            let mut bytes = [0; HEADER];
            let payload = &mut self.chain.readable;
            if !payload.read_at(0, &mut bytes) {
                return Err(Broken("packet without a header"));
            }
            let header = Header::parse(&bytes);
            payload.consume(HEADER);
            if (header.length as usize) > payload.len() {
                return Err(Broken("packet shorter than its header says"));
            }
            payload.truncate(header.length as usize);
            self.parts.multiplexer.handle(&header, payload, epoll);
            queue.publish(&[Used { head: self.chain.head, length: 0 }])?;
        }
        if queue.needs_interrupt()? {
            self.interrupt.queue();
        }
        // One that was full of packets may have more, and their kick has been taken.
        if self.parts.multiplexer.has_room() && queue.enable_kicks()? {
            let _ = self.transmit.kick.write(1);
        }
        Ok(())
    }

    /// To the guest, as long as it has buffers.
    fn give_packets(&mut self) -> std::result::Result<(), Broken> {
        let queue = &mut self.receive.queue;
        let mut given = 0;
        while self.parts.multiplexer.has_outgoing() && given < BATCH {
            if !queue.pop(&mut self.chain)? {
                if queue.enable_kicks()? {
                    continue;
                }
                queue.metrics().stalls.increment();
                break;
            }
            let buffer = &self.chain.writable;
            if !self.chain.readable.is_empty() || buffer.len() < HEADER {
                return Err(Broken("receive buffer that cannot hold a header"));
            }
            match self.parts.multiplexer.fill(buffer, Instant::now())? {
                Some(length) => queue.publish(&[Used { head: self.chain.head, length }])?,
                None => {
                    queue.undo_pop();
                    break;
                }
            }
            given += 1;
        }
        if queue.needs_interrupt()? {
            self.interrupt.queue();
        }
        if given == BATCH {
            let _ = self.receive.kick.write(1);
        }
        Ok(())
    }

    fn tell_reset(&mut self) -> std::result::Result<(), Broken> {
        let queue = &mut self.events.queue;
        if !self.parts.tells_reset || !queue.pop(&mut self.chain)? {
            return Ok(());
        }
        let event = EVENT_TRANSPORT_RESET.to_le_bytes();
        if !self.chain.writable.write_at(0, &event) {
            return Err(Broken("event buffer that cannot hold an event"));
        }
        queue.publish(&[Used { head: self.chain.head, length: event.len() as u32 }])?;
        self.parts.tells_reset = false;
        if queue.needs_interrupt()? {
            self.interrupt.queue();
        }
        Ok(())
    }

    fn tick(&mut self, epoll: &Epoll) {
        // It was readable, and only this thread sets it.
        let _ = self.parts.timer.wait();
        self.parts.timer_is_set = false;
        self.parts.multiplexer.tick(Instant::now(), epoll);
    }

    fn set_timer(&mut self) {
        if !self.parts.timer_is_set && self.parts.multiplexer.needs_tick() {
            match self.parts.timer.reset(TICK, None) {
                Ok(()) => self.parts.timer_is_set = true,
                Err(error) => tracing::error!(%error, "vsock's timer"),
            }
        }
    }
}

#[cfg(test)]
mod tests;
