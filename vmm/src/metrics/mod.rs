//! What is counted, and how it is told.
//!
//! Two shapes are served from the same counters: Firecracker's JSON line (`json`; what happened since the
//! line before) and Prometheus text (`prometheus`; totals since the start). `sink` writes the former to the
//! file or fifo of `PUT /metrics`.
//!
//! Counters lie where the work is done and are read by whoever reports: an increment never waits, never
//! allocates and never shares a cache line with another thread's by design ([`Tally`] is one plain add for the one thread that owns
//! it; [`Counter`] is for the few that several write). What may not happen here: a lock on a path that a guest can reach.
//! The registry below is locked when a device or vCPU is made and when a report is written, never in between.
//!
//! The registry is the process's, as the VM is: a parameter through every constructor would say no more.

mod counters;
mod device;
mod exits;
mod json;
mod prometheus;
mod sink;

use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Instant;

use crate::bus::lock;

pub use counters::Counter;
pub use device::{DeviceMetrics, Elsewhere, QueueMetrics};
pub use exits::{ExitKind, VcpuMetrics};
pub use prometheus::text as prometheus_text;
pub use sink::Sink;

/// Those of a VM that could not be made in the end go with it.
static DEVICES: Mutex<Vec<Weak<DeviceMetrics>>> = Mutex::new(Vec::new());
static VCPUS: Mutex<Vec<Arc<VcpuMetrics>>> = Mutex::new(Vec::new());

/// What belongs to no device and no vCPU.
pub static PROCESS: ProcessMetrics = ProcessMetrics::new();

/// See [`PROCESS`].
pub struct ProcessMetrics {
    /// Requests on the REST socket by method, answered with 2xx or not.
    pub get_requests: Counter,
    pub put_requests: Counter,
    pub patch_requests: Counter,
    /// Those answered with 4xx or 5xx.
    pub failed_requests: Counter,
    /// Lines of metrics that could not be written (a full fifo, a full disk).
    pub missed_metrics: Counter,
    /// Lines of the log that could not be written.
    pub missed_logs: Counter,
    /// Bytes that the guest wrote to the serial port, and read from it.
    pub serial_written: Counter,
    pub serial_read: Counter,
    /// From the program's first own instruction to the first KVM_RUN (µs); 0 before it.
    pub start_us: Counter,
    /// Duration (µs) of the last pause, snapshot and restore.
    pub pause_us: Counter,
    pub resume_us: Counter,
    pub snapshot_full_us: Counter,
    pub snapshot_diff_us: Counter,
    pub restore_us: Counter,
}

impl ProcessMetrics {
    const fn new() -> Self {
        ProcessMetrics {
            get_requests: Counter::new(),
            put_requests: Counter::new(),
            patch_requests: Counter::new(),
            failed_requests: Counter::new(),
            missed_metrics: Counter::new(),
            missed_logs: Counter::new(),
            serial_written: Counter::new(),
            serial_read: Counter::new(),
            start_us: Counter::new(),
            pause_us: Counter::new(),
            resume_us: Counter::new(),
            snapshot_full_us: Counter::new(),
            snapshot_diff_us: Counter::new(),
            restore_us: Counter::new(),
        }
    }
}

static STARTED: OnceLock<Instant> = OnceLock::new();

/// The process begins; [`first_run`] counts from here.
pub fn process_started() {
    STARTED.get_or_init(Instant::now);
}

/// The first vCPU enters the guest.
pub fn first_run() {
    if let Some(started) = STARTED.get() {
        PROCESS.start_us.set(u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX));
    }
}

/// Counters for a device with `queues` queues: `kind` is its virtio device id, `id` what the configuration calls
/// it (empty for the only one of its kind).
pub fn device(kind: u32, id: &str, queues: usize) -> Arc<DeviceMetrics> {
    let metrics = Arc::new(DeviceMetrics::new(kind, id, queues));
    lock(&DEVICES).push(Arc::downgrade(&metrics));
    metrics
}

/// Counters for the vCPU `index`.
pub fn vcpu(index: u8) -> Arc<VcpuMetrics> {
    let metrics = Arc::new(VcpuMetrics::new(index));
    lock(&VCPUS).push(metrics.clone());
    metrics
}

fn devices() -> Vec<Arc<DeviceMetrics>> {
    lock(&DEVICES).iter().filter_map(Weak::upgrade).collect()
}

fn vcpus() -> Vec<Arc<VcpuMetrics>> {
    lock(&VCPUS).clone()
}
