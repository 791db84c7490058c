//! virtio-net (virtio 1.2, 5.1) on a tap.
//!
//! One pair of queues on one thread. Frames go between tap and guest memory with one `readv` or `writev` each and no
//! copy in between; the virtio-net header is the tap's own, so offloads pass through in both directions.
//! `receive` and `transmit` are the two directions, this file is the device and the thread that drives them.
//!
//! # No lost wake-up
//!
//! Each direction can be stopped by either side: receiving by an empty ring, transmitting by a full tap. What
//! is waited for is always derived from that state in one place (`NetWorker::update_interest`): the tap is readable-watched
//! unless receiving waits for buffers, and then kicks are on and were checked once more after
//! they were turned on; it is writable-watched exactly while transmitting waits for it. With ring and
//! tap both full, either side's progress wakes the worker. A direction that waits for its rate limiter's tokens is woken by the
//! limiter's timer, which is set whenever tokens are refused.

mod receive;
mod transmit;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::queue::Broken;
use super::worker::{Shell, Worker, rewatch, watch};
use super::{Activation, Interrupt, QueuePosition, VirtioDevice};
use crate::api;
use crate::backends::tap::{Offloads, Tap};
use crate::confine::ThreadKind;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;
use receive::Receiver;
use transmit::Transmitter;

const QUEUE_SIZES: &[u16] = &[256, 256];
/// Frames handled in one go before the other direction and the stop event get their turn.
const BATCH: usize = 256;

/// Numbers in the worker's epoll set.
const TAP: u64 = 0;
const RECEIVE_KICK: u64 = 1;
const TRANSMIT_KICK: u64 = 2;
const RECEIVE_TOKENS: u64 = 3;
const TRANSMIT_TOKENS: u64 = 4;

/// What of the host's is behind an interface.
pub struct Link {
    pub tap: Tap,
    /// How much the guest may receive, and how much it may transmit.
    pub receive_limiter: Option<RateLimiter>,
    pub transmit_limiter: Option<RateLimiter>,
}

pub struct Net {
    worker: Shell<NetWorker>,
    name: String,
    features: u64,
    config: Vec<u8>,
}

impl Net {
    /// `name` is what the configuration calls the interface.
    pub fn new(link: Link, name: &str, mac: Option<MacAddress>) -> Self {
        let mut features = 0;
        for bit in [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
        ] {
            features |= 1 << bit;
        }
        if link.tap.has_uso() {
            for bit in [VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6] {
                features |= 1 << bit;
            }
        }
        let config = mac.map_or(Vec::new(), |mac| mac.0.to_vec());
        if mac.is_some() {
            features |= 1 << VIRTIO_NET_F_MAC;
        }
        Net { worker: Shell::new(link), name: name.to_owned(), features, config }
    }
}

impl Net {
    /// Changes the buckets of the two directions that are given. To be called while the device does not work.
    pub fn limit(&mut self, receive: &api::RateLimiter, transmit: &api::RateLimiter) -> Result<()> {
        let link = self.worker.parts().ok_or(Error::host("interface")(io::ErrorKind::ResourceBusy.into()))?;
        RateLimiter::change(&mut link.receive_limiter, receive)
            .and_then(|()| RateLimiter::change(&mut link.transmit_limiter, transmit))
            .map_err(Error::host("rate limiter's timer"))
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
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
        let [receive, transmit] = activation.take_queues()?;
        self.worker.parts().ok_or(io::ErrorKind::ResourceBusy)?.tap.set_offloads(offloads(&activation))?;
        self.worker.start(|Link { tap, receive_limiter, transmit_limiter }| NetWorker {
            receiver: Receiver::new(receive, activation.has(VIRTIO_NET_F_MRG_RXBUF), receive_limiter),
            transmitter: Transmitter::new(transmit, transmit_limiter),
            tap,
            interrupt: activation.interrupt,
            watched: EventSet::empty(),
            _memory: activation.memory,
        })
    }

    fn deactivate(&mut self) -> Vec<QueuePosition> {
        self.worker.stop()
    }
}

/// What the driver can take from us unfinished.
fn offloads(activation: &Activation) -> Offloads {
    Offloads {
        checksum: activation.has(VIRTIO_NET_F_GUEST_CSUM),
        tso4: activation.has(VIRTIO_NET_F_GUEST_TSO4),
        tso6: activation.has(VIRTIO_NET_F_GUEST_TSO6),
        ecn: activation.has(VIRTIO_NET_F_GUEST_ECN),
        uso: activation.has(VIRTIO_NET_F_GUEST_USO4) && activation.has(VIRTIO_NET_F_GUEST_USO6),
    }
}

