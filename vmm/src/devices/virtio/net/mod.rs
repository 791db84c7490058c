//! virtio-net (virtio 1.2, 5.1) on a tap.
//!
//! A pair of queues for each thread, and a queue of the tap for each pair. Frames go between tap and guest memory with one `readv` or `writev`
//! each and no copy in between; the virtio-net header is the tap's own, so offloads pass through in both directions.
//!
//! * This file is the device as the transport sees it; `pair` is the thread of one pair of queues; `receive` and `transmit` are the two directions.
//! * `control` is the control queue, over which a driver says how many pairs it uses. It comes with several pairs, and is served by the first
//!   pair's thread: a command is rare, and nobody waits for it but the guest.
//! * `taps` is what the pairs share: the queues of the tap, and how many of them are in use.
//!
//! # Several pairs
//!
//! A driver that has not said anything uses one pair (5.1.5). Which pair a frame for the guest comes in by is the tap's choice: it keeps a flow where the guest
//! has sent it, which is the steering that 5.1.6.5.6 asks for. The threads of all pairs start with the device, since the
//! thread that hears of another number of pairs may start none; one without a pair sleeps.

mod control;
mod mac;
mod pair;
mod receive;
mod taps;
mod transmit;

use std::io;
use std::sync::Arc;

use serde_json::{Value, json};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;

use super::worker::Shell;
use super::{Activation, QueuePosition, VirtioDevice};
use crate::api;
use crate::backends::tap::{Offloads, Tap};
use crate::bus::lock;
use crate::error::{Error, Result};
use crate::rate_limiter::RateLimiter;
use control::Control;
pub use mac::MacAddress;
use pair::{Limits, PairWorker};
use taps::Taps;

const QUEUE_SIZE: u16 = 256;
/// Pairs of queues at most.
pub const MAX_PAIRS: u16 = 16;

/// What of the host's is behind an interface.
pub struct Link {
    /// A queue of the tap for each pair of the device's: 1 to [`MAX_PAIRS`].
    pub taps: Vec<Tap>,
    /// How much the guest may receive, and how much it may transmit, by all queues together.
    pub receive_limiter: Option<RateLimiter>,
    pub transmit_limiter: Option<RateLimiter>,
}

pub struct Net {
    name: String,
    features: u64,
    config: Vec<u8>,
    /// Receiving and transmitting in turns, then, if there are several pairs, the control queue (5.1.2).
    queue_sizes: Vec<u16>,
    taps: Arc<Taps>,
    pairs: Vec<Shell<PairWorker>>,
}

impl Net {
    /// `name` is what the configuration calls the interface.
    pub fn new(link: Link, name: &str, mac: Option<MacAddress>) -> Result<Self> {
        let has_uso = link.taps.iter().all(Tap::has_uso);
        let count = link.taps.len();
        let limits = Limits { receive: link.receive_limiter, transmit: link.transmit_limiter };
        let limits = limits.for_each_of(count).map_err(Error::host("rate limiter's timer"))?;
        let several = count > 1;
        Ok(Net {
            name: name.to_owned(),
            features: features(has_uso, mac.is_some(), several),
            config: configuration_space(mac, count as u16),
            queue_sizes: vec![QUEUE_SIZE; 2 * count + usize::from(several)],
            taps: Arc::new(Taps::new(link.taps).map_err(Error::host("the tap's queues"))?),
            pairs: limits.into_iter().map(Shell::new).collect(),
        })
    }

    /// Changes the buckets of the two directions that are given. To be called while the device does not work.
    pub fn limit(&mut self, receive: &api::RateLimiter, transmit: &api::RateLimiter) -> Result<()> {
        let failed = Error::host("rate limiter's timer");
        let mut parts = Vec::with_capacity(self.pairs.len());
        for pair in &mut self.pairs {
            parts.push(pair.parts().ok_or(Error::host("interface")(io::ErrorKind::ResourceBusy.into()))?);
        }
        let Some((first, others)) = parts.split_first_mut() else { return Ok(()) };
        first.change(receive, transmit).map_err(&failed)?;
        others.iter_mut().try_for_each(|other| first.share().map(|limits| **other = limits)).map_err(&failed)
    }

    /// How many pairs a driver with these features sets up.
    fn pairs_set_up(&self, features: u64) -> usize {
        let has = |bit: u32| features & 1 << bit != 0;
        // Several pairs need the control queue (5.1.3.1); a driver that takes the one feature without the other gets one pair.
        if has(VIRTIO_NET_F_MQ) && has(VIRTIO_NET_F_CTRL_VQ) { self.pairs.len() } else { 1 }
    }
}

fn features(has_uso: bool, has_mac: bool, has_several_pairs: bool) -> u64 {
    let always = [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
        VIRTIO_NET_F_MRG_RXBUF,
    ];
    [
        (true, always.as_slice()),
        (has_uso, &[VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6]),
        (has_mac, &[VIRTIO_NET_F_MAC]),
        (has_several_pairs, &[VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ]),
    ]
    .into_iter()
    .filter_map(|(is_offered, bits)| is_offered.then_some(bits))
    .flatten()
    .fold(0, |features, bit| features | 1 << bit)
}

/// `struct virtio_net_config` (5.1.4) as far as there is something in it: `mac`, `status`, `max_virtqueue_pairs`.
fn configuration_space(mac: Option<MacAddress>, pairs: u16) -> Vec<u8> {
    let mut space = mac.map_or(Vec::new(), |mac| mac.0.to_vec());
    if pairs > 1 {
        space.resize(8, 0);
        space.extend(pairs.to_le_bytes());
    }
    space
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
        &self.queue_sizes
    }

    fn queues_in_use(&self, features: u64) -> usize {
        let control = features & self.features & 1 << VIRTIO_NET_F_CTRL_VQ != 0;
        2 * self.pairs_set_up(features) + usize::from(control)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn settings(&self) -> Value {
        match self.pairs.len() {
            1 => Value::Null,
            _ => json!({ "pairs": self.taps.in_use() }),
        }
    }

    fn adopt_settings(&mut self, settings: &Value) -> std::result::Result<(), String> {
        if self.pairs.len() == 1 && settings.is_null() {
            return Ok(());
        }
        let pairs = settings["pairs"].as_u64().and_then(|pairs| u16::try_from(pairs).ok());
        match pairs {
            Some(pairs) if self.taps.has(pairs) => self.taps.use_first(pairs).map_err(|error| error.to_string()),
            _ => Err(format!("{settings} says no number of pairs that interface {:?} could use", self.name)),
        }
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let pairs = self.pairs_set_up(activation.features);
        let is_multi_queue = pairs > 1;
        if !activation.is_resumed || !is_multi_queue {
            self.taps.use_first(1)?;
        }
        lock(self.taps.queue(0)).set_offloads(offloads(&activation))?;
        let mut control = match activation.has(VIRTIO_NET_F_CTRL_VQ) {
            true => activation.queues.pop().map(|queue| Control::new(queue, is_multi_queue)),
            false => None,
        };
        for index in 0..pairs {
            let queues = activation.take_queues()?;
            let started = self.pairs[index]
                .start(|limits| PairWorker::new(queues, limits, control.take(), self.taps.clone(), index, &activation));
            if let Err(error) = started {
                self.deactivate();
                return Err(error);
            }
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<QueuePosition> {
        // The first pair's worker says after its own where the control queue stands, which comes last of all.
        let mut positions = self.pairs[0].stop();
        let control = positions.split_off(positions.len().min(2));
        positions.extend(self.pairs[1..].iter_mut().flat_map(Shell::stop));
        positions.extend(control);
        positions
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

#[cfg(test)]
mod tests;
