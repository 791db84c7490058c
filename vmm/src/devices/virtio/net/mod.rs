//! virtio-net (virtio 1.2, 5.1) on a tap.
//!
//! A pair of queues for each thread, and a queue of the tap for each pair. Frames go between tap and guest memory with one `readv` or `writev`
//! each and no copy in between; the virtio-net header is the tap's own, so offloads pass through in both directions.
//!
//! * This file is the device as the transport sees it; `pair` is the thread of one pair of queues; `receive` and `transmit` are the two directions.
//! * `kernel` is the other way: the host's kernel moves the frames (vhost-net), by the same tap, features and control queue.
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
mod kernel;
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
use super::{Activation, ActiveQueue, QueuePosition, VirtioDevice};
use crate::api;
use crate::backends::tap::{Offloads, Tap};
use crate::backends::tap_counters::TapCounters;
use crate::backends::vhost::{self, Vhost};
use crate::bus::lock;
use crate::error::{Error, Result};
use crate::rate_limiter::RateLimiter;
use control::Control;
use kernel::Kernel;
pub use mac::MacAddress;
use pair::{Limits, PairWorker};
use taps::Taps;

const QUEUE_SIZE: u16 = 256;
/// Why an interface has none.
pub const NO_LIMITS: &str =
    "rate limiters are not possible with vhost_net, whose frames pass by this process; limit the tap instead (tc)";
/// Pairs of queues at most.
pub const MAX_PAIRS: u16 = 16;

/// What of the host's is behind an interface.
pub struct Link {
    /// A queue of the tap for each pair of the device's: 1 to [`MAX_PAIRS`].
    pub taps: Vec<Tap>,
    pub mover: MoverParts,
}

/// Who is to move frames, and with what.
pub enum MoverParts {
    /// A thread of ours for each pair. The limiters say how much the guest may receive and transmit by all pairs together.
    Threads { receive_limiter: Option<RateLimiter>, transmit_limiter: Option<RateLimiter> },
    /// The host's kernel, by one of these for each pair; it also counts what it moves.
    Kernel { vhosts: Vec<Vhost>, counters: TapCounters },
}

pub struct Net {
    name: String,
    features: u64,
    config: Vec<u8>,
    /// Receiving and transmitting in turns, then, if there are several pairs, the control queue (5.1.2).
    queue_sizes: Vec<u16>,
    taps: Arc<Taps>,
    pairs: usize,
    mover: Mover,
}

enum Mover {
    /// A worker for each pair.
    Threads(Vec<Shell<PairWorker>>),
    Kernel(Kernel),
}

impl Net {
    /// `name` is what the configuration calls the interface.
    pub fn new(link: Link, name: &str, mac: Option<MacAddress>) -> Result<Self> {
        let has_uso = link.taps.iter().all(Tap::has_uso);
        let count = link.taps.len();
        let several = count > 1;
        let mut features = features(has_uso, mac.is_some(), several);
        let mover = match link.mover {
            MoverParts::Threads { receive_limiter, transmit_limiter } => {
                let limits = Limits { receive: receive_limiter, transmit: transmit_limiter };
                let limits = limits.for_each_of(count).map_err(Error::host("rate limiter's timer"))?;
                Mover::Threads(limits.into_iter().map(Shell::new).collect())
            }
            MoverParts::Kernel { vhosts, counters } => {
                let known = vhosts.iter().fold(vhost::FEATURES, |known, vhost| known & vhost.features());
                features &= known | !vhost::FEATURES;
                Mover::Kernel(Kernel::new(vhosts, counters).map_err(Error::host("eventfd"))?)
            }
        };
        Ok(Net {
            name: name.to_owned(),
            features,
            config: configuration_space(mac, count as u16),
            queue_sizes: vec![QUEUE_SIZE; 2 * count + usize::from(several)],
            taps: Arc::new(Taps::new(link.taps).map_err(Error::host("the tap's queues"))?),
            pairs: count,
            mover,
        })
    }

    /// Changes the buckets of the two directions that are given. To be called while the device does not work.
    pub fn limit(&mut self, receive: &api::RateLimiter, transmit: &api::RateLimiter) -> Result<()> {
        let Mover::Threads(pairs) = &mut self.mover else {
            return Err(Error::BadConfiguration(format!("interface {:?}: {NO_LIMITS}", self.name)));
        };
        let failed = Error::host("rate limiter's timer");
        let mut parts = Vec::with_capacity(pairs.len());
        for pair in pairs {
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
        if has(VIRTIO_NET_F_MQ) && has(VIRTIO_NET_F_CTRL_VQ) { self.pairs } else { 1 }
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
        match self.pairs {
            1 => Value::Null,
            _ => json!({ "pairs": self.taps.in_use() }),
        }
    }

    fn adopt_settings(&mut self, settings: &Value) -> std::result::Result<(), String> {
        if self.pairs == 1 && settings.is_null() {
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
        let control = match activation.has(VIRTIO_NET_F_CTRL_VQ) {
            true => activation.queues.pop().map(|queue| Control::new(queue, is_multi_queue)),
            false => None,
        };
        let queues = (0..pairs).map(|_| activation.take_queues()).collect::<io::Result<Vec<_>>>()?;
        match &mut self.mover {
            Mover::Threads(workers) => start(workers, queues, control, &self.taps, &activation),
            Mover::Kernel(kernel) => kernel.activate(queues, control, &self.taps, &activation),
        }
    }

    fn deactivate(&mut self) -> Vec<QueuePosition> {
        match &mut self.mover {
            Mover::Threads(workers) => stop(workers),
            Mover::Kernel(kernel) => kernel.deactivate(),
        }
    }
}

/// Starts the pairs' workers; after an error there is none.
fn start(
    workers: &mut [Shell<PairWorker>],
    queues: Vec<[ActiveQueue; 2]>,
    mut control: Option<Control>,
    taps: &Arc<Taps>,
    activation: &Activation,
) -> io::Result<()> {
    for (index, (worker, queues)) in workers.iter_mut().zip(queues).enumerate() {
        let started =
            worker.start(|limits| PairWorker::new(queues, limits, control.take(), taps.clone(), index, activation));
        if let Err(error) = started {
            stop(workers);
            return Err(error);
        }
    }
    Ok(())
}

fn stop(workers: &mut [Shell<PairWorker>]) -> Vec<QueuePosition> {
    let mut positions: Vec<_> = workers.iter_mut().map(Shell::stop).collect();
    // The first pair's worker says after its own where the control queue stands, which comes last of all.
    let control = positions.first_mut().map(|first| first.split_off(first.len().min(2)));
    positions.extend(control);
    positions.concat()
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