struct NetWorker {
    receiver: Receiver,
    transmitter: Transmitter,
    tap: Tap,
    interrupt: Arc<Interrupt>,
    /// What of the tap is waited for now.
    watched: EventSet,
    /// What the buffers' pointers point into.
    _memory: GuestMemory,
}

impl Worker for NetWorker {
    const NAME: &'static str = "virtio-net";
    const KIND: ThreadKind = ThreadKind::Net;
    type Parts = Link;

    fn register(&self, epoll: &Epoll) -> io::Result<()> {
        watch(epoll, self.tap.fd(), self.watched, TAP)?;
        watch(epoll, self.receiver.kick().as_raw_fd(), EventSet::IN, RECEIVE_KICK)?;
        watch(epoll, self.transmitter.kick().as_raw_fd(), EventSet::IN, TRANSMIT_KICK)?;
        for (limiter, number) in
            [(self.receiver.limiter(), RECEIVE_TOKENS), (self.transmitter.limiter(), TRANSMIT_TOKENS)]
        {
            limiter.map_or(Ok(()), |limiter| watch(epoll, limiter.timer(), EventSet::IN, number))?;
        }
        Ok(())
    }

    fn handle(&mut self, number: u64, events: EventSet, epoll: &Epoll) -> std::result::Result<(), Broken> {
        match number {
            TAP => {
                if events.intersects(EventSet::ERROR | EventSet::HANG_UP) {
                    return self.lose_tap(epoll);
                }
                if events.contains(EventSet::OUT) {
                    self.transmitter.run(&self.tap, &self.interrupt)?;
                }
                if events.contains(EventSet::IN) {
                    self.receiver.run(&self.tap, &self.interrupt)?;
                }
            }
            RECEIVE_KICK => {
                self.receiver.take_kick();
                self.receiver.run(&self.tap, &self.interrupt)?;
            }
            TRANSMIT_KICK => {
                self.transmitter.take_kick();
                self.transmitter.run(&self.tap, &self.interrupt)?;
            }
            RECEIVE_TOKENS => {
                self.receiver.wake();
                self.receiver.run(&self.tap, &self.interrupt)?;
            }
            TRANSMIT_TOKENS => {
                self.transmitter.wake();
                self.transmitter.run(&self.tap, &self.interrupt)?;
            }
            _ => {}
        }
        self.update_interest(epoll)
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn take_apart(self) -> (Self::Parts, Vec<QueuePosition>) {
        let (receiving, receive_limiter) = self.receiver.stop();
        let (transmitting, transmit_limiter) = self.transmitter.stop();
        (Link { tap: self.tap, receive_limiter, transmit_limiter }, vec![receiving, transmitting])
    }
}

impl NetWorker {
    fn update_interest(&mut self, epoll: &Epoll) -> std::result::Result<(), Broken> {
        let mut wanted = EventSet::empty();
        if self.receiver.waits_for_tap() {
            wanted |= EventSet::IN;
        }
        if self.transmitter.waits_for_tap() {
            wanted |= EventSet::OUT;
        }
        if wanted != self.watched {
            rewatch(epoll, self.tap.fd(), wanted, TAP).map_err(|_| Broken("epoll"))?;
            self.watched = wanted;
        }
        Ok(())
    }

    /// The interface was taken away on the host. There is nothing to be received any more, and what is
    /// transmitted is lost, as on a cable that is cut.
    fn lose_tap(&mut self, epoll: &Epoll) -> std::result::Result<(), Broken> {
        tracing::warn!("virtio-net: the tap is gone");
        epoll.ctl(ControlOperation::Delete, self.tap.fd(), EpollEvent::default()).map_err(|_| Broken("epoll"))?;
        Err(Broken("the tap is gone"))
    }
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// Six pairs of hexadecimal digits with colons; a station's, not a group's.
    pub fn parse(text: &str) -> Result<Self> {
        let refused = || {
            Error::BadConfiguration(format!(
                "guest_mac {text:?} is not the MAC address of a station, such as 06:00:ac:10:00:02"
            ))
        };
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()))
                .ok_or_else(refused)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| refused())?;
        }
        if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(refused());
        }
        Ok(MacAddress(mac))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_stations_are_taken() {
        assert_eq!(MacAddress::parse("06:00:AC:10:00:02").unwrap().0, [6, 0, 0xac, 0x10, 0, 2]);
        for text in [
            "",
            "06:00:ac:10:00",
            "06:00:ac:10:00:02:03",
            "01:00:5e:00:00:01",
            "0600:ac:10:00:02",
            "00:00:00:00:00:00",
            "+6:00:ac:10:00:02",
        ] {
            assert!(MacAddress::parse(text).is_err(), "{text}");
        }
    }
}
