//! A virtio device's counters: its queues', and those that only its own kind has.

use std::fmt::Debug;
use std::sync::{Arc, OnceLock};

use virtio_bindings::virtio_ids::*;

use super::counters::{Counter, Histogram, Tally};

/// Counted by the worker that owns the queue.
#[derive(Debug, Default)]
pub struct QueueMetrics {
    /// Kicks of the driver that the worker woke up for (several in between count once).
    pub kicks: Tally,
    /// Requests taken from the ring.
    pub requests: Tally,
    /// Bytes of these that the driver gave the device to read.
    pub bytes_read: Tally,
    /// Bytes that the device says it wrote.
    pub bytes_written: Tally,
    pub interrupts: Tally,
    /// Interrupts that the driver did not want (event index or flag).
    pub interrupts_suppressed: Tally,
    /// Broken rings and chains. Each ends the device's work until a reset.
    pub descriptor_errors: Tally,
    /// Times that work had to wait for the other side: the backend had something and the ring no buffer, or the ring something and
    /// the backend no room (a full tap, a rate limit).
    pub stalls: Tally,
    /// Requests given back at once, between two looks at whether the driver wants an interrupt.
    pub batch: Histogram,
}

/// Who counts what a device does without this process (the host's kernel).
pub trait Elsewhere: Debug + Send + Sync {
    /// Totals by the names of a line of metrics. Asked for by the thread that writes a report, each time.
    fn counts(&self) -> Vec<(&'static str, u64)>;
}

/// See [`super::device`].
#[derive(Debug)]
pub struct DeviceMetrics {
    /// `net`, `block`, `entropy` …
    pub kind: &'static str,
    /// What the configuration calls the device; empty where it gives no name.
    pub id: String,
    pub queues: Vec<Arc<QueueMetrics>>,
    /// Activations by a driver.
    pub activations: Counter,
    /// Times that the device had to ask for a reset (DEVICE_NEEDS_RESET).
    pub needs_reset: Counter,
    /// Requests that the backend failed.
    pub backend_errors: Counter,
    /// What only devices of this kind count.
    own: Vec<(&'static str, Counter)>,
    elsewhere: OnceLock<Arc<dyn Elsewhere>>,
    /// How long the backend took for a request (µs), where the device measures it.
    pub latency: Histogram,
}

impl DeviceMetrics {
    pub(super) fn new(kind: u32, id: &str, queues: usize) -> Self {
        DeviceMetrics {
            kind: kind_name(kind),
            id: id.to_owned(),
            queues: (0..queues).map(|_| Arc::default()).collect(),
            activations: Counter::new(),
            needs_reset: Counter::new(),
            backend_errors: Counter::new(),
            own: own_names(kind).iter().map(|name| (*name, Counter::new())).collect(),
            elsewhere: OnceLock::new(),
            latency: Histogram::default(),
        }
    }

    /// For a device that nobody has attached yet: counts for nobody.
    pub fn nowhere() -> Self {
        DeviceMetrics::new(u32::MAX, "", 0)
    }

    /// Adds to one of the counters that only this kind of device has.
    pub fn count(&self, name: &str, count: u64) {
        if let Some((_, counter)) = self.own.iter().find(|(own, _)| *own == name) {
            counter.add(count);
        }
    }

    /// Says who else counts for this device; the first one stays.
    pub fn count_elsewhere(&self, counts: &Arc<dyn Elsewhere>) {
        self.elsewhere.get_or_init(|| counts.clone());
    }

    /// The counters that only this kind of device has, or this device.
    pub fn own(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let elsewhere = self.elsewhere.get().map_or(Vec::new(), |elsewhere| elsewhere.counts());
        elsewhere.into_iter().chain(self.own.iter().map(|(name, counter)| (*name, counter.get())))
    }

    /// The counters of one queue; those of a queue that is not there count for nobody.
    pub fn queue(&self, index: usize) -> Arc<QueueMetrics> {
        self.queues.get(index).cloned().unwrap_or_default()
    }
}

/// What a kind of device counts beside its queues: Firecracker's names where it counts the same.
fn own_names(id: u32) -> &'static [&'static str] {
    match id {
        VIRTIO_ID_VSOCK => &["conns_added", "conns_removed", "conns_killed"],
        VIRTIO_ID_BALLOON => &[
            "inflate_count",
            "inflate_bytes",
            "deflate_count",
            "stats_updates_count",
            "free_page_report_count",
            "free_page_report_freed",
        ],
        VIRTIO_ID_CONSOLE => &["discarded_bytes"],
        VIRTIO_ID_BLOCK => {
            &["read_count", "write_count", "flush_count", "identify_count", "discard_count", "write_zeroes_count"]
        }
        _ => &[],
    }
}

/// Firecracker's names of the objects in its metrics.
fn kind_name(id: u32) -> &'static str {
    match id {
        VIRTIO_ID_NET => "net",
        VIRTIO_ID_BLOCK => "block",
        VIRTIO_ID_CONSOLE => "console",
        VIRTIO_ID_RNG => "entropy",
        VIRTIO_ID_BALLOON => "balloon",
        VIRTIO_ID_VSOCK => "vsock",
        _ => "other",
    }
}
