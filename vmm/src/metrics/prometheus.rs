//! Prometheus' text format 0.0.4: totals since the start, labelled with device, queue, vCPU.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::counters::{BUCKETS, Histogram};
use super::device::{DeviceMetrics, QueueMetrics};
use super::exits::ExitKind;
use super::{PROCESS, devices, vcpus};

/// A counter of a queue: name, help, value.
type QueueCounter = (&'static str, &'static str, fn(&QueueMetrics) -> u64);

const QUEUE_COUNTERS: [QueueCounter; 8] = [
    ("kicks", "Kicks of the driver that a worker woke up for.", |q| q.kicks.get()),
    ("requests", "Requests taken from the ring.", |q| q.requests.get()),
    ("read_bytes", "Bytes that the driver gave to be read.", |q| q.bytes_read.get()),
    ("written_bytes", "Bytes that the device wrote.", |q| q.bytes_written.get()),
    ("interrupts", "Interrupts raised.", |q| q.interrupts.get()),
    ("interrupts_suppressed", "Interrupts that the driver did not want.", |q| q.interrupts_suppressed.get()),
    ("descriptor_errors", "Broken rings and descriptor chains.", |q| q.descriptor_errors.get()),
    ("stalls", "Times that work waited for buffers or for the backend.", |q| q.stalls.get()),
];

/// A counter of a device: name, help, value.
type DeviceCounter = (&'static str, &'static str, fn(&DeviceMetrics) -> u64);

const DEVICE_COUNTERS: [DeviceCounter; 3] = [
    ("activations", "Activations by a driver.", |d| d.activations.get()),
    ("needs_reset", "Times that the device asked for a reset.", |d| d.needs_reset.get()),
    ("backend_errors", "Requests that the backend failed.", |d| d.backend_errors.get()),
];

/// Everything that is counted.
pub fn text() -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(&mut text);
    text
}

fn write_all(text: &mut String) -> std::fmt::Result {
    head(text, "mallee_vmm_api_requests_total", "counter", "Requests on the REST socket.")?;
    for (method, counter) in
        [("GET", &PROCESS.get_requests), ("PUT", &PROCESS.put_requests), ("PATCH", &PROCESS.patch_requests)]
    {
        writeln!(text, "mallee_vmm_api_requests_total{{method=\"{method}\"}} {}", counter.get())?;
    }
    for (name, kind, help, value) in process_values() {
        head(text, name, kind, help)?;
        writeln!(text, "{name} {value}")?;
    }
    head(text, "mallee_vmm_vcpu_exits_total", "counter", "Exits from the guest by reason.")?;
    for vcpu in vcpus() {
        for kind in ExitKind::ALL {
            let (index, name, count) = (vcpu.index, kind.name(), vcpu.exits(kind));
            let reason = name.trim_start_matches("exit_");
            writeln!(text, "mallee_vmm_vcpu_exits_total{{vcpu=\"{index}\",reason=\"{reason}\"}} {count}")?;
        }
    }
    write_devices(text, &devices())
}

fn process_values() -> [(&'static str, &'static str, &'static str, u64); 10] {
    let p = &PROCESS;
    [
        ("mallee_vmm_api_failed_requests_total", "counter", "Requests that were refused.", p.failed_requests.get()),
        ("mallee_vmm_missed_metrics_total", "counter", "Lines of metrics that were lost.", p.missed_metrics.get()),
        ("mallee_vmm_serial_written_bytes_total", "counter", "Console output.", p.serial_written.get()),
        ("mallee_vmm_serial_read_bytes_total", "counter", "Console input.", p.serial_read.get()),
        ("mallee_vmm_start_microseconds", "gauge", "From the program's start to the first KVM_RUN.", p.start_us.get()),
        ("mallee_vmm_pause_microseconds", "gauge", "Duration of the last pause.", p.pause_us.get()),
        ("mallee_vmm_resume_microseconds", "gauge", "Duration of the last resume.", p.resume_us.get()),
        ("mallee_vmm_snapshot_full_microseconds", "gauge", "The last full snapshot.", p.snapshot_full_us.get()),
        ("mallee_vmm_snapshot_diff_microseconds", "gauge", "The last diff snapshot.", p.snapshot_diff_us.get()),
        ("mallee_vmm_restore_microseconds", "gauge", "Duration of the restore.", p.restore_us.get()),
    ]
}

fn write_devices(text: &mut String, devices: &[std::sync::Arc<DeviceMetrics>]) -> std::fmt::Result {
    for (name, help, value) in DEVICE_COUNTERS {
        let name = format!("mallee_vmm_device_{name}_total");
        head(text, &name, "counter", help)?;
        for device in devices {
            writeln!(text, "{name}{{{}}} {}", labels(device), value(device))?;
        }
    }
    head(text, "mallee_vmm_device_latency_microseconds", "histogram", "Time that the backend took for a request.")?;
    for device in devices {
        write_histogram(text, "mallee_vmm_device_latency_microseconds", &labels(device), &device.latency)?;
    }
    write_own(text, devices)?;
    for (name, help, value) in QUEUE_COUNTERS {
        let name = format!("mallee_vmm_queue_{name}_total");
        head(text, &name, "counter", help)?;
        for device in devices {
            for (index, queue) in device.queues.iter().enumerate() {
                writeln!(text, "{name}{{{},queue=\"{index}\"}} {}", labels(device), value(queue))?;
            }
        }
    }
    head(text, "mallee_vmm_queue_batch_requests", "histogram", "Requests given back at once.")?;
    for device in devices {
        for (index, queue) in device.queues.iter().enumerate() {
            let labels = format!("{},queue=\"{index}\"", labels(device));
            write_histogram(text, "mallee_vmm_queue_batch_requests", &labels, &queue.batch)?;
        }
    }
    Ok(())
}

/// What only some devices count: `mallee_vmm_vsock_conns_added_total`.
fn write_own(text: &mut String, devices: &[std::sync::Arc<DeviceMetrics>]) -> std::fmt::Result {
    let mut families: BTreeMap<(&str, &str), Vec<(String, u64)>> = BTreeMap::new();
    for device in devices {
        for (own, count) in device.own() {
            families.entry((device.kind, own)).or_default().push((labels(device), count));
        }
    }
    for ((kind, own), samples) in families {
        let name = format!("mallee_vmm_{kind}_{}_total", own.trim_end_matches("_count"));
        head(text, &name, "counter", &format!("Of the {kind}: {own}."))?;
        for (labels, count) in samples {
            writeln!(text, "{name}{{{labels}}} {count}")?;
        }
    }
    Ok(())
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) -> std::fmt::Result {
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

/// Buckets are cumulative in this format.
fn write_histogram(text: &mut String, name: &str, labels: &str, histogram: &Histogram) -> std::fmt::Result {
    let counts = histogram.counts();
    let mut below = 0;
    for (bucket, count) in counts.iter().enumerate().take(BUCKETS - 1) {
        below += count;
        let bound = Histogram::bound(bucket).unwrap_or(u64::MAX);
        writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {below}")?;
    }
    let all = below + counts[BUCKETS - 1];
    writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {all}")?;
    writeln!(text, "{name}_sum{{{labels}}} {}\n{name}_count{{{labels}}} {all}", histogram.sum())
}

/// The id is the caller's text: quotes, backslashes and line ends are escaped.
fn labels(device: &DeviceMetrics) -> String {
    let id = device.id.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("device=\"{}\",id=\"{id}\"", device.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_are_cumulative_and_labels_escaped() {
        let metrics = super::super::device(virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK, "a\"b", 1);
        metrics.latency.record(3);
        metrics.latency.record(200);
        metrics.queue(0).requests.add(2);
        let text = text();
        let has = |line: &str| assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        has("mallee_vmm_queue_requests_total{device=\"block\",id=\"a\\\"b\",queue=\"0\"} 2");
        has("mallee_vmm_device_latency_microseconds_bucket{device=\"block\",id=\"a\\\"b\",le=\"1\"} 0");
        has("mallee_vmm_device_latency_microseconds_bucket{device=\"block\",id=\"a\\\"b\",le=\"3\"} 1");
        has("mallee_vmm_device_latency_microseconds_bucket{device=\"block\",id=\"a\\\"b\",le=\"+Inf\"} 2");
        has("mallee_vmm_device_latency_microseconds_sum{device=\"block\",id=\"a\\\"b\"} 203");
    }

    #[test]
    fn every_family_is_announced_once_before_its_samples() {
        super::super::vcpu(250);
        let text = text();
        let mut announced = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let name = rest.split(' ').next().unwrap();
                assert!(!announced.contains(&name), "{name} twice");
                announced.push(name);
            } else if !line.starts_with('#') {
                let name = line.split(['{', ' ']).next().unwrap();
                let family = announced.last().unwrap();
                assert!(name.starts_with(*family), "{line} under {family}");
            }
        }
    }
}
